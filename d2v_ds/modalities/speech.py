"""Speech: 16 kHz waveforms, seven strided convolutions, convolutional and ALiBi positions.

data2vec 2.0: fairseq examples/data2vec/models/modalities/audio.py; 1.0, without ALiBi: fairseq
examples/data2vec/models/data2vec_audio.py.

B samples, M masked views per sample, R rows (B or B * M), S raw audio samples, T tokens (frames of
20 ms), C channels of the convolutions, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2v_ds.batch import Batch, mask_indices
from d2v_ds.config.bounds import (
    BelowOne,
    Bounds,
    InnerShare,
    MoreLayers,
    Positive,
    Seconds,
    Share,
    Views,
    Width,
)
from d2v_ds.data import audio, headers
from d2v_ds.data.checks import Unusable
from d2v_ds.data.headers import HeaderReader
from d2v_ds.masking import Mask, block_count, block_mask_1d, span_mask
from d2v_ds.modalities.base import (
    Modality,
    ModalityConfig,
    described,
    extra_tokens,
    metadata,
    require_decoder,
    require_groups,
    require_some_masked,
)
from d2v_ds.student import Context, ConvDecoder, FrontEnd, Head, MaskToken
from d2v_ds.transformer import Alibi, TransformerConfig

Waveform = npt.NDArray[np.float32]

WHOLE = 1e5  # seconds that no recording exceeds
LONG = 4  # of recordings longer than this many crops, only the crop is decoded
CONTAINERS = ("flac", "wav", "mp3", "ogg", "opus")  # extensions of recordings in a set
REDRAWN = 3  # crops that are drawn again if they are silent

# (channels, kernel, stride): 50 frames per second, receptive field 400 samples (wav2vec 2.0)
PUBLISHED_CONVS = ((512, 10, 5), *((512, 3, 2),) * 4, *((512, 2, 2),) * 2)


@dataclass(frozen=True)
class PositionsConfig:
    """Convolutional relative positions (fairseq conv_pos_*, pos_conv_depth)."""

    depth: MoreLayers = 5
    """The number of convolutions."""

    kernel: Width = 19
    """Kernel size of each convolution, in tokens."""

    groups: Width = 16
    """Groups of each convolution, which must divide model.dim."""


@dataclass(frozen=True)
class MaskConfig:
    """Masks of data2vec 2.0 (fairseq compute_block_mask_1d) or 1.0 (compute_mask_indices)."""

    kind: Literal["blocks", "spans"] = "blocks"
    """blocks (2.0): blocks at random positions that cover exactly the fraction prob of the tokens;
    spans (1.0): spans from random starts, whose number of tokens varies; adjust and inverse are
    not used."""

    prob: InnerShare = 0.5
    """The fraction of tokens to mask, between 0 and 1."""

    length: Positive = 5
    """Length of a block or span in tokens; for images, the side of a square in patches."""

    adjust: Share = 0.05
    """Added to prob when blocks are drawn, because blocks overlap. Does not change the number of
    masked tokens."""

    inverse: bool = False
    """Draw the visible tokens in blocks instead of the masked ones."""


@dataclass(frozen=True)
class SpeechConfig(ModalityConfig):
    """Speech: waveforms to frames of 20 ms."""

    views: Views = 8
    shared: tuple[str, ...] = ("features",)
    prenet_dropout: BelowOne = 0.1

    sample_rate: Annotated[int, Bounds(1, 1_000_000)] = 16_000
    """Sample rate in Hz. Recordings with a different rate are bad samples."""

    crop_seconds: Seconds = 20.0
    """Longer recordings are cropped to this length at a random position."""

    min_seconds: Seconds = 2.0
    """Shorter recordings are left out."""

    convs: tuple[tuple[Width, Width, Width], ...] = PUBLISHED_CONVS
    """Convolutions of the feature extractor, as (channels, kernel, stride). The default yields 50
    tokens per second."""

    positions: PositionsConfig = field(default_factory=PositionsConfig)

    alibi: bool = True
    """Add an ALiBi bias to the attention (data2vec 2.0)."""

    mask: MaskConfig = field(default_factory=MaskConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.convs:
            raise ValueError("convs: needs at least one (channels, kernel, stride)")
        if token_count(round(self.min_seconds * self.sample_rate), self.convs) < 2:
            raise ValueError(
                f"min_seconds={self.min_seconds} is shorter than two frames of the convolutions"
            )
        if self.crop_seconds < self.min_seconds:
            raise ValueError(
                f"crop_seconds={self.crop_seconds} is below min_seconds={self.min_seconds}"
            )


def token_count(samples: int, convs: Sequence[tuple[int, int, int]]) -> int:
    """The number of tokens T (20 ms each) that the convolutions produce from S audio samples."""
    for _, kernel, stride in convs:
        samples = (samples - kernel) // stride + 1 if samples >= kernel else 0
    return samples


def normalised(pcm: npt.NDArray[Any], start: int = 0, kept: int | None = None) -> Waveform:
    """Normalises audio [S], int16 or float32 in [-1, 1], to zero mean and unit variance over all S
    samples, and returns `kept` samples of it from `start` on (None: all)."""
    unit = audio.INT16_SCALE if pcm.dtype == np.int16 else 1.0
    waveform = torch.from_numpy(pcm.astype(np.float32))
    eps = 1e-5 * unit**2  # int16 is not divided by its scale, so eps is multiplied by it
    # fairseq raw_audio_dataset.py: layer norm over the utterance, in [-1, 1]
    scaled = torch.native_layer_norm(waveform, waveform.shape, None, None, eps)[0]
    piece: Waveform = scaled.numpy()[start:][:kept]
    return piece


def audible(pcm: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The audio [S]. Raises Unusable if it is silent."""
    if audio.is_silent(pcm):
        raise Unusable("silent", "is silent")
    return pcm


