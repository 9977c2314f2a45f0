"""Text: blocks of token ids, with learned positions. Masks ignore word boundaries.

data2vec 2.0: fairseq examples/data2vec/models/modalities/text.py; 1.0: fairseq
examples/data2vec/models/data2vec_text.py.

A sample is the tokenizer's ids, including special ones, so that reading it is one copy and needs no
tokenizer. The ids of a packed block are in the field u16 or u32; a labelled text is a
one-dimensional .npy array of uint16 or uint32.

B samples, M masked views per sample, R = B * M rows, T tokens, V ids in the vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from d2v_ds.batch import Batch, mask_indices
from d2v_ds.config.bounds import Amount, BelowOne, Bounds, Count, InnerShare, Positive, Share, Views
from d2v_ds.data import headers, npy
from d2v_ds.data.checks import Unusable
from d2v_ds.data.headers import HeaderReader
from d2v_ds.errors import UserError
from d2v_ds.masking import (
    Mask,
    Tokens,
    corrupt_tokens,
    token_span_mask,
    uniform_count,
    uniform_mask,
)
from d2v_ds.modalities.base import (
    Modality,
    ModalityConfig,
    described,
    extra_tokens,
    metadata,
    require_decoder,
    require_some_masked,
)
from d2v_ds.student import Context, ConvDecoder, FrontEnd, Head
from d2v_ds.transformer import TransformerConfig, bert_init

BERT_STD = 0.02  # initial standard deviation of embeddings in bert_init
CHECKED = ("vocab_size", "pad_id", "mask_id")  # settings that a tokenizer determines
RAW_IDS = {"u16": "<u2", "u32": "<u4"}  # field -> type


@dataclass(frozen=True)
class MaskConfig:
    """Masks of data2vec 2.0 (fairseq random_masking) or 1.0 (MaskTokensDataset)."""

    kind: Literal["uniform", "spans"] = "uniform"
    """uniform (2.0): single tokens, exactly the fraction prob of them; length is not used. spans
    (1.0): spans from random starts, whose number of tokens varies."""

    prob: InnerShare = 0.48
    """The fraction of tokens to mask, between 0 and 1."""

    length: Positive = 1
    """Length of a block or span in tokens; for images, the side of a square in patches."""

    random_prob: Share = 0.0
    """With masked=replaced, the fraction of masked tokens that become a random token in the
    student's input."""

    keep_prob: Share = 0.0
    """With masked=replaced, the fraction of masked tokens that the student reads unchanged."""

    def __post_init__(self) -> None:
        if self.random_prob + self.keep_prob > 1:
            raise ValueError(
                f"random_prob={self.random_prob} and keep_prob={self.keep_prob} must be 0 or more, "
                "and their sum at most 1"
            )


