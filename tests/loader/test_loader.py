"""The loader on real tars with real processes: identical batches for any number of ranks and
workers, exact resume, checksums, errors, and the lifetime of workers."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2v_ds.batch import Batch, StepBatch
from d2v_ds.data.shard_format import ShardSet
from d2v_ds.errors import UserError
from d2v_ds.loader import plan as plan_module
from d2v_ds.loader import reading
from d2v_ds.loader.loader import Loader
from d2v_ds.loader.quarantine import MAX_BAD, Quarantine
from d2v_ds.loader.reading import read_samples
from d2v_ds.run.preflight import require_divisible
from tests import ROOT
from tests.helpers.processes import alive
from tests.helpers.series import modality as series_modality
from tests.helpers.series import series, write_set

EPOCH = 19  # steps of the first epoch
LENGTHS = [[5 + 37 * i % 240 for i in range(n)] for n in (50, 7, 90, 33, 20)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_set(tmp_path_factory.mktemp("sets") / "series", LENGTHS)


@pytest.fixture(autouse=True)
def small_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes windows and pools so small that a small set has several."""
    monkeypatch.setattr(plan_module, "WINDOW", 60)
    monkeypatch.setattr(plan_module, "POOL", 40)
    monkeypatch.setattr(plan_module, "POOL_STEPS", 3)


def make_loader(
    shards: ShardSet, file: Path | None = None, max_bad: float = MAX_BAD, **changes: Any
) -> Loader:
    """file: where bad samples are recorded."""
    settings: dict[str, Any] = {"seed": 3, "size": 1600, "micro_batches": 4} | changes
    settings["quarantine"] = Quarantine(file, max_bad)
    return Loader(shards, series_modality(), **settings)  # type: ignore[arg-type]


def digest(batch: Batch) -> tuple[int, tuple[str, ...], str]:
    """The content of a batch, in a form that is easy to compare and to print."""
    content = hashlib.sha256()
    for name, value in vars(batch).items():
        content.update(name.encode())
        tensor = isinstance(value, torch.Tensor)
        content.update(value.numpy().tobytes() if tensor else repr(value).encode())
    return batch.index, batch.keys, content.hexdigest()[:16]


def global_steps(
    shards: ShardSet, steps: int, world: int = 1, **settings: Any
) -> tuple[list[list[Any]], dict[str, int]]:
    """The batches of all ranks, for each step, and the cursor after the last one."""
    with ExitStack() as stack:
        loaders = [make_loader(shards, rank=r, world=world, **settings) for r in range(world)]
        for one in loaders:
            stack.enter_context(closing(one))
        found = []
        for _ in range(steps):
            parts = [next(one) for one in loaders]
            assert len({(p.count, p.samples, p.units, str(p.cursor)) for p in parts}) == 1
            found.append([digest(batch) for part in parts for batch in part.micro_batches])
        return found, parts[0].cursor