def loudest(pcm: npt.NDArray[Any], kept: int) -> npt.NDArray[Any]:
    """The `kept` samples of audio [S] with the highest energy, in steps of half of it."""
    starts = [*range(0, len(pcm) - kept, max(1, kept // 2)), len(pcm) - kept]
    crops = [pcm[start : start + kept] for start in starts]
    return max(crops, key=lambda crop: float(np.var(crop, dtype=np.float64)))


class ConvFeatures(nn.Module):
    """Waveforms [B, S] -> tokens [B, T, D]. Convolutions, each with LayerNorm over channels and
    GELU, then LayerNorm and a linear layer (the feature extractor of wav2vec 2.0)."""

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
            # GELU's backward is many times slower if its input and gradient differ in layout.
            x = F.gelu(x.contiguous())  # [B, C, T]
        return self.proj(self.norm(x.transpose(1, 2)))  # type: ignore[no-any-return]


class ConvPositions(nn.Module):
    """Relative positions: grouped convolutions, each with LayerNorm (no affine) and GELU."""

    def __init__(self, config: PositionsConfig, dim: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv1d(dim, dim, config.kernel, padding=config.kernel // 2, groups=config.groups)
            for _ in range(config.depth)
        )

    def forward(self, x: Tensor, exists: Tensor | None) -> Tensor:
        """Tokens [R, T, D], zero where hidden; exists [R, T, 1] False for padding -> addend
        [R, T, D]. Every layer sees padding as zeros, like positions beyond the end."""
        T = x.shape[1]
        for conv in self.convs:
            x = conv(x.transpose(1, 2))[..., :T].transpose(1, 2)  # even kernels add one position
            x = F.gelu(F.layer_norm(x, x.shape[-1:]))
            if exists is not None:
                x = x * exists
        return x


class Speech(Modality):
    """Speech recordings."""

    name: ClassVar[str] = "speech"
    batch_unit: ClassVar[str] = "s"
    length_unit: ClassVar[str] = "frames"
    extensions: ClassVar[tuple[str, ...]] = ("flac", "wav")
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
            raise Unusable("row", f"has no recording (members: {', '.join(members)})")
        rate = about["sample_rate"]
        try:
            with audio.Recording(members[name]) as recording:
                if recording.info.rate != rate:
                    found = recording.info.rate
                    raise Unusable("rate", f"has {found} Hz, but the set has {rate} Hz")
                length = len(audible(recording.pcm()))
        except Unusable as error:
            raise Unusable(error.kind, f"{name}: {error}") from None
        metadata(members)
        return length

    def crop(self, length: int) -> int:
        return 0 if length < self.min_samples else min(length, self.max_samples)

    def cost(self, length: int) -> float:
        return self.crop(length) / self.config.sample_rate

    def masked_tokens(self, length: int) -> int | None:
        T, mask = token_count(self.crop(length), self.config.convs), self.config.mask
        if mask.kind == "spans":
            return None
        return self.views * block_count(T, prob=mask.prob, inverse=mask.inverse)

    def warnings(self) -> list[str]:
        positions = self.config.positions
        reach = 1 + positions.depth * (positions.kernel - 1)
        crop = token_count(self.max_samples, self.config.convs)
        if reach < crop:
            return []
        return [
            f"modality.speech.positions: {positions.depth} convolutions with kernel "
            f"{positions.kernel} cover {reach} frames, the whole crop of {crop}. Such runs are "
            "known to collapse. Raise modality.speech.crop_seconds, or lower depth or kernel."
        ]

    def decode(self, sample: Mapping[str, bytes], rng: np.random.Generator | None) -> Waveform:
        """The waveform [S], normalised to zero mean and unit variance over the recording, then
        cropped.

        A recording longer than LONG crops contains many utterances. Only its crop is decoded, and
        only the crop is normalised. If it is silent, another one is drawn.
        """
        data = next(sample[key] for key in self.extensions if key in sample)
        # The converter and `verify` have compared the header with what is there.
        with audio.Recording(data, trusted=True) as recording:
            return self._piece(recording, rng)

    def _piece(self, recording: audio.Recording, rng: np.random.Generator | None) -> Waveform:
        found = recording.info
        if found.rate != self.config.sample_rate:
            raise Unusable("rate", f"is {found.rate} Hz, expected {self.config.sample_rate} Hz")
        if rng is None:
            return normalised(recording.pcm())
        kept = self.crop(found.frames)
        if not kept:
            raise Unusable(
                "too short",
                f"is {found.frames} audio samples long, but at least {self.min_samples} are needed",
            )
        start = int(rng.integers(found.frames - kept + 1))
        if found.frames <= LONG * self.max_samples:
            return normalised(audible(recording.pcm()), start, kept)
        for _ in range(REDRAWN):
            crop = recording.pcm(start, kept)
            if not audio.is_silent(crop):
                return normalised(crop)
            start = int(rng.integers(found.frames - kept + 1))
        return normalised(loudest(audible(recording.pcm()), kept))

    def fit(self, example: Waveform, length: int) -> Waveform:
        size = self.crop(length)
        return example if len(example) == size else np.resize(example, size)

    def collate(
        self, examples: Sequence[Waveform], rngs: Sequence[np.random.Generator], index: int
    ) -> Batch:
        counts = [token_count(len(example), self.config.convs) for example in examples]
        masks = [self.draw_masks(T, rng) for T, rng in zip(counts, rngs, strict=True)]
        valid = None
        if self.config.padded_statistics:
            masks = [np.pad(m, ((0, 0), (0, max(counts) - m.shape[1]))) for m in masks]
            valid = np.arange(max(counts)) < np.array(counts)[:, None]
        return Batch(
            modality=self.name,
            index=index,
            inputs=pad(examples),
            views=self.views,
            **mask_indices(masks, removed=self.config.masked == "removed", valid=valid),
        )

    def draw_masks(self, T: int, rng: np.random.Generator) -> Mask:
        """The masks of one sample's views, [M, T]."""
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
            np.zeros((1, token_count(len(example), self.config.convs)), dtype=bool)
            for example in examples
        ]
        return Batch(
            modality=self.name, index=0, inputs=pad(examples), views=1, **mask_indices(nothing)
        )

    def check_example(self, example: Any) -> None:
        if not isinstance(example, np.ndarray) or example.dtype != np.float32 or example.ndim != 1:
            raise ValueError(f"is {described(example)}, expected a waveform, float32 [S]")
        shortest = self.samples(1)
        if len(example) < shortest:
            raise ValueError(
                f"is {len(example)} audio samples long, but the model needs at least {shortest}"
            )

    def prepare(self, raw: Any, *, rate: int | None = None) -> Waveform:
        """raw: a waveform [S] or [1, S], int16 or a float type in [-1, 1], with its `rate`; or the
        path or the bytes of a recording, which has its own rate."""
        if isinstance(raw, str | Path):
            raw = Path(raw).read_bytes()
        if isinstance(raw, bytes):
            with audio.Recording(raw) as recording:
                return self._piece(recording, None)
        if isinstance(raw, Tensor):
            raw = raw.detach().cpu()
            raw = raw.float() if raw.is_floating_point() else raw  # numpy has no bfloat16
        wave = np.asarray(raw)
        if wave.ndim == 2 and len(wave) == 1:
            wave = wave[0]
        if wave.ndim != 1 or not (wave.dtype == np.int16 or wave.dtype.kind == "f"):
            raise ValueError(
                f"is {described(wave)}, expected one channel [S] of int16 or floats in [-1, 1]"
            )
        if rate != self.config.sample_rate:
            given = "rate is missing" if rate is None else f"has {rate} Hz"
            raise ValueError(
                f"{given}, but the model needs {self.config.sample_rate} Hz; resample it first "
                "(d2v_ds.data.audio.resample) and give its rate"
            )
        if not len(wave):
            raise Unusable("empty", "is empty")
        if wave.dtype != np.int16:
            audio.checked_range(wave)  # before float32, which cannot hold all values of float64
            wave = wave.astype(np.float32)
        return normalised(np.ascontiguousarray(wave))

    def largest(self) -> Waveform:
        return np.zeros(self.max_samples, dtype=np.float32)

    def baseline(self, example: Waveform) -> npt.NDArray[np.float32]:
        """Mean log-mel spectrum [bands], with its level removed."""
        mel = np.asarray(audio.log_mel(example, self.config.sample_rate), dtype=np.float32)
        mean: npt.NDArray[np.float32] = (mel - mel.mean()).mean(0)
        return mean

    def check_model(self, model: TransformerConfig, *, predicts: bool = True) -> None:
        positions = self.config.positions
        if positions.depth:
            path = f"modality.{self.name}.positions.groups"
            require_groups(path, positions.groups, {"model.dim": model.dim})
        if predicts:
            crop = token_count(self.max_samples, self.config.convs)
            require_some_masked(self, self.masked_tokens(self.max_samples), crop)
        if predicts and self.config.masked == "removed":
            require_decoder(f"modality.{self.name}.decoder", self.config.decoder, model)

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
            zero_padding=config.masked == "replaced",  # as fairseq: its 1.0 does, its 2.0 does not
        )

    def predictor(self, model: TransformerConfig) -> nn.Module:
        config = self.config
        if config.masked == "replaced":  # torch's initialisation, as in fairseq
            return Head(model.dim, config.head.layers, None, config.head.zero_last)
        return ConvDecoder(config.decoder, model.dim)

    def uncropped(self, max_seconds: float = 0.0) -> Speech:
        """The same modality for recordings that are used whole, of at least two tokens and, unless
        max_seconds is 0, of at most max_seconds."""
        return Speech(
            dataclasses.replace(
                self.config,
                crop_seconds=max_seconds or WHOLE,
                min_seconds=self.samples(2) / self.config.sample_rate,
            )
        )

    def picture(self, batch: Batch) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Log-mel frames [T_mel, bands] of the first sample, and the mask [T] of its first view."""
        T = int(batch.seen[0].numel() if batch.valid is None else batch.valid[0].sum())
        samples = self.samples(T)
        mel = audio.log_mel(batch.inputs[0, :samples].cpu().numpy(), self.config.sample_rate)
        return np.asarray(mel, dtype=np.float32), ~batch.seen[0, :T].cpu().numpy()

    def samples(self, T: int) -> int:
        """The number of audio samples that T frames cover."""
        for _, kernel, stride in reversed(self.config.convs):
            T = (T - 1) * stride + kernel
        return T


def pad(waveforms: Sequence[Waveform]) -> Tensor:
    """Stacks waveforms into [B, S], with zeros after the end of shorter ones."""
    inputs = torch.empty(len(waveforms), max(map(len, waveforms)))
    for row, waveform in zip(inputs.numpy(), waveforms, strict=True):
        row[: len(waveform)] = waveform
        row[len(waveform) :] = 0
    return inputs
