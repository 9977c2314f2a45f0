"""The JSON file behind engine.config: DeepSpeed's ZeRO and communication settings."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from d2v_ds.config.documents import load_json
from d2v_ds.errors import UserError
from d2v_ds.files import resource


def engine_config_file(name: str) -> Path | None:
    """The JSON file behind engine.config, a name or a path; None for the local engine. Raises
    UserError if there is no such file."""
    if name == "local":
        return None
    folder = resource("ds_configs")
    known = sorted(p.stem for p in folder.glob("*.json"))
    path = folder / f"{name}.json" if name in known else Path(name)
    if not is_file(path):
        near = difflib.get_close_matches(name, ["local", *known], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"engine.config: {name!r} is neither a JSON file nor one of local, "
            f"{', '.join(known)}{hint}"
        )
    return path


def is_file(path: Path) -> bool:
    """Whether there is such a file. A name that is too long for a file is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


# DeepSpeed keys that the run determines, and the settings that they follow from.
OWNED_BY_RUN = {
    "train_batch_size": "batch.size and batch.micro_batches",
    "train_micro_batch_size_per_gpu": "batch.size and batch.micro_batches",
    "gradient_accumulation_steps": "batch.micro_batches",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim.*",
    "scheduler": "optim.schedule",
    "fp16": "engine.precision",
    "bf16": "engine.precision",
    "torch_autocast": "engine.precision",
}


def load_engine_config(name: str) -> dict[str, Any]:
    """The DeepSpeed settings behind engine.config: ZeRO and communication. Empty for the local
    engine. Raises UserError if the file is unusable or sets a key of OWNED_BY_RUN."""
    path = engine_config_file(name)
    if path is None:
        return {}
    raw = load_json(path, "a file of DeepSpeed settings in JSON")
    for key, owner in OWNED_BY_RUN.items():
        if key in raw:
            raise UserError(
                f"{path} sets {key}, but the run configuration owns it ({owner}). "
                "Remove it from the file."
            )
    return raw
