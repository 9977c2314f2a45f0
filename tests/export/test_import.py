"""Imports: of folders of transformers, with the same outputs in transformers, and of checkpoints of
fairseq and data2vec_vision, with the same features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_ds.cli import main
from d2v_ds.encoder import load_encoder
from d2v_ds.pretrain import Pretrain
from d2v_ds.weights import Which
from tests.export.helpers import load
from tests.helpers import fairseq_files, variants
from tests.helpers.variants import VARIANTS
from tests.test_key_maps import shaken

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def audio() -> tuple[Any, dict[str, torch.Tensor]]:
    from transformers import Data2VecAudioConfig, Data2VecAudioForCTC

    convs = {"conv_dim": (16,) * 7, "num_conv_pos_embedding_groups": 4, "intermediate_size": 128}
    model = Data2VecAudioForCTC(Data2VecAudioConfig(**SIZE, **convs, vocab_size=5))
    return model, {"input_values": torch.randn(2, 4000)}


def vision() -> tuple[Any, dict[str, torch.Tensor]]:
    from transformers import Data2VecVisionConfig, Data2VecVisionModel

    settings = {
        "image_size": 32,
        "patch_size": 8,
        "intermediate_size": 128,
        "use_mask_token": True,
        "use_shared_relative_position_bias": True,
        "use_mean_pooling": False,
        "layer_norm_eps": 1e-6,
    }
    model = Data2VecVisionModel(Data2VecVisionConfig(**SIZE, **settings))
    return model, {"pixel_values": torch.randn(2, 3, 32, 32)}


def text() -> tuple[Any, dict[str, torch.Tensor]]:
    from transformers import Data2VecTextConfig, Data2VecTextForSequenceClassification

    settings = {
        "vocab_size": 60,
        "intermediate_size": 128,
        "max_position_embeddings": 42,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "num_labels": 3,
    }
    model = Data2VecTextForSequenceClassification(Data2VecTextConfig(**SIZE, **settings))
    return model, {"input_ids": torch.randint(4, 60, (2, 17))}


@pytest.mark.parametrize("make", [audio, vision, text])
def test_folders_of_transformers(make: Any, tmp_path: Path) -> None:
    """Also an import of the import."""
    torch.manual_seed(0)
    model, inputs = make()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "token_type" not in name and "word_embeddings" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        expected = model.eval()(**inputs)[0]
    model.save_pretrained(tmp_path / "theirs")
    if make is audio:
        letters = {"<pad>": 0, "|": 1, "A": 2, "B": 3, "C": 4}
        (tmp_path / "theirs/vocab.json").write_text(json.dumps(letters))
    if make is text:
        (tmp_path / "theirs/merges.txt").write_text("a b")
    source = tmp_path / "theirs"
    for out in (tmp_path / "ours", tmp_path / "again"):
        assert main(["import", str(source), str(out), "--no-verify"]) == 0
        kinds = {
            audio: "AutoModelForCTC",
            vision: "AutoModel",
            text: "AutoModelForSequenceClassification",
        }
        with torch.no_grad():
            found = load(out, kinds[make])(**inputs)[0]
        # Not bit-equal for text, whose token type is added to the positions.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert (out / "merges.txt").exists() == (make is text)
        source = out


@pytest.mark.parametrize("weights", ["student", "teacher"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpoints_of_fairseq_and_data2vec_vision(
    variant: str, weights: Which, tmp_path: Path
) -> None:
    """By the command; one of them with its verification by transformers."""
    task, config = shaken(variant).eval(), Pretrain.resolve(variants.config(variant))
    with torch.no_grad():
        for parameter in task.teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    source = fairseq_files.write(task, config, variant, tmp_path / "model.pt")
    verified = (variant, weights) == ("v2_speech", "student")
    options = ["--weights", weights, *([] if verified else ["--no-verify"])]
    assert main(["import", str(source), str(tmp_path / "out"), *options]) == 0
    theirs, ours = (load_encoder(p, weights=weights) for p in (source, tmp_path / "out"))
    examples = variants.examples(task, 30, 40)
    with torch.no_grad():
        for a, b in zip(theirs(examples).blocks, ours(examples).blocks, strict=True):
            assert torch.equal(a, b)
