"""Damage in the cache or in D2V_STAGE never blocks a run: the file is fetched again, once, and read
again. Only damage at the source is a bad sample."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from array import array
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from d2v_ds.data import download
from d2v_ds.data.cache import renew
from d2v_ds.data.cache.stage import open_copy, stage
from d2v_ds.data.shard_format import ShardSet
from d2v_ds.data.shard_index import index_bytes, read_index
from d2v_ds.errors import UserError
from d2v_ds.loader.find_set import find_set
from d2v_ds.loader.loader import Loader
from d2v_ds.loader.quarantine import Quarantine
from d2v_ds.loader.reading import Reader, read_samples
from d2v_ds.loader.webdataset import webdataset
from tests.helpers.runs import environment
from tests.helpers.series import modality as series_modality
from tests.helpers.series import write_set

LENGTHS = [[50] * 40, [60] * 30, [70] * 20]
PAYLOAD = 1540  # a byte of the first .series of a tar
Open = Callable[[], ShardSet]
Damage = Callable[[bytes], bytes]


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    return write_set(tmp_path / "far" / "series", LENGTHS)


@pytest.fixture(params=["remote", "staged"])
def opened(
    request: pytest.FixtureRequest,
    shards: ShardSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Open:
    """Opens the copy, as each start does."""
    monkeypatch.setenv("D2V_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "PAUSE", 0.02)
    monkeypatch.setattr(download, "TRY_FOR", 0.1)
    monkeypatch.setattr(renew.log, "propagate", True)

    def remote() -> ShardSet:
        return find_set(f"pipe:cat {shards.root}/{{}}", "series")

    def staged() -> ShardSet:
        folder = stage(shards, tmp_path / "stage", lambda: None)
        assert folder
        return open_copy(shards, folder)

    return remote if request.param == "remote" else staged


def content(shards: ShardSet) -> list[Any]:
    return list(read_samples(shards, ("series", "json")))


def flipped(data: bytes, at: int) -> bytes:
    broken = bytearray(data)
    broken[at % len(data)] ^= 4
    return bytes(broken)


DAMAGES: dict[str, Damage] = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "longer": lambda data: data + b"x",
    "flip": lambda data: flipped(data, PAYLOAD),
    "first byte": lambda data: flipped(data, 2),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["series-000001.tar", "series-000001.idx", "index.json"])
def test_a_damaged_copy_is_fetched_again(
    opened: Open, shards: ShardSet, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = opened()
    assert content(first) == content(shards)
    path = first.root / file
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    second = opened()
    assert content(second) == content(shards) and second.shards == shards.shards
    if (file, damage) != ("series-000001.tar", "first byte"):  # of a header, which is not read
        assert path.read_bytes() == whole and file in caplog.text
    assert "convert the corpus again" not in caplog.text


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("suffix", ["tar", "idx"])
def test_damage_while_a_run_reads(
    opened: Open, shards: ShardSet, workers: int, suffix: str, tmp_path: Path
) -> None:
    """After the start has looked at the files; nothing is a bad sample."""
    found = opened()
    content(found)
    for entry in found.shards:
        path = found.root / f"{entry.name}.{suffix}"
        path.write_bytes(flipped(path.read_bytes(), PAYLOAD))
    settings: dict[str, Any] = {"seed": 1, "size": 800, "micro_batches": 2, "workers": workers}

    def keys(of: ShardSet) -> list[tuple[str, ...]]:
        quarantine = Quarantine(tmp_path / "bad.jsonl", 0.0)
        loader = Loader(of, series_modality(), quarantine=quarantine, **settings)  # type: ignore[arg-type]
        with closing(loader):
            return [b.keys for step in islice(loader, 10) for b in step.micro_batches]

    assert keys(found) == keys(shards)
    assert not (tmp_path / "bad.jsonl").exists()


def test_the_pipeline_reads_on_after_damage(opened: Open, shards: ShardSet) -> None:
    found = opened()
    content(found)
    for entry, cut in zip(found.shards, (None, 20_000, None), strict=True):
        path = found.tar(entry)
        data = path.read_bytes()
        path.write_bytes(flipped(data, 18 * 2048 + PAYLOAD) if cut is None else data[:cut])

    def keys(of: ShardSet) -> list[str]:
        return [item["__key__"] for item in webdataset(of, series_modality(), decode=False)]

    assert keys(found) == keys(shards)


def test_damage_at_the_source_is_a_bad_sample(
    opened: Open, shards: ShardSet, caplog: pytest.LogCaptureFixture
) -> None:
    """The copy has the same bytes, so it is not fetched again."""
    found = opened()
    content(found)
    index = shards.index(shards.shards[0])
    for path in (index, found.index(found.shards[0])):  # of the sample, another checksum
        path.write_bytes(with_other_checksum(path))
    caplog.clear()
    reader = Reader(found, ("series",))
    source = "series-000000.tar has the same bytes"
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"its \.series has changed: .*; .*{source}") as error:
            reader.read(0)
        assert not isinstance(error.value, UserError)
    assert reader.read(1)
    reader.close()
    assert caplog.text.count("fetched again") == 0


def with_other_checksum(path: Path) -> bytes:
    found = read_index(path)
    checksums = array("I", found.checksums)
    checksums[1] ^= 1
    keys = [found.key(i) for i in range(found.count)]
    numbers = array("q", found.offsets), array("I", found.sizes), checksums
    return index_bytes(found.fields, found.bytes, keys, *numbers, array("I", found.lengths))


def test_a_source_that_is_gone(
    opened: Open, shards: ShardSet, caplog: pytest.LogCaptureFixture
) -> None:
    """The copy stays: its other samples are used."""
    found = opened()
    content(found)
    tar = found.tar(found.shards[0])
    tar.write_bytes(flipped(tar.read_bytes(), PAYLOAD))
    shards.tar(shards.shards[0]).unlink()
    reader = Reader(found, ("json", "series"))
    bad = []
    for sample_id in range(found.shards[0].samples):
        try:
            reader.read(sample_id)
        except ValueError as error:
            bad.append(str(error))
    reader.close()
    assert len(bad) == 1 and "this copy could not be replaced" in bad[0]
    assert tar.exists()


READ = """
import sys, hashlib, logging
from pathlib import Path
logging.basicConfig(level=30)
from d2v_ds.data.cache.stage import stage, open_copy
from d2v_ds.data.shard_format import open_set
from d2v_ds.loader.find_set import find_set
from d2v_ds.loader.reading import read_samples
where, folder = sys.argv[1:]
if folder:
    source = open_set(where)
    shards = open_copy(source, stage(source, Path(folder), lambda: None))
