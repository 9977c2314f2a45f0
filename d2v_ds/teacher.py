"""The teacher: a frozen encoder whose weights are the moving average of the student's.

    student's fp32 masters --Ema.update--> fp32 averages --Ema.publish--> Teacher, in low precision

`Teacher` is the forward copy, a submodule of the task inside the one engine, in the student's
precision. `Ema` is the state: fp32 averages of the parts of the student that this rank owns. It
does not depend on the ZeRO stage or the rank.

B samples, T tokens, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from d2v_ds.batch import Batch
from d2v_ds.engine import EmaKind, Engine, Pieces
from d2v_ds.student import Encoder


class Teacher(nn.Module):
    """A copy of the student's encoder, without the parts that it shares with the student.

    shared: for each modality, the submodules of its front end (features, positions, context) that
    are always the student's own. fairseq keeps copies of these and overwrites them with
    the student's values at every step (its `skip_keys`), which is equivalent.
    """

    def __init__(self, encoder: Encoder, shared: Mapping[str, tuple[str, ...]]) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        for modality, submodules in shared.items():
            front_end = self.encoder.front_end(modality)
            front_end.mask_token = None  # the teacher sees everything
            for name in submodules:
                setattr(front_end, name, None)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode, regardless of the mode of the task."""
        super().train(False)
        return self

    @torch.no_grad()
    def layers(
        self, student: Encoder, batch: Batch, tokens: Tensor, top_k: int
    ) -> list[tuple[Tensor, Tensor]]:
        """(FFN output, block output), each [B, T, D], of the top_k blocks for the unmasked batch.
        tokens [B, T, D]: the output of the student's features, for a teacher that shares them."""
        own = self.encoder.front_end(batch.modality)
        shared = student.front_end(batch.modality)
        if own.features is not None:
            tokens = own.features(batch.inputs)
        with evaluating(shared.context if own.context is None else None):
            _, _, layers = self.encoder.whole(batch, tokens.detach(), shared=shared, collect=top_k)
        return layers


@contextmanager
def evaluating(module: nn.Module | None) -> Iterator[None]:
    """Runs a shared module of the student, if there is one, without dropout."""
    if module is None:
        yield
        return
    training = module.training
    module.train(False)
    try:
        yield
    finally:
        module.train(training)


class Ema:
    """fp32 moving averages of the parts of the student that this rank owns, by the names of the
    teacher's parameters.

    averages: {teacher's name: student's name}, full names in the task that `engine` wraps. teacher:
    the frozen module that `publish` writes; its names begin with `prefix`.

    At a decay of 0.99999 the change of an average in one step, (1 - decay) * (master - average), is
    often below the resolution of fp32 and would be lost. Here the rounding error of `values` is
    kept in `compensation` and added back at the next step (Kahan 1965): the average is their sum.

    Holds views of the masters, which stay valid for the engine's lifetime (Engine.partitions).
    """

    def __init__(
        self, engine: Engine, teacher: nn.Module, averages: Mapping[str, str], prefix: str
    ) -> None:
        self.engine = engine
        self.teacher = teacher
        self.prefix = prefix
        partitions = engine.partitions()
        part = {name: group.part for group in engine.groups for name in group.parameters}
        missing = sorted(set(averages.values()) - part.keys())
        assert not missing, f"the teacher follows parameters that are not trained: {missing}"
        owned = {t: partitions[s] for t, s in averages.items() if s in partitions}
        self.values = {t: (p.offset, p.master.clone()) for t, p in owned.items()}
        self.compensation = {t: (p.offset, torch.zeros_like(p.master)) for t, p in owned.items()}
        by_part: dict[str, list[Triple]] = {}
        for t, partition in owned.items():
            triple = (self.values[t][1], self.compensation[t][1], partition.master)
            by_part.setdefault(part[averages[t]], []).append(triple)
        self._chunks = {name: in_chunks(triples) for name, triples in by_part.items()}
        self.publish()

    @property
    def pieces(self) -> dict[EmaKind, Pieces]:
        """The tensors that a checkpoint stores; live views."""
        return {"ema": self.values, "ema_compensation": self.compensation}

    def update(self, decay: float, active: str) -> None:
        """values = decay * values + (1 - decay) * masters, for the parameters that a step of the
        modality `active` trains; then publishes. Called only after an applied step."""
        for part in {"", active}:
            for values, compensation, masters in self._chunks.get(part, ()):
                move(values, compensation, masters, 1.0 - decay)
        self.publish()

    def publish(self) -> None:
        """Copies the averages into the teacher. Also called after `values` are restored."""
        self.engine.publish(
            self.teacher, {name.removeprefix(self.prefix): v for name, v in self.values.items()}
        )


# Elements of the temporary buffer of an update. On a CPU, small enough to stay in a core's cache
# and for torch not to start threads, which would cost more than it saves; on a GPU, large enough
# to keep it busy.
CHUNK = {"cpu": 2**15, "cuda": 2**24}

Triple = tuple[Tensor, Tensor, Tensor]  # flat fp32 of equal length: value, compensation, master
Chunk = tuple[list[Tensor], list[Tensor], list[Tensor]]  # the same, in lists


def in_chunks(triples: Sequence[Triple], size: int = 0) -> list[Chunk]:
    """Views of all triples, cut and gathered into lists of at most `size` elements in total; 0: the
    best size for their device."""
    size = size or CHUNK["cuda" if triples[0][0].is_cuda else "cpu"]
    chunks: list[Chunk] = []
    room = 0
    for triple in triples:
        start, length = 0, len(triple[0])
        while start < length:
            if room == 0:
                chunks.append(([], [], []))
                room = size
            taken = min(room, length - start)
            for views, whole in zip(chunks[-1], triple, strict=True):
                views.append(whole[start : start + taken])
            start, room = start + taken, room - taken
    return chunks


def move(
    values: list[Tensor], compensation: list[Tensor], masters: list[Tensor], weight: float
) -> None:
    """Moves values + compensation towards the masters by the fraction `weight`, in place.

    With v, c, m for these: amount = c + weight * (m - v - c), v' = round(v + amount), and the new
    c' = amount - (v' - v). `compensation` holds the amount until the last line.
    """
    work = torch._foreach_sub(masters, values)  # m - v
    torch._foreach_lerp_(compensation, work, weight)  # amount
    torch._foreach_copy_(work, values)  # v
    torch._foreach_add_(values, compensation)  # v'
    torch._foreach_sub_(work, values)  # v - v'
    torch._foreach_add_(compensation, work)  # c'
