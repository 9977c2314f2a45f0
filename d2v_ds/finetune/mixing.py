"""Augmentation of labelled images: mixup, CutMix, RandAugment and random erasing.

Images are uint8 [B, 3, h, w], labels [B, C] probabilities. Mixed pixels are rounded to 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from d2v_ds.config.finetuning import FineTuning
from d2v_ds.data import images
from d2v_ds.data.images import Pixels
from d2v_ds.data.rand_augment import rand_augment

Labels = npt.NDArray[np.float32]

ERASED_AREA = (0.02, 1 / 3)  # of the image (Zhong et al. 2020)
ERASED_ASPECT = (0.3, 1 / 0.3)
ATTEMPTS = 10


@dataclass(frozen=True)
class Mixing:
    """The augmentation of a fine-tuning run."""

    mixup: float
    cutmix: float
    prob: float
    switch: float
    erase: float
    rand: bool

    @classmethod
    def of(cls, settings: FineTuning) -> Mixing:
        return cls(
            settings.mixup,
            settings.cutmix,
            settings.mix_prob,
            settings.mix_switch,
            settings.erase,
            settings.augment == "rand",
        )

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def augment(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        """One image [3, h, w], after its crop."""
        if self.rand:
            pixels = rand_augment(pixels, rng)
        return erased(pixels, rng) if self.erase and rng.random() < self.erase else pixels

    def mix(
        self, pixels: Pixels, labels: Labels, rng: np.random.Generator
    ) -> tuple[Pixels, Labels]:
        """Mixes each image of a micro-batch with the one at the opposite place. One draw decides
        for the whole micro-batch, as in timm's batch mode. A sample without a label stays one."""
        if rng.random() >= self.prob:
            return pixels, labels
        cut = self.mixup == 0 or (self.cutmix > 0 and rng.random() < self.switch)
        alpha = self.cutmix if cut else self.mixup
        share = float(rng.beta(alpha, alpha))
        if cut:
            mixed, share = cut_and_paste(pixels, share, rng)
        else:
            blend = share * pixels.astype(np.float32) + (1 - share) * pixels[::-1]
            mixed = np.rint(blend).astype(np.uint8)
        counted = (labels.sum(1) > 0) & (labels[::-1].sum(1) > 0)
        both = share * labels + (1 - share) * labels[::-1]
        return mixed, (both * counted[:, None]).astype(np.float32)


def cut_and_paste(pixels: Pixels, share: float, rng: np.random.Generator) -> tuple[Pixels, float]:
    """Replaces a rectangle of the fraction 1 - share by that of the opposite image. Returns the
    images and the exact share that is left."""
    h, w = pixels.shape[2:]
    side = np.sqrt(1 - share)
    y, x = int(rng.integers(h)), int(rng.integers(w))
    half_h, half_w = int(h * side) // 2, int(w * side) // 2
    rows = slice(max(0, y - half_h), min(h, y + half_h))
    columns = slice(max(0, x - half_w), min(w, x + half_w))
    mixed = pixels.copy()
    mixed[:, :, rows, columns] = pixels[::-1, :, rows, columns]
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed, 1 - area / (h * w)


def erased(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Replaces a random rectangle by noise with the mean and spread of ImageNet's pixels."""
    _, h, w = pixels.shape
    for _ in range(ATTEMPTS):
        area = rng.uniform(*ERASED_AREA) * h * w
        aspect = np.exp(rng.uniform(*np.log(ERASED_ASPECT)))
        rows, columns = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < rows < h and 0 < columns < w:
            y, x = int(rng.integers(h - rows + 1)), int(rng.integers(w - columns + 1))
            noise = rng.standard_normal((3, rows, columns))
            values = 255 * (np.array(images.MEAN) + (noise.T * np.array(images.STD)))
            result = pixels.copy()
            result[:, y : y + rows, x : x + columns] = np.clip(np.rint(values.T), 0, 255)
            return result
    return pixels
