"""Features of frozen encoders, for probes.

B samples, T tokens, D width, K blocks, n samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d2v_ds.encoder import PretrainedEncoder
from d2v_ds.evaluate.labelled import Labelled

Features = npt.NDArray[np.float32]
Tokens = list[Tensor]  # [T, D] of each sample, fp32, on the CPU


def embed(encoder: PretrainedEncoder, examples: Sequence[Any], layer: int) -> Features:
    """The mean over tokens of the output of block `layer` (from 1) -> [n, D].

    Examples of similar size are encoded together; padding does not influence the result.
    """
    return embed_blocks(encoder, examples, [layer])[:, 0]


def embed_blocks(
    encoder: PretrainedEncoder, examples: Sequence[Any], layers: Sequence[int]
) -> Features:
    """As `embed`, of several blocks: [n, K, D]."""
    encoder.eval()
    rows: dict[int, Tensor] = {}
    for group, output in encoder.encode(examples):
        means = torch.stack([output.pooled(layer) for layer in layers], 1)  # [B, K, D]
        rows.update(zip(group, means.cpu(), strict=True))
    return torch.stack([rows[i] for i in range(len(examples))]).numpy()


def embed_tokens(encoder: PretrainedEncoder, examples: Sequence[Any], layer: int) -> Tokens:
    """The output of block `layer` for the tokens of each example, without padding."""
    encoder.eval()
    rows: dict[int, Tensor] = {}
    for group, (blocks, valid) in encoder.encode(examples):
        block = blocks[layer - 1].float().cpu()
        lengths = [block.shape[1]] * len(block) if valid is None else valid.sum(1).tolist()
        for i, tokens, length in zip(group, block, lengths, strict=True):
            rows[i] = tokens[:length].clone()
    return [rows[i] for i in range(len(examples))]


def of_set(labelled: Labelled, encode: Callable[[list[Any]], Any]) -> Any:
    """`encode` applied to all samples of a set, a window at a time: an array [n, ...] or a list."""
    parts = [encode(window) for window in labelled.windows()]
    if isinstance(parts[0], list):
        return [row for part in parts for row in part]
    return np.concatenate(parts)
