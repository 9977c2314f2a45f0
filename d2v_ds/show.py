"""What a run will be, computed without a GPU and without data.

    Config --task on the meta device--> parameters by part, memory by ZeRO stage, batch split

P trained parameters, A those that the teacher averages, N ranks.
"""

from __future__ import annotations

from collections import Counter

import torch

from d2v_ds.config import Config
from d2v_ds.decoding import dump_yaml
from d2v_ds.pretrain import Pretrain, build_pretrain, resolved

GIB = 2**30


def describe(config: Config, ranks: int) -> str:
    """The text that `d2v-ds show` prints. Raises UserError."""
    config = resolved(config)
    with torch.device("meta"):
        task = build_pretrain(config)
    warnings = [w for m in task.modalities.values() for w in m.warnings()]
    return "\n".join(
        [
            dump_yaml(config).rstrip(),
            "",
            *parameters(task),
            "",
            *memory(task, ranks),
            "",
            *batch_split(config, {m.unit for m in task.modalities.values()}, ranks),
            *(f"warning: {warning}" for warning in warnings),
        ]
    )


def parameters(task: Pretrain) -> list[str]:
    """Counts by part of the model."""
    counts: Counter[str] = Counter()
    for name, parameter in task.student.named_parameters():
        pieces = name.split(".")
        named = 4 if "front_ends" in pieces else 2
        counts[".".join(pieces[:named])] += parameter.numel()
    student, teacher = sizes(task)
    width = max(map(len, counts)) + 2
    return [
        "parameters",
        *(f"  {name:<{width}}{count:>14,}" for name, count in counts.items()),
        f"  {'student, trained':<{width}}{student:>14,}",
        f"  {'teacher, averaged':<{width}}{teacher:>14,}",
    ]


def sizes(task: Pretrain) -> tuple[int, int]:
    """P and A."""
    return (
        sum(p.numel() for p in task.student.parameters()),
        sum(p.numel() for p in task.teacher.parameters()),
    )


def state_bytes(P: int, A: int, stage: int, ranks: int, width: int) -> int:
    """Bytes of weights, gradients, optimizer and teacher on one rank; activations come on top.

    width: of the low-precision weights, 2 or 4 bytes. Sharded over ranks are the fp32 states (from
    stage 1), the gradients (from 2), and the weights and the teacher's copy (at 3).
    """
    masters = 0 if stage == 0 and width == 4 else 4 * P  # stage 0 in fp32 trains the weights
    states = masters + 8 * P + 4 * A
    gradients, weights = width * P, width * (P + A)
    return (
        states // (ranks if stage >= 1 else 1)
        + gradients // (ranks if stage >= 2 else 1)
        + weights // (ranks if stage == 3 else 1)
    )


def memory(task: Pretrain, ranks: int) -> list[str]:
    P, A = sizes(task)
    lines = [
        f"GiB on each of {ranks} ranks, without activations",
        f"  {'':<8}" + "".join(f"{f'ZeRO {stage}':>10}" for stage in range(4)),
    ]
    for name, width in (("bf16", 2), ("fp32", 4)):
        cells = (state_bytes(P, A, stage, ranks, width) / GIB for stage in range(4))
        lines.append(f"  {name:<8}" + "".join(f"{cell:>10.3f}" for cell in cells))
    return lines


def batch_split(config: Config, units: set[str], ranks: int) -> list[str]:
    size, number, unit = config.batch.size, config.batch.micro_batches, " or ".join(sorted(units))
    divisors = [str(n) for n in range(1, number + 1) if number % n == 0]
    lines = [
        f"a step of {size:g} {unit} is cut into {number} micro-batches of at most "
        f"{size / number:g} {unit}, on {', '.join(divisors)} ranks alike"
    ]
    if number % ranks == 0:
        lines.append(f"each of {ranks} ranks makes {number // ranks} of them, one after the other")
    return lines
