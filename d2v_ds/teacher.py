"""The teacher: a frozen encoder whose weights are the moving average of the student's.

Two halves. `Teacher` is the forward copy, a submodule of the task inside the one engine, in the
student's precision. `Ema` is the state: fp32 values of what this rank owns, averaged from the
engine's fp32 masters and then published into the forward copy; it knows neither stage nor rank.

B samples, T tokens, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from d2v_ds.batch import Batch
from d2v_ds.engine import Engine
from d2v_ds.student import Encoder


class Teacher(nn.Module):
    """A copy of the student's encoder without the parts that it shares with the student.

    shared: for each modality, parts of its front end (features, positions) that are always the
    student's own (data2vec.md 3.1: parts "overwritten each step" are the same thing).
    """

    def __init__(self, encoder: Encoder, shared: Mapping[str, tuple[str, ...]]) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        for modality, parts in shared.items():
            for part in parts:
                setattr(self.encoder.front_end(modality), part, None)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Teacher:
        """Always in evaluation mode, whatever the task around it is set to."""
        super().train(False)
        return self

    @torch.no_grad()
    def layers(
        self, student: Encoder, batch: Batch, tokens: Tensor, top_k: int
    ) -> list[tuple[Tensor, Tensor]]:
        """(FFN output, block output), each [B, T, D], of the top_k blocks on the unmasked batch.
        tokens [B, T, D]: what the student's features made of it, for a teacher that shares them."""
        own = self.encoder.front_end(batch.modality)
        if own.features is not None:
            tokens = own.features(batch.inputs)
        _, layers = self.encoder.whole(
            batch.modality,
            tokens.detach(),
            batch.valid,
            positions=own.positions or student.front_end(batch.modality).positions,
            collect=top_k,
        )
        return layers


class Ema:
    """fp32 averages of what this rank owns of the student, by the teacher's parameter names.

    tracked: {teacher's name: student's name}, both full names in the task that `engine` wraps;
    teacher: the frozen module that `publish` writes, whose names begin with `prefix`.
    """

    def __init__(
        self, engine: Engine, teacher: nn.Module, tracked: Mapping[str, str], prefix: str
    ) -> None:
        self.engine = engine
        self.teacher = teacher
        self.prefix = prefix
        shards = engine.shards()
        part = {name: group.part for group in engine.groups for name in group.parameters}
        missing = sorted(set(tracked.values()) - part.keys())
        assert not missing, f"the teacher follows parameters that are not trained: {missing}"
        self.masters = {t: shards[s].master for t, s in tracked.items() if s in shards}
        self.values = {
            t: (shards[s].offset, shards[s].master.clone())
            for t, s in tracked.items()
            if s in shards
        }
        self.part = {t: part[s] for t, s in tracked.items()}
        self.publish()

    def update(self, decay: float, active: str) -> None:
        """values = decay * values + (1 - decay) * masters, for what the step of the modality
        `active` trained; then the forward copy follows. Called after a step that was taken."""
        names = [name for name in self.values if self.part[name] in ("", active)]
        values = [self.values[name][1] for name in names]
        masters = [self.masters[name] for name in names]
        if values:
            torch._foreach_lerp_(values, masters, 1.0 - decay)
        self.publish()

    def publish(self) -> None:
        """The forward copy takes the averages; also after `values` were restored."""
        self.engine.publish(
            self.teacher, {name.removeprefix(self.prefix): v for name, v in self.values.items()}
        )
