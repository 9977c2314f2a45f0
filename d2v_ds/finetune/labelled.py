"""A modality whose samples have labels: what the loader reads in fine-tuning.

    members, .json --decode--> (example, label) --collate--> Batch with labels, masks, mixed images

B samples, T tokens, D width, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from d2v_ds.batch import Batch
from d2v_ds.config.finetuning import FineTuning
from d2v_ds.errors import UserError
from d2v_ds.finetune.labels import Classes, Labels, Transcripts
from d2v_ds.finetune.mixing import Mixing
from d2v_ds.loader.reading import label_of
from d2v_ds.masking import span_mask
from d2v_ds.modalities.base import Modality, metadata
from d2v_ds.student import FrontEnd
from d2v_ds.transformer import TransformerConfig

Example = tuple[Any, Any]  # what the modality decodes, and its label's numbers; None: not counted


class Labelled(Modality, abstract=True):
    """Reads the samples of another modality together with their labels.

    training: crop, augment and mask; otherwise samples are read whole. Recordings with a transcript
    are never cropped. `base` must not crop recordings that are read whole (Speech.uncropped).
    """

    def __init__(
        self,
        base: Modality,
        settings: FineTuning,
        labels: Labels,
        dim: int,
        *,
        training: bool,
    ) -> None:
        super().__init__(base.config)
        self.base, self.settings, self.labels, self.dim = base, settings, labels, dim
        self.training = training
        self.whole = settings.task == "ctc" or base.name == "text" or not training
        self.mixing = Mixing.of(settings) if training and base.name == "vision" else None
        # Class attributes of the contract, as those of `base`.
        for name in ("name", "batch_unit", "length_unit", "packed_extensions", "converter"):
            setattr(self, name, getattr(base, name))
        self.extensions = (*base.extensions, "json")  # type: ignore[misc]
        if base.name == "text":
            self.batch_unit = "samples"  # type: ignore[misc]

    @property
    def views(self) -> int:
        return 1

    # -------------------------------------------------------------------------- planning a step

    def check_set(self, about: Mapping[str, Any]) -> None:
        self.base.check_set(about)

    @classmethod
    def check_sample(cls, members: Mapping[str, bytes], about: Mapping[str, Any]) -> int:
        raise NotImplementedError("sets are verified by their own modality")

    def crop(self, length: int) -> int:
        return 0 if self.too_long(length) else self.base.crop(length)

    def too_long(self, length: int) -> bool:
        """Whether a recording exceeds finetune.max_seconds."""
        limit = self.settings.max_seconds
        return self.base.name == "speech" and 0 < limit * self.base.config.sample_rate < length

    def is_cut(self, length: int) -> bool:
        """Whether a text, with the id that is prepended, has more than max_tokens."""
        more = self.settings.bos_id is not None
        return self.base.name == "text" and length + more > self.base.config.max_tokens

    def remarks(self, counts: Mapping[int, int]) -> list[str]:
        def number(affected: Callable[[int], bool]) -> int:
            return sum(n for length, n in counts.items() if affected(length))

        found = {
            "longer than finetune.max_seconds and left out": number(self.too_long),
            "too short and left out": number(lambda n: not self.too_long(n) and not self.crop(n)),
        }
        if self.base.name == "text":
            limit = self.base.config.max_tokens
            found[f"longer than {limit} tokens and cut"] = number(self.is_cut)
        total = sum(counts.values())
        return [f"{n} of {total} samples are {what}" for what, n in found.items() if n]

    def cost(self, length: int) -> float:
        """Texts count one each: published batches of labelled texts have a number of texts, and
        their loss is a mean over texts."""
        return 1.0 if self.base.name == "text" else self.base.cost(length)

    def masked_tokens(self, length: int) -> int | None:
        return 1  # the loss is divided by the number of samples

    # ---------------------------------------------------------------------------- making a batch

    def decode(self, sample: Mapping[str, bytes], rng: np.random.Generator | None) -> Example:
        """Raises UserError for a sample without a label or with one that is not known, because
        that is no damage of a single sample."""
        label = self.label(sample)
        example = self.base.decoded(sample, None if self.whole else rng)
        example = self.begun(example)
        if self.mixing and rng is not None:
            example = self.mixing.augment(example, rng)
        return example, label

    def begun(self, example: Any) -> Any:
        """A text with its first id, cut to the positions of the model; other examples unchanged.
        Ids of a tokenizer of transformers have it already."""
        if self.base.name != "text" or self.settings.bos_id is None:
            return example
        if len(example) and example[0] == self.settings.bos_id:
            return example[: self.base.config.max_tokens]
        return np.concatenate([[self.settings.bos_id], example])[: self.base.config.max_tokens]

    def label(self, sample: Mapping[str, bytes]) -> Any:
        meta = metadata(sample)  # raises ValueError: damage of a single sample
        try:
            return self.labels.encode(label_of(meta, self.settings.label))
        except ValueError as error:
            name = f"{origin}: " if (origin := origin_of(meta)) else ""
            raise UserError(f"finetune.label: {name}{error}") from None

    def fit(self, example: Example, length: int) -> Example:
        size = self.crop(length)
        content, _ = example
        if self.base.name == "text" and self.settings.bos_id is not None and len(content) != size:
            size = min(length + 1, self.base.config.max_tokens)  # with the id that is prepended
        if self.base.name == "vision" or len(content) == size:
            return example
        return np.resize(content, size), None  # another sample's, cut: its label no longer fits

    def collate(
        self, examples: Sequence[Example], rngs: Sequence[np.random.Generator], index: int
    ) -> Batch:
        contents, labels = [list(column) for column in zip(*examples, strict=True)]
        batch = self.base.unmasked(contents)
        fields = self.label_fields(labels)
        if self.mixing and self.mixing.mixes:
            rng = rngs[0]  # of the first sample: the plan determines who is mixed with whom
            inputs, mixed = self.mixing.mix(batch.inputs.numpy(), fields["labels"].numpy(), rng)
            fields["labels"] = torch.from_numpy(mixed)
            batch = dataclasses.replace(batch, inputs=torch.from_numpy(inputs))
        if self.training:
            fields |= self.masks(batch, rngs)
        return dataclasses.replace(batch, index=index, **fields)

    def label_fields(self, labels: Sequence[Any]) -> dict[str, Any]:
        """`labels` and `label_lengths` of a Batch."""
        if isinstance(self.labels, Classes):
            rows = torch.zeros(len(labels), len(self.labels.names))
            for row, label in zip(rows, labels, strict=True):
                if label is not None:
                    row[label] = 1
            return {"labels": rows}
        if isinstance(self.labels, Transcripts):
            ids = [label for label in labels if label is not None]
            return {
                "labels": torch.from_numpy(np.concatenate(ids or [np.zeros(0, np.int64)])),
                "label_lengths": torch.tensor([-1 if n is None else len(n) for n in labels]),
            }
        return {"labels": torch.tensor([np.nan if n is None else n for n in labels]).float()}

    def masks(self, batch: Batch, rngs: Sequence[np.random.Generator]) -> dict[str, Any]:
        """Masked tokens and channels of a batch of speech: `seen` and `channels` of a Batch."""
        settings, (B, T) = self.settings, batch.seen.shape
        fields: dict[str, Any] = {}
        if settings.time_mask:
            lengths = [T] * B if batch.valid is None else batch.valid.sum(1).tolist()
            masks = [
                np.pad(spans(n, settings.time_mask, settings.time_mask_length, rng), (0, T - n))
                for n, rng in zip(lengths, rngs, strict=True)
            ]
            fields["seen"] = torch.from_numpy(np.stack(masks)).logical_not() & batch.seen
        if settings.channel_mask:
            hidden = [
                spans(self.dim, settings.channel_mask, settings.channel_mask_length, rng)
                for rng in rngs
            ]
            fields["channels"] = torch.from_numpy(np.stack(hidden)).logical_not()
        return fields

    def unmasked(self, examples: Sequence[Any]) -> Batch:
        """Examples of `base`, without labels."""
        return self.base.unmasked([self.begun(example) for example in examples])

    def largest(self) -> Any:
        return self.base.largest()

    # ---------------------------------------------------------------------- the model, inspection

    def front_end(self, model: TransformerConfig) -> FrontEnd:
        return self.base.front_end(model)

    def predictor(self, model: TransformerConfig) -> nn.Module:
        raise NotImplementedError("fine-tuning has a head instead")

    def baseline(self, example: Example) -> npt.NDArray[np.float32]:
        return self.base.baseline(example[0])

    def picture(self, batch: Batch) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        return self.base.picture(batch)


def origin_of(meta: Mapping[str, Any]) -> str:
    """The source file of a sample, or the first of several; "" if it is unknown. meta: its .json"""
    first, *more = [meta["path"]] if "path" in meta else meta.get("paths") or [""]
    return f"{first} and {len(more)} more" if more else str(first)


def spans(length: int, prob: float, span: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Masked positions [length], in spans as data2vec 1.0 draws them."""
    [mask] = span_mask(length, prob=prob, length=span, views=1, rng=rng)
    return np.asarray(mask)
