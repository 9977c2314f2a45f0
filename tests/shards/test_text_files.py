"""Files of text as people have them: encodings, compression, damage, links, long lines."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_ds.data.checks import Unusable
from shards.cli import main
from shards.encoding import check_head, check_text
from shards.findings import of_error
from shards.text import reading
from shards.text.compressed import Decompressed, open_compressed
from tests.helpers.corpora import found, put
from tests.shards.layout_corpora import put_parquet
from tests.shards.text_sets import about, convert, documents, found_in, open_text, read

ENGLISH = "".join(f"Note {i}: the water near the evening road\n" for i in range(50))
GERMAN = "Über die Straße läuft ein müder Bär.\n" * 30
CHINESE = "一个人走在路上。他说：你好，世界。\n" * 30
GREEK = "Ένας άνθρωπος περπατά, στον δρόμο.\n" * 30
WIDE = ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]


# ---------------------------------------------------------------------------------------- encodings


@pytest.mark.parametrize("text", [ENGLISH, GERMAN, CHINESE, GREEK, "a"])
@pytest.mark.parametrize("codec", WIDE)
@pytest.mark.parametrize("mark", ["\ufeff", ""])
def test_utf_16_and_32_are_recognised(text: str, codec: str, mark: str) -> None:
    name = codec.upper().removesuffix("-LE").removesuffix("-BE")
    with pytest.raises(
        Unusable, match=rf"is {name}(LE|BE)?; convert it: iconv -f {name}"
    ) as caught:
        check_head((mark + text).encode(codec)[:4096])
    assert caught.value.kind == "encoding"


@pytest.mark.parametrize("text", [ENGLISH, GERMAN, CHINESE, GREEK, "", "\x01 \x7f", "\n\n"])
@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig"])
def test_utf_8_is_not_refused(text: str, codec: str) -> None:
    whole = text.encode(codec)
    for size in range(max(0, len(whole) - 8), len(whole) + 1):  # also within a character
        check_head(whole[:size])


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200), st.text(max_size=200))
def test_no_utf_8_is_taken_for_another_encoding(first: str, second: str) -> None:
    check_head((first + second).replace("\0", "").encode())


def files_in(encoded: bytes, folder: Path) -> list[Path]:
    names = ("a.txt", "a.jsonl", "a.json", "a.tsv", "a.csv", "a.txt.gz", "a.txt.xz")
    pack = {".gz": gzip.compress, ".xz": lzma.compress}
    return [put(folder / n, pack.get(n[-3:], bytes)(encoded)) for n in names]


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-be", "utf-32"])
def test_a_file_in_another_encoding_is_one_finding(codec: str, tmp_path: Path) -> None:
    rows = '{"text": "a\\tb"}\n' * 40
    for file in files_in(rows.encode(codec), tmp_path):
        for document in ("line", "blank-line", "file"):
            assert found_in(file, document) == ([], [(file.name, "encoding")])


def test_a_large_file_in_another_encoding_is_one_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PART", 100)
    file = put(tmp_path / "a.txt", ENGLISH.encode("utf-16"))
    assert found_in(file) == ([], [("a.txt", "encoding")])


def test_a_set_of_utf_16_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "in/a.txt", ENGLISH.encode("utf-16"))
    assert convert(tmp_path / "in", tmp_path / "out") == 2
    reason = "is UTF-16; convert it: iconv -f UTF-16 -t UTF-8 (a.txt)"
    assert reason in capsys.readouterr().err
    assert main(["tokenizer", str(tmp_path / "in"), str(tmp_path / "new.model")]) == 2
    assert reason in capsys.readouterr().err and not (tmp_path / "new.model").exists()


def test_latin_1_is_one_reason_that_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "a.txt", GERMAN.encode("latin-1"))
    assert convert(tmp_path / "a.txt", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert "30 x is not UTF-8" in message and "iconv -f LATIN1 -t UTF-8" in message


FRENCH = "« L’été » — déjà vu : cœur à l’œuvre…\n"
RUSSIAN = "Человек идёт по дороге вечером.\n"


@pytest.mark.parametrize(
    ("text", "codec", "advice"),
    [
        (GERMAN, "latin-1", "LATIN1"),
        (FRENCH, "cp1252", "WINDOWS-1252"),
        (RUSSIAN, "cp1251", "GB18030"),
        (RUSSIAN, "koi8-r", "GB18030"),
        (CHINESE, "gbk", "GB18030"),
        ("日本語の文です。\n" * 9, "shift-jis", "GB18030"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv", "a.json", "a.jsonl"])
def test_the_advice_for_other_encodings(
    name: str, text: str, codec: str, advice: str, tmp_path: Path
) -> None:
    text = text.split("\n")[0]
    form = {"a.txt": "{}", "a.csv": "text\n{}", "a.tsv": "text\n{}"}
    row = form.get(name, '[{{"text": "{}"}}]' if name == "a.json" else '{{"text": "{}"}}')
    data = put(tmp_path / name, row.format(text).encode(codec)).read_bytes()
    texts, findings = read(open_text(tmp_path / name))
    for content in texts:
        with pytest.raises(Unusable) as caught:
            check_text(content)
        findings.append(of_error(name, caught.value))
    assert findings and {one.kind for one in findings} == {"encoding"}
    command = findings[0].reason.partition("iconv ")[2]
    assert command == f"-f {advice} -t UTF-8"
    done = subprocess.run(["iconv", *command.split()], input=data, capture_output=True)
    assert done.returncode == 0 or advice == "GB18030"
    if advice != "GB18030":
        assert done.stdout == row.format(text).encode()


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_header_in_another_encoding(name: str, tmp_path: Path) -> None:
    row = "text,läbel\nold,x\n".replace(",", "," if name == "a.csv" else "\t")
    texts, [found] = read(open_text(put(tmp_path / name, row.encode("latin-1")), label_key="label"))
    assert not texts and found.kind == "encoding" and "iconv -f LATIN1" in found.reason


def test_utf_8_with_damaged_bytes(tmp_path: Path) -> None:
    data = put(tmp_path / "a.txt", GREEK[:30].encode() + b"\xff\xfe.\n").read_bytes()
    _, [found] = read(open_text(tmp_path / "a.txt"))
    command = found.reason.partition("iconv ")[2]
    done = subprocess.run(["iconv", *command.split()], input=data, capture_output=True)
    assert done.stdout == GREEK[:30].encode() + b".\n"


def test_a_binary_file_with_a_name_of_text(tmp_path: Path) -> None:
    picture = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0 \0\0\0 \x08\x02\0\0\0\xfc\x18\xed\xa3\n\n\n"
    put(tmp_path / "a.txt", picture)
    assert found_in(tmp_path) == ([], [("a.txt", "format")])


def test_documents_with_nul_are_left_out(tmp_path: Path) -> None:
    put(tmp_path / "in/a.txt", "good one\nbad \0 one\n" + "fine\n" * 8)
    put(tmp_path / "in/b.jsonl", '{"text": "a\\u0000b"}\n{"text": "kept"}\n')
    put_parquet(tmp_path / "in/c.parquet", {"text": ["n\0l", "also kept"]})
    assert convert(tmp_path / "in", tmp_path / "out", "--max-bad", "50%") == 0
    assert set(documents(tmp_path / "out")) == {"good one", "fine", "kept", "also kept"}
    index = about(tmp_path / "out")
    assert index["left_out"] == {"encoding": 3} and index["inputs"] == 14


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"])
def test_only_a_newline_ends_a_line(end: str, tmp_path: Path) -> None:
    text = f"one{end}two"
    put(tmp_path / "a.txt", f"{text}\nthree\n")
    put(tmp_path / "b.tsv", f"text\tlabel\n{text}\tx\n")
    assert found_in(tmp_path / "a.txt") == ([text, "three"], [])
    assert found_in(tmp_path / "b.tsv", label_key="label") == ([text], [])


# ------------------------------------------------------------------------------- kinds of files


@cache
def compressed(data: bytes) -> dict[str, bytes]:
    """The same data by extension."""
    zstandard = pytest.importorskip("zstandard")
    half = len(data) // 2
    return {
        "": data,
        ".gz": gzip.compress(data),
        ".GZ": gzip.compress(data[:half]) + gzip.compress(data[half:]) + b"\0" * 512,
        ".bz2": bz2.compress(data),
        ".BZ2": bz2.compress(data[:half]) + bz2.compress(data[half:]),
        ".xz": lzma.compress(data),
        ".Xz": lzma.compress(data[:half]) + lzma.compress(data[half:]),
        ".lzma": lzma.compress(data, format=lzma.FORMAT_ALONE),
        ".zst": zstandard.compress(data),
        ".ZST": zstandard.compress(data[:half]) + zstandard.compress(data[half:]),
    }


@pytest.mark.parametrize("name", ["a.txt", "a.text", "a.md", "a.rst", "A.TXT", "a.Md"])
def test_every_extension_and_compression(name: str, tmp_path: Path) -> None:
    files = compressed(ENGLISH.encode())
    for extension, data in files.items():
        file = put(tmp_path / f"{len(extension)}{extension}" / f"{name}{extension}", data)
        assert found_in(file) == (ENGLISH.splitlines(), []), file
    texts, findings = found_in(tmp_path)
    assert texts == len(files) * ENGLISH.splitlines() and not findings


@settings(max_examples=30, deadline=None)
@given(data=st.binary(max_size=3000), sizes=st.lists(st.integers(1, 500), max_size=9))
def test_decompression_equals_the_input(
    data: bytes, sizes: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("compressed")
    for extension, packed in compressed(data).items():
        if not extension:
            continue
        raw = open_compressed(put(folder / f"a{extension}", packed))
        with io.BufferedReader(raw, 64) as file:
            found = b"".join(file.read(size) for size in sizes) + file.read()
        assert (found, raw.damage) == (data, "")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a line\n" * 400, "its content is not compressed; rename it without this extension"),
        ("Ü".encode(), "its content is not compressed; rename it without this extension"),
        (gzip.compress(b"a line\n", mtime=0), "its content is compressed as .gz; rename it"),
        (bz2.compress(b"a line\n"), "its content is compressed as .bz2; rename it"),
    ],
    ids=["text", "short", "gz", "bz2"],
)
@pytest.mark.parametrize("extension", [".gz", ".bz2", ".xz", ".zst", ".lzma"])
def test_files_that_are_not_compressed_as_their_name_says(
    extension: str, content: bytes, reason: str, tmp_path: Path
) -> None:
    if f"as {extension};" in reason:
        return
    put(tmp_path / f"a.txt{extension}", content)
    assert read(open_text(tmp_path / f"a.txt{extension}")) == (
        [],
        [(f"a.txt{extension}", f"is named {extension}, but {reason}", "format")],
    )


@pytest.mark.parametrize("extension", [".gz", ".bz2", ".xz", ".zst", ".lzma"])
def test_a_truncated_file_keeps_its_whole_lines(extension: str, tmp_path: Path) -> None:
    letters = np.random.default_rng(0).choice(list(b"abcdefgh "), (20_000, 100)).astype(np.uint8)
    letters[:, -1] = ord("\n")
    lines = letters.tobytes().decode().split("\n")[:-1]
    data = compressed(letters.tobytes())[extension]
    file = put(tmp_path / f"a.txt{extension}", data[: len(data) * 3 // 4])
    texts, findings = found_in(file)
    assert findings == [(file.name, "damaged")]
    assert 8_000 < len(texts) < 16_000  # a block of bz2 has 9,000 lines
    assert texts == lines[: len(texts)]


@pytest.mark.parametrize("document", ["line", "blank-line", "file"])
def test_a_flipped_byte_loses_what_follows_it(document: str, tmp_path: Path) -> None:
    data = bytearray(gzip.compress(ENGLISH.encode()))
    data[-6] ^= 255  # of the checksum: all lines are before it
    file = put(tmp_path / "a.txt.gz", bytes(data))
    texts, findings = found_in(file, document)
    assert "\n".join(texts).split() == ENGLISH.split() and findings == [("a.txt.gz", "damaged")]


@settings(max_examples=80, deadline=None)
@given(
    place=st.floats(0, 0.999),
    flip=st.integers(1, 255),
    cut=st.booleans(),
    extension=st.sampled_from([".gz", ".bz2", ".xz", ".zst", ".lzma"]),
)
def test_damage_is_always_named(
    place: float, flip: int, cut: bool, extension: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Or the text is as it was. Files without a checksum, .lzma and .zst, can give other text."""
    data = bytearray(compressed(ENGLISH.encode())[extension])
    at = int(place * len(data))
    data[at] ^= flip
    file = put(
        tmp_path_factory.mktemp("damaged") / f"a.txt{extension}", bytes(data[:at] if cut else data)
    )
    texts, findings = found_in(file)
    assert findings or texts == ENGLISH.splitlines() or extension in (".lzma", ".zst")
    if cut:
        assert findings and texts == ENGLISH.splitlines()[: len(texts)]


