"""Verification of an exported folder: a fresh process loads it with transformers.

    fixed random examples --our encoder, each alone--> features, logits ----+--> differences
                          --load_export.py, transformers, one batch--> same --'

The differences are relative: the largest absolute difference of a tensor (one block's output for
one example) divided by the largest absolute value of ours.

B samples, T tokens, D width, L blocks.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from d2v_ds.config.decoding import decode
from d2v_ds.config.finetuning import FineTuning
from d2v_ds.data import image_files, images
from d2v_ds.errors import UserError
from d2v_ds.export.heads import build_head, classes_of
from d2v_ds.export.model import Exported
from d2v_ds.export.tokenizer import TextTokenizer
from d2v_ds.finetune.labels import LABELS_FILE, Transcripts
from d2v_ds.finetune.settings import create_labels
from d2v_ds.modalities.base import Modality
from d2v_ds.modalities.speech import normalised

TOLERANCE = 1e-5
TRANSCRIPTS = 20
SHORTER = (1.0, 0.61, 0.35)  # lengths of the examples, relative to the largest
IMAGE_SIZES = ((300, 200), (97, 260), (640, 640))  # width, height
TEXTS = (
    "a",
    "  Two  spaces, a tab\tand a\nnew line. ",
    "In 2023 it cost 1,234.50 € (≈ 99 %).",
    "naïve Ærøskøbing 東京 🙂👩‍🔬 ▁ ▁▁x",
    "<s> </s> <pad> <mask> <unk> <0x41>",
)


class VerificationFailed(RuntimeError):
    """transformers does not give what our encoder gives; the message has the reasons."""


@dataclass(frozen=True)
class Found:
    """What the fresh process measured."""

    model: dict[str, float]  # {modality: the largest relative difference of features and logits}
    inputs: dict[str, float]  # {modality: that of the preprocessors' results}
    problems: list[str]  # other findings: tensors that were not loaded ...
    versions: dict[str, str]

    def failures(self) -> list[str]:
        """One sentence for each reason why the export is wrong."""
        failures = list(self.problems)
        for kind, differences in (("features", self.model), ("preprocessed inputs", self.inputs)):
            failures += [
                f"{kind} of {name} differ by {value:.1e}, allowed is {TOLERANCE:.0e}"
                for name, value in differences.items()
                if not value <= TOLERANCE
            ]
        return failures


def require_transformers() -> None:
    """Raises UserError if transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError(
            "verifying an export needs transformers: pip install 'd2v-ds[transformers]', or skip "
            "the verification with --no-verify"
        )


