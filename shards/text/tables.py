"""Tables of text: rows of values under the names of columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from d2v_ds.data.checks import Unusable
from d2v_ds.errors import suggestion
from shards.encoding import check_unicode
from shards.tables import about_separator
from shards.text.layout import TextOptions, from_row

# What pandas, and so the datasets library, reads as a missing value.
MISSING = frozenset(
    [
        *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "1.#IND", "1.#QNAN", "<NA>", "NA"),
        *("N/A", "n/a", "NULL", "null", "None", "NaN", "-NaN", "nan", "-nan"),
    ]
)


def check_names(names: Sequence[str], options: TextOptions) -> None:
    """Raises Unusable if a column is missing, or the name of one is not unique or not UTF-8."""
    check_unicode("".join(names))
    for key in options.keys:
        if key not in names:
            hint = suggestion(key, names) + about_separator(names)
            raise Unusable("row", f"has no column {key!r}{hint}")
    twice = [name for name, number in Counter(names).items() if number > 1 and name in options.keys]
    if twice:
        raise Unusable("row", f"has several columns {twice[0]!r}; rename them")


def document(
    names: Sequence[str], values: Sequence[str], options: TextOptions
) -> tuple[str, dict[str, Any]]:
    """(text, columns) of a row. Raises Unusable."""
    if len(values) != len(names):
        raise Unusable("row", f"has {len(values)} columns, expected {len(names)}")
    row = dict(zip(names, values, strict=True))
    label = row.get(options.label_key)
    if label in MISSING:
        key = options.label_key
        raise Unusable("label", f"{key!r} is {label!r}, which stands for a missing label")
    return from_row(row, options)
