"""Tars at URLs without an index: every rank streams its own from a real server."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import webdataset

from d2v_ds.batch import StepBatch
from d2v_ds.data import download
from d2v_ds.errors import UserError
from d2v_ds.loader import stream as stream_module
from d2v_ds.loader.find_set import stream_tars
from d2v_ds.loader.quarantine import Quarantine
from d2v_ds.loader.stream import GROUP_TARS, StreamLoader
from d2v_ds.modalities.speech import Speech, SpeechConfig
from tests.helpers.corpora import recording
from tests.helpers.http_server import Server, start, stop
from tests.helpers.runs import Run, environment
from tests.test_train import QUICK

TARS, CLIPS = 10, 6  # clips per tar
CONFIG = SpeechConfig(views=1, crop_seconds=0.6, min_seconds=0.3)
ALL = {f"clip{i}" for i in range(TARS * CLIPS)}


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars written by webdataset."""
    folder = tmp_path_factory.mktemp("far") / "tars"
    folder.mkdir()
    with webdataset.ShardWriter(f"{folder}/a-%06d.tar", maxcount=CLIPS, verbose=0) as writer:
        for i in range(TARS * CLIPS):
            kind = ("wav", "flac")[i % 2]
            clip = recording(kind, seconds=0.35 + i % 7 / 20, seed=i)
            writer.write({"__key__": f"clip{i}", kind: clip, "json": {"i": i}})
    return folder


