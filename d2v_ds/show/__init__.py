"""`d2v-ds show`: parameters, memory and batch split of a run, without data or a GPU.

Config --task on the meta device--> parameters by part, memory by ZeRO stage, batch split
the same + the memory of a GPU --> the ZeRO stage and the micro-batch that fit
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch

from d2v_ds.config import Config
from d2v_ds.config.decoding import dump_yaml
from d2v_ds.engine import DTYPES, resolve_precision
from d2v_ds.loader.mixture import shares_of
from d2v_ds.modalities.base import Modality
from d2v_ds.pretrain import Pretrain
from d2v_ds.show.memory import (
    activation_bytes,
    checkpoint_bytes,
    largest_batch,
    measured_activations,
    sizes,
    state_bytes,
)
from d2v_ds.transformer import Trunk

GIB = 2**30
LONGEST = 2**40  # longer than any crop
FREE = 0.1  # fraction of a GPU's memory reserved for driver, communication and fragmentation


def describe(
    config: Config, ranks: int, gpu_memory: int | None = None, *, measure: bool = False
) -> str:
    """The text that `d2v-ds show` prints. gpu_memory: bytes per GPU; adds the ZeRO stages and
    micro-batches that fit. measure: run the largest micro-batch of each modality on this machine
    instead of estimating its memory. Raises UserError."""
    config = Pretrain.resolve(config)
    with torch.device("meta"):
        task = Pretrain.create(config)
    measured = measure_longest(config) if measure else {}
    warnings = [w for m in task.modalities.values() for w in m.warnings()]
    return "\n".join(
        [
            dump_yaml(config).rstrip(),
            "",
            *parameters(task),
            "",
            *memory(task, ranks),
            "",
            *batch_split(config, task.modalities, ranks),
            *(["", *(m.line for m in measured.values())] if measured else []),
            *([] if gpu_memory is None else ["", *fit(task, config, ranks, gpu_memory, measured)]),
            *(f"warning: {warning}" for warning in warnings),
        ]
    )


def parameters(task: Pretrain) -> list[str]:
    """Parameter counts by part of the model and, if a run has several modalities, by modality.
    Fixed positions are included, as in the original code."""
    counts: Counter[str] = Counter()
    own: Counter[str] = Counter()
    for name, parameter in [*task.student.named_parameters(), *task.student.named_buffers()]:
        pieces = name.split(".")
        named = 4 if "front_ends" in pieces else 2
        counts[".".join(pieces[:named])] += parameter.numel()
        own[task.part(f"student.{name}")] += parameter.numel()
    parts = ["", *task.modalities] if len(task.modalities) > 1 else []
    teacher = sizes(task)[1] + sum(b.numel() for b in task.teacher.buffers())
    width = max(map(len, counts)) + 2
    return [
        "parameters",
        *(f"  {name:<{width}}{count:>14,}" for name, count in counts.items()),
        *(f"  {f'of {name}' if name else 'shared':<{width}}{own[name]:>14,}" for name in parts),
        f"  {'student':<{width}}{counts.total():>14,}",
        f"  {'teacher':<{width}}{teacher:>14,}",
    ]


def memory(task: Pretrain, ranks: int) -> list[str]:
    """Memory per rank by ZeRO stage and precision."""
    P, A = sizes(task)
    lines = [
        f"GiB per rank on {counted(ranks, 'rank')}, without activations",
        f"  {'':<8}" + "".join(f"{f'ZeRO {stage}':>10}" for stage in range(4)),
    ]
    for name, width in (("bf16", 2), ("fp32", 4)):
        cells = (state_bytes(P, A, stage, ranks, width) / GIB for stage in range(4))
        lines.append(f"  {name:<8}" + "".join(f"{cell:>10.3f}" for cell in cells))
    return lines


def counted(number: int, noun: str, plural: str = "s") -> str:
    """1 rank, 2 ranks."""
    return f"{number} {noun}{'' if number == 1 else plural}"


def batch_split(config: Config, modalities: Mapping[str, Modality], ranks: int) -> list[str]:
    """How a step is split into micro-batches, and steps are divided among the sources."""
    number = config.batch.micro_batches
    divisors = [str(n) for n in range(1, number + 1) if number % n == 0]
    allowed = " or ".join(filter(None, [", ".join(divisors[:-1]), divisors[-1]]))
    lines = []
    for name, modality in modalities.items():
        size, unit = config.batch_size(name), modality.batch_unit
        of = "" if len(modalities) == 1 else f" of {name}"
        lines.append(
            f"a step{of} ({size:g} {unit}) is split into "
            f"{counted(number, 'micro-batch', 'es')} of at most {size / number:g} {unit}"
        )
    if len(config.sources) > 1:
        shares = zip(config.sources, shares_of(config).of, strict=True)
        shown = ", ".join(f"{source} {float(share):.1%}" for source, share in shares)
        lines.append(f"each step reads one source; shares of the steps: {shown}")
    lines.append(f"runs on {allowed} rank{'' if number == 1 else 's'}, with the same batches")
    if number % ranks == 0:
        each = counted(number // ranks, "micro-batch", "es")
        lines.append(f"on {counted(ranks, 'rank')}, each rank computes {each} per step")
    return lines


@dataclass(frozen=True)
class Measured:
    """Measurements of the largest micro-batch of a modality on this machine."""

    bytes: int  # of activations
    line: str


def measure_longest(config: Config) -> dict[str, Measured]:
    """Runs forward and backward of each modality's largest micro-batch in the run's precision, on
    the GPU if there is one. Raises UserError if the precision is not available."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(config.engine.precision, device)
    torch.manual_seed(config.run.seed)
    task = Pretrain.create(config).train().to(device, DTYPES[precision])
    measured = {}
    for name, modality in task.modalities.items():
        samples = micro_batch_samples(config, modality)
        size, seconds = measured_activations(task, largest_batch(task, name, samples))
        measured[name] = Measured(
            size,
            f"{name}: measured on this machine's {device.type} in {precision}: a micro-batch of "
            f"{samples * modality.cost(LONGEST):g} {modality.batch_unit} takes {size / GIB:.3f} "
            f"GiB of activations and {seconds:.2f} s",
        )
    return measured


