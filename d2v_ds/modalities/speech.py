"""Speech: 16 kHz waveforms, seven strided convolutions, convolutional and ALiBi positions.

B samples, M masked views a sample, R rows (B or B * M), S raw audio samples, T tokens (frames of
20 ms), C channels of the convolutions, D width. data2vec 2.0: fairseq
examples/data2vec/models/modalities/audio.py; 1.0, without ALiBi: data2vec_audio.py there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2v_ds.batch import Batch, mask_indices
from d2v_ds.data import audio, headers
from d2v_ds.data.headers import HeaderReader
from d2v_ds.data.ogg import ogg_problem
from d2v_ds.masking import Mask, block_count, block_mask_1d, span_mask
from d2v_ds.modalities.base import Modality, ModalityConfig, check_json, extra_tokens
from d2v_ds.student import Context, ConvDecoder, FrontEnd, Head, MaskToken
from d2v_ds.transformer import Alibi, TransformerConfig

Waveform = npt.NDArray[np.float32]

LONG = 4  # crops: of longer recordings only the crop is decoded
CONTAINERS = ("flac", "wav", "mp3", "ogg", "opus")  # extensions of recordings in a set
SILENCE = 1e-9  # mean square of samples in [-1, 1]: one step of 16 bits

# (channels, kernel, stride): 50 frames a second, receptive field 400 samples (wav2vec 2.0)
PUBLISHED_CONVS = ((512, 10, 5), *((512, 3, 2),) * 4, *((512, 2, 2),) * 2)


@dataclass(frozen=True)
class PositionsConfig:
    """Convolutional relative positions (fairseq conv_pos_*, pos_conv_depth)."""

    depth: int = 5
    kernel: int = 19
    groups: int = 16


@dataclass(frozen=True)
class MaskConfig:
    """2.0: blocks, exactly floor(prob * T) of T frames (fairseq compute_block_mask_1d). 1.0: spans,
    whose number varies (compute_mask_indices)."""

    kind: Literal["blocks", "spans"] = "blocks"
    prob: float = 0.5
    length: int = 5
    adjust: float = 0.05  # of blocks: more of them are drawn, for they overlap
    inverse: bool = False  # of blocks: they are what stays visible

    def __post_init__(self) -> None:
        if not 0 < self.prob < 1:
            raise ValueError(f"prob={self.prob} does not lie between 0 and 1")
        if self.length < 1:
            raise ValueError(f"length={self.length} must be at least 1")


@dataclass(frozen=True)
class SpeechConfig(ModalityConfig):
    """`modality.speech.*`."""

    views: int = 8
    shared: tuple[str, ...] = ("features",)
    sample_rate: int = 16_000
    crop_seconds: float = 20.0  # longer utterances are cropped, at random
    min_seconds: float = 2.0  # shorter ones are left out
    convs: tuple[tuple[int, int, int], ...] = PUBLISHED_CONVS  # (channels, kernel, stride)
    positions: PositionsConfig = field(default_factory=PositionsConfig)
    alibi: bool = True
    prenet_dropout: float = 0.1
    mask: MaskConfig = field(default_factory=MaskConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.convs:
            raise ValueError("convs: needs at least one (channels, kernel, stride)")
        if frames(round(self.min_seconds * self.sample_rate), self.convs) < 2:
            raise ValueError(
                f"min_seconds={self.min_seconds} is shorter than two frames of the convolutions"
            )
        if self.crop_seconds < self.min_seconds:
            raise ValueError(
                f"crop_seconds={self.crop_seconds} is below min_seconds={self.min_seconds}"
            )


def frames(samples: int, convs: Sequence[tuple[int, int, int]]) -> int:
    """Frames that the convolutions make of so many samples: T of S."""
    for _, kernel, stride in convs:
        samples = (samples - kernel) // stride + 1 if samples >= kernel else 0
    return samples


def normalised(
    pcm: npt.NDArray[Any], start: int = 0, kept: int | None = None, audible: bool = False
) -> Waveform:
    """`kept` samples (None: all) from `start` on of audio [S], int16 or float32 in [-1, 1], with
    the mean and the variance of all of it taken out. audible: raises ValueError for silence."""
    unit = audio.INT16_SCALE if pcm.dtype == np.int16 else 1.0
    waveform = torch.from_numpy(pcm.astype(np.float32))
    eps = 1e-5 * unit**2
    # fairseq raw_audio_dataset.py: layer norm over the utterance, in [-1, 1]
    scaled, _, rstd = torch.native_layer_norm(waveform, waveform.shape, None, None, eps)
    if audible and 1 / float(rstd) ** 2 - eps < SILENCE * unit**2:
        raise ValueError("is silent")
    piece: Waveform = scaled.numpy()[start:][:kept]
    return piece


class ConvFeatures(nn.Module):
    """Waveforms [B, S] -> tokens [B, T, D]: convolutions, each with LayerNorm over channels and
    GELU, then LayerNorm and a linear layer (wav2vec 2.0's extractor)."""

    def __init__(self, convs: Sequence[tuple[int, int, int]], dim: int) -> None:
        super().__init__()
        channels = [1, *(c for c, _, _ in convs)]
        self.convs = nn.ModuleList(
            nn.Conv1d(a, b, kernel, stride, bias=False)
            for a, (b, kernel, stride) in zip(channels, convs, strict=False)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in channels[1:])
        self.norm = nn.LayerNorm(channels[-1])
        self.proj = nn.Linear(channels[-1], dim)
        for conv in self.convs:
            assert isinstance(conv, nn.Conv1d)
            nn.init.kaiming_normal_(conv.weight)

    def forward(self, waveforms: Tensor) -> Tensor:
        x = waveforms[:, None].to(self.proj.weight.dtype)  # [B, 1, S]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x).transpose(1, 2)).transpose(1, 2)
            # GELU's backward is many times slower where its input and gradient lie differently.
            x = F.gelu(x.contiguous())  # [B, C, T]
        return self.proj(self.norm(x.transpose(1, 2)))  # type: ignore[no-any-return]


class ConvPositions(nn.Module):
    """Relative positions: grouped convolutions with LayerNorm (no affine) and GELU."""

    def __init__(self, config: PositionsConfig, dim: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv1d(dim, dim, config.kernel, padding=config.kernel // 2, groups=config.groups)
            for _ in range(config.depth)
        )

    def forward(self, x: Tensor, exists: Tensor | None) -> Tensor:
        """Tokens [R, T, D], zero where they must not be seen; exists [R, T, 1] False for padding,
        which every layer sees as the zeros beyond the end -> addend [R, T, D]."""
        T = x.shape[1]
        for conv in self.convs:
            x = conv(x.transpose(1, 2))[..., :T].transpose(1, 2)  # an even kernel gives one more
            x = F.gelu(F.layer_norm(x, x.shape[-1:]))
            if exists is not None:
                x = x * exists
        return x


class Speech(Modality):
    """Speech."""

    name: ClassVar[str] = "speech"
    batch_unit: ClassVar[str] = "s"
    length_unit: ClassVar[str] = "frames"
    keys: ClassVar[tuple[str, ...]] = ("flac", "wav")
    header_readers: ClassVar[dict[str, HeaderReader]] = {"flac": headers.flac, "wav": headers.wav}
    converter: ClassVar[str] = "speech"
    baseline_name: ClassVar[str] = "mean log-mel"
    Config: ClassVar[type[ModalityConfig]] = SpeechConfig
    config: SpeechConfig

    def __init__(self, config: SpeechConfig) -> None:
        super().__init__(config)
        self.max_samples = round(config.crop_seconds * config.sample_rate)
        self.min_samples = round(config.min_seconds * config.sample_rate)

    @classmethod
    def check_sample(cls, members: Mapping[str, bytes], about: Mapping[str, Any]) -> int:
        name = next((name for name in CONTAINERS if name in members), "")
        if not name:
            raise ValueError(f"has no recording (members: {', '.join(members)})")
        data, rate = members[name], about["sample_rate"]
        info = audio.info(data)
        if info.rate != rate:
            raise ValueError(f"{name}: {info.rate} Hz; the set says {rate} Hz")
        if data[:4] == b"OggS" and (problem := ogg_problem(data)):
            raise ValueError(f"{name}: {problem}")
        check_json(members)
        return len(audio.decode(data))

    def crop(self, length: int) -> int:
        return 0 if length < self.min_samples else min(length, self.max_samples)

    def cost(self, length: int) -> float:
        return self.crop(length) / self.config.sample_rate

    def masked_tokens(self, length: int) -> int | None:
        T, mask = frames(self.crop(length), self.config.convs), self.config.mask
        if mask.kind == "spans":
            return None
        return self.views * block_count(T, prob=mask.prob, inverse=mask.inverse)

    def warnings(self) -> list[str]:
        positions = self.config.positions
        reach = 1 + positions.depth * (positions.kernel - 1)
        crop = frames(self.max_samples, self.config.convs)
        if reach < crop:
            return []
        return [
            f"modality.speech.positions: {positions.depth} layers of kernel {positions.kernel} see "
            f"{reach} frames, the whole crop of {crop}; such runs were seen to collapse. Raise "
            "modality.speech.crop_seconds or lower depth or kernel"
        ]

    def decode(self, sample: Mapping[str, bytes], rng: np.random.Generator | None) -> Waveform:
        """The waveform [S]: zero mean and unit variance over the utterance, then cropped.

        What is longer than LONG crops is a recording of many utterances: of it only the crop is
        decoded, and has zero mean and unit variance itself.
        """
        data = next(sample[key] for key in self.keys if key in sample)
        with audio.Recording(data) as recording:
            return self._piece(recording, rng)

    def _piece(self, recording: audio.Recording, rng: np.random.Generator | None) -> Waveform:
        found = recording.info
        if found.rate != self.config.sample_rate:
            raise ValueError(f"is {found.rate} Hz, expected {self.config.sample_rate} Hz")
        if rng is None:
            return normalised(recording.pcm())
        kept = self.crop(found.frames)
        if not kept:
            raise ValueError(f"is {found.frames} samples long, too short")
        start = int(rng.integers(found.frames - kept + 1))
        if found.frames > LONG * self.max_samples:
            return normalised(recording.pcm(start, kept), audible=True)
        return normalised(recording.pcm(), start, kept, audible=True)

    def fit(self, example: Waveform, length: int) -> Waveform:
        size = self.crop(length)
        return example if len(example) == size else np.resize(example, size)

    def collate(
        self, examples: Sequence[Waveform], rngs: Sequence[np.random.Generator], index: int
    ) -> Batch:
        T = [frames(len(example), self.config.convs) for example in examples]
        masks = [self.mask(t, rng) for t, rng in zip(T, rngs, strict=True)]
        valid = None
        if self.config.padded_statistics:
            masks = [np.pad(m, ((0, 0), (0, max(T) - m.shape[1]))) for m in masks]
            valid = np.arange(max(T)) < np.array(T)[:, None]
        return Batch(
            modality=self.name,
            index=index,
            inputs=pad(examples),
            views=self.views,
            **mask_indices(masks, removed=self.config.masked == "removed", valid=valid),
        )

    def mask(self, T: int, rng: np.random.Generator) -> Mask:
        """The masks of one sample's views [M, T]."""
        mask = self.config.mask
        if mask.kind == "spans":
            return span_mask(T, prob=mask.prob, length=mask.length, views=self.views, rng=rng)
        return block_mask_1d(
            T,
            prob=mask.prob,
            length=mask.length,
            adjust=mask.adjust,
            inverse=mask.inverse,
            views=self.views,
            rng=rng,
        )

    def unmasked(self, examples: Sequence[Waveform]) -> Batch:
        nothing = [
            np.zeros((1, frames(len(example), self.config.convs)), dtype=bool)
            for example in examples
        ]
        return Batch(
            modality=self.name, index=0, inputs=pad(examples), views=1, **mask_indices(nothing)
        )

    def largest(self) -> Waveform:
        return np.zeros(self.max_samples, dtype=np.float32)

    def baseline(self, example: Waveform) -> npt.NDArray[np.float32]:
        """Mean log-mel spectrum [bands], its level removed: the strongest of the plain means."""
        mel = np.asarray(audio.log_mel(example, self.config.sample_rate), dtype=np.float32)
        mean: npt.NDArray[np.float32] = (mel - mel.mean()).mean(0)
        return mean

    def front_end(self, model: TransformerConfig) -> FrontEnd:
        config = self.config
        return FrontEnd(
            features=ConvFeatures(config.convs, model.dim),
            positions=ConvPositions(config.positions, model.dim),
            bias=Alibi(model.heads) if config.alibi else None,
            extra=extra_tokens(config, model.dim),
            # U(0, 1): fairseq wav2vec2.py, mask_emb
            mask_token=MaskToken(model.dim, nn.init.uniform_)
            if config.masked == "replaced"
            else None,
            context=Context(
                model,
                depth=config.prenet_depth,
                dropout=config.prenet_dropout,
                layer_drop=config.prenet_layer_drop,
            ),
            zero_padding=config.masked == "replaced",  # fairseq's 1.0 does, its 2.0 does not
        )

    def predictor(self, model: TransformerConfig) -> nn.Module:
        config = self.config
        if config.masked == "replaced":  # torch's initialisation, as in fairseq
            return Head(model.dim, config.head.layers, None, config.head.zero_last)
        return ConvDecoder(config.decoder, model.dim)

    def picture(self, batch: Batch) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Of the first view of the first sample: log-mel frames [T_mel, bands] and mask [T]."""
        T = int(batch.seen[0].numel() if batch.valid is None else batch.valid[0].sum())
        samples = self.samples(T)
        mel = audio.log_mel(batch.inputs[0, :samples].cpu().numpy(), self.config.sample_rate)
        return np.asarray(mel, dtype=np.float32), ~batch.seen[0, :T].cpu().numpy()

    def samples(self, T: int) -> int:
        """Audio samples that T frames cover."""
        for _, kernel, stride in reversed(self.config.convs):
            T = (T - 1) * stride + kernel
        return T


def pad(waveforms: Sequence[Waveform]) -> Tensor:
    """One tensor [B, S], zeros after the end of shorter ones."""
    inputs = torch.empty(len(waveforms), max(map(len, waveforms)))
    for row, waveform in zip(inputs.numpy(), waveforms, strict=True):
        row[: len(waveform)] = waveform
        row[len(waveform) :] = 0
    return inputs
