"""Hostile inputs and lacking resources: a conversion leaves the input out and names it, or ends
with one line and resumes."""

from __future__ import annotations

import ast
import errno
import gzip
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from d2v_ds.data import image_files
from d2v_ds.data.checks import Unusable
from shards import core, writer
from shards.cli import main
from shards.family import Converted, Input, Sample
from shards.layout import Layout
from shards.plan import Samples, make_plan
from shards.speech.converter import SpeechConverter
from shards.text import reading
from shards.workers import WorkerDied, WorkerPool
from tests import ROOT
from tests.helpers.corpora import found, put, put_tar, recording
from tests.shards.text_sets import convert as convert_text
from tests.shards.text_sets import documents

HALF = ("--max-bad", "50%", "-j1")


def convert(family: str, source: Path, out: Path, *options: str) -> int:
    return main([family, str(source), str(out), *options])


def kinds(out: Path) -> dict[str, str]:
    return {name: kind for name, (_, kind) in found(out, "quarantine.jsonl").items()}


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    for i in range(3):
        put(tmp_path / f"in/ok{i}.wav", recording(seed=i))
    return tmp_path / "in"


# -------------------------------------------------------------------------------- headers and sizes


@pytest.mark.parametrize("rate", [1, 100, 3999, 400_000])
def test_rates_that_no_recording_has(rate: int, sounds: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(-9999, 9999, 9000).astype(np.int16)
    soundfile.write(sounds / "odd.wav", noise, rate)
    assert convert("speech", sounds, tmp_path / "out", *HALF) == 0
    assert kinds(tmp_path / "out") == {"odd.wav": "rate"}


CONVERT = """
import sys
from shards.cli import main
sys.exit(main(["speech", {source!r}, {out!r}, "--max-bad", "100%", "-j1"]))
"""


def test_absurd_headers_within_limited_memory(sounds: Path, tmp_path: Path) -> None:
    """Every size that a header states is compared with the bytes that there are."""
    flac = bytearray(recording("flac", seconds=1))
    for name, frames, block in (("a", (1 << 36) - 1, 0xFFFF), ("b", 1 << 29, 0xFFFF)):
        packed = int.from_bytes(flac[18:26], "big") >> 36 << 36 | frames
        flac[18:26] = packed.to_bytes(8, "big")
        flac[10:12] = block.to_bytes(2, "big")
        put(sounds / f"{name}.flac", bytes(flac))
    wav = bytearray(recording("wav"))
    wav[40:44] = b"\xff\xff\xff\x7e"
    put(sounds / "c.wav", bytes(wav))
    caf = tmp_path / "caf.caf"
    soundfile.write(caf, np.zeros(9000, np.int16) + 5, 16_000, format="CAF", subtype="ALAC_16")
    data = bytearray(caf.read_bytes())
    at = data.index(b"pakt") + 12 + 8
    data[at : at + 8] = (1 << 40).to_bytes(8, "big")
    put(sounds / "d.caf", bytes(data))
    most = 3 << 30
    done = subprocess.run(
        [sys.executable, "-c", CONVERT.format(source=str(sounds), out=str(tmp_path / "out"))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (most, most)),
    )
    assert done.returncode == 0, done.stderr
    assert kinds(tmp_path / "out").keys() == {"a.flac", "b.flac", "c.wav", "d.caf"}


def test_a_file_that_needs_more_memory_than_there_is(
    sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = Layout.payload

    def lacking(self: Any, item: Input) -> bytes:
        if item.path == "ok1.wav":
            raise MemoryError
        return payload(self, item)

    monkeypatch.setattr(Layout, "payload", lacking)
    assert convert("speech", sounds, tmp_path / "out", *HALF) == 0
    assert found(tmp_path / "out", "quarantine.jsonl") == {
        "ok1.wav": ("needs more memory than there is", "size")
    }


def test_a_file_of_absurd_size_is_not_read(sounds: Path, tmp_path: Path) -> None:
    with (sounds / "huge.wav").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    assert convert("speech", sounds, tmp_path / "out", *HALF) == 0
    assert kinds(tmp_path / "out") == {"huge.wav": "size"}


# --------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("document", ["line", "blank-line", "file"])
def test_a_line_that_never_ends(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a few MB of .gz that hold a line of many GB, with smaller limits."""
    monkeypatch.setattr(reading, "LONGEST", 1000)
    monkeypatch.setattr(reading, "LARGEST", 10_000)
    source, out = tmp_path / "in", tmp_path / "out"
    put(source / "a.txt.gz", gzip.compress(b"first\n" + b"x" * 5_000_000 + b"\nlast\n"))
    put(source / "b.txt", "hello\n")
    assert convert_text(source, out, "--document", document, "--max-bad", "50%") == 0
    text = "".join(documents(out))
    assert "first" in text and "last" in text and "hello" in text
    assert 9_000 < text.count("x") < 12_000
    lost = found(out, "quarantine.jsonl")
    assert [kind for _, kind in lost.values()] == ["size"] and "a.txt.gz, byte " in next(iter(lost))


def test_a_long_line_of_a_table_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "LONGEST", 1000)
    monkeypatch.setattr(reading, "LARGEST", 10_000)
    rows = [json.dumps({"text": text}) for text in ("one", "x" * 50_000, "two")]
    source = put(tmp_path / "a.jsonl", "\n".join(rows))
    assert convert_text(source, tmp_path / "out", "--max-bad", "50%") == 0
    assert [kind for _, kind in found(tmp_path / "out", "quarantine.jsonl").values()] == ["size"]


def test_decompression_does_not_copy_what_waits(tmp_path: Path) -> None:
    """A slice of 64 KB of .gz may hold 64 MB: the time must be linear in them."""
    path = put(tmp_path / "a.txt.gz", gzip.compress(b"x" * 60_000_000))
    with reading.open_bytes(path) as file:
        raw: Any = file.raw
        assert file.read(10) == b"x" * 10
        waiting = raw._waiting
        assert isinstance(waiting, memoryview) and len(waiting) > 1_000_000
        file.read(1 << 17)
        assert raw._waiting.obj is waiting.obj  # the same bytes


# ------------------------------------------------------------------------------------------- images

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n%%EOF\n"


def test_other_content_with_the_name_of_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow would start Ghostscript for PostScript."""
    from d2v_ds.modalities.vision import Vision  # not in the worker processes of other tests

    monkeypatch.setattr(subprocess, "check_call", pytest.fail)
    monkeypatch.setattr(subprocess, "Popen", pytest.fail)
    for i in range(2):
        put(tmp_path / f"in/{i}.png", picture_bytes(i))
    put(tmp_path / "in/photo.jpg", EPS)
    assert convert("images", tmp_path / "in", tmp_path / "out", *HALF) == 0
    assert found(tmp_path / "out", "quarantine.jsonl") == {"photo.jpg": ("is PostScript", "format")}
    for read in (image_files.decode, image_files.open_image, image_files.inspect):
        with pytest.raises(Unusable, match="is PostScript"):
            read(EPS)  # type: ignore[operator]
    with pytest.raises(Unusable, match="is PostScript"):
        Vision(Vision.Config()).prepare(EPS)  # type: ignore[arg-type]


def picture_bytes(seed: int) -> bytes:
    from tests.shards.pictures import picture

    return picture(seed=seed)


def test_images_are_opened_only_in_named_formats() -> None:
    opened = 0
    for folder in ("d2v_ds", "shards"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open":
                    opened += 1
                    assert "formats" in {word.arg for word in node.keywords}, path
    assert opened >= 3


# --------------------------------------------------------------------------------- processes, disks


@dataclass(frozen=True)
class Deadly(SpeechConverter):
    """The process that reads `bad` is killed, as by the system when memory runs out."""

    @property
    def knows_inputs(self) -> bool:
        return False

    def convert(self, samples: Iterable[Sample]) -> Iterator[Converted]:
        for sample in samples:
            if sample.key == "bad":
                os.kill(os.getpid(), signal.SIGKILL)
            yield Converted(sample.key, (b"x", b"{}"), 1)


def test_a_killed_worker_names_what_it_read(tmp_path: Path) -> None:
    names = [*(f"{i:02d}" for i in range(40)), "bad"]
    given = Samples(Sample(name, (Input(f"{name}.wav"),), {}, 1_000_000) for name in names)
    plan = make_plan(given, {}, 2_000_000, 0)
    converter = Deadly(None, 16_000)  # type: ignore[arg-type]
    with WorkerPool(2) as pool, pytest.raises(WorkerDied) as caught:
        core.convert(plan, converter, tmp_path / "out", pool, 0.1)
    assert "while it read bad.wav, possibly" in str(caught.value)
    assert "leave the file out with --except" in str(caught.value)
    assert not (tmp_path / "out/index.json").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_disk_that_cannot_be_written(
    number: int,
    sounds: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line and exit code 2; then the same command resumes."""

    def refuse(path: Path, data: bytes) -> None:
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(writer, "write_atomically", refuse)
        assert convert("speech", sounds, tmp_path / "out", "-j1") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and os.strerror(number) in said
    assert ("free space" in said) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert convert("speech", sounds, tmp_path / "out", "-j1") == 0
    assert not list((tmp_path / "out").glob("*.tmp"))


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"[" * 100_000])
def test_damaged_files_of_an_unfinished_conversion(
    content: bytes, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--shard-size", "10KB", "-j1", "--task", "0/1"]
    assert convert("speech", sounds, out, "--task", "0/2", "-j1", "--shard-size", "10KB") == 0
    for report in out.glob("speech-*.json"):
        report.write_bytes(content)
    assert convert("speech", sounds, out, *words) == 0  # the shards are written again
    put(tmp_path / "other/plan.json", content)
    capsys.readouterr()
    assert main(["merge", str(tmp_path / "other")]) == 2
    said = capsys.readouterr().err
    assert "plan.json: is damaged" in said and said.count("\n") == 1


# ----------------------------------------------------------------------------------------- dry runs


def test_a_dry_run_says_whether_the_conversion_would_stop(
    sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(sounds / "bad.wav", b"RIFF")
    out = tmp_path / "out"
    assert convert("speech", sounds, out, "--dry-run") == 0
    assert (
        "set: about 25.00% of the inputs cannot be used, more than --max-bad 1.000% allows: the "
        "conversion would stop" in capsys.readouterr().out
    )
    assert convert("speech", sounds, out, "--dry-run", "--max-bad", "25%") == 0
    assert "would stop" not in capsys.readouterr().out and not out.exists()


# --------------------------------------------------------------------------------------------- tars


def test_a_refused_index_leaves_only_the_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tars = [[(f"{i}{j}.wav", recording(seed=i)) for j in range(3)] for i in range(2)]
    for i, members in enumerate(tars):
        put_tar(tmp_path / f"t/{i}.tar", members)
    put_tar(tmp_path / "t/2.tar", [("a.wav", recording(rate=8000))])
    for out in (tmp_path / "t", tmp_path / "new"):
        before = sorted(out.iterdir()) if out.exists() else None
        assert main(["index", str(tmp_path / "t"), str(out), "-j1"]) == 2
        assert "one sample rate" in capsys.readouterr().err
        assert (sorted(out.iterdir()) if out.exists() else None) == before
    put_tar(tmp_path / "t/2.tar", [("a.wav", b"RIFF")])
    assert main(["index", str(tmp_path / "t"), "-j1"]) == 2
    assert {file.name for file in (tmp_path / "t").iterdir()} == {
        "0.tar", "1.tar", "2.tar", "quarantine.jsonl",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------ Parquet


@pytest.mark.parametrize("family", ["speech", "images"])
def test_row_groups_without_rows_are_told(family: str, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    data = recording() if family == "speech" else picture_bytes(0)
    column = "audio" if family == "speech" else "image"
    table = pa.table({column: [{"bytes": data, "path": "a"}]})
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in/a.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "in/b.parquet")
    out = tmp_path / "out"
    assert convert(family, tmp_path / "in", out, *HALF) == 0
    about = json.loads((out / "index.json").read_text())
    assert about["samples"] + about["quarantined"] == about["inputs"]
    if about["quarantined"]:  # an empty table may have no row group at all
        assert set(kinds(out).values()) == {"empty"}
