"""d2v-shards text: documents of every format, packing, labels, damaged inputs, and reading by the
loader."""

from __future__ import annotations

import gzip
import io
import json
import sys
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_ds.data.checks import Finding
from d2v_ds.data.shard_format import open_set
from d2v_ds.data.shard_index import read_index
from d2v_ds.errors import UserError
from d2v_ds.loader.reading import read_samples
from d2v_ds.modalities.text import Text, TextConfig
from shards.cli import main
from shards.family import Converted, PackedMember
from shards.layout import AUTO, find
from shards.text import LAYOUTS, reading
from shards.text.layout import TextLayout, TextOptions
from shards.text.packing import LabelledText, PackedText, pack
from tests.helpers.corpora import put, quarantine
from tests.shards.text_sets import MODEL, TOKENIZER, read

EOS = TOKENIZER.eos_id
DOCUMENTS = [
    "plain words",
    "Ünïcödé 東京 😀👩‍👩‍👧 e\u0301",
    " spaces  kept ",
    "tab\tand \x01 control \x7f",
    "carriage return\rinside",
    "<mask> </s> ▁",
    "x" * 700,
]


def convert(*arguments: object) -> int:
    return main(["text", *map(str, arguments), "--tokenizer", str(MODEL)])


def open_text(source: Path, document: Any = "file", label_key: str = "") -> TextLayout:
    settings = TextOptions(document, label_key=label_key)
    return find(LAYOUTS, AUTO, source).open(source, settings)


def blocks(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """(key, ids) as the loader reads them."""
    shards = open_set(folder, "text")
    modality = Text(TextConfig(vocab_size=4096, mask_id=4095, max_tokens=10**6))
    for key, sample in read_samples(shards, modality.extensions):
        yield key, modality.decode(sample, None).tolist()


def documents(folder: Path) -> list[str]:
    """The text of a set, split at eos."""
    stream = [i for _, ids in blocks(folder) for i in ids]
    assert stream[-1] == EOS
    result, ids = [], list[int]()
    for i in stream:
        if i == EOS:
            result.append(TOKENIZER.decode(ids))
            ids = []
        else:
            ids.append(i)
    return result


# ----------------------------------------------------------------------------------------- packing


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(4, 99), max_size=30), max_size=12), st.integers(2, 16))
def test_packing_matches_a_slow_reference(texts: list[list[int]], block: int) -> None:
    stream = []
    for ids in texts:
        for i in ids:
            stream.append(i)
        stream.append(EOS)
    slow = []
    while stream:
        slow.append(stream[:block])
        stream = stream[block:]
    assert list(pack(iter(texts), block, EOS)) == slow


def test_a_set(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(DOCUMENTS) + "\n", newline="")
    assert convert(tmp_path / "a.txt", tmp_path / "out", "--block", 32) == 0
    assert documents(tmp_path / "out") == DOCUMENTS
    shards = open_set(tmp_path / "out", "text")
    assert (shards.length_unit, shards.fields, shards.sample_rate) == ("tokens", ("u16",), 0)
    lengths = [len(ids) for _, ids in blocks(tmp_path / "out")]
    assert set(lengths[:-1]) == {32} and 0 < lengths[-1] <= 32 and shards.length == sum(lengths)
    about = json.loads((tmp_path / "out/index.json").read_bytes())
    assert about["tokenizer"] == {"file": "tokenizer.model", **TOKENIZER.about()}
    assert (tmp_path / "out/tokenizer.model").read_bytes() == MODEL.read_bytes()
    assert (about["inputs"], about["quarantined"]) == (len(DOCUMENTS), 0)


