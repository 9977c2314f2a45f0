"""Random and damaged inputs: no crash or hang, and every input is in a shard or in the quarantine.
The slow tests run many more examples."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2v_ds.data.tar_index import index_set
from d2v_ds.data.tar_scan import DamagedTar, Member, members, next_header, samples
from d2v_ds.errors import UserError
from d2v_ds.modalities import sample_formats
from shards.cli import main
from tests.helpers.corpora import (
    FORMATS,
    contents,
    ogg_problem,
    put,
    put_tar,
    quarantine,
    recording,
)

Fuzz = Callable[[Callable[..., None]], Callable[..., None]]


def fuzz(few: int, many: int, *args: Any, **kwargs: Any) -> Fuzz:
    """Runs a property with few examples, and with many examples as a slow test."""

    def decorate(test: Callable[..., None]) -> Any:
        def run(number: int) -> None:
            quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
            bounds = settings(
                max_examples=number, deadline=None, suppress_health_check=quiet, derandomize=True
            )
            bounds(given(*args, **kwargs)(test))()

        sizes = [pytest.param(few, id="few"), pytest.param(many, id="many", marks=pytest.mark.slow)]
        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return pytest.mark.parametrize("number", sizes)(run)

    return decorate


# Thousands of small sets are synced, so they are written to memory if possible.
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None

SOUND = {kind: recording(kind, seconds=0.5) for kind in FORMATS}


@st.composite
def damaged(draw: st.DrawFn, whole: bytes, block: int = 1) -> bytes:
    """The data with up to 3 defects at the start of blocks: cut, flipped, zeroed, duplicated or
    inserted bytes."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1) // block)) * block
        how = draw(st.sampled_from(("cut", "flip", "zero", "double", "insert")))
        if how == "cut":
            del data[at:]
        elif how == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "zero":
            data[at : at + 1200] = bytes(len(data[at : at + 1200]))
        elif how == "double":
            data[at:at] = data[at : at + 600]
        else:
            data[at:at] = draw(st.binary(max_size=40))
    return bytes(data)


kinds = st.sampled_from(sorted(FORMATS))
sounds = kinds.flatmap(
    lambda kind: st.tuples(st.just(kind), st.one_of(damaged(SOUND[kind]), st.binary(max_size=99)))
)


def convert(source: Path, out: Path, *options: str) -> tuple[int, str]:
    """(exit code, stderr) of a conversion with --max-bad 100%."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main(["speech", str(source), str(out), "--max-bad", "100%", "-j1", *options])
    assert code in (0, 2), said.getvalue()
    if code == 2:
        assert said.getvalue().count("\n") == 1, said.getvalue()
    return code, said.getvalue()


def used(out: Path) -> set[str]:
    return {path for members in contents(out).values() for path in members["json"]["paths"]}


@fuzz(25, 1500, st.lists(sounds, min_size=1, max_size=4), st.sampled_from(("", "0.2", "1")))
def test_recordings(files: list[tuple[str, bytes]], most: str) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        root = Path(folder)
        names = {f"{i}.{kind}" for i, (kind, _) in enumerate(files)}
        for i, (kind, data) in enumerate(files):
            put(root / f"in/{i}.{kind}", data)
        put(root / "in/sound.wav", SOUND["wav"])
        code, said = convert(root / "in", root / "out", *(["--max-seconds", "1"] if most else []))
        assert code == 0, said
        kept, left_out = used(root / "out"), set(quarantine(root / "out"))
        assert kept | left_out == names | {"sound.wav"} and not kept & left_out
        assert main(["verify", str(root / "out"), "-j1"]) == 0


values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
fields = ("path", "audio_filepath", "offset", "duration", "start", "end", "text", "paths")
numbers = st.sampled_from((0, 0.1, 0.25, 1, -1, 1e300, "0.1", True))
rows = st.one_of(
    st.dictionaries(st.sampled_from(fields), st.one_of(values, numbers)),
    st.fixed_dictionaries(
        {"path": st.sampled_from(("a.wav", "b.wav", "gone.wav", ""))},
        optional={name: numbers for name in fields[2:6]},
    ),
    values,
)
json_lines = st.one_of(rows.map(lambda row: json.dumps(row).encode()), st.binary(max_size=60))


@fuzz(40, 2000, st.lists(json_lines, max_size=6))
def test_jsonl(lines: list[bytes]) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        root = Path(folder)
        for name in ("a.wav", "b.wav"):
            put(root / name, SOUND["wav"])
        lines = [b'{"path": "a.wav"}', *lines]
        data = b"\n".join(lines)
        put(root / "list.jsonl", data)
        code, said = convert(root / "list.jsonl", root / "out")
        assert code == 0, said
        found = contents(root / "out")
        about = json.loads((root / "out/index.json").read_text())
        number = sum(bool(line.strip()) for line in data.split(b"\n"))
        assert len(found) + about["quarantined"] == about["inputs"] == number


cells = st.text(st.characters(blacklist_categories=("Cs",)), max_size=8)
tables = st.one_of(
    st.lists(st.lists(cells, max_size=3).map("\t".join), max_size=5).map("\n".join),
    st.lists(st.tuples(st.sampled_from(("a.wav", "b.wav", "x", "")), cells).map("\t".join)).map(
        lambda rows: "\n".join(["path\ttext", *rows])
    ),
)


@fuzz(40, 2000, st.one_of(tables.map(str.encode), st.binary(max_size=99)))
def test_tables(data: bytes) -> None:
    """A manifest is refused with one line, or every row is a sample or in the quarantine."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        root = Path(folder)
        put(root / "list.tsv", data)
        for name in ("a.wav", "b.wav"):
            put(root / name, SOUND["wav"])
        code, said = convert(root / "list.tsv", root / "out")
        assert "list.tsv" in said or "none of the inputs" in said or code == 0, said
        if code == 0:
            about = json.loads((root / "out/index.json").read_text())
            lines = [line for line in data.split(b"\n")[1:] if line.strip(b"\r\n")]
            assert about["samples"] + about["quarantined"] == about["inputs"] == len(lines)


