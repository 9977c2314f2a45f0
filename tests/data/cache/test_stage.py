"""Copies of a shard set on a node's own disk: complete, checked, and made once if they fit."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from d2v_ds.data.cache import stage as staging
from d2v_ds.data.cache.stage import stage
from d2v_ds.data.shard_format import ShardSet, open_set, set_json
from d2v_ds.errors import UserError
from d2v_ds.run.watchdog import Watchdog
from d2v_ds.start import local_copy
from shards import samples
from shards.cli import main


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    out = tmp_path_factory.mktemp("sets") / "unseen"
    source = samples.path("speech") / "unseen.tsv"
    assert main(["speech", str(source), str(out), "--shard-size", "200KB", "-j1"]) == 0
    return open_set(out)


def hashes(folder: Path) -> dict[str, str]:
    files = [f for f in folder.iterdir() if f.suffix in {".tar", ".idx"} or f.name == "index.json"]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_a_copy_is_the_set(shards: ShardSet, tmp_path: Path) -> None:
    marks: list[None] = []
    copy = stage(shards, tmp_path, lambda: marks.append(None))
    assert copy and hashes(copy) == hashes(shards.root)
    assert len(marks) > len(shards.shards), "it reports progress repeatedly"
    again = open_set(copy)
    assert again.shards == shards.shards and len(shards.shards) > 1


def test_a_second_call_copies_nothing(shards: ShardSet, tmp_path: Path) -> None:
    copy = stage(shards, tmp_path, lambda: None)
    assert copy
    before = {f: f.stat().st_mtime_ns for f in copy.glob("*.tar")}
    assert stage(shards, tmp_path, lambda: None) == copy
    assert before == {f: f.stat().st_mtime_ns for f in copy.glob("*.tar")}


def test_tars_in_another_folder_than_their_index(shards: ShardSet, tmp_path: Path) -> None:
    apart = tmp_path / "apart"
    apart.mkdir()
    for entry in shards.shards:
        (apart / f"{entry.name}.idx").write_bytes(shards.index(entry).read_bytes())
    there = dataclasses.replace(shards, root=apart, tars=shards.root)
    (apart / "index.json").write_text(set_json(there))
    assert open_set(apart) == there
    copy = stage(there, tmp_path / "local", lambda: None)
    assert (
        copy and open_set(copy).tars is None and hashes(copy).keys() == hashes(shards.root).keys()
    )


def test_an_incomplete_copy_is_completed(shards: ShardSet, tmp_path: Path) -> None:
    copy = stage(shards, tmp_path, lambda: None)
    assert copy
    (copy / "index.json").unlink()
    first, last = shards.shards[0], shards.shards[-1]
    (copy / f"{last.name}.tar").rename(copy / f"{last.name}.tar.tmp")
    kept = (copy / f"{first.name}.tar").stat().st_mtime_ns
    assert stage(shards, tmp_path, lambda: None) == copy
    assert hashes(copy) == hashes(shards.root)
    assert (copy / f"{first.name}.tar").stat().st_mtime_ns == kept


def test_processes_of_a_node_copy_once(shards: ShardSet, tmp_path: Path) -> None:
    code = (
        "import sys, logging; from pathlib import Path; logging.basicConfig(level=20)\n"
        "from d2v_ds.data.shard_format import open_set; from d2v_ds.data.cache.stage import stage\n"
        "assert stage(open_set(sys.argv[1]), Path(sys.argv[2]), lambda: None)\n"
    )
    command = [sys.executable, "-c", code, str(shards.root), str(tmp_path)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sum("was copied to" in error for error in errors) == 1


def test_damage_during_the_copy_is_detected(shards: ShardSet, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in shards.root.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tar = broken / f"{shards.shards[1].name}.tar"
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    with pytest.raises(UserError, match=rf"{tar.name}: its SHA-256 differs from index.json"):
        stage(open_set(broken), tmp_path / "local", lambda: None)
    assert not list((tmp_path / "local").rglob("index.json"))


def test_no_copy_if_it_does_not_fit(
    shards: ShardSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage(10**9, 0, 50_100_000))
    monkeypatch.setattr(staging.log, "propagate", True)
    assert stage(shards, tmp_path, lambda: None) is None
    assert "is not copied to" in caplog.text
    assert not list(tmp_path.rglob("*.tar"))


def test_a_folder_that_cannot_be_written(shards: ShardSet, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"D2V_STAGE: cannot write .*File exists"):
        stage(shards, tmp_path / "file", lambda: None)


def test_the_environment_variable_selects_the_folder(
    shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("D2V_STAGE", raising=False)
    watchdog = Watchdog(0, 1)
    assert local_copy(shards, watchdog) is shards
    monkeypatch.setenv("D2V_STAGE", str(tmp_path))
    copy = local_copy(shards, watchdog)
    assert copy.root.is_relative_to(tmp_path) and copy.shards == shards.shards
