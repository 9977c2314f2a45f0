"""Lines that end with a carriage return, alone or before a newline."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import pytest

from shards.text import reading
from tests.helpers.corpora import contents, put
from tests.shards.pictures import picture
from tests.shards.test_images_family import convert as convert_images
from tests.shards.text_sets import found_in, open_text

TEXT = b"one\n\ntwo and\nthree\n\nfour\n"
ROWS = {
    "a.csv": b'text,label\none,x\n"two, ""2""",y\n',
    "a.tsv": b"text\tlabel\none\tx\ntwo\ty\n",
    "a.jsonl": b'{"text": "one", "label": 1}\n{"text": "two", "label": 2}\n',
    "a.json": b'[{"text": "one", "label": 1},\n{"text": "two",\n"label": 2}]\n',
}


@pytest.mark.parametrize("document", ["line", "blank-line", "file"])
@pytest.mark.parametrize("end", [b"\r", b"\r\n"])
@pytest.mark.parametrize("name", ["a.txt", "a.md.gz", "a.txt.xz"])
def test_text_is_the_same_whatever_ends_its_lines(
    name: str, end: bytes, document: str, tmp_path: Path
) -> None:
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(name[-3:], bytes)
    plain = put(tmp_path / "plain" / name, pack(TEXT))
    other = put(tmp_path / "other" / name, pack(TEXT.replace(b"\n", end)))
    texts, findings = found_in(other, document)
    assert (texts, findings) == (found_in(plain, document)[0], [])
    assert len(texts) == {"line": 4, "blank-line": 3, "file": 1}[document]


@pytest.mark.parametrize("end", [b"\r", b"\r\n"])
@pytest.mark.parametrize("name", list(ROWS))
def test_rows_are_the_same_whatever_ends_their_lines(name: str, end: bytes, tmp_path: Path) -> None:
    plain = put(tmp_path / "plain" / name, ROWS[name])
    other = put(tmp_path / "other" / name, ROWS[name].replace(b"\n", end))
    texts, findings = found_in(other, label_key="label")
    assert (texts, findings) == (found_in(plain, label_key="label")[0], [])
    assert len(texts) == 2


def test_a_large_file_is_the_same_whatever_ends_its_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PART", 50)
    data = b"".join(b"line %d\n" % i for i in range(900))
    for end, parts in ((b"\r", range(1, 2)), (b"\r\n", range(100, 200))):
        file = put(tmp_path / "a.txt", data.replace(b"\n", end))
        assert len(list(open_text(file).samples([]))) in parts
        assert found_in(file) == ([f"line {i}" for i in range(900)], [])


def test_a_return_within_a_line_stays(tmp_path: Path) -> None:
    assert found_in(put(tmp_path / "a.txt", b"10 %\r20 %\nend\r\n")) == (["10 %\r20 %", "end"], [])


@pytest.mark.parametrize("end", ["\r", "\r\n"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_manifests_of_images(name: str, end: str, tmp_path: Path) -> None:
    for image in "01":
        put(tmp_path / f"{image}.png", picture())
    rows = {
        ".csv": "path,label\n0.png,cat\n1.png,dog\n",
        ".tsv": "path\tlabel\n0.png\tcat\n1.png\tdog\n",
        ".jsonl": '{"path": "0.png", "label": "cat"}\n{"path": "1.png", "label": "dog"}\n',
    }
    manifest = put(tmp_path / name, rows[f".{name.split('.')[1]}"].replace("\n", end))
    assert convert_images(manifest, tmp_path / "out", "-j1") == 0
    read = contents(tmp_path / "out")
    assert {key: sample["json"]["label"] for key, sample in read.items()} == {
        "0": "cat",
        "1": "dog",
    }
