"""Normalisation of waveforms as in pre-training: Wav2Vec2FeatureExtractor adds another small number
to the variance (1e-7 instead of 1e-5), which scales quiet recordings differently."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import Wav2Vec2FeatureExtractor


class D2vFeatureExtractor(Wav2Vec2FeatureExtractor):
    """Waveforms in [-1, 1] -> zero mean and unit variance over each recording."""

    @staticmethod
    def zero_mean_unit_var_norm(
        input_values: list[Any], attention_mask: Any, padding_value: float = 0.0
    ) -> list[Any]:
        lengths = [len(x) for x in input_values]
        if attention_mask is not None:
            lengths = [int(np.sum(mask)) for mask in attention_mask]
        normalised = []
        for waveform, length in zip(input_values, lengths, strict=True):
            x = torch.from_numpy(np.asarray(waveform, dtype=np.float32)[:length])
            row = np.full(len(waveform), padding_value, dtype=np.float32)
            row[:length] = torch.nn.functional.layer_norm(x, x.shape, eps=1e-5).numpy()
            normalised.append(row)
        return normalised
