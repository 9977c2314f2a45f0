"""Weights of others: config.json and the tensors of folders, and files of torch.save."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save

from d2v_ds.errors import UserError
from d2v_ds.key_maps import HUGGING_FACE, to_theirs
from d2v_ds.pretrain import Pretrain
from d2v_ds.weights import open_weights
from tests.fuzz.harness import Target
from tests.fuzz.mutations import Mutate, any_bytes, head_bytes, json_values
from tests.helpers import fairseq_files, variants

CONFIG, TENSORS = "config.json", "model.safetensors"
SMALL = ("model.dim=8", "model.heads=2", "model.depth=1", "target.top_k=1")
TEXT = ("modality.text.vocab_size=12", "modality.text.mask_id=11", "modality.text.max_tokens=6")


def _exported(folder: Path) -> tuple[bytes, bytes]:
    """config.json and tensors of a folder as d2v-ds export writes it, in transformers' class."""
    config = Pretrain.resolve(variants.config("v1_text", *SMALL, *TEXT))
    student = Pretrain.create(config).student
    tensors = {f"encoder.{n}": p.detach() for n, p in student.encoder.named_parameters()}
    theirs = to_theirs(tensors, HUGGING_FACE["text", "1.0"])
    entry = {"version": 1, "weights": "student", "step": 7, "finetune": {}}
    entry |= {"model": config.model, "modality": config.modality, "about": {"recipe": "tiny"}}
    stock = {"model_type": "data2vec-text", "architectures": ["Data2VecTextModel"]}
    stock |= {"num_attention_heads": 2, "hidden_dropout_prob": 0.1, "pad_token_id": 1}
    (folder / "tokenizer.json").write_text('{"added_tokens": [{"content": "<mask>", "id": 11}]}')
    return (
        json.dumps(stock | {"d2v_ds": entry}).encode(),
        save({name: value.contiguous() for name, value in theirs.items()}),
    )


def _configs(folder: Path) -> Sequence[bytes]:
    """With and without our entry."""
    ours, tensors = _exported(folder)
    (folder / TENSORS).write_bytes(tensors)
    (folder.parent / "work").mkdir(exist_ok=True)
    (folder.parent / "work" / TENSORS).write_bytes(tensors)
    stock = {key: value for key, value in json.loads(ours).items() if key != "d2v_ds"}
    return [ours, json.dumps(stock).encode()]


def _tensors(folder: Path) -> Sequence[bytes]:
    config, tensors = _exported(folder)
    (folder.parent / "work").mkdir(exist_ok=True)
    (folder.parent / "work" / CONFIG).write_bytes(config)
    return [tensors]


def _open(name: str) -> Callable[[bytes, Path], Any]:
    def parse(data: bytes, folder: Path) -> Any:
        path = folder / name
        path.write_bytes(data)
        found = open_weights(path if name.endswith(".pt") else folder)
        shapes = {key: tuple(value.shape) for key, value in found.tensors("student").items()}
        return found.model, found.modality, shapes

    return parse


def header(data: bytes, rng: Random) -> bytes:
    """Changes of the JSON header of safetensors, with its right length; sometimes of any byte."""
    if rng.random() < 0.3:
        return head_bytes(data, rng)
    (size,) = struct.unpack("<Q", data[:8])
    changed = json_values(data[8 : 8 + size], rng)
    return struct.pack("<Q", len(changed)) + changed + data[8 + size :]


def _pickles(folder: Path) -> Sequence[bytes]:
    """Of both formats of torch.save."""
    config = Pretrain.resolve(variants.config("v1_text", *SMALL, *TEXT))
    content = fairseq_files.content(Pretrain.create(config), config, "v1_text")
    files = []
    for new in (True, False):
        file = io.BytesIO()
        torch.save(content, file, _use_new_zipfile_serialization=new)
        files.append(file.getvalue())
    return files


def pickled(data: bytes, rng: Random) -> bytes:
    """In the zip format, the pickle is stored uncompressed near the beginning."""
    mutate: Mutate = any_bytes if rng.random() < 0.3 else lambda x, r: head_bytes(x, r, 6000)
    return mutate(data, rng)


TARGETS = (
    Target("model config.json", _configs, _open(CONFIG), json_values, (UserError,), False),
    Target("safetensors", _tensors, _open(TENSORS), header, (UserError,), False),
    Target("torch.save", _pickles, _open("x.pt"), pickled, (UserError,), False),
)
