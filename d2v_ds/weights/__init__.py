"""Trained weights, wherever they were saved, with the settings that build their model.

    run folder, checkpoint          runs.py          --.
    exported or transformers folder transformers.py  --+-- open_weights --> Weights
    fairseq .pt, BEiT .pth          fairseq.py       --'

    Weights --build_encoder--> Encoder        --initialise--> a task that starts from the weights

Names of parameters are those of a Student: encoder.front_ends.*, encoder.trunk.*, predictors.*.
Reading needs neither DeepSpeed nor fairseq nor transformers.
"""

from __future__ import annotations

from pathlib import Path

from d2v_ds.errors import UserError
from d2v_ds.weights.init import initialise
from d2v_ds.weights.model import Weights, Which, build_encoder
from d2v_ds.weights.runs import load_weights, open_newest, open_run

__all__ = [
    "Weights",
    "Which",
    "build_encoder",
    "initialise",
    "load_weights",
    "open_newest",
    "open_weights",
]


def open_weights(path: str | Path) -> Weights:
    """The weights in a run folder (its newest valid checkpoint) or a checkpoint's folder. Raises
    UserError."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    return open_run(path)