@dataclass(frozen=True)
class TextConfig(ModalityConfig):
    """Text: blocks of token ids."""

    views: Views = 8
    shared: tuple[str, ...] = ("features",)

    vocab_size: Annotated[int, Bounds(2, 2**27)] = 50_265
    """The number of token ids, including special ones."""

    pad_id: Count = 1
    """The id of padding."""

    mask_id: Count = 50_264
    """The id of the mask token."""

    specials: Count = 4
    """Ids below this are special and are never drawn as random tokens."""

    max_tokens: Annotated[int, Bounds(2, 2**24)] = 512
    """Longer blocks are cropped to this number of tokens at a random position."""

    position_std: Amount = BERT_STD
    """Initial standard deviation of the learned positions. The default is the published value, the
    same as for tokens. Positions are easy to predict, and short runs that learn them first learn
    little else; a smaller value avoids this."""

    dropout: BelowOne = 0.1
    """Dropout of the student's embeddings."""

    mask: MaskConfig = field(default_factory=MaskConfig)

    text_teacher: Literal["whole", "masked"] = "whole"
    """whole: the teacher reads the whole text; masked: it reads only the masked tokens, and padding
    instead of the others, as in fairseq's 1.0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("pad_id", "mask_id"):
            if getattr(self, name) >= self.vocab_size:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be in [0, vocab_size={self.vocab_size})"
                )
        if self.specials >= self.vocab_size:
            raise ValueError(f"specials={self.specials} must be in [0, {self.vocab_size})")
        if self.masked == "replaced" and self.views > 1 and self.text_teacher == "masked":
            raise ValueError(f"text_teacher=masked requires views=1, got {self.views}")
        if self.text_teacher == "masked" and self.cls_weight > 0:
            raise ValueError(
                f"text_teacher=masked requires cls_weight=0, got {self.cls_weight}: the class loss "
                "needs targets of the whole text"
            )


class TokenFeatures(nn.Module):
    """Ids [B, T] -> tokens [B, T, D]: embedding plus learned position, then LayerNorm.

    Positions count the tokens that are not padding, from pad_id + 1 on (fairseq make_positions).
    """

    def __init__(self, config: TextConfig, dim: int, norm_eps: float) -> None:
        super().__init__()
        self.pad_id = config.pad_id
        self.tokens = nn.Embedding(config.vocab_size, dim, padding_idx=config.pad_id)
        rows = config.max_tokens + config.pad_id + 1
        self.positions = nn.Embedding(rows, dim, padding_idx=config.pad_id)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.apply(bert_init)
        with torch.no_grad():
            self.positions.weight.mul_(config.position_std / BERT_STD)

    def forward(self, ids: Tensor) -> Tensor:
        exists = ids != self.pad_id
        positions = exists.cumsum(1) * exists + self.pad_id  # [B, T]
        return self.norm(self.tokens(ids) + self.positions(positions))  # type: ignore[no-any-return]


class Text(Modality):
    """Token ids."""

    name: ClassVar[str] = "text"
    batch_unit: ClassVar[str] = "tokens"
    length_unit: ClassVar[str] = "tokens"
    extensions: ClassVar[tuple[str, ...]] = ("u16", "u32", "npy")
    packed_extensions: ClassVar[dict[str, str]] = {"u16": "npy", "u32": "npy"}
    header_readers: ClassVar[dict[str, HeaderReader]] = {"npy": headers.npy}
    converter: ClassVar[str] = "text"
    baseline_name: ClassVar[str] = "bag of words"
    Config: ClassVar[type[ModalityConfig]] = TextConfig
    config: TextConfig

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self._ids = {name: getattr(config, name) for name in CHECKED}

    @classmethod
    def check_sample(cls, members: Mapping[str, bytes], about: Mapping[str, Any]) -> int:
        ids = read_ids(members)
        metadata(members)
        check_ids(ids, about.get("tokenizer", {}), "its tokenizer's ")
        return len(ids)

    def crop(self, length: int) -> int:
        return 0 if length < 2 else min(length, self.config.max_tokens)

    def cost(self, length: int) -> float:
        return float(self.crop(length))

    def masked_tokens(self, length: int) -> int | None:
        mask = self.config.mask
        if mask.kind == "spans":
            return None
        return self.views * uniform_count(self.crop(length), prob=mask.prob)

    def remarks(self, counts: Mapping[int, int]) -> list[str]:
        """The tokens that an epoch does not use: of blocks that are longer than max_tokens, and of
        those that are too short."""
        limit, found = self.config.max_tokens, super().remarks(counts)
        total = sum(length * number for length, number in counts.items())
        used = sum(self.crop(length) * number for length, number in counts.items())
        short = sum(length * number for length, number in counts.items() if not self.crop(length))
        if lost := total - used - short:
            long = sum(number for length, number in counts.items() if length > limit)
            found.append(
                f"an epoch uses {used:,} of {total:,} tokens ({used / total:.0%}): {long:,} "
                f"samples are longer than modality.text.max_tokens={limit}, and of each only a "
                f"random piece is read, so {lost:,} tokens are lost; use all with "
                f"`d2v-shards text --block {limit}`, or with modality.text.max_tokens={max(counts)}"
            )
        return found

    def check_set(self, about: Mapping[str, Any]) -> None:
        """Raises UserError if the tokenizer of a shard set does not fit these settings. about: the
        set's index.json. Sets without a tokenizer in their index are accepted."""
        tokenizer = about.get("tokenizer", {})
        wrong = [
            name
            for name in CHECKED
            if tokenizer.get(name, getattr(self.config, name)) != getattr(self.config, name)
        ]
        if wrong:
            have = ", ".join(f"modality.text.{n}={getattr(self.config, n)}" for n in wrong)
            want = " ".join(f"modality.text.{n}={tokenizer[n]}" for n in wrong)
            raise UserError(
                f"data.shards: its tokenizer does not fit {have}; set {want}, or convert the "
                "corpus with another tokenizer"
            )

    def decode(self, sample: Mapping[str, bytes], rng: np.random.Generator | None) -> Tokens:
        """Ids [T], a random piece of at most max_tokens; without rng, the first. Raises Unusable
        for the samples that `check_sample` refuses."""
        ids = read_ids(sample)
        check_ids(ids, self._ids, "modality.text.")
        start, kept = 0, min(len(ids), self.config.max_tokens)
        if rng is not None:
            start = int(rng.integers(len(ids) - kept + 1))
        piece: Tokens = ids[start : start + kept].astype(np.int64)
        return piece

    def fit(self, example: Tokens, length: int) -> Tokens:
        size = self.crop(length)
        return example if len(example) == size else np.resize(example, size)

    def collate(
        self, examples: Sequence[Tokens], rngs: Sequence[np.random.Generator], index: int
    ) -> Batch:
        config, longest = self.config, max(map(len, examples))
        masks = [self.draw_masks(len(e), rng) for e, rng in zip(examples, rngs, strict=True)]
        replaced: list[Tokens] = []  # one per view
        if config.masked == "replaced":
            for example, mask, rng in zip(examples, masks, rngs, strict=True):
                replaced += list(self.corrupt(example, mask, rng))
        valid = None
        if config.padded_statistics:
            masks = [np.pad(m, ((0, 0), (0, longest - m.shape[1]))) for m in masks]
            valid = np.arange(longest) < np.array([len(e) for e in examples])[:, None]
        inputs, shown = pad(examples, config.pad_id), None
        if config.text_teacher == "masked":
            rows = [np.pad(mask[0], (0, longest - mask.shape[1])) for mask in masks]
            shown = torch.from_numpy(np.stack(rows))
            inputs = inputs.where(shown, config.pad_id)
        return Batch(
            modality=self.name,
            index=index,
            inputs=inputs,
            corrupted=pad(replaced, config.pad_id) if replaced else None,
            shown=shown,
            views=self.views,
            **mask_indices(masks, removed=config.masked == "removed", valid=valid),
        )

    def draw_masks(self, T: int, rng: np.random.Generator) -> Mask:
        """The masks of one block's views, [M, T]."""
        mask = self.config.mask
        if mask.kind == "uniform":
            return uniform_mask(T, prob=mask.prob, views=self.views, rng=rng)
        return token_span_mask(T, prob=mask.prob, length=mask.length, views=self.views, rng=rng)

    def corrupt(self, ids: Tokens, mask: Mask, rng: np.random.Generator) -> Tokens:
        """The ids that the student reads in each view of ids [T]: [M, T]."""
        config = self.config
        vocabulary = np.arange(config.specials, config.vocab_size)
        if config.pad_id >= config.specials:  # padding that was drawn would hide a token
            vocabulary = np.delete(vocabulary, config.pad_id - config.specials)
        return corrupt_tokens(
            np.broadcast_to(ids, mask.shape),
            mask,
            mask_id=config.mask_id,
            vocabulary=vocabulary,
            random_prob=config.mask.random_prob,
            keep_prob=config.mask.keep_prob,
            rng=rng,
        )

    def unmasked(self, examples: Sequence[Tokens]) -> Batch:
        nothing = [np.zeros((1, len(example)), dtype=bool) for example in examples]
        return Batch(
            modality=self.name,
            index=0,
            inputs=pad(examples, self.config.pad_id),
            views=1,
            **mask_indices(nothing),
        )

    def check_example(self, example: Any) -> None:
        if (
            not isinstance(example, np.ndarray)
            or example.ndim != 1
            or example.dtype.kind not in "iu"
        ):
            raise ValueError(f"is {described(example)}, expected token ids, int64 [T]")
        if not 0 < len(example) <= self.config.max_tokens:
            raise ValueError(
                f"has {len(example)} tokens, expected 1 to {self.config.max_tokens} "
                "(modality.text.max_tokens)"
            )
        low, high = int(example.min()), int(example.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"has token id {low if low < 0 else high}, expected 0 to "
                f"{self.config.vocab_size - 1} (modality.text.vocab_size)"
            )

    def prepare(self, raw: Any, *, rate: int | None = None) -> Tokens:
        """raw: token ids [T] of the model's tokenizer with its special ids, as a list or an array.
        Of more than max_tokens the first ones are used, as by `decode`."""
        if isinstance(raw, str | bytes):
            raise ValueError(
                "is text, expected token ids; tokenize it with the tokenizer of the training data"
            )
        ids = np.asarray(raw.detach().cpu() if isinstance(raw, Tensor) else raw)
        if ids.ndim == 1 and not len(ids):
            raise ValueError("is empty")
        self.check_example(ids[: self.config.max_tokens] if ids.ndim else ids)
        tokens: Tokens = ids[: self.config.max_tokens].astype(np.int64)
        return tokens

    def largest(self) -> Tokens:
        return np.full(self.config.max_tokens, self.config.vocab_size - 1, dtype=np.int64)

    def baseline(self, example: Tokens) -> npt.NDArray[np.float32]:
        """The relative frequency of each id in the block, [V]."""
        counts = np.bincount(example, minlength=self.config.vocab_size)
        return (counts / len(example)).astype(np.float32)

    def check_model(self, model: TransformerConfig, *, predicts: bool = True) -> None:
        if predicts:
            longest = self.config.max_tokens
            require_some_masked(self, self.masked_tokens(longest), longest)
        if predicts and self.config.masked == "removed":
            require_decoder(f"modality.{self.name}.decoder", self.config.decoder, model)

    def front_end(self, model: TransformerConfig) -> FrontEnd:
        config = self.config
        return FrontEnd(
            features=TokenFeatures(config, model.dim, model.norm_eps),
            extra=extra_tokens(config, model.dim),
            # The embeddings have their own norm; prenet blocks add another one.
            context=Context(
                model,
                depth=config.prenet_depth,
                dropout=config.prenet_dropout if config.prenet_depth else 0.0,
                layer_drop=config.prenet_layer_drop,
                norm=config.prenet_depth > 0,
            ),
            dropout=config.dropout,
            zero_padding=config.masked == "replaced",  # as fairseq: its 1.0 does, its 2.0 does not
        )

    def predictor(self, model: TransformerConfig) -> nn.Module:
        config = self.config
        if config.masked == "replaced":
            return Head(model.dim, config.head.layers, bert_init, config.head.zero_last)
        return ConvDecoder(config.decoder, model.dim, init=bert_init)

    def picture(self, batch: Batch) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """The first block with one column of constant shade per id, [T, rows], and the mask [T] of
        its first view."""
        T = int(batch.seen[0].numel() if batch.valid is None else batch.valid[0].sum())
        ids = batch.inputs[0, :T].cpu().numpy().astype(np.float32)
        return np.repeat(ids[:, None], PICTURE_ROWS, axis=1), ~batch.seen[0, :T].cpu().numpy()


