"""Pictures for TensorBoard, drawn with numpy.

T tokens, F mel bands.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

RAMP = np.array(  # dark blue, violet, red, orange, pale yellow: lighter is louder
    [[8, 8, 40], [84, 20, 110], [196, 52, 78], [246, 142, 48], [252, 246, 190]], dtype=np.float64
)
MASK_COLOUR = np.array([150.0, 170.0, 190.0])
MASK_OPACITY = 0.65
PIXELS = 4  # per mel band and per frame


def masked_picture(
    log_mel: npt.NDArray[np.floating[Any]], mask: npt.NDArray[np.bool_]
) -> npt.NDArray[np.uint8]:
    """A spectrogram with its masked part shaded: [height, width, 3], low frequencies at the bottom.

    log_mel: [frames, F], of any frame rate; mask: [T], over the same time, or [T, u] over both
    axes, as of an image [across, up].
    """
    low, high = np.percentile(log_mel, [1, 99])
    level = np.clip((log_mel - low) / max(float(high - low), 1e-6), 0.0, 1.0)
    stops = np.linspace(0.0, 1.0, len(RAMP))
    picture = np.stack([np.interp(level, stops, RAMP[:, c]) for c in range(3)], axis=-1)
    frames = len(log_mel)
    shaded = mask[np.arange(frames) * len(mask) // frames]  # [frames] or [frames, u]
    if mask.ndim == 2:
        rows = log_mel.shape[1]
        shaded = shaded[:, np.arange(rows) * mask.shape[1] // rows]  # [frames, F]
    picture[shaded] += MASK_OPACITY * (MASK_COLOUR - picture[shaded])
    upright = picture.transpose(1, 0, 2)[::-1].round().astype(np.uint8)
    return upright.repeat(PIXELS, axis=0).repeat(PIXELS, axis=1)
