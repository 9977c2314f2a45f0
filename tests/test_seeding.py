"""Seeds: the same everywhere, and different for different paths."""

from __future__ import annotations

import torch

from d2v_ds.seeding import seed_torch, stable_hash


def test_stable_hash_is_the_same_everywhere_and_distinguishes_parts() -> None:
    assert stable_hash(0, 1, 2) == 3662037204992188296
    assert len({stable_hash(*p) for p in [(1, 23), (12, 3), (123,), ("1/23",)]}) >= 3
    assert all(0 <= stable_hash(i) < 2**63 for i in range(100))


def test_seeds_distinguish_seed_step_and_micro_batch() -> None:
    drawn = set()
    for triple in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        seed_torch(*triple)
        first = torch.rand(3)
        seed_torch(*triple)
        assert torch.equal(first, torch.rand(3))
        drawn.add(first.sum().item())
    assert len(drawn) == 4