@pytest.fixture(scope="module")
def uninterrupted(shards: ShardSet) -> list[list[Any]]:
    """More than two epochs on one rank without workers."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("WINDOW", 60), ("POOL", 40), ("POOL_STEPS", 3)):
            patch.setattr(plan_module, name, value)
        return global_steps(shards, 40)[0]


# ----------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_global_batches_are_the_same_for_any_ranks_and_workers(
    shards: ShardSet, uninterrupted: list[list[Any]], world: int, workers: int
) -> None:
    found, _ = global_steps(shards, 8, world, workers=workers)
    assert found == uninterrupted[:8]
    assert [[index for index, _, _ in step] for step in found] == [[0, 1, 2, 3]] * 8


@pytest.mark.parametrize(
    ("stop", "before", "then"),
    [
        (1, (1, 0), (1, 0)),
        (5, (1, 2), (4, 0)),
        (EPOCH - 1, (4, 0), (2, 1)),
        (EPOCH, (2, 1), (1, 1)),
        (EPOCH + 1, (1, 0), (2, 0)),
        (31, (2, 0), (4, 1)),
    ],
)
def test_resuming_on_other_ranks_and_workers_is_exact(
    shards: ShardSet,
    uninterrupted: list[list[Any]],
    stop: int,
    before: tuple[int, int],
    then: tuple[int, int],
) -> None:
    first, cursor = global_steps(shards, stop, before[0], workers=before[1])
    second, _ = global_steps(shards, 4, then[0], workers=then[1], cursor=cursor)
    assert first + second == uninterrupted[: stop + 4]


def test_the_resume_test_crosses_the_end_of_an_epoch(shards: ShardSet) -> None:
    with closing(make_loader(shards)) as loader:
        assert loader.stats.steps == EPOCH
        cursors = [step.cursor for step in islice(loader, EPOCH + 1)]
    assert (cursors[-2]["epoch"], cursors[-2]["step"]) == (0, EPOCH)
    assert (cursors[-1]["epoch"], cursors[-1]["step"]) == (1, 1)


def test_every_sample_once_per_epoch_with_its_content(shards: ShardSet) -> None:
    lengths = {f"s{s}-{i}": n for s, shard in enumerate(LENGTHS) for i, n in enumerate(shard)}
    usable = {key for key, n in lengths.items() if n >= 8}
    with closing(make_loader(shards)) as loader:
        stats = loader.stats
        steps = list(islice(loader, stats.steps))
    batches = [batch for step in steps for batch in step.micro_batches]
    keys = [key for batch in batches for key in batch.keys]
    assert len(keys) == len(set(keys)) == stats.samples and set(keys) == usable
    assert stats.left_out == len(lengths) - len(usable) > 0
    assert sum(step.samples for step in steps) == stats.samples
    assert sum(step.units for step in steps) == stats.units
    for step in steps:
        assert step.count == sum(len(batch.masked) for batch in step.micro_batches)
    for batch in batches:
        for key, row in zip(batch.keys, batch.inputs.numpy(), strict=True):
            whole = np.frombuffer(series(key, lengths[key]), "<i2")
            crop = row[: min(lengths[key], 200)].astype(np.int16)
            starts = np.flatnonzero(whole == crop[0])
            assert any(np.array_equal(whole[s : s + len(crop)], crop) for s in starts)


def test_crops_and_masks_change_from_epoch_to_epoch(shards: ShardSet) -> None:
    """Only for samples longer than a crop; shorter ones are never cropped."""
    crops: dict[str, list[bytes]] = {}
    seen: dict[str, list[bytes]] = {}
    with closing(make_loader(shards)) as loader:
        for step in islice(loader, 2 * EPOCH + 2):
            for batch in step.micro_batches:
                for row, key in enumerate(batch.keys):
                    if batch.inputs.shape[1] == 200 and batch.inputs[row, -1]:
                        crops.setdefault(key, []).append(batch.inputs[row].numpy().tobytes())
                        seen.setdefault(key, []).append(batch.seen[2 * row].numpy().tobytes())
    again = [key for key in crops if len(crops[key]) > 1]
    assert len(again) > 10
    assert all(len(set(seen[key])) > 1 for key in again)
    assert sum(len(set(crops[key])) > 1 for key in again) > 0.8 * len(again)


def test_the_two_views_of_a_sample_are_masked_differently(shards: ShardSet) -> None:
    with closing(make_loader(shards)) as loader:
        batch = next(loader).micro_batches[0]
    seen = batch.seen.reshape(len(batch.keys), 2, -1).numpy()
    long = seen.sum((1, 2)) > 30
    assert long.any() and (seen[long, 0] != seen[long, 1]).any(1).all()


def test_read_samples_gives_all_members_in_order(shards: ShardSet) -> None:
    found = list(read_samples(shards, ("series", "json", "absent")))
    assert [key for key, _ in found] == [
        f"s{s}-{i}" for s, shard in enumerate(LENGTHS) for i in range(len(shard))
    ]
    key, members = found[60]
    assert members == {"series": series(key, LENGTHS[2][3]), "json": b'{"key": "s2-3"}'}


def test_open_files_are_bounded(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "OPEN_SHARDS", 2)
    before = len(os.listdir("/proc/self/fd"))
    with closing(make_loader(shards)) as loader:
        for _ in islice(loader, EPOCH):
            assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert len(os.listdir("/proc/self/fd")) == before


# ------------------------------------------------------------------------------------------ errors


def damage(shards: ShardSet, shard: int, key: bytes) -> bytes:
    """Flips one byte of the sample's content in its tar."""
    tar = shards.tar(shards.shards[shard])
    data = bytearray(tar.read_bytes())
    at = data.index(key + b".series\0") + 512 + 5
    data[at] ^= 1
    tar.write_bytes(data)
    return bytes(data)