@pytest.fixture
def far(tars: Path) -> Iterator[Server]:
    state = Server("", Counter())
    server = start(state, tars)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/a-{{000000..{TARS - 1:06d}}}.tar"
    yield state
    stop(server)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("D2V_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "PAUSE", 0.02)
    return tmp_path / "cache"


def stream(url: str, **settings: Any) -> StreamLoader:
    given: dict[str, Any] = {"seed": 1, "size": 4.0, "micro_batches": 4} | settings
    return StreamLoader(stream_tars(url), Speech(CONFIG), **given)


def keys(step: StepBatch) -> list[str]:
    return [key for batch in step.micro_batches for key in batch.keys]


def first_epoch(loader: StreamLoader) -> list[StepBatch]:
    steps: list[StepBatch] = []
    for step in loader:
        if step.cursor["epoch"] > 0:
            return steps
        steps.append(step)
    raise AssertionError("it never ends")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_has_every_sample_once(far: Server, cache: Path, workers: int) -> None:
    held = []
    with closing(stream(far.url, workers=workers)) as loader:
        steps = first_epoch(loader)
        for step in islice(loader, 3):
            held.append(len(list(cache.glob("own/*/*/*.tar"))))
            assert step.cursor["epoch"] == 1
    assert Counter(key for step in steps for key in keys(step)) == Counter(ALL)
    assert 0 < max(held) <= 2 * GROUP_TARS, "no more are on disk"
    assert not list(cache.glob("own/*/")), "nothing is left"
    assert [step.cursor["step"] for step in steps] == list(range(1, len(steps) + 1))
    for step in steps:
        assert step.samples == len(keys(step)) and step.count == sum(
            len(batch.masked) for batch in step.micro_batches
        )


def test_any_workers_give_the_same_order_and_epochs_differ(far: Server) -> None:
    def order(workers: int, seed: int = 1) -> list[list[str]]:
        with closing(stream(far.url, workers=workers, seed=seed)) as loader:
            return [keys(step) for step in islice(loader, 40)]

    found = order(0)
    assert found == order(2)
    epoch = next(i for i in range(1, 40) if set(found[i]) & set(found[0]))
    assert found[epoch : epoch + 3] != found[:3]
    assert order(0, seed=2) != found


def of_rank(url: str, steps: int) -> list[Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    with closing(stream(url, rank=rank, world=world)) as loader:
        return [
            (
                step.count,
                step.samples,
                step.units,
                step.cursor["step"],
                sum(len(batch.masked) for batch in step.micro_batches),
                keys(step),
                [batch.index for batch in step.micro_batches],
            )
            for step in islice(loader, steps)
        ]


def test_ranks_read_their_own_tars_and_sum_their_counts(
    far: Server, run_ranks: Callable[..., list[Any]]
) -> None:
    first, second = run_ranks(2, of_rank, far.url, 8)
    for a, b in zip(first, second, strict=True):
        assert a[:4] == b[:4], "must be totals over all ranks"
        assert a[0] == a[4] + b[4] and a[1] == len(a[5]) + len(b[5])
        assert (a[6], b[6]) == ([0, 1], [2, 3])
        assert a[2] <= 4.0 + 1e-6
    own = [{key for step in part[:3] for key in step[5]} for part in (first, second)]
    assert own[0] and own[1] and not own[0] & own[1]


def test_a_resume_skips_the_group_that_was_being_read(
    far: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("d2v_ds"), "propagate", True)
    with closing(stream(far.url)) as loader:
        begun = [next(loader) for _ in range(2)]
        rest = first_epoch(loader)
    group = {key for step in [*begun, *rest] if step.cursor["group"] == 1 for key in keys(step)}
    assert len(group) == GROUP_TARS * CLIPS
    with closing(stream(far.url, cursor=begun[-1].cursor)) as loader:
        after = first_epoch(loader)
    assert {key for step in after for key in keys(step)} == ALL - group
    assert after[0].cursor["step"] == 3
    assert "a stream does not resume exactly" in caplog.text


# ------------------------------------------------------------------------------------------ errors


def test_damage_is_named_by_its_url(far: Server, tars: Path) -> None:
    """webdataset would end the tar there silently."""
    whole = (tars / "a-000003.tar").read_bytes()
    try:
        for harmed, reason in (
            (whole[: len(whole) // 1024 * 512], r"a-000003.tar: .* extend past the end at byte"),
            (whole.replace(b"clip20", b"clip2?", 1), r"a-000003.tar: damaged header .* at byte"),
        ):
            (tars / "a-000003.tar").write_bytes(harmed)
            with closing(stream(far.url)) as loader, pytest.raises(UserError, match=reason) as e:
                first_epoch(loader)
            assert str(e.value).startswith("http://127.0.0.1"), "the URL, not a file of the cache"
    finally:
        (tars / "a-000003.tar").write_bytes(whole)


def test_missing_tars_and_incomplete_answers(far: Server) -> None:
    far.answer = {"a-000001.tar": ["short", 503, "short"]}
    with closing(stream(far.url)) as loader:
        assert len({key for step in first_epoch(loader) for key in keys(step)}) == len(ALL)
    assert far.asked["a-000001.tar"] >= 4
    far.answer = {"a-000001.tar": [404]}
    with closing(stream(far.url)) as loader, pytest.raises(UserError, match=r"a-000001.tar: 404"):
        first_epoch(loader)


def write_tar(path: Path, clips: dict[str, bytes]) -> str:
    """Writes a tar; returns a URL that reads it by a command."""
    with webdataset.TarWriter(str(path)) as writer:
        for key, clip in clips.items():
            writer.write({"__key__": key, "flac" if clip[:4] == b"fLaC" else "wav": clip})
    return f"pipe:cat {path}"


def some_clips(number: int, first: int = 0) -> dict[str, bytes]:
    return {f"clip{first + i}": recording("wav", seconds=0.5, seed=i) for i in range(number)}


def test_bad_samples_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("d2v_ds"), "propagate", True)
    clips = {"clip0": recording("wav", seconds=1.0, rate=8_000), **some_clips(7, 1)}
    clips["clip3"] = b"no recording"  # visible in its header
    flac = bytearray(recording("flac", seconds=0.5))
    flac[len(flac) // 2 :] = bytes(len(flac) - len(flac) // 2)
    clips["clip5"] = bytes(flac)  # visible when it is decoded, as for clip0
    url, lines = write_tar(tmp_path / "a.tar", clips), tmp_path / "bad.jsonl"
    settings: dict[str, Any] = {"size": 2.0, "micro_batches": 1}
    with closing(stream(url, quarantine=Quarantine(lines, 0.5), **settings)) as loader:
        steps = list(islice(loader, 12))
    assert {key for step in steps for key in keys(step)} == clips.keys() - {
        "clip0",
        "clip3",
        "clip5",
    }
    found = {line["key"]: line for line in map(json.loads, lines.read_text().splitlines())}
    assert found.keys() == {"clip0", "clip3", "clip5"}
    assert len(lines.read_text().splitlines()) == 3, "once each"
    assert {line["tar"] for line in found.values()} == {url}
    assert found["clip0"]["reason"] == "is 8000 Hz, expected 16000 Hz"
    assert found["clip3"]["reason"] == ".wav: is not WAV"
    assert "clip3': .wav: is not WAV; it is left out" in caplog.text
    assert sum(sum(step.bad.values()) for step in steps if step.cursor["epoch"] == 0) == 3
    loader = stream(url, quarantine=Quarantine(lines, 0.0), **settings)
    with closing(loader), pytest.raises(UserError, match=r"sample 'clip\d'.*more|cannot be used"):
        list(islice(loader, 12))


def test_tars_with_less_than_a_step_are_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("d2v_ds"), "propagate", True)
    monkeypatch.setattr(stream_module, "GROUP_TARS", 1)
    for i, clips in enumerate([some_clips(8), some_clips(1, 8), some_clips(8, 9), {}]):
        url = write_tar(tmp_path / f"{i}.tar", clips).replace(f"{i}.tar", "{0..3}.tar")
    with closing(stream(url)) as loader:
        found = {key for step in first_epoch(loader) for key in keys(step)}
    assert found == {f"clip{i}" for i in range(17)} - {"clip8"}
    assert "1.tar: skipped: data.shards: modality.speech can use only 1 of 1 sam" in caplog.text
    assert "3.tar: skipped: they have no usable sample" in caplog.text
    with (
        closing(stream(url.replace("0..3", "1,3"))) as loader,
        pytest.raises(UserError, match="an epoch of 2 tars for 1 ranks has less than one step"),
    ):
        next(loader)


def test_groups_are_of_about_one_size(tmp_path: Path) -> None:
    """The last group is not a single tar, which might have less than a step."""
    url = write_tar(tmp_path / "0.tar", some_clips(1)).replace("0.tar", "{0..8}.tar")
    with closing(stream(url)) as loader:
        groups = loader._groups()
        assert [len(next(groups)[2]) for _ in range(6)] == [3] * 6


def test_a_hanging_download_does_not_keep_the_process_from_ending(tmp_path: Path) -> None:
    hangs = f"echo $$ > {tmp_path}/pid; sleep 600; cat a.tar"
    code = f"""
import sys; sys.path[:0] = {sys.path!r}
from pathlib import Path
import time
from tests.loader.test_stream import stream
loader = stream({"pipe:" + hangs!r})
while not Path({f"{tmp_path}/pid"!r}).exists():
    time.sleep(0.02)
time.sleep(0.2)
loader.close()
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), timeout=60)
    assert done.returncode == 0
    group = int((tmp_path / "pid").read_text())
    assert not [p for p in Path("/proc").glob("[0-9]*/stat") if group_of(p) == group], "sleep"


def group_of(stat: Path) -> int:
    """The process group of a running process; 0 if it has ended."""
    try:
        state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if state == "Z" else int(group)


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(UserError, match=r"2 tars without an index for 4 ranks.*Use at most 2 rank"):
        stream("https://h/a-{0..1}.tar", world=4)
    with pytest.raises(
        UserError, match=r"2 s in 4 micro-batches leaves 0.5 s .* up to 0.6. Use at"
    ):
        stream("https://h/a-{0..1}.tar", size=2.0)


# --------------------------------------------------------------------------------------- whole runs


def test_a_run_streams_and_resumes(far: Server, tmp_path: Path) -> None:
    settings = [
        f"data.shards={far.url}",
        *QUICK,
        "batch.size=4",
        "modality.speech.crop_seconds=0.6",
    ]
    run = Run(tmp_path / "run", "speech_tiny", *settings, "modality.speech.min_seconds=0.3")
    done = run.train("run.steps=3", "save.every=3", "data.workers=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "an epoch: 10 tars without an index, 5 per rank" in done.stdout
    done = run.train("run.steps=5", "save.every=3", "data.workers=0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a stream does not resume exactly" in done.stdout
    assert list(run.losses()) == [1, 2, 3, 4, 5]
    refused = Run(tmp_path / "other", "speech_tiny", *settings).train(nproc=16)
    assert refused.returncode == 2 and "batch.micro_batches" in refused.stderr
