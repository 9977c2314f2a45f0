"""Properties of the loader for random runs: a changing number of ranks neither loses nor repeats a
sample, and damaged shards neither crash the loader nor remain undetected."""

from __future__ import annotations

import shutil
from collections import Counter
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2v_ds.batch import Batch
from d2v_ds.data.shard_format import ShardSet, open_set
from d2v_ds.errors import UserError
from d2v_ds.loader import plan as plan_module
from tests.helpers.series import modality, series, write_set
from tests.loader.test_loader import make_loader

LENGTHS = [[9 + 37 * i % 240 for i in range(n)] for n in (40, 7, 60, 13)]
SAMPLES = {f"s{s}-{i}": n for s, shard in enumerate(LENGTHS) for i, n in enumerate(shard)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_set(tmp_path_factory.mktemp("sets") / "series", LENGTHS)


@pytest.fixture(autouse=True, scope="module")
def small_pools() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("WINDOW", 50), ("POOL", 30), ("POOL_STEPS", 2)):
            patch.setattr(plan_module, name, value)
        yield


def keys_of(parts: list[Any]) -> list[str]:
    return [key for part in parts for batch in part.micro_batches for key in batch.keys]


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, float, int, list[tuple[int, int]]]:
    """(seed, size, micro_batches, [(ranks, steps) for each start])."""
    micro_batches = draw(st.sampled_from([1, 2, 3, 4, 6, 12]))
    ranks = [n for n in range(1, micro_batches + 1) if micro_batches % n == 0]
    starts = st.lists(st.tuples(st.sampled_from(ranks), st.integers(1, 9)), min_size=1, max_size=6)
    size = micro_batches * draw(st.floats(200, 900))
    return draw(st.integers(0, 2**40)), size, micro_batches, draw(starts)


@given(run=runs())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_sample_is_lost_or_repeated_when_ranks_change(
    shards: ShardSet, run: tuple[int, float, int, list[tuple[int, int]]]
) -> None:
    """A ledger of all samples of a run that is resumed on other numbers of ranks, across epochs:
    each complete epoch has every sample once, in the same order as one uninterrupted rank."""
    seed, size, micro_batches, starts = run
    cursor: dict[str, Any] | None = None
    ledger: list[tuple[int, list[str]]] = []
    common: dict[str, Any] = {"seed": seed, "size": size, "micro_batches": micro_batches}
    for world, steps in starts:
        with ExitStack() as stack:
            loaders = [
                stack.enter_context(
                    closing(make_loader(shards, rank=r, world=world, cursor=cursor, **common))
                )
                for r in range(world)
            ]
            for _ in range(steps):
                parts = [next(one) for one in loaders]
                cursor = parts[0].cursor
                assert all(part.cursor == cursor for part in parts)
                ledger.append((cursor["epoch"], keys_of(parts)))
    with closing(make_loader(shards, **common)) as loader:
        alone = [(step.cursor["epoch"], keys_of([step])) for step in islice(loader, len(ledger))]
        assert ledger == alone
        over = loader.plan.samples - loader.stats.samples  # fewer than a step
    last = ledger[-1][0]
    for epoch in range(last + 1):
        seen = Counter(key for number, keys in ledger if number == epoch for key in keys)
        assert max(seen.values()) == 1 and seen.keys() <= SAMPLES.keys()
        if epoch < last:
            assert len(SAMPLES) - len(seen) < micro_batches
    assert 0 <= over < micro_batches


# --------------------------------------------------------------------------------------- damage


@st.composite
def damages(draw: st.DrawFn) -> list[tuple[str, int, float, int]]:
    """(kind of damage, shard, relative offset, bytes)."""
    what = st.sampled_from(["flip", "zero", "cut", "idx flip", "idx cut", "noise"])
    one = st.tuples(what, st.integers(0, 3), st.floats(0, 0.999), st.integers(1, 4000))
    return draw(st.lists(one, min_size=1, max_size=4))


def harm(path: Path, what: str, where: float, much: int) -> None:
    data = bytearray(path.read_bytes())
    at = int(where * len(data))
    if what == "flip":
        data[at : at + 1] = bytes(byte ^ 1 << much % 8 for byte in data[at : at + 1])
    elif what == "cut":
        del data[at:]
    else:
        stretch = data[at : at + much]
        noise = np.random.default_rng(much).bytes(len(stretch))
        data[at : at + much] = bytes(len(stretch)) if what == "zero" else noise
    path.write_bytes(data)


def check_damaged(shards: ShardSet, folder: Path, damage: list[tuple[str, int, float, int]]) -> str:
    """Reads an epoch of a damaged copy and returns the outcome."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(shards.root, folder)
    copy = open_set(folder)  # the damage happens during the run
    for what, shard, where, much in damage:
        entry = copy.shards[shard]
        file = copy.index(entry) if what.startswith("idx") else copy.tar(entry)
        harm(file, what.removeprefix("idx "), where, much)
    try:
        with closing(make_loader(copy, max_bad=0.99)) as loader:
            steps = list(islice(loader, loader.stats.steps))
            bad = {each.key for each in loader.quarantine.bad.values()}
            samples = loader.stats.samples
    except UserError as error:
        assert str(folder) in str(error), "the error must name the file"
        return "error"
    batches = [batch for step in steps for batch in step.micro_batches]
    keys = [key for batch in batches for key in batch.keys]
    assert len(keys) == samples, "the planned number"
    assert SAMPLES.keys() - set(keys) <= bad, "no sample is left out silently"
    assert sum(sum(step.bad.values()) for step in steps) == len(bad)
    assert not bad & set(keys), "bad samples are not used"
    for batch in batches:
        check_content(batch)
    return "bad" if bad else "whole"


def check_content(batch: Batch) -> None:
    """Every row is a piece of the sample of its key, repeated if it replaces a longer one."""
    for key, row, seen in zip(batch.keys, batch.inputs.numpy(), batch.seen[::2], strict=True):
        whole = np.frombuffer(series(key, SAMPLES[key]), "<i2")
        start = int(row[0]) - int(whole[0])  # readings count up by one
        piece = whole[start : start + modality().crop(len(whole))]
        values = row[: np.flatnonzero(row)[-1] + 1]  # without the padding
        assert len(values) >= modality().config.least and seen.any()
        np.testing.assert_array_equal(values, np.resize(piece, len(values)))


@given(damage=damages())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_damaged_shards_are_survived_and_detected(
    shards: ShardSet,
    tmp_path_factory: pytest.TempPathFactory,
    damage: list[tuple[str, int, float, int]],
) -> None:
    check_damaged(shards, tmp_path_factory.getbasetemp() / "hurt", damage)


@pytest.mark.slow
@given(damage=damages())
@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_damaged_shards_are_survived_and_detected_at_length(
    shards: ShardSet,
    tmp_path_factory: pytest.TempPathFactory,
    damage: list[tuple[str, int, float, int]],
) -> None:
    check_damaged(shards, tmp_path_factory.getbasetemp() / "hurt", damage)


def test_the_fuzz_test_has_every_outcome(shards: ShardSet, tmp_path: Path) -> None:
    def outcome(*damage: tuple[str, int, float, int]) -> str:
        return check_damaged(shards, tmp_path / "hurt", list(damage))

    assert outcome(("flip", 1, 0.0, 3)) == "whole", "a header, which is not read"
    assert outcome(("zero", 2, 0.4, 4000)) == "bad"
    assert outcome(("cut", 0, 0.5, 1)) == "bad"
    assert outcome(("idx flip", 3, 0.5, 1)) == "error"
    assert outcome(("idx cut", 3, 0.9, 1)) == "error"