def verify(folder: Path, exported: Exported, text: TextTokenizer | None) -> Found:
    """Loads the folder in a fresh process and compares. Raises VerificationFailed, with what the
    process printed, if it cannot be loaded."""
    with tempfile.TemporaryDirectory() as scratch:
        plan, tensors = expectations(exported, text)
        if exported.finetune.get("task") == "ctc":
            plan["transcripts"] = transcripts(exported, folder)
        separate = {key: value.clone().contiguous() for key, value in tensors.items()}
        save_file(separate, f"{scratch}/tensors.safetensors")
        (Path(scratch) / "plan.json").write_text(json.dumps(plan))
        done = subprocess.run(
            [sys.executable, "-m", "d2v_ds.export.load_export", str(folder), scratch],
            env={
                **os.environ,
                "HF_MODULES_CACHE": f"{scratch}/modules",
                "HF_HUB_OFFLINE": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "TOKENIZERS_PARALLELISM": "false",
            },
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise VerificationFailed(f"transformers cannot load the export\n{done.stderr.rstrip()}")
        return Found(**json.loads((Path(scratch) / "found.json").read_text()))


def expectations(
    exported: Exported, text: TextTokenizer | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The plan for the fresh process, and our results by name: NAME.input.i, NAME.last.i,
    NAME.block.n.i, NAME.logits.i of example i, NAME.raw.i and NAME.ready.i of the preprocessors."""
    tensors: dict[str, Tensor] = {}
    plan: dict[str, Any] = {
        "model": exported.names,
        "inputs": [],
        "class": classes_of(exported.names[0], exported.head)[0] if exported.head else "AutoModel",
        "labels": list(exported.finetune.get("labels", ())),
        "settings": exported.modality,
    }
    for name, modality in exported.modalities.items():
        for i, example in enumerate(examples(modality)):
            results = outputs(exported, modality, example)
            tensors |= {f"{name}.{key}.{i}": value for key, value in results.items()}
        if name == "text":
            plan["texts"] = list(TEXTS) if text else []
            plan["ids"] = [text.encode(each) for each in TEXTS] if text else []
        else:
            plan["inputs"].append(name)
            tensors |= preprocessed(modality)
    return plan, tensors


def examples(modality: Modality) -> list[Any]:
    """Random examples of unequal lengths. The first has the largest size."""
    rng, largest = np.random.default_rng(0), modality.largest()
    if modality.name == "vision":
        return [rng.integers(0, 256, largest.shape, dtype=np.uint8) for _ in SHORTER]
    lengths = [max(1, round(len(largest) * share)) for share in SHORTER]
    if modality.name == "speech":
        lengths = [max(n, round(0.1 * modality.config.sample_rate)) for n in lengths]
        return [rng.standard_normal(n).astype(np.float32) for n in lengths]
    config = modality.config
    usual = [i for i in range(config.vocab_size) if i != config.pad_id]
    return [rng.choice(usual, n).astype(np.int64) for n in lengths]


def transcripts(exported: Exported, folder: Path) -> list[tuple[list[int], str]]:
    """Paths of random symbols and the transcripts that our greedy decoding makes of them."""
    tokenizer = str(folder / LABELS_FILE) if exported.finetune["tokenizer"] else ""
    labels = decode(FineTuning, {**exported.finetune, "tokenizer": tokenizer}, "finetune")
    decoder = create_labels(labels)
    assert isinstance(decoder, Transcripts)
    special = re.compile(r"<.+>")  # blank, unknown, control symbols and bytes
    usual = [i for i, name in enumerate(decoder.names) if not special.fullmatch(name)]
    rng, found = np.random.default_rng(2), []
    for _ in range(TRANSCRIPTS):
        symbols = rng.choice(usual, 20)
        path = np.stack([symbols, symbols, np.zeros_like(symbols)], axis=1).ravel()
        found.append((path.tolist(), decoder.greedy(path)))
    return found


@torch.no_grad()
def outputs(exported: Exported, modality: Modality, example: Any) -> dict[str, Tensor]:
    """Our results for one example alone, without extra tokens."""
    batch = modality.unmasked([example])
    encoder = exported.module
    depth = exported.model["depth"]
    last, _, layers = encoder.whole(batch, encoder.features(batch), collect=depth)
    blocks = [block[0] for _, block in layers]
    ready = batch.inputs[0]
    if modality.name == "vision":
        ready = images.normalise(batch.inputs)[0]
    found = {"input": ready, "last": last[0]}
    found |= {f"block.{n}": block for n, block in enumerate(blocks)}
    if exported.head:
        found["logits"] = build_head(exported.head)(blocks[-1][None], None)[0]
    return found


def preprocessed(modality: Modality) -> dict[str, Tensor]:
    """Raw inputs of the preprocessor, and what our decoding makes of them."""
    rng, found = np.random.default_rng(1), dict[str, Tensor]()
    if modality.name == "speech":
        for i, loudness in enumerate((3000.0, 20.0)):
            size = (1 + i) * modality.config.sample_rate // 2
            pcm = (loudness * rng.standard_normal(size)).astype(np.int16)
            found[f"speech.raw.{i}"] = torch.from_numpy(pcm.astype(np.float32) / 32768)
            found[f"speech.ready.{i}"] = torch.from_numpy(normalised(pcm))
        return found
    for i, (w, h) in enumerate(IMAGE_SIZES):
        pixels = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
        image = image_files.open_image(b"P6 %d %d 255\n" % (w, h) + pixels.tobytes())
        crop = images.centre_crop(image, modality.config.image_size)
        found[f"vision.raw.{i}"] = torch.from_numpy(pixels)
        found[f"vision.ready.{i}"] = images.normalise(torch.from_numpy(crop)[None])[0]
    return found
