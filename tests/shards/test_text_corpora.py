"""Random corpora of text files as people have them: every file is used, left out or passed over, by
name, and every document of a good file is in the set."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.cli import main
from tests.helpers.corpora import put
from tests.shards.layout_corpora import put_parquet
from tests.shards.text_sets import about, convert, documents

PACK = {"": bytes, ".gz": gzip.compress, ".XZ": lzma.compress, ".bz2": bz2.compress}
KINDS = ["txt", "md", "jsonl", "json", "parquet"]
ODD = {
    "utf-16.txt": "text\n".encode("utf-16"),
    "utf-32.jsonl": '{"text": "a"}\n'.encode("utf-32-be"),
    "binary.txt": b"\x89PNG\0\0\0\xff\xfe\n" * 9,
    "empty.txt": b"",
    "blank.md": b"\n \n",
    "empty.json": b"[]",
    "no.txt.gz": b"no gzip",
    "none.txt.xz": b"",
    "wrong.parquet": b"PAR1",
    "wrong.json": b"{",
    "README": b"text",
    "picture.png": b"\x89PNG",
    "table.csv": b"a,b\n",
    ".hidden.txt": b"text\n",
}


def write(folder: Path, number: int, kind: str, pack: str, texts: list[str]) -> str:
    name = f"{number}.{kind}" + (pack if kind != "parquet" else "")
    rows = [{"text": text} for text in texts]
    if kind == "parquet":
        put_parquet(folder / name, {"text": texts})
        return name
    data = {
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "json": json.dumps(rows, indent=1),
    }.get(kind, "".join(text + "\n" for text in texts))
    put(folder / name, PACK[pack](data.encode()))
    return name


WORDS = st.lists(
    st.sampled_from(["one", "two three", "東京 é", "a\u2028b", '"quoted"']), min_size=1, max_size=6
)

FILES = st.tuples(st.sampled_from(KINDS), st.sampled_from(sorted(PACK)), WORDS)


@settings(max_examples=30, deadline=None)
@given(
    good=st.lists(
        st.tuples(st.sampled_from(KINDS), st.sampled_from(sorted(PACK)), WORDS),
        min_size=1,
        max_size=6,
    ),
    odd=st.sets(st.sampled_from(sorted(ODD))),
)
def test_every_file_is_accounted_for(
    good: list[tuple[str, str, list[str]]],
    odd: set[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    expected: Counter[str] = Counter()
    used = set()
    for number, (kind, pack, texts) in enumerate(good):
        used.add(write(folder / "in", number, kind, pack, texts))
        expected.update(texts)
    for name in odd:
        put(folder / "in/deep" / name, ODD[name])
    assert convert(folder / "in", folder / "out", "--max-bad", "100%") == 0
    assert Counter(documents(folder / "out")) == expected
    named = []
    for file in ("quarantine.jsonl", "notes.jsonl"):
        lines = (folder / "out" / file).read_text().split("\n")[:-1]
        named += [json.loads(line)["path"].removeprefix("deep/") for line in lines]
    # A file with an odd line only is named with the place of the line.
    assert sorted(name.split(",")[0] for name in named) == sorted(odd)
    index = about(folder / "out")
    assert index["inputs"] == expected.total() + index["quarantined"]
    assert main(["verify", str(folder / "out"), "-j", "1"]) == 0