else:
    shards = find_set(where)
print("open", flush=True)
sys.stdin.readline()
print(hashlib.sha256(repr(list(read_samples(shards, ("series", "json")))).encode()).hexdigest())
"""


@pytest.mark.slow
def test_processes_that_find_the_same_damage(
    opened: Open, shards: ShardSet, tmp_path: Path
) -> None:
    found = opened()
    want = content(found)
    where = found.remote or str(shards.root)
    command = [sys.executable, "-c", READ, where, "" if found.remote else str(tmp_path / "stage")]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    processes = [subprocess.Popen(command, text=True, env=environment(), **pipes) for _ in range(3)]
    for process in processes:
        assert process.stdout and process.stdout.readline() == "open\n"
    for entry in found.shards:
        path = found.tar(entry)
        path.write_bytes(flipped(path.read_bytes(), PAYLOAD))
    answers = [process.communicate("go\n", timeout=60) for process in processes]
    digest = hashlib.sha256(repr(want).encode()).hexdigest()
    assert [out for out, _ in answers] == [f"{digest}\n"] * 3
    written = sum(error.count("since it was written") for _, error in answers)
    assert written == len(found.shards), "each shard is fetched once"


def test_an_error_of_the_disk_is_damage_of_a_copy(
    opened: Open, shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = opened()
    want = content(found)
    reader = Reader(found, ("series", "json"))
    reader.read(0)
    broken, pread = os.fstat(reader.open[0].file).st_ino, os.pread

    def fail(file: int, size: int, offset: int) -> bytes:
        if os.fstat(file).st_ino == broken:
            raise OSError(5, "Input/output error")
        return pread(file, size, offset)

    monkeypatch.setattr(os, "pread", fail)
    assert reader.read(0) == want[0][1]
    reader.close()