@pytest.fixture
def own(tmp_path: Path) -> ShardSet:
    return write_set(tmp_path / "own", LENGTHS)


def drain(loader: Loader, steps: int) -> list[StepBatch]:
    with closing(loader):
        return list(islice(loader, steps))


def test_read_samples_names_a_changed_byte(own: ShardSet) -> None:
    damage(own, 2, b"s2-11")
    with pytest.raises(UserError) as caught:
        list(read_samples(own, ("series",)))
    assert str(caught.value) == (
        f"{own.root}/series-000002.tar, sample 's2-11': its .series has changed: the index has "
        "another checksum for it. Copy the shard again or convert again; `d2v-shards verify` lists "
        "every fault of a set"
    )
    assert len(list(read_samples(own, ("json",)))) == 200


def test_a_shard_removed_while_training(own: ShardSet) -> None:
    own.tar(own.shards[4]).unlink()
    with pytest.raises(UserError, match=r"series-000004.tar: cannot be read \(No such file"):
        drain(make_loader(own), EPOCH)


def test_an_index_of_another_tar(own: ShardSet) -> None:
    own.index(own.shards[0]).write_bytes(own.index(own.shards[1]).read_bytes())
    with pytest.raises(UserError, match=r"000000.idx: .* does not belong to its tar: 7 samp"):
        make_loader(own)


def test_an_index_with_other_fields(own: ShardSet) -> None:
    """Also of an index without a checksum of its first line, as earlier versions wrote them."""
    path = own.index(own.shards[1])
    flipped = path.read_bytes().replace(b'"series"', b'"reries"', 1)
    old = re.sub(rb', "head": \d+}', b"}", flipped)
    assert len(old) < len(flipped)
    for data, fault in ((flipped, "checksum of its first"), (old, "its fields are json, reries")):
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"series-000001.idx: is damaged \(.*{fault}"):
            make_loader(own)
        with pytest.raises(UserError, match=rf"series-000001.idx: is damaged \(.*{fault}"):
            list(read_samples(own, ("json",)))