def test_other_files_are_named(tmp_path: Path) -> None:
    put(tmp_path / "a.txt", "text\n")
    put(tmp_path / "LICENSE", "text\n")
    put(tmp_path / "table.csv", "text\n")
    put(tmp_path / "table.tsv", "text\n")
    put(tmp_path / "empty.txt", "")
    put(tmp_path / "empty.txt.gz", "")
    put(tmp_path / ".cache/a.txt", "text\n")
    texts, findings = found_in(tmp_path)
    assert texts == ["text"] and sorted(findings) == [
        (".cache", "hidden"),
        ("LICENSE", "type"),
        ("empty.txt", "empty"),
        ("empty.txt.gz", "empty"),
        ("table.csv", "type"),
        ("table.tsv", "type"),
    ]


def test_links_are_followed_and_no_document_is_read_twice(tmp_path: Path) -> None:
    put(tmp_path / "in/2023/a.txt", "a\n")
    put(tmp_path / "other/b.txt", "b\n")
    os.symlink(tmp_path / "other", tmp_path / "in/2024")
    os.symlink(tmp_path / "in/2023/a.txt", tmp_path / "in/2025.txt")
    os.symlink(tmp_path / "other/c.txt", tmp_path / "in/gone.txt")
    os.link(tmp_path / "other/b.txt", tmp_path / "in/z.txt")
    os.symlink(tmp_path / "in", tmp_path / "in/2023/loop")
    put(tmp_path / "in/.ipynb_checkpoints/a.txt", "a\n")
    for options in (["--layout", "folder"], ["--layout", "txt"]):
        out = tmp_path / f"out-{options[1]}"
        assert convert(tmp_path / "in", out, *options, "--max-bad", "50%") == 0
        assert sorted(documents(out)) == ["a", "b"]
        index = about(out)
        assert index["left_out"] == {"link": 1}
        assert index["passed_over"] == {"linked twice": 3, "hidden": 1}


