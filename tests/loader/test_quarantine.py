"""Bad samples: detected, reported once, replaced by the same rule for any number of ranks and
workers; too many of them end the run."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2v_ds.data.shard_format import ShardSet
from d2v_ds.errors import UserError
from d2v_ds.loader import plan as plan_module
from d2v_ds.loader.loader import Loader
from d2v_ds.loader.quarantine import Past, Quarantine, names_of
from d2v_ds.loader.reading import BadSample
from tests.helpers.sensor import STRIDE
from tests.helpers.series import modality as series_modality
from tests.helpers.series import series, write_set
from tests.loader.test_loader import LENGTHS, damage, global_steps, make_loader

STEPS = 19  # per epoch
NEGATIVE = np.full(240, -1, "<i2").tobytes()
Damage = Callable[[ShardSet], None]


@pytest.fixture(autouse=True)
def small_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WINDOW", 60), ("POOL", 40), ("POOL_STEPS", 3)):
        monkeypatch.setattr(plan_module, name, value)


@pytest.fixture
def own(tmp_path: Path) -> ShardSet:
    return write_set(tmp_path / "own", LENGTHS)


def lose(shards: ShardSet) -> None:
    """Truncates a shard after its size was checked."""
    os.truncate(shards.tar(shards.shards[4]), 20_000)


def flip(shards: ShardSet) -> None:
    damage(shards, 2, b"s2-11")


def epoch(shards: ShardSet, **settings: Any) -> list[Any]:
    with closing(make_loader(shards, max_bad=0.9, **settings)) as loader:
        return list(islice(loader, STEPS))


@pytest.mark.parametrize("harm", [flip, lose])
def test_a_replacement_has_the_planned_size(own: ShardSet, harm: Damage) -> None:
    sound = epoch(own)
    harm(own)
    hurt = epoch(own)
    replaced = 0
    for before, after in zip(sound, hurt, strict=True):
        assert (before.samples, before.units, before.count, before.cursor) == (
            after.samples,
            after.units,
            after.count,
            after.cursor,
        )
        other = 0
        for a, b in zip(before.micro_batches, after.micro_batches, strict=True):
            assert a.inputs.shape == b.inputs.shape and a.seen.equal(b.seen)
            changed = [i for i, (x, y) in enumerate(zip(a.keys, b.keys, strict=True)) if x != y]
            other += len(changed)
            for i in range(len(a.keys)):
                assert a.inputs[i].equal(b.inputs[i]) or i in changed
            for i in changed:
                good = [j for j in range(len(a.keys)) if j not in changed]
                assert not good or b.keys[i] in [a.keys[j] for j in good]
        assert sum(after.bad.values()) == other
        replaced += other
    assert replaced == 1 if harm is flip else replaced > 5


def test_a_replacement_is_cut_to_size_or_repeated(tmp_path: Path) -> None:
    """Lots are in the order of cost: the sample before a bad one, or the one after the first."""
    lengths = [200, 180, 160, 140]
    for bad, key, expected in (
        ("s0-2", "s0-1", np.frombuffer(series("s0-1", 180), "<i2")[:160]),
        ("s0-0", "s0-1", np.resize(np.frombuffer(series("s0-1", 180), "<i2"), 200)),
    ):
        shards = write_set(tmp_path / bad, [lengths], {bad: NEGATIVE[: 2 * lengths[int(bad[-1])]]})
        loader = make_loader(shards, size=800, micro_batches=1)
        with closing(loader):
            [batch] = next(loader).micro_batches
        at = int(bad[-1])
        assert batch.keys == tuple(key if i == at else f"s0-{i}" for i in range(4))
        assert batch.inputs[at, : len(expected)].tolist() == expected.tolist()
        assert batch.seen[2 * at].sum() == len(expected) // STRIDE // 2


def test_a_spare_sample_replaces_a_whole_micro_batch(tmp_path: Path) -> None:
    """Each sample is a micro-batch."""
    shards = write_set(tmp_path / "set", [[200] * 12], {"s0-5": NEGATIVE[:400]})
    loader = make_loader(shards, size=800, micro_batches=4)
    with closing(loader):
        steps = list(islice(loader, 3))
    keys = [key for step in steps for batch in step.micro_batches for key in batch.keys]
    assert len(keys) == 12 and len(set(keys)) == 11 and "s0-5" not in keys
    assert sum(sum(step.bad.values()) for step in steps) == 1


@pytest.mark.parametrize("harm", [flip, lose])
def test_replacements_do_not_depend_on_ranks_and_workers(own: ShardSet, harm: Damage) -> None:
    harm(own)
    alone, cursor = global_steps(own, 2 * STEPS, max_bad=0.9)
    for world, workers in ((1, 2), (4, 0), (2, 1)):
        assert global_steps(own, 2 * STEPS, world, workers=workers, max_bad=0.9) == (
            alone,
            cursor,
        )
    first, middle = global_steps(own, 10, 2, max_bad=0.9)
    second, _ = global_steps(own, 5, 1, cursor=middle, max_bad=0.9)
    assert first + second == alone[:15]


@pytest.mark.parametrize("workers", [0, 1])
def test_each_is_reported_once(
    own: ShardSet,
    tmp_path: Path,
    workers: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("d2v_ds"), "propagate", True)
    flip(own)
    file = tmp_path / "run" / "bad_samples" / "rank00000.jsonl"
    with closing(make_loader(own, workers=workers, file=file, max_bad=0.01)) as loader:
        bad = [sum(step.bad.values()) for step in islice(loader, 2 * STEPS)]
    assert sum(bad) == 2, "once per epoch"
    reason = "its .series has changed: the index has another checksum for it"
    tar = str(own.tar(own.shards[2]))
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"sample_id": 68, "tar": tar, "key": "s2-11", "reason": reason, "kind": "damaged"}
    ]
    logged = f"{tar}, sample 's2-11': {reason}; it is replaced by another sample"
    assert [record.message for record in caplog.records] == [logged]


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_stop_the_run(own: ShardSet, tmp_path: Path, workers: int) -> None:
    for key in (b"s2-11", b"s2-30", b"s0-10", b"s4-2"):
        damage(own, int(key[1:2]), key)
    file = tmp_path / "bad.jsonl"
    loader = make_loader(own, workers=workers, file=file, max_bad=0.003)
    with closing(loader), pytest.raises(UserError) as caught:
        list(islice(loader, STEPS))
    message = str(caught.value)
    assert message.startswith("4 of the first ") and message.count("sample 's") == 3
    assert " samples cannot be used, more than data.max_bad=0.003 allows: " in message
    assert message.endswith("`d2v-shards verify` lists every fault of a set")
    assert len(file.read_text().splitlines()) == 4


def test_no_bad_sample_is_allowed_with_0(own: ShardSet) -> None:
    flip(own)
    loader = make_loader(own, max_bad=0)
    with closing(loader), pytest.raises(UserError, match=r"1 of the first .*sample 's2-11'"):
        list(islice(loader, STEPS))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_micro_batch_without_any_good_sample(tmp_path: Path, workers: int) -> None:
    keys = [f"s0-{i}" for i in range(20)]
    shards = write_set(tmp_path / "bad", [[50] * 20], dict.fromkeys(keys, NEGATIVE[:100]))
    loader = make_loader(shards, size=400, micro_batches=2, workers=workers)
    with closing(loader), pytest.raises(UserError) as caught:
        next(loader)
    assert str(caught.value).startswith("none of 2 samples of a micro-batch and 8 like them can be")
    assert "series-000000.tar, sample 's0-" in str(caught.value)
    assert "': has negative numbers. Copy the shard again" in str(caught.value)


def test_a_sample_whose_length_differs_from_the_index(tmp_path: Path) -> None:
    short = {"s0-3": series("s0-3", 30)}
    shards = write_set(tmp_path / "set", [[50] * 20], short)
    loader = Loader(shards, series_modality(), seed=0, size=400, micro_batches=1)  # type: ignore[arg-type]
    with closing(loader):
        steps = list(islice(loader, 3))
    assert [bad.reason for bad in loader.quarantine.bad.values()] == [
        "its length differs from that in the index"
    ]
    assert sum(sum(step.bad.values()) for step in steps) == 1


def samples(*numbers: int) -> list[BadSample]:
    return [BadSample(n, "/set/a.tar", f"k{n}", "is damaged") for n in numbers]


def test_a_resumed_run_reports_each_sample_once_and_keeps_the_share(tmp_path: Path) -> None:
    file = tmp_path / "bad_samples" / "rank00000.jsonl"
    first = Quarantine(file, 0.002)
    first.add(5_000, samples(1, 2, 3))
    first.add(100, samples(4))  # after the checkpoint that the run resumes from
    counted, reported = names_of(file.parent, {file.name: 3})
    assert {key for _, key in counted} == {"k1", "k2", "k3"}
    again = Quarantine(file, 0.002, Past(5_000, 3, counted, reported))
    again.add(100, samples(4))  # the same step once more
    assert again.new == 1 and len(file.read_text().splitlines()) == 4, "is reported twice"
    again.add(100, samples(1, 2, 3))
    again.add(100, samples(*range(5, 11)))
    assert again.new == 7
    with pytest.raises(UserError, match="11 of the first 5400 samples cannot be used"):
        again.add(100, samples(11))


def test_damaged_lists_of_bad_samples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("d2v_ds"), "propagate", True)
    file = tmp_path / "rank00000.jsonl"
    Quarantine(file).add(10, samples(1))
    with file.open("ab") as lines:
        lines.write(b"\0\0\n[]\n{}\n" + b'{"tar": 1, "key": []}\n{"tar": "/set/a.tar", "ke')
    _, reported = names_of(tmp_path, {})
    assert reported == {("/set/a.tar", "k1")}
    assert "5 damaged lines are left out" in caplog.text
    Quarantine(file).add(10, samples(2))  # not glued to the line that was cut
    assert names_of(tmp_path, {})[1] == {("/set/a.tar", "k1"), ("/set/a.tar", "k2")}


def test_a_list_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "bad_samples").write_text("a file instead of a folder")
    quarantine = Quarantine(tmp_path / "bad_samples" / "rank00000.jsonl")
    quarantine.add(10, samples(1))
    assert quarantine.losses is not None and quarantine.losses.total == 1