@fuzz(25, 1000, st.one_of(st.binary(max_size=200), damaged(b"1-2-0001 HELLO YOU\n1-2-0002 GO\n")))
def test_transcripts(data: bytes) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        root = Path(folder)
        names = {f"1/2/1-2-{i:04d}.flac" for i in (1, 2)}
        for name in names:
            put(root / "in" / name, SOUND["flac"])
        put(root / "in/1/2/1-2.trans.txt", data)
        code, said = convert(root / "in", root / "out")
        assert code == 0, said
        assert used(root / "out") == names


# --------------------------------------------------------------------------------------------- tars

NAMED = [(f"{i}.{kind}", SOUND[kind]) for i, kind in enumerate(("wav", "flac", "wav", "ogg"))]
NAMED.insert(1, ("0.json", b'{"label": 1}'))
with tempfile.TemporaryDirectory() as folder_of_tar:
    TAR = put_tar(Path(folder_of_tar) / "a.tar", NAMED).read_bytes()


@fuzz(40, 3000, st.one_of(damaged(TAR), damaged(TAR, 512), st.binary(max_size=2000)))
def test_tars(data: bytes) -> None:
    """Every missing sample is reported."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        root = Path(folder)
        tar = put(root / "in/a.tar", data)
        code, said = convert(tar, root / "out")
        if code == 0:
            found = contents(root / "out")
            left_out = (root / "out/quarantine.jsonl").read_text()
            assert {"0", "1", "2", "3"} <= found.keys() or left_out, "lost silently"
        else:
            reasons = ("SOURCE contains no inputs", "none of the inputs", "a tar but compressed")
            assert any(reason in said for reason in reasons), said
        with contextlib.suppress(UserError):
            indexed = index_set([tar], root / "index", sample_formats("speech"))
            assert indexed.samples == len(contents(root / "index"))
            assert {"0", "1", "2", "3"} <= contents(root / "index").keys() or data != TAR


@fuzz(150, 10_000, st.one_of(damaged(TAR), damaged(TAR, 512), st.binary(max_size=3000)))
def test_scan(data: bytes) -> None:
    """A scan terminates, also after damage, and finds only members within the file."""
    file, start = io.BytesIO(data), 0
    found: list[Member] = []
    while start is not None:
        try:
            found.extend(members(file, start))
            break
        except DamagedTar as error:
            following = next_header(file, error.offset)
            assert following is None or following > error.offset >= start
            start = following
    assert all(m.offset + m.size <= len(data) for m in found)
    assert sum(len(group) for _, group in samples(found)) <= len(found)


@fuzz(100, 5000, st.one_of(damaged(SOUND["ogg"]), damaged(SOUND["opus"]), st.binary(max_size=200)))
def test_ogg_pages(data: bytes) -> None:
    """Every difference from a whole file is reported, unless whole pages follow the file."""
    whole = any(data.startswith(SOUND[kind]) for kind in ("ogg", "opus"))
    assert ogg_problem(data) or whole, struct.unpack("<4sBB", data[:6])