# ------------------------------------------------------------------------------------- long lines


@pytest.fixture
def short_lines(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(reading, "LONGEST", 100)
    monkeypatch.setattr(reading, "PART", 50)
    return 100


LONG = st.lists(
    st.sampled_from(["word ", "é", "東京", "x", "\n", " \n", "a longer word ", "y" * 60]),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(pieces=LONG, document=st.sampled_from(["line", "blank-line", "file"]))
def test_long_text_is_cut_and_nothing_is_lost(
    pieces: list[str], document: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = "".join(pieces)
    file = put(tmp_path_factory.mktemp("long") / "a.txt", text)
    longest, part, reading.LONGEST, reading.PART = reading.LONGEST, reading.PART, 100, 50
    try:
        texts, findings = found_in(file, document)
    finally:
        reading.LONGEST, reading.PART = longest, part
    assert all(len(each.encode()) <= 100 for each in texts)
    assert "".join("".join(texts).split()) == "".join(text.split())
    cut = [name for name, kind in findings if kind == "cut"]
    assert bool(cut) == any(len(line.encode()) >= 101 for line in units(text, document))


def units(text: str, document: str) -> list[str]:
    """The documents, with their newlines."""
    if document == "file":
        return [text]
    lines = [line + "\n" for line in text.split("\n")[:-1]] + [text.split("\n")[-1]]
    if document == "line":
        return [line for line in lines if line.strip()]
    found = [""]
    for line in lines:
        if line.strip():
            found[-1] += line
        else:
            found.append("")
    return found


def test_long_rows_are_left_out(short_lines: int, tmp_path: Path) -> None:
    long = "x" * 1000
    rows = ['{"text": "first"}', f'{{"text": "{long}"}}', '{"text": "last"}']
    file = put(tmp_path / "a.jsonl", "\n".join(rows))
    assert found_in(file) == (["first", "last"], [(f"a.jsonl, byte {len(rows[0]) + 1}", "size")])
    file = put(tmp_path / "a.tsv", f"text\tlabel\nfirst\t1\n{long}\t2\nlast\t3\n")
    assert found_in(file, label_key="label") == (["first", "last"], [("a.tsv, byte 19", "size")])
    file = put(tmp_path / "a.csv", f'text,label\nfirst,1\n"{long}",2\nlast,3\n')
    assert found_in(file, label_key="label") == (["first"], [("a.csv", "size")])
    file = put(tmp_path / "a.json", f'[{{"text": "first"}}, {{"text": "{long * 200}"}}]')
    assert found_in(file) == (["first"], [("a.json", "size")])


def test_a_decompressor_is_closed_with_its_file(tmp_path: Path) -> None:
    file = reading.open_bytes(put(tmp_path / "a.txt.gz", gzip.compress(b"x")))
    raw = file.raw
    assert isinstance(raw, Decompressed)
    file.close()
    assert raw._file.closed


def test_tables_in_folders_of_unlabelled_text_are_told_how_to_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless labels are asked for, tables in a folder are taken for metadata."""
    put(tmp_path / "in/b.csv", "text,kind\none,1\n")
    advice = "a table is read with --label-key, or if it is SOURCE"
    assert convert(tmp_path / "in", tmp_path / "out") == 2
    assert f"(found: 1 .csv); {advice}" in capsys.readouterr().err
    put(tmp_path / "in/a.txt", "some text\n")
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert found(tmp_path / "out", "notes.jsonl") == {"b.csv": (advice, "type")}