def test_a_member_holds_many_blocks_and_each_can_be_addressed(tmp_path: Path) -> None:
    text = "\n".join(f"number {i} of many" for i in range(4000))
    (tmp_path / "a.txt").write_text(text)
    assert convert(tmp_path / "a.txt", tmp_path / "out", "--block", 8) == 0
    shards = open_set(tmp_path / "out")
    [shard] = shards.shards
    index = read_index(shards.index(shard))
    ids = dict(blocks(tmp_path / "out"))
    with tarfile.open(shards.tar(shard)) as tar:
        members = tar.getmembers()
        arrays = {
            m.name: np.load(io.BytesIO(tar.extractfile(m).read()))  # type: ignore[union-attr]
            for m in members
        }
    assert len(members) == -(-(index.count - 1) // 1024) + 1 < 10 < index.count
    assert shard.bytes < 1.05 * 2 * shards.length + 20_000
    raw = shards.tar(shard).read_bytes()
    for i, key in enumerate(index.key(i) for i in range(index.count)):
        name, row = key.rsplit("/", 1)
        assert arrays[f"{name}.npy"][int(row)].tolist() == ids[key]
        assert raw[index.offsets[i] :][: index.sizes[i]] == np.array(ids[key], "<u2").tobytes()


def test_plain_webdataset_reads_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(DOCUMENTS))
    assert convert(tmp_path / "a.txt", tmp_path / "out", "--block", 16) == 0
    shards = open_set(tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        urls = [str(shards.tar(shard)) for shard in shards.shards]
        theirs = [s["npy"] for s in wds.WebDataset(urls, shardshuffle=False).decode()]
    ours = [ids for _, ids in blocks(tmp_path / "out")]
    assert [row.tolist() for rows in theirs for row in rows] == ours


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words")
    layout = open_text(tmp_path)
    large = {**TOKENIZER.about(), "vocab_size": (1 << 16) + 1}
    converter = PackedText(layout, MODEL, large, block=4)
    assert converter.fields == ("u32",)
    [table, *_] = converter.convert(list(layout.samples([])))
    assert isinstance(table, PackedMember)
    _, first, size, length = table.rows[0]
    ids = np.frombuffer(table.payload[first : first + size], "<u4")
    assert ids.tolist() == TOKENIZER.encode("some words")[:4] and length == 4
    sample = {"u32": table.payload[first : first + size]}
    assert Text(TextConfig()).decode(sample, None).tolist() == ids.tolist()
    assert Text.check_sample(sample, {"tokenizer": large}) == 4
    with pytest.raises(ValueError, match="has token id"):
        Text.check_sample(sample, {"tokenizer": {"vocab_size": 5}})


# --------------------------------------------------------------------------------------- documents


@pytest.mark.parametrize(
    ("divided", "expected"),
    [
        ("line", ["one", "two", " three ", "four"]),
        ("blank-line", ["one\ntwo", " three \nfour"]),
        ("file", ["one\ntwo\n\n \t\n three \nfour\n\n"]),
    ],
)
def test_options_for_dividing_files_into_documents(
    divided: Any, expected: list[str], tmp_path: Path
) -> None:
    text = "one\ntwo\r\n\n \t\n three \nfour\n\n"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read(open_text(tmp_path, divided)) == (expected, [])


LINES = st.lists(st.sampled_from(["", " ", "a", "bc", "déf", "a longer line", "x\r"]), max_size=40)


@settings(max_examples=150, deadline=None)
@given(lines=LINES, divided=st.sampled_from(["line", "blank-line"]), stretch=st.integers(1, 40))
def test_large_files_are_cut_between_documents(
    lines: list[str],
    divided: Any,
    stretch: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_text("\n".join(lines), newline="")

    def content(layout: TextLayout) -> tuple[list[str], list[Finding]]:
        """Without the findings about parts with blank lines only."""
        found, findings = read(layout)
        return found, [one for one in findings if one.kind != "empty"]

    whole = content(open_text(file, divided))
    size, reading.PART = reading.PART, stretch
    try:
        layout = open_text(file, divided)
        parts = [part for sample in layout.samples([]) for part in sample.inputs if part.bytes]
        assert content(layout) == whole
    finally:
        reading.PART = size
    ends = [sum(part.bytes) for part in parts if part.bytes]
    starts = [part.bytes[0] for part in parts if part.bytes]
    if parts:
        assert starts == [0, *ends[:-1]] and ends[-1] == file.stat().st_size
        assert file.stat().st_size > stretch


def write_kinds(folder: Path, texts: list[str]) -> list[Path]:
    """Writes the same documents in every format."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    lines = "".join(text + "\n" for text in texts).encode()
    rows = "".join(json.dumps({"text": t, "n": 1}) + "\n" for t in texts).encode()
    data = {
        "a.txt": lines,
        "b.jsonl": rows,
        "c.txt.gz": gzip.compress(lines),
        "d.jsonl.gz": gzip.compress(rows),
        "e.txt.zst": zstandard.compress(lines),
        "f.jsonl.zst": zstandard.compress(rows),
    }
    for name, content in data.items():
        (folder / name).write_bytes(content)
    pq.write_table(pa.table({"text": texts}), folder / "g.parquet", row_group_size=2)
    return sorted(folder.iterdir())


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    pytest.importorskip("zstandard")
    for file in write_kinds(tmp_path, DOCUMENTS):
        assert read(open_text(file, "line")) == (DOCUMENTS, []), file.name
    samples = open_text(tmp_path / "g.parquet").samples([])
    parts = [part.part for sample in samples for part in sample.inputs]
    assert parts == [(0, 2), (2, 4), (4, 6), (6, 7)]
    everything, _ = read(open_text(tmp_path, "line"))
    assert everything == 7 * DOCUMENTS


@pytest.mark.parametrize(
    ("name", "package"), [("a.parquet", "pyarrow"), ("a.txt.zst", "zstandard")]
)
def test_a_missing_package_is_named(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"{name}: .*pip install {package}"):
        read(open_text(tmp_path))


# ----------------------------------------------------------------------------------------- labels


def test_labelled(tmp_path: Path) -> None:
    rows = [{"body": t, "kind": i % 2, "from": "x", "also": [1]} for i, t in enumerate(DOCUMENTS)]
    rows.append({"body": "", "kind": 1, "from": "x", "also": []})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--text-key", "body", "--label-key", "kind", "--max-bad", "50%"]
    assert convert(tmp_path / "a.jsonl", tmp_path / "out", *arguments) == 0
    shards = open_set(tmp_path / "out", "text")
    assert shards.fields == ("json", "npy") and shards.samples == len(DOCUMENTS)
    modality = Text(TextConfig(vocab_size=4096, mask_id=4095, max_tokens=10**6))
    for row, (_, sample) in zip(rows, read_samples(shards, ("npy", "json")), strict=False):
        ids = modality.decode(sample, None).tolist()
        assert ids[-1] == EOS and TOKENIZER.decode(ids[:-1]) == row["body"]
        meta = json.loads(sample["json"])
        assert meta.pop("path").startswith("a.jsonl, byte ")
        assert meta == {"from": "x", "label": row["kind"]}
        assert Text.check_sample(sample, {"tokenizer": TOKENIZER.about()}) == len(ids)
    [(_, reason)] = quarantine(tmp_path / "out").items()
    assert reason == "contains no text"


def test_text_files_have_no_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "in/a.txt", "x")
    put(tmp_path / "in/b.jsonl", '{"text": "one", "kind": 1}\n')
    words = ("--label-key", "kind")
    assert convert(tmp_path / "in", tmp_path / "out", *words) == 2
    message = "--label-key kind: a.txt is plain text and has no labels; use .jsonl"
    assert message in capsys.readouterr().err
    assert convert(tmp_path / "in", tmp_path / "chosen", *words, "--only", "*.jsonl") == 0


# ---------------------------------------------------------------------------------- damaged inputs


def test_unusable_documents_are_left_out_and_named(tmp_path: Path) -> None:
    lines = [
        '{"text": "good"}',
        "{broken",
        '["no object"]',
        '{"txt": "x"}',
        '{"text": 5}',
        '{"text": "half \\ud800"}',
        "[" * 100_000,
        '{"text": "also good"}',
    ]
    data = "\n".join(lines).encode() + b'\n{"text": "\xff"}\n'
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(data)
    (tmp_path / "in/cut.txt.gz").write_bytes(gzip.compress(b"before the end\n" * 9)[:-8])
    (tmp_path / "in/fake.txt.gz").write_bytes(b"no gzip")
    assert convert(tmp_path / "in", tmp_path / "out", "--max-bad", "100%") == 0
    found = documents(tmp_path / "out")
    assert set(found) == {"good", "also good", "before the end"}
    reasons = quarantine(tmp_path / "out")
    starts = [data.index(line.encode()) for line in lines]
    for i, reason in (
        (1, "is not JSON"),
        (2, "is not a JSON object"),
        (3, "has no 'text'; did you mean 'txt'?"),
        (4, "'text' is not text but int"),
        (5, "is not Unicode text"),
        (6, "is not JSON"),
    ):
        assert reason[:10] in reasons.pop(f"a.jsonl, byte {starts[i]}"), (i, reason)
    [last] = [name for name in reasons if name.startswith("a.jsonl")]
    assert "is not UTF-8" in reasons.pop(last)
    assert "cannot be read to its end" in reasons.pop("cut.txt.gz")
    assert "its content is not compressed" in reasons.pop("fake.txt.gz")
    assert not reasons


def test_one_bad_document_of_many_is_below_the_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\n" * 200 + b"\xff\n")
    assert convert(tmp_path / "a.txt", tmp_path / "out") == 0
    assert "1 of 201 inputs were left out" in capsys.readouterr().out
    (tmp_path / "a.txt").write_bytes(b"fine\n" * 20 + b"\xff\n")
    assert convert(tmp_path / "a.txt", tmp_path / "other") == 2
    assert "1 of 21 inputs cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.pdf", "contains no .txt, .text, .md, .rst (also compressed), .jsonl, "),
        ("missing", "no such file or folder"),
    ],
)
def test_wrong_sources(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "a.pdf":
        (tmp_path / name).write_bytes(b"x")
    source = tmp_path if name == "a.pdf" else tmp_path / name
    assert convert(source, tmp_path.parent / "out") == 2
    assert message in capsys.readouterr().err
    if name == "a.pdf":
        assert convert(tmp_path / name, tmp_path.parent / "out") == 2
        assert "its layout is not recognised; set --layout (txt, " in capsys.readouterr().err


def test_a_missing_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("x")
    arguments = [str(tmp_path), str(tmp_path / "out"), "--tokenizer", str(tmp_path / "no.model")]
    assert main(["text", *arguments]) == 2
    assert "no.model: no such file" in capsys.readouterr().err


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["a.txt", "a.jsonl", "a.txt.gz", "a.txt.zst", "a.parquet"]),
    data=st.binary(max_size=200) | st.text(max_size=60).map(str.encode),
    whole=st.booleans(),
)
def test_random_bytes_do_not_crash_the_conversion(
    name: str, data: bytes, whole: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every line is a document or is reported."""
    pytest.importorskip("pyarrow")
    pytest.importorskip("zstandard")
    if name.endswith(".gz") and whole:
        data = gzip.compress(data)
    file = tmp_path_factory.mktemp("fuzz") / name
    file.write_bytes(data)
    layout = open_text(file, "line")
    converter = PackedText(layout, MODEL, TOKENIZER.about(), block=8)
    made = list(converter.convert(list(layout.samples([]))))
    data = data.removeprefix(reading.BOM)
    findings = [item for one in made for item in one.findings]
    found = 1 + sum(one.found for one in made)
    if name in ("a.txt", "a.jsonl"):
        assert found == max(1, sum(bool(line.strip()) for line in data.split(b"\n")))
    rows = sum(len(one.rows) for one in made if isinstance(one, PackedMember))
    assert rows or findings or not data.strip() or name.endswith((".gz", ".zst"))


@pytest.mark.slow
def test_damaged_parquet_does_not_crash_the_conversion(tmp_path: Path) -> None:
    """Every row is read, or its row group or file is reported."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": [f"some text {i}" for i in range(50)]}), file, row_group_size=9
    )
    whole, draw = file.read_bytes(), np.random.default_rng(0)
    assert len(read(open_text(file))[0]) == 50
    for _ in range(1000):
        data = bytearray(whole)
        for place in draw.integers(0, len(data), draw.integers(1, 10)):
            data[place] = draw.integers(256)
        file.write_bytes(data[: draw.integers(1, len(data))] if draw.random() < 0.2 else data)
        found, findings = read(open_text(file))
        assert findings or found  # damaged counts may hide rows


# -------------------------------------------------------------------------------- the whole command


def test_same_bytes_with_any_number_of_processes(tmp_path: Path) -> None:
    for i in range(3):
        put(tmp_path / f"in/in{i}.txt", f"document {i}\n".encode() * 3000)
    for jobs in (1, 2):
        out = tmp_path / f"out{jobs}"
        arguments = ["--shard-size", "30KB", "-j", jobs, "--block", 64]
        assert convert(tmp_path / "in", out, *arguments) == 0
    one, two = (
        {f.name: f.read_bytes() for f in (tmp_path / f"out{jobs}").iterdir()} for jobs in (1, 2)
    )
    assert one == two


def test_a_run_that_does_not_fit_the_set_is_refused() -> None:
    about = {"tokenizer": {"file": "tokenizer.model", **TOKENIZER.about()}}
    Text(TextConfig(vocab_size=4096, mask_id=4095)).check_set(about)
    Text(TextConfig()).check_set({})
    with pytest.raises(UserError) as caught:
        Text(TextConfig(vocab_size=5000, mask_id=4999)).check_set(about)
    assert str(caught.value).startswith(
        "data.shards: its tokenizer does not fit modality.text.vocab_size=5000, "
        "modality.text.mask_id=4999; set modality.text.vocab_size=4096 modality.text.mask_id=4095"
    )


def test_labelled_rows_keep_their_columns(tmp_path: Path) -> None:
    """Labels and other columns of Parquet."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(
        pa.table({"text": ["a b", "c d"], "label": ["x", "y"], "more": [1.5, 2.5]}),
        tmp_path / "a.parquet",
    )
    layout = open_text(tmp_path, label_key="label")
    converter = LabelledText(layout, MODEL, TOKENIZER.about())
    made = list(converter.convert(list(layout.samples([]))))
    rows = [one for one in made if isinstance(one, Converted) and one.members]
    assert [json.loads(row.members[0] or b"") for row in rows] == [
        {"label": "x", "more": 1.5, "path": "a.parquet, row 0"},
        {"label": "y", "more": 2.5, "path": "a.parquet, row 1"},
    ]
