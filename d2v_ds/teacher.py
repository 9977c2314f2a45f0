"""The teacher: a frozen encoder whose weights are the moving average of the student's.

Two halves. `Teacher` is the forward copy, a submodule of the task inside the one engine, in the
student's precision. `Ema` is the state: fp32 values of what this rank owns, averaged from the
engine's fp32 masters and then published into the forward copy; it knows neither stage nor rank.

B samples, T tokens, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from d2v_ds.batch import Batch
from d2v_ds.checkpoint.format import Kind, Pieces
from d2v_ds.engine import Engine
from d2v_ds.student import Encoder


class Teacher(nn.Module):
    """A copy of the student's encoder without the parts that it shares with the student.

    shared: for each modality, parts of its front end (features, positions, context) that are always
    the student's own. What fairseq keeps in the teacher and overwrites with the student's values at
    every step (its `skip_keys`) is the same thing.
    """

    def __init__(self, encoder: Encoder, shared: Mapping[str, tuple[str, ...]]) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        for modality, parts in shared.items():
            front_end = self.encoder.front_end(modality)
            front_end.mask_token = None  # it sees everything
            for part in parts:
                setattr(front_end, part, None)
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
        shared = student.front_end(batch.modality)
        if own.features is not None:
            tokens = own.features(batch.inputs)
        with evaluating(shared.context if own.context is None else None):
            _, _, layers = self.encoder.whole(batch, tokens.detach(), shared=shared, collect=top_k)
        return layers


@contextmanager
def evaluating(module: nn.Module | None) -> Iterator[None]:
    """Without the module's dropout, for a while."""
    training = module is not None and module.training
    if module is not None:
        module.train(False)
    yield
    if module is not None:
        module.train(training)


class Ema:
    """fp32 averages of what this rank owns of the student, by the teacher's parameter names.

    tracked: {teacher's name: student's name}, both full names in the task that `engine` wraps;
    teacher: the frozen module that `publish` writes, whose names begin with `prefix`.

    At a decay of 0.99999 a step moves an average by less than half a unit of its last fp32 digit,
    so a plain fp32 average stands still, or drifts. Here what rounding takes from `values` goes
    into `compensation` and comes back in the next step (Kahan 1965): the average is their sum.
    """

    def __init__(
        self, engine: Engine, teacher: nn.Module, tracked: Mapping[str, str], prefix: str
    ) -> None:
        self.engine = engine
        self.teacher = teacher
        self.prefix = prefix
        partitions = engine.partitions()
        part = {name: group.part for group in engine.groups for name in group.parameters}
        missing = sorted(set(tracked.values()) - part.keys())
        assert not missing, f"the teacher follows parameters that are not trained: {missing}"
        owned = {t: partitions[s] for t, s in tracked.items() if s in partitions}
        self.values = {t: (s.offset, s.master.clone()) for t, s in owned.items()}
        self.compensation = {t: (s.offset, torch.zeros_like(s.master)) for t, s in owned.items()}
        by_part: dict[str, list[Piece]] = {}
        for t, partition in owned.items():
            piece = (self.values[t][1], self.compensation[t][1], partition.master)
            by_part.setdefault(part[tracked[t]], []).append(piece)
        self._chunks = {name: in_chunks(pieces) for name, pieces in by_part.items()}
        self.publish()

    @property
    def pieces(self) -> dict[Kind, Pieces]:
        """What a checkpoint holds of it, live."""
        return {"ema": self.values, "ema_compensation": self.compensation}

    def update(self, decay: float, active: str) -> None:
        """values = decay * values + (1 - decay) * masters, for what the step of the modality
        `active` trained; then the forward copy follows. Called after a step that was taken."""
        for part in {"", active}:
            for values, compensation, masters in self._chunks.get(part, ()):
                move(values, compensation, masters, 1.0 - decay)
        self.publish()

    def publish(self) -> None:
        """The forward copy takes the averages; also after `values` were restored."""
        self.engine.publish(
            self.teacher, {name.removeprefix(self.prefix): v for name, v in self.values.items()}
        )


# An update's temporary has this many elements: on a CPU few enough for a core's cache, and for
# torch not to share out the work, which costs more than it saves; on a GPU enough to keep it busy.
CHUNK = {"cpu": 2**15, "cuda": 2**24}

Piece = tuple[Tensor, Tensor, Tensor]  # flat fp32: value, compensation, master, of one length
Chunk = tuple[list[Tensor], list[Tensor], list[Tensor]]  # the same, in lists


def in_chunks(pieces: Sequence[Piece], size: int = 0) -> list[Chunk]:
    """Views of all pieces, cut and gathered into lists of at most `size` elements together; 0: what
    is best where they lie."""
    size = size or CHUNK["cuda" if pieces[0][0].is_cuda else "cpu"]
    chunks: list[Chunk] = []
    room = 0
    for piece in pieces:
        start, length = 0, len(piece[0])
        while start < length:
            if room == 0:
                chunks.append(([], [], []))
                room = size
            taken = min(room, length - start)
            for views, whole in zip(chunks[-1], piece, strict=True):
                views.append(whole[start : start + taken])
            start, room = start + taken, room - taken
    return chunks


def move(
    values: list[Tensor], compensation: list[Tensor], masters: list[Tensor], weight: float
) -> None:
    """values + compensation go the share `weight` of their way to the masters, in place."""
    work = torch._foreach_sub(masters, values)
    torch._foreach_lerp_(compensation, work, weight)  # what is to be added to the values
    torch._foreach_copy_(work, values)
    torch._foreach_add_(values, compensation)
    torch._foreach_sub_(work, values)
    torch._foreach_add_(compensation, work)  # what was not