def test_a_read_error_is_an_error_of_the_shard(
    own: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not a bad sample that would be replaced."""

    def fail(*given: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(reading.os, "pread", fail)
    with pytest.raises(UserError, match=r"series-00000\d.tar: cannot be read \(Input/output error"):
        drain(make_loader(own, max_bad=0.9), EPOCH)
    with pytest.raises(UserError, match=r"^/.*series-000000.tar: cannot be read \(Input/output"):
        list(read_samples(own, ("json",)))


def test_a_set_that_changed_since_the_checkpoint(shards: ShardSet, own: ShardSet) -> None:
    _, cursor = global_steps(shards, 2)
    global_steps(own, 2, cursor=cursor)  # the same content in another folder
    changed = write_set(own.root.parent / "changed", [*LENGTHS, [50]])
    with pytest.raises(UserError, match="changed is not the shard set of the checkpoint"):
        make_loader(changed, cursor=cursor)


def test_a_set_without_the_modality_members(shards: ShardSet) -> None:
    modality: Any = series_modality()
    modality.extensions = ("flac", "wav")
    with pytest.raises(UserError) as caught:
        Loader(shards, modality, seed=0, size=1600, micro_batches=1)
    assert str(caught.value) == (
        f"{shards.root}: its samples have no .flac or .wav member (they have: .json, .series), "
        "which modality series reads"
    )


@pytest.mark.parametrize(
    ("micro_batches", "ranks", "advice"),
    [
        (6, 4, "Use 4, 8 or 12, or 1, 2, 3 or 6 ranks."),
        (3, 4, "Use 4, 8 or 12, or 1 or 3 ranks."),
        (1, 2, "Use 2, 4 or 6, or 1 rank."),
        (16, 6, "Use 12, 18 or 24, or 1, 2, 4, 8 or 16 ranks."),
    ],
)
def test_ranks_that_do_not_divide_the_micro_batches(
    shards: ShardSet, micro_batches: int, ranks: int, advice: str
) -> None:
    with pytest.raises(UserError) as caught:
        make_loader(shards, micro_batches=micro_batches, rank=0, world=ranks)
    assert str(caught.value) == (
        f"batch.micro_batches: {micro_batches} is not divisible by {ranks} ranks. {advice}"
    )
    require_divisible(12, 4)


def test_planned_and_drawn_masks_must_agree(shards: ShardSet) -> None:
    modality: Any = series_modality()
    modality.masked_tokens = lambda length: 7
    with pytest.raises(AssertionError, match=r"planned \d+ masked tokens, drew"):
        drain(Loader(shards, modality, seed=0, size=1600, micro_batches=1), 1)


# ----------------------------------------------------------------------------------------- workers

TRAINER = """
import os, signal, sys, time
from pathlib import Path
from tests.helpers.processes import alive
from tests.helpers.series import modality as series_modality
from d2v_ds.loader.loader import Loader
from d2v_ds.data.shard_format import open_set
signal.signal(signal.SIGTERM, lambda *_: None)
shards = open_set({root!r})
loader = Loader(shards, series_modality(), seed=0, size=1600, micro_batches=2, workers=2)
next(loader)
print(*loader.workers.pids, flush=True)
{then}
"""


def trainer(shards: ShardSet, then: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A training process with two workers that then runs `then`, and the PIDs of the workers."""
    code = TRAINER.format(root=str(shards.root), then=then)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert process.stdout
    return process, [int(pid) for pid in process.stdout.readline().split()]


def gone(pids: Sequence[int], seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pids)


def shared_memory(pid: int) -> list[str]:
    """Shared-memory files that a process maps."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [line.split(maxsplit=5)[5] for line in lines if "/memfd:" in line or "/pym-" in line]


def test_workers_die_with_a_killed_trainer_and_leave_nothing(shards: ShardSet) -> None:
    process, workers = trainer(shards, "time.sleep(60)")
    assert len(alive(workers)) == 2
    for pid in (process.pid, *workers):
        found = shared_memory(pid)
        assert found and all(file.endswith(" (deleted)") for file in found)
    server = parent_of(workers[0])
    assert server not in (process.pid, os.getpid()) and alive([server])
    process.kill()
    process.communicate()
    assert gone([server, *workers])


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_training_script_is_not_run_again_in_workers(shards: ShardSet, tmp_path: Path) -> None:
    """multiprocessing would import the script, which has no `if __name__ == "__main__"`."""
    script = tmp_path / "train.py"
    code = TRAINER.format(root=str(shards.root), then="loader.close(); print('ended')")
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 3 and done.stdout.endswith("ended\n")


def test_workers_are_forked_from_a_process_without_threads(shards: ShardSet) -> None:
    """A lock that a thread holds during the fork would never be released in the child."""
    with closing(make_loader(shards, workers=1)) as loader:
        next(loader)
        assert loader.workers
        [worker] = loader.workers.pids
        assert len(os.listdir(f"/proc/{parent_of(worker)}/task")) == 1
        assert parent_of(parent_of(worker)) == os.getpid()


@pytest.mark.parametrize(
    ("then", "code"), [("pass", 0), ("raise ValueError", 1), ("loader.close()", 0)]
)
def test_a_trainer_ends_immediately_with_or_without_close(
    shards: ShardSet, then: str, code: int
) -> None:
    process, workers = trainer(shards, then)
    process.communicate(timeout=20)
    assert process.returncode == code
    assert gone(workers)


def test_workers_continue_after_stop_signals(shards: ShardSet) -> None:
    """Launchers send them to every process, but the trainer has to finish its step and save."""
    process, workers = trainer(
        shards, "sys.stdin.readline(); print(sum(next(loader).samples for _ in range(60)))"
    )
    others = [*workers, parent_of(workers[0])]
    for pid in others:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            os.kill(pid, number)
    time.sleep(0.2)
    assert alive(others) == others
    out, _ = process.communicate("continue\n", timeout=60)
    assert process.returncode == 0 and int(out) > 60


def test_the_global_random_numbers_do_not_change(shards: ShardSet) -> None:
    before = torch.get_rng_state()
    drain(make_loader(shards, workers=1), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_close_ends_the_workers(shards: ShardSet) -> None:
    loader = make_loader(shards, workers=2)
    next(loader)
    assert loader.workers
    pids = loader.workers.pids
    assert len(alive(pids)) == 2
    loader.close()
    assert gone(pids)
    with pytest.raises(StopIteration):
        next(loader)
    loader.close()
