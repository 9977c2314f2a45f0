"""Vision: images as square patches, with fixed sine-cosine positions (2.0) or a learned relative
position bias (1.0), and a class token.

data2vec 2.0: fairseq examples/data2vec/models/modalities/images.py; 1.0: data2vec_vision
beit/modeling_cyclical.py.

B samples, M masked views per sample, h x w a grid of T = h * w patches, p side of a patch in
pixels, D width.
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
from d2v_ds.config.bounds import Bounds, InnerShare, MoreLayers, Positive, Share, Views
from d2v_ds.data import headers, image_files, images
from d2v_ds.data.checks import Unusable
from d2v_ds.data.headers import HeaderReader
from d2v_ds.data.images import Pixels
from d2v_ds.errors import UserError
from d2v_ds.masking import Mask, beit_mask, block_count, block_mask_2d
from d2v_ds.modalities.base import (
    Modality,
    ModalityConfig,
    described,
    extra_tokens,
    metadata,
    require_decoder,
    require_some_masked,
)
from d2v_ds.student import Context, ConvDecoder, FrontEnd, Head, MaskToken
from d2v_ds.transformer import RelativeBias, TransformerConfig, beit_init, beit_normal

CHANNELS = 3


@dataclass(frozen=True)
class MaskConfig:
    """Masks of data2vec 2.0 (fairseq compute_block_mask_2d) or 1.0 (beit/masking_generator.py)."""

    kind: Literal["blocks", "beit"] = "blocks"
    """blocks (2.0): squares at random positions that cover exactly the fraction prob of patches;
    beit (1.0): BEiT's rectangles, which cover at most mask.patches; prob, length, adjust and
    inverse are not used."""

    prob: InnerShare = 0.8
    """The fraction of tokens to mask, between 0 and 1."""

    length: Positive = 3
    """Length of a block or span in tokens; for images, the side of a square in patches."""

    adjust: Share = 0.07
    """Added to prob when blocks are drawn, because blocks overlap. Does not change the number of
    masked tokens."""

    inverse: bool = True
    """Draw the visible tokens in blocks instead of the masked ones."""

    patches: Positive = 120
    """beit: the maximum number of patches to mask."""

    min_patches: Positive = 16
    """beit: the smallest area of a rectangle, in patches."""

    max_patches: Positive | None = None
    """beit: the largest area of a rectangle, in patches; null: the number still to mask."""


@dataclass(frozen=True)
class VisionConfig(ModalityConfig):
    """Vision: images to square patches."""

    views: Views = 16
    extra_tokens: MoreLayers = 1

    image_size: Annotated[int, Bounds(1, 16_384)] = 224
    """Side of a crop in pixels, a multiple of patch_size."""

    patch_size: Annotated[int, Bounds(1, 16_384)] = 16
    """Side of a patch in pixels."""

    positions: Literal["sincos", "relative"] = "sincos"
    """sincos: fixed sine-cosine positions (data2vec 2.0); relative: a learned attention bias per
    offset between patches (1.0)."""

    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Range of the fraction of an image's area that a training crop covers."""

    jitter: Share = 0.0
    """Strength of random changes of brightness, contrast and saturation, in [0, 1]; 0: none."""

    mask: MaskConfig = field(default_factory=MaskConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}"
            )
        T = (self.image_size // self.patch_size) ** 2
        if self.mask.kind == "beit" and self.mask.patches >= T:
            raise ValueError(
                f"mask.patches={self.mask.patches} must be below {T}, the number of patches"
            )
        if self.positions == "relative" and self.extra_tokens != 1:
            raise ValueError(f"positions=relative requires extra_tokens=1, got {self.extra_tokens}")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale={self.crop_scale} must be [min, max] within (0, 1]")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches, (h, w)."""
        side = self.image_size // self.patch_size
        return side, side


class PatchFeatures(nn.Module):
    """Images [B, 3, h * p, w * p] -> tokens [B, T, D], patches in row-major order, plus fixed
    positions."""

    def __init__(self, config: VisionConfig, dim: int) -> None:
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv2d(CHANNELS, dim, p, p)
        self.positions: Tensor | None
        if config.positions == "sincos":
            # Xavier-uniform over the flattened kernel, as in MAE
            nn.init.xavier_uniform_(self.proj.weight.view(dim, -1))
            self.register_buffer("positions", sincos_2d(config.grid, dim))
        else:
            beit_init(self.proj)
            self.positions = None

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.dtype == torch.uint8:  # as decoded; other types are already normalised
            pixels = images.normalise(pixels)
        x: Tensor = self.proj(pixels.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)
        return x if self.positions is None else x + self.positions.to(x.dtype)


def sincos_2d(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed positions [T, D]: half of the channels encode the column and half the row, each as
    sines, then cosines, of a geometric series of frequencies (MAE, He et al. 2022; fairseq
    get_2d_sincos_pos_embed)."""
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    frequency = 1.0 / 10_000 ** (np.arange(dim // 4) / (dim // 4))
    halves = []
    for position in (column, row):
        angle = np.outer(position, frequency)  # [T, D / 4]
        halves += [np.sin(angle), np.cos(angle)]
    return torch.from_numpy(np.concatenate(halves, axis=1)).float()


class Vision(Modality):
    """Images."""

    name: ClassVar[str] = "vision"
    batch_unit: ClassVar[str] = "images"
    length_unit: ClassVar[str] = "pixels"
    extensions: ClassVar[tuple[str, ...]] = ("jpg", "jpeg", "png", "webp")
    header_readers: ClassVar[dict[str, HeaderReader]] = {
        "jpg": headers.jpeg,
        "jpeg": headers.jpeg,
        "png": headers.png,
        "webp": headers.webp,
    }
    converter: ClassVar[str] = "images"
    baseline_name: ClassVar[str] = "pixels"
    Config: ClassVar[type[ModalityConfig]] = VisionConfig
    config: VisionConfig

    @classmethod
    def check_sample(cls, members: Mapping[str, bytes], about: Mapping[str, Any]) -> int:
        _, w, h = image_files.inspect(cls.image_of(members))
        metadata(members)
        return w * h

    @classmethod
    def image_of(cls, members: Mapping[str, bytes]) -> bytes:
        """The only image of a sample. Raises Unusable."""
        found = [key for key in members if key in cls.extensions]
        if len(found) != 1:
            raise Unusable("row", f"has {len(found)} images, expected one")
        return members[found[0]]

    def crop(self, length: int) -> int:
        """Every image is resized to image_size; lengths are in pixels."""
        return self.config.image_size**2

    def cost(self, length: int) -> float:
        return 1.0

    def masked_tokens(self, length: int) -> int | None:
        mask, (h, w) = self.config.mask, self.config.grid
        if mask.kind == "beit":
            return None
        return self.views * block_count(h * w, prob=mask.prob, inverse=mask.inverse)

    def decode(self, sample: Mapping[str, bytes], rng: np.random.Generator | None) -> Pixels:
        """Pixels uint8 [3, h, w] of a random crop, flipped with probability 1/2; without rng, of
        the central crop."""
        config = self.config
        data = self.image_of(sample)
        if rng is None:
            return images.centre_crop(image_files.open_image(data), config.image_size)
        # BEiT flips before the crop; the distribution is the same.
        if config.jitter > 0:
            image = images.jitter(image_files.decode(data), config.jitter, rng)
        else:
            image = image_files.open_image(data)
        pixels = images.random_crop(image, config.image_size, config.crop_scale, rng)
        return images.random_flip(pixels, rng)

    def fit(self, example: Pixels, length: int) -> Pixels:
        return example

    def collate(
        self, examples: Sequence[Pixels], rngs: Sequence[np.random.Generator], index: int
    ) -> Batch:
        return Batch(
            modality=self.name,
            index=index,
            inputs=torch.from_numpy(np.stack(examples)),
            views=self.views,
            **mask_indices(
                [self.draw_masks(rng) for rng in rngs], removed=self.config.masked == "removed"
            ),
        )

    def draw_masks(self, rng: np.random.Generator) -> Mask:
        """The masks of one image's views, [M, T]."""
        mask, grid = self.config.mask, self.config.grid
        if mask.kind == "beit":
            return beit_mask(
                grid,
                target=mask.patches,
                min_area=mask.min_patches,
                max_area=mask.max_patches,
                views=self.views,
                rng=rng,
            )
        return block_mask_2d(
            grid,
            prob=mask.prob,
            length=mask.length,
            adjust=mask.adjust,
            inverse=mask.inverse,
            views=self.views,
            rng=rng,
        )

    def unmasked(self, examples: Sequence[Pixels]) -> Batch:
        h, w = self.config.grid
        return Batch(
            modality=self.name,
            index=0,
            inputs=torch.from_numpy(np.stack(examples)),
            views=1,
            **mask_indices([np.zeros((1, h * w), dtype=bool)] * len(examples)),
        )

    def check_example(self, example: Any) -> None:
        side = self.config.image_size
        if (
            not isinstance(example, np.ndarray)
            or example.shape != (CHANNELS, side, side)
            or example.dtype not in (np.uint8, np.float32)
        ):
            raise ValueError(
                f"is {described(example)}, expected pixels, uint8 or normalised float32 of shape "
                f"{[CHANNELS, side, side]}"
            )

    def prepare(self, raw: Any, *, rate: int | None = None) -> Pixels:
        """raw: the bytes or the path of an image file, a Pillow image, or uint8 pixels [h, w, 3],
        [3, h, w] or [h, w]: resized and cropped like every image. A JPEG that is at least twice as
        large as the crop gives slightly other pixels as a Pillow image than as a file, because
        `decode` reads such files at a lower resolution."""
        data = raw.detach().cpu().numpy() if isinstance(raw, Tensor) else raw
        return images.centre_crop(image_files.as_image(data), self.config.image_size)

    def largest(self) -> Pixels:
        side = self.config.image_size
        return np.zeros((3, side, side), dtype=np.uint8)

    def baseline(self, example: Pixels) -> npt.NDArray[np.float32]:
        """All pixels as one vector."""
        return example.reshape(-1).astype(np.float32)

    def check_model(self, model: TransformerConfig, *, predicts: bool = True) -> None:
        if self.config.positions == "sincos" and model.dim % 4:
            raise UserError(
                f"model.dim: must be a multiple of 4 for modality.{self.name}.positions=sincos, "
                f"got {model.dim}"
            )
        if predicts:
            h, w = self.config.grid
            require_some_masked(self, self.masked_tokens(0), h * w)
        if predicts and self.config.masked == "removed":
            require_decoder(f"modality.{self.name}.decoder", self.config.decoder, model)

    def front_end(self, model: TransformerConfig) -> FrontEnd:
        config = self.config
        init = beit_normal if model.init == "beit" else nn.init.normal_
        return FrontEnd(
            features=PatchFeatures(config, model.dim),
            bias=RelativeBias(config.grid, model.heads) if config.positions == "relative" else None,
            extra=extra_tokens(config, model.dim, init),
            mask_token=MaskToken(model.dim, beit_normal) if config.masked == "replaced" else None,
            context=Context(
                model,
                depth=config.prenet_depth,
                dropout=config.prenet_dropout,
                layer_drop=config.prenet_layer_drop,
                norm=model.norm == "post",  # pre-norm blocks begin with a norm
            ),
        )

    def predictor(self, model: TransformerConfig) -> nn.Module:
        config = self.config
        if config.masked == "replaced":
            return Head(model.dim, config.head.layers, beit_init, config.head.zero_last)
        # The last layer has torch's initialisation, as in fairseq's reset_parameters.
        return ConvDecoder(config.decoder, model.dim, grid=config.grid)

    def picture(self, batch: Batch) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """The first image in grey [across, up], and the patches that its first view masks."""
        grey = batch.inputs[0].cpu().numpy().mean(0, dtype=np.float32) / 255
        masked = ~batch.seen[0].cpu().numpy().reshape(self.config.grid)
        return np.ascontiguousarray(grey[::-1].T), np.ascontiguousarray(masked[::-1].T)
