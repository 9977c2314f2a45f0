"""The memory that a rank needs, computed without data or a GPU.

    sizes --formula--> state_bytes: weights, gradients, optimizer, teacher, by ZeRO stage
    task, examples --forward and backward on the meta device--> activation_bytes of a micro-batch
    the same on a CPU or GPU --> measured_activations

On the meta device the model runs on tensors without data. Its actual allocations are counted, for
any modality.

P trained parameters, A parameters that the teacher averages.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from d2v_ds.batch import Batch
from d2v_ds.pretrain import Pretrain


def sizes(task: Pretrain) -> tuple[int, int]:
    """(P, A) of a task."""
    return (
        sum(p.numel() for p in task.student.parameters()),
        sum(p.numel() for p in task.teacher.parameters()),
    )


def state_bytes(P: int, A: int, stage: int, ranks: int, width: int) -> int:
    """Bytes of weights, gradients, optimizer and teacher per rank, without activations.

    width: bytes per weight, 2 or 4. ZeRO partitions the fp32 states over the ranks from stage 1,
    the gradients from stage 2, and the weights and the teacher's copy at stage 3.
    """
    masters = 0 if stage == 0 and width == 4 else 4 * P  # stage 0 in fp32 has no separate masters
    states = masters + 8 * P + 8 * A  # two moments; the average and its compensation
    gradients, weights = width * P, width * (P + A)
    return (
        states // (ranks if stage >= 1 else 1)
        + gradients // (ranks if stage >= 2 else 1)
        + weights // (ranks if stage == 3 else 1)
    )


def checkpoint_bytes(P: int, A: int) -> int:
    """Bytes of a checkpoint over all ranks: masters, two moments, averages and compensations, in
    fp32."""
    return 12 * P + 8 * A


def activation_bytes(task: Pretrain, batch: Batch, dtype: torch.dtype, *, fused: bool) -> int:
    """The peak memory of forward and backward of `batch`, without weights and gradients.

    Moves the task to the meta device, in `dtype`. fused: attention as fused GPU kernels compute it,
    without storing the weights of all pairs of tokens; otherwise as a CPU computes it with a
    learned bias.
    """
    task.to("meta", dtype)  # buffers may still be on another device
    batch = batch.to(torch.device("meta"))
    with torch.enable_grad(), fused_attention(fused), PeakMemory(task, batch) as memory:
        run_once(task, batch)
    peak: int = memory.peak
    return peak


def measured_activations(task: Pretrain, batch: Batch) -> tuple[int, float]:
    """(Bytes that activation_bytes estimates, measured by the allocator of the task's device;
    seconds of forward and backward). The first pass is not measured, because libraries allocate
    their own buffers in it."""
    device = next(task.parameters()).device
    batch = batch.to(device)
    run_once(task, batch)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        run_once(task, batch)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, time.perf_counter() - start
    start = time.perf_counter()
    run_once(task, batch)
    seconds = time.perf_counter() - start
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run_once(task, batch)
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        now += change
        peak = max(peak, now)
    return peak, seconds


def run_once(task: nn.Module, batch: Batch) -> None:
    """Runs forward and backward of one micro-batch. Frees every gradient immediately, because
    state_bytes counts gradients."""

    def drop(p: Tensor) -> None:
        p.grad = None

    trained = [p for p in task.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(drop) for p in trained]  # type: ignore[no-untyped-call]
    loss, _ = task(batch, batch.masked.numel())
    loss.backward()
    for hook in hooks:
        hook.remove()


def largest_batch(task: Pretrain, modality: str, samples: int) -> Batch:
    """A micro-batch of `samples` examples of the modality's largest size."""
    kind = task.modalities[modality]
    rngs = [np.random.default_rng(i) for i in range(samples)]
    return kind.collate([kind.largest()] * samples, rngs, 0)


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that operations allocate, and their peak. given: modules and batches whose
    memory is not counted."""

    def __init__(self, *given: nn.Module | Batch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: set[int] = set()
        self._given = [t.untyped_storage() for t in tensors_of(given)]  # keeps them alive
        self._alive.update(storage._cdata for storage in self._given)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self._count(made.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive.add(key)
            self.now += size
            weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._alive.remove(key)
        self.now -= size


def tensors_of(given: Iterable[nn.Module | Batch]) -> Iterable[Tensor]:
    """All tensors of modules and batches."""
    for one in given:
        if isinstance(one, nn.Module):
            yield from one.parameters()
            yield from one.buffers()
        else:
            yield from (value for value in vars(one).values() if isinstance(value, Tensor))


@contextmanager
def fused_attention(on: bool) -> Iterator[None]:
    """On the meta device, computes attention with the memory of a fused kernel instead of plain
    operations. A torch function mode would not reach the recomputation in the backward pass."""
    plain = F.scaled_dot_product_attention
    if on:
        F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None, dropout_p: float
) -> Tensor:
    """q, k, v [R, H, T, D / H], attn_mask broadcastable to [R, H, T, T] or None -> [R, H, T, D / H]
    by the fused kernel that supports a learned bias."""
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    keep = torch.is_grad_enabled()
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    out: Tensor = kernel(q, k, v, attn_mask, keep, dropout_p)[0]
    return out
