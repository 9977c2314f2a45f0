"""The outputs of a fine-tuned model's head on features of the encoder.

    ctc                         every token                     -> proj
    classification of images    mean of the last block's output -> norm -> proj
    classification, regression  first token -> dense -> tanh    -> proj

T tokens, D width, C outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


def logits(
    head: Mapping[str, Tensor], task: str, last: Tensor, block: Tensor, norm_eps: float
) -> Tensor:
    """One example: the trunk's output [T, D] and the last block's output [T, D] -> [T, C] for ctc,
    else [C]. head: head.* by name."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, head[f"head.{name}.weight"], head[f"head.{name}.bias"])

    if task == "ctc":
        return linear("proj", last)
    if "head.norm.weight" in head:
        mean = block.mean(0)
        norm = head["head.norm.weight"], head["head.norm.bias"]
        return linear("proj", F.layer_norm(mean, mean.shape, *norm, eps=norm_eps))
    return linear("proj", torch.tanh(linear("dense", last[0])))