PICTURE_ROWS = 16


def read_ids(sample: Mapping[str, bytes]) -> npt.NDArray[Any]:
    """The ids [T] of a sample. Raises Unusable with the reason if they cannot be read."""
    for key, kind in RAW_IDS.items():
        if key in sample:
            if len(sample[key]) % np.dtype(kind).itemsize:
                raise Unusable("truncated", "ends within a token id")
            return np.frombuffer(sample[key], np.dtype(kind))
    if "npy" not in sample:
        raise Unusable("row", f"has no token ids (members: {', '.join(sample)})")
    data = sample["npy"]
    found = npy.header_of(data)
    return np.frombuffer(data, np.dtype(found.kind), offset=found.start)


def check_ids(ids: npt.NDArray[Any], known: Mapping[str, Any], where: str) -> None:
    """Raises Unusable if the ids are none of a text. known: vocab_size, pad_id and mask_id, as far
    as they are known; where: before their names in reasons."""
    if not len(ids):
        raise Unusable("empty", "holds no token ids")
    low, high = np.minimum.reduce(ids), np.maximum.reduce(ids)  # faster than min() and max()
    size = known.get("vocab_size")
    if size is not None and high >= size:
        raise Unusable("ids", f"has token id {high}, but {where}vocab_size is {size}")
    for name in ("pad_id", "mask_id"):
        # Most texts have only ids between the two, so that nothing is compared.
        if name in known and low <= known[name] <= high and (ids == known[name]).any():
            raise Unusable("ids", f"has token id {known[name]}, which is {where}{name}")


def pad(blocks: Sequence[Tokens], pad_id: int) -> Tensor:
    """Stacks blocks into [B, T], with padding after the end of shorter ones."""
    inputs = torch.full((len(blocks), max(map(len, blocks))), pad_id, dtype=torch.int64)
    for row, block in zip(inputs, blocks, strict=True):
        row[: len(block)] = torch.from_numpy(np.ascontiguousarray(block))
    return inputs