def micro_batch_samples(config: Config, modality: Modality) -> int:
    """The number of a modality's largest samples in a micro-batch."""
    limit = config.batch_size(modality.name) / config.batch.micro_batches
    return max(1, int(limit / modality.cost(LONGEST) + 1e-6))


def fit(
    task: Pretrain,
    config: Config,
    ranks: int,
    gpu_memory: int,
    measured: Mapping[str, Measured],
) -> list[str]:
    """The smallest ZeRO stage that fits the configured micro-batch, and the largest micro-batch of
    each stage, by modality."""
    P, A = sizes(task)
    width = 4 if config.engine.precision == "fp32" else 2
    states = [state_bytes(P, A, stage, ranks, width) for stage in range(4)]
    room = [int(gpu_memory * (1 - FREE)) - of_stage for of_stage in states]
    lines = [
        f"with {gpu_memory / GIB:g} GiB per GPU, {FREE:.0%} of it kept free, on "
        f"{counted(ranks, 'rank')}"
    ]
    stages = []
    for name, modality in task.modalities.items():
        cost, unit = modality.cost(LONGEST), modality.batch_unit
        samples = micro_batch_samples(config, modality)
        needs = [activations(task, name, width, samples, again) for again in (False, True)]
        own = needs[config.model["checkpoint_activations"]][samples]
        if name in measured:
            own = measured[name].bytes
        stage = next((stage for stage in range(4) if own <= room[stage]), None)
        stages.append(stage)
        lines += [
            f"{name}: activations of {samples * cost:g} {unit} take "
            f"{needs[0][samples] / GIB:.2f} GiB, or {needs[1][samples] / GIB:.2f} GiB with "
            "model.checkpoint_activations=true",
            "  does not fit at any ZeRO stage: use more ranks, raise batch.micro_batches or lower "
            "batch.size"
            if stage is None
            else f"  smallest ZeRO stage that fits: engine.config=zero{stage}",
            f"  {f'largest micro-batch ({unit})':<28}{'plain':>14}{'checkpointed':>14}",
        ]
        for stage in range(4):
            cells = (most_samples(need, room[stage]) * cost for need in needs)
            lines.append(f"  {f'ZeRO {stage}':<28}" + "".join(f"{cell:>14,.0f}" for cell in cells))
    if len(stages) > 1:
        fitting = [stage for stage in stages if stage is not None]
        lines.append(
            f"smallest ZeRO stage that fits all modalities: engine.config=zero{max(fitting)}"
            if len(fitting) == len(stages)
            else "the run does not fit at any ZeRO stage, because not all of its modalities fit"
        )
    return [*lines, f"a checkpoint takes {checkpoint_bytes(P, A) / 1e9:.3g} GB on disk"]


def activations(
    task: Pretrain, modality: str, width: int, samples: int, again: bool
) -> dict[int, int]:
    """{samples in a micro-batch: bytes of activations}, for `samples` and a few other numbers.
    width: bytes per weight, 4 for fp32, 2 for bf16 and fp16; again: with activation
    checkpointing."""
    for module in task.modules():
        if isinstance(module, Trunk):
            module.checkpoint_activations = again
    dtype = torch.float32 if width == 4 else torch.bfloat16
    many = max(samples, 8)
    return {
        n: activation_bytes(task, largest_batch(task, modality, n), dtype, fused=True)
        for n in sorted({1, samples, many, 2 * many})
    }


def most_samples(needed: Mapping[int, int], room: int) -> int:
    """The number of samples that fit into `room` bytes. needed: as `activations` returns it.

    Memory grows more slowly for few samples, because a part of it is constant. Linear interpolation
    between two measured numbers therefore never underestimates it.
    """
    numbers = list(needed)
    if needed[1] > room:
        return 0
    low, high = numbers[-2:]  # beyond the last number, the slope between the last two
    for a, b in pairwise(numbers):
        if needed[b] > room:
            low, high = a, b
            break
    slope = (needed[high] - needed[low]) / (high - low)
    return int(low + (room - needed[low]) / slope)
