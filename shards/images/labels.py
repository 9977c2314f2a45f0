"""Labels of images: one rule for every layout that reads them from a column.

    value of the label column -> the class as text, or the reason why there is none

Text and numbers are classes. An image without a usable label stays in the set, without one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

NONE = re.compile(r"|nan|NaN|None|null|NULL|-1(\.0+)?")
"""Text for a missing label; -1 is that of the datasets library."""

NO_LABEL, NO_METADATA = "no label", "no metadata"
"""Columns with the reason why there is none, from the layout to the converter; a set does not have
them."""

SHOWN = 60  # characters of a value in a reason


def label_of(value: Any, names: tuple[str, ...] | None = None) -> tuple[str, str]:
    """(class, ""), or ("", why there is none). 1 and 1.0 are the class 1, true is the class true;
    spaces around a label do not count. names: of the classes, if a number is the number of one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "", "has no label"
    if not isinstance(value, str | int | float):
        return "", f"its label is neither text nor a number ({_shown(value)})"
    text = str(value).lower() if isinstance(value, bool) else str(value).strip()
    if NONE.fullmatch(text) and text not in (names or ()):
        return "", f"has no label ({text or 'it is empty'})"
    if names is None or (isinstance(value, str) and text in names):
        return text, ""
    if isinstance(value, int) and 0 <= value < len(names):
        return names[value], ""
    return "", f"its label {_shown(value)} is none of the {len(names)} classes"


def labelled(
    columns: Mapping[str, Any], key: str = "label", names: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """The columns of a sample with its class as the column `label`, or with the reason why there is
    none as the column NO_LABEL. key: the column of the label. names: as for `label_of`."""
    result = {name: value for name, value in columns.items() if name not in (key, "label")}
    label, reason = label_of(columns.get(key), names)
    if reason:
        return result | {NO_LABEL: reason}
    return result | {"label": label}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
