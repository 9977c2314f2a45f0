"""A fresh process verifies exports: it measures small differences, and finds altered tensors and
preprocessors."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2v_ds import recipes
from d2v_ds.errors import UserError
from d2v_ds.export import writer
from d2v_ds.export.load_export import difference
from d2v_ds.export.model import select
from d2v_ds.export.text import open_tokenizer
from d2v_ds.export.verify import Found, verify
from d2v_ds.export.writer import Options, VerificationFailed, export
from d2v_ds.finetune.labels import Pieces
from d2v_ds.finetune.model import finetuned
from d2v_ds.weights import open_weights
from tests import ROOT
from tests.export.helpers import TOKENIZER, from_task, weights_of, with_head, write
from tests.helpers.joint_sets import SMALL

MODEL = ROOT / TOKENIZER
WITH_TOKENIZER = [
    f"modality.text.{setting}" for setting in ("vocab_size=4096", "mask_id=4095", "pad_id=1")
]


def test_a_joint_export_with_all_preprocessors(tmp_path: Path) -> None:
    settings = [each for each in SMALL if not each.startswith("modality.text.")]
    more = ["modality.text.decoder.dim=16", "modality.text.decoder.groups=4"]
    found = from_task(recipes.load("joint_tiny", [*settings, *more, *WITH_TOKENIZER]))
    content, measured = export(found, tmp_path / "out", Options(tokenizer=MODEL))
    assert measured is not None and content.missing == ""
    assert sorted(measured.model) == ["speech", "text", "vision"]
    assert sorted(measured.inputs) == ["speech", "vision"]
    assert all(0 <= value <= 1e-5 for value in measured.model.values())
    assert not measured.failures()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer.model", "preprocessor_config.json"} <= names
    assert {path.name for path in tmp_path.iterdir()} == {"out"}

    exported = select(found, "student", "", {})
    text = open_tokenizer(MODEL, exported.modality["text"])
    file = tmp_path / "out/tokenizer_config.json"
    file.write_text(file.read_text().replace('"split_special_tokens": true', '"x": 1'))
    [failure] = verify(tmp_path / "out", exported, text).failures()
    assert failure.startswith("the tokenizer gives [0, ") and "'<s> </s>" in failure


def test_altered_exports_fail(tmp_path: Path) -> None:
    """Of a fine-tuned model, whose symbols must be those of the tokenizer."""
    found = with_head(weights_of("v1_speech"))
    write(found, tmp_path / "out")
    exported = select(found, "student", "", {})
    assert verify(tmp_path / "out", exported, None).failures() == []

    renamed = "data2vec_audio.encoder.layer_norm.bias"
    alter(tmp_path / "out", "feature_projection.projection.weight", renamed)
    settings = tmp_path / "out/preprocessor_config.json"
    code = json.loads(settings.read_text())
    del code["auto_map"]  # the class of transformers normalises a little differently
    settings.write_text(json.dumps(code))
    vocabulary = tmp_path / "out/vocab.json"
    vocabulary.write_text(vocabulary.read_text().replace('"a": 2', '"c": 2'))
    failures = verify(tmp_path / "out", exported, None).failures()
    assert len(failures) == 6
    starts = (
        "features of speech differ",
        f"missing keys: {renamed}",
        "preprocessed inputs of speech differ",
        "the tokenizer decodes ",
        "the tokenizer has other symbols",
        "unexpected keys: other",
    )
    for failure, start in zip(sorted(failures), starts, strict=True):
        assert failure.startswith(start), failure


def test_transcripts_of_sentencepiece_symbols(tmp_path: Path) -> None:
    """The model that makes them is in the export, and transformers decodes as we do."""
    labels = tmp_path / "labels.model"
    labels.write_bytes(MODEL.read_bytes())
    names = Pieces.collect(str(labels))
    found = with_head(weights_of("v1_speech"), labels=names)
    assert names[0] == "<blank>" and any(name.startswith("▁") for name in names)
    found.finetune["tokenizer"] = "spm/of/the/training.model"
    with pytest.raises(UserError, match=r"lacks labels.model.*copy .*spm/of/the/training.model"):
        export(found, tmp_path / "out", Options())

    found = dataclasses.replace(found, files={labels.name: labels})
    _, measured = export(found, tmp_path / "out", Options())
    assert measured is not None and not measured.failures()
    labels.unlink()
    again = finetuned(open_weights(tmp_path / "out"))
    assert isinstance(again.labels, Pieces)
    ids = again.labels.encode("a text of words")
    assert again.labels.decode(ids) == "a text of words"
    assert tuple(again.labels.names) == names
    export(open_weights(tmp_path / "out"), tmp_path / "again", Options())
    assert (tmp_path / "again/labels.model").read_bytes() == MODEL.read_bytes()


def alter(folder: Path, name: str, renamed: str = "") -> None:
    """Changes a single value of the tensor whose name ends so, and renames another one."""
    tensors = load_file(folder / "model.safetensors")
    [key] = [key for key in tensors if key.endswith(name)]
    tensors[key].view(-1)[0] += 0.05
    if renamed:
        tensors["other"] = tensors.pop(renamed)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_nothing_is_left_of_an_export_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = writer.write

    def damaged(folder: Path, content: Any) -> None:
        real(folder, content)
        alter(folder, "features.proj.weight")

    monkeypatch.setattr(writer, "write", damaged)
    with pytest.raises(VerificationFailed, match=r"^features of vision differ by \d.*allowed"):
        export(weights_of("v2_vision"), tmp_path / "out", Options())
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_loaded(tmp_path: Path) -> None:
    found = weights_of("v2_vision")
    write(found, tmp_path / "out")
    (tmp_path / "out/modeling_d2v.py").write_text("import d2v_ds")
    with pytest.raises(VerificationFailed, match=r"cannot load the export(.|\n)*import of d2v_ds"):
        verify(tmp_path / "out", select(found, "student", "", {}), None)


def test_differences_of_shape_and_nan_count() -> None:
    ones = torch.ones(3)
    assert difference(ones, ones + 1e-3) == pytest.approx(1e-3, rel=1e-3)
    assert difference(2 * ones, ones) == 0.5
    assert difference(ones, torch.ones(2)) == difference(ones, ones * float("nan")) == float("inf")
    found = Found({"speech": float("inf")}, {"speech": 1e-5}, [], {})
    assert found.failures() == ["features of speech differ by inf, allowed is 1e-05"]


def test_transformers_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name)
    )
    with pytest.raises(UserError, match=r"pip install 'd2v-ds\[transformers\]'.*--no-verify"):
        export(weights_of("v1_vision"), tmp_path / "out", Options())
    write(weights_of("v1_vision"), tmp_path / "out")
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import d2v_ds.export.writer, d2v_ds.cli\n"
        "assert 'tokenizers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
