"""Run folders and checkpoints as sources of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v_ds.checkpoint import Checkpoint, StateKind, newest_verified, open_verified
from d2v_ds.config import Config
from d2v_ds.config.decoding import decode, to_dict
from d2v_ds.errors import UserError
from d2v_ds.pretrain import Pretrain
from d2v_ds.run.run_folder import RunFolder
from d2v_ds.weights.assemble import naming
from d2v_ds.weights.model import Part, Weights

# (prefix that is removed, beginning of the names) of a task's parameters, in pre-training and in
# fine-tuning
PREFIXES: dict[bool, dict[Part, tuple[str, str]]] = {
    False: {
        "student": ("student.", "student."),
        "teacher": ("teacher.", "teacher."),
        "head": ("", "head."),
    },
    True: {"student": ("", "encoder."), "teacher": ("", "teacher."), "head": ("", "head.")},
}


def open_newest(path: Path) -> Checkpoint:
    """The checkpoint in `path`: the newest valid one of a run folder, or a checkpoint's own folder.
    Collective: all ranks must call it. Raises UserError."""
    if (path / "manifest.json").is_file():
        return open_verified(path)
    found = newest_verified(RunFolder(path), "choose another run")
    if found is None:
        raise UserError(f"{path}: neither a checkpoint nor a run folder with a checkpoint")
    return found


def open_run(path: Path) -> Weights:
    """The weights of the newest valid checkpoint in a run folder, or of a checkpoint. Raises
    UserError."""
    found = open_newest(path)
    with naming(found.path):
        config = decode(Config, found.state["config"])
        finetuned = config.finetune.task != "none"
        if not finetuned:
            config = Pretrain.resolve(config)
    run = RunFolder(found.path.resolve().parent.parent)

    def tensors(part: Part) -> dict[str, Tensor]:
        kind: StateKind = "ema" if part == "teacher" else "master"
        prefix, wanted = PREFIXES[finetuned][part]
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in found.tensors(kind).items()
            if name.startswith(wanted)
        }

    return Weights(
        path=path,
        model=config.model,
        modality=config.modality,
        tensors=tensors,
        step=found.step,
        finetune=to_dict(config.finetune) if finetuned else {},
        config=config,
        about=about(config, found),
        files={file.name: file for file in (run.tokenizer, run.labels) if file.is_file()},
    )


def about(config: Config, found: Checkpoint) -> dict[str, Any]:
    return {"recipe": config.run.name, "run": dict(found.state["train"])}


@torch.no_grad()
def load_weights(task: Pretrain, found: Checkpoint) -> None:
    """Loads the weights of student and teacher from the checkpoint, in fp32."""
    values = {**found.tensors("master"), **found.tensors("ema")}
    for name, parameter in task.named_parameters():
        parameter.copy_(values[name])
