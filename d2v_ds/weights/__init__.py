"""Trained weights, wherever they were saved, with the settings that build their model.

    run folder, checkpoint           runs.py                 --.
    exported or transformers folder  transformers_folder.py  --+-- open_weights --> Weights
    fairseq .pt, BEiT .pth           fairseq.py              --'

    Weights --build_encoder--> Encoder        --initialise--> a task that starts from the weights

Names of parameters are those of a Student: encoder.front_ends.*, encoder.trunk.*, predictors.*.
Reading needs neither DeepSpeed nor fairseq nor transformers, and runs no code from the files.
unpickle.py reads the files of torch.save; shapes.py and assemble.py find the settings of a model
of another implementation and verify its parameters; what they assumed is in about["assumed"].
"""

from __future__ import annotations

from pathlib import Path

from d2v_ds.errors import UserError
from d2v_ds.run.run_folder import RunFolder
from d2v_ds.weights.fairseq import open_fairseq
from d2v_ds.weights.init import initialise
from d2v_ds.weights.model import Weights, Which, build_encoder, load_parameters
from d2v_ds.weights.runs import load_weights, open_newest, open_run
from d2v_ds.weights.transformers_folder import open_folder

__all__ = [
    "Weights",
    "Which",
    "build_encoder",
    "initialise",
    "load_parameters",
    "load_weights",
    "open_newest",
    "open_weights",
]

SUPPORTED = (
    "a folder of transformers or of d2v-ds export (with config.json), or a .pt or .pth file of "
    "fairseq or data2vec_vision"
)


def open_weights(path: str | Path) -> Weights:
    """The weights in a run folder (its newest valid checkpoint), a checkpoint's folder, an exported
    folder, a folder of Hugging Face transformers (data2vec 1.0), or a checkpoint of fairseq
    (data2vec 1.0 and 2.0) or data2vec_vision. Raises UserError."""
    path = Path(path)
    try:
        return opened(path)
    except PermissionError as error:
        raise UserError(f"{error.filename or path}: must be readable ({error.strerror})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def opened(path: Path) -> Weights:
    """As `open_weights`; also raises OSError, for example for a name that is too long."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_file():
        if path.suffix in (".safetensors", ".json", ".bin", ".yaml"):
            raise UserError(f"{path}: is one file of a folder; give the folder {path.parent}")
        return open_fairseq(path)
    if (path / "manifest.json").is_file() or RunFolder(path).checkpoints.is_dir():
        return open_run(path)
    if (path / "config.json").is_file():
        return open_folder(path)
    raise UserError(
        f"{path}: neither a checkpoint nor a run folder with a checkpoint, and not {SUPPORTED}"
    )
