"""Weight names of other implementations: round trips, and equal outputs of transformers' encoders
with the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from d2v_ds.data.audio import import_torchaudio
from d2v_ds.key_maps import FAIRSEQ, HUGGING_FACE, match, to_ours, to_theirs
from d2v_ds.pretrain import Pretrain
from tests.helpers import variants
from tests.helpers.golden_fixture import Fixture, fixture_names
from tests.helpers.variants import VARIANTS

VERSIONS = {"v1": "1.0", "v2": "2.0"}


def shaken(variant: str, *overrides: str) -> Pretrain:
    """A task without any weight of 0 or 1."""
    task = variants.build(variant, *overrides)
    with torch.no_grad():
        for parameter in task.student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for module in task.student.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
    return task


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_fairseq_names_round_trip(variant: str) -> None:
    rules = FAIRSEQ[variant[3:], VERSIONS[variant[:2]]]
    prenet = [] if variant.startswith("v1") else [f"modality.{variant[3:]}.prenet_depth=1"]
    state = shaken(variant, *prenet).student.state_dict()
    theirs = to_theirs(state, rules)
    assert not theirs.keys() & state.keys()
    same(to_ours(theirs, rules), dict(state))


@pytest.mark.parametrize("name", fixture_names())
def test_names_and_shapes_equal_the_original(name: str) -> None:
    golden = Fixture(name)
    expected = golden.group("student")
    ours = golden.theirs(to_ours(expected, golden.rules))
    left = {"rel_pos_bias.relative_position_index", "encoder.sentence_encoder.version"}
    assert expected.keys() - ours.keys() <= left and ours.keys() <= expected.keys()
    for key, value in ours.items():
        assert torch.equal(value, expected[key]), key


def test_two_class_tokens_keep_their_order() -> None:
    task = shaken("v2_vision", "modality.vision.extra_tokens=2")
    rules = FAIRSEQ["vision", "2.0"]
    theirs = to_theirs(task.student.state_dict(), rules)
    tokens = theirs["modality_encoders.IMAGE.extra_tokens"]
    assert tokens.shape == (1, 2, 32)
    front_end = task.student.encoder.front_end("vision")
    assert torch.equal(front_end.extra(torch.zeros(1, 0, 32)), tokens)  # type: ignore[misc]


def test_unknown_and_missing_names_are_errors() -> None:
    rules = FAIRSEQ["speech", "1.0"]
    with pytest.raises(KeyError, match="quantizer"):
        to_ours({"quantizer.vars": torch.zeros(1)}, rules)
    layer = "encoder.layers.3.self_attn"
    with pytest.raises(KeyError, match=r"blocks\.3\.attention\.qkv\.weight: .*k_proj.* is missing"):
        to_ours({f"{layer}.{x}_proj.weight": torch.zeros(2, 2) for x in "qv"}, rules)
    state = dict(variants.build("v1_speech").student.state_dict()) | {"more": torch.zeros(1)}
    with pytest.raises(KeyError, match="more"):
        to_theirs(state, rules)
    assert to_ours({"_ema": torch.zeros(1)}, rules) == {}


def test_counting_from_one() -> None:
    rules = FAIRSEQ["speech", "2.0"]
    theirs = "modality_encoders.AUDIO.relative_positional_encoder.5.0.bias"
    rule, _, values = match(theirs, rules, side="theirs")
    assert rule.ours == "encoder.front_ends.speech.positions.convs.{i}.{p}"
    assert values == {"i": "4", "p": "bias"}


# ------------------------------------------------------------------- Hugging Face transformers


@pytest.fixture(scope="module", autouse=True)
def torchaudio_imported() -> None:
    """Imports torchaudio before transformers does, with our workaround for a mismatched wheel."""
    import_torchaudio()


def audio_model(task: Pretrain) -> nn.Module:
    from transformers import Data2VecAudioConfig, Data2VecAudioModel

    config = task.modalities["speech"].config
    channels, kernels, strides = zip(*config.convs, strict=True)
    return Data2VecAudioModel(
        Data2VecAudioConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            conv_dim=channels,
            conv_kernel=kernels,
            conv_stride=strides,
            num_feat_extract_layers=len(channels),
            conv_pos_kernel_size=config.positions.kernel,
            num_conv_pos_embeddings=config.positions.depth,
            num_conv_pos_embedding_groups=config.positions.groups,
        )
    )


def vision_model(task: Pretrain) -> nn.Module:
    from transformers import Data2VecVisionConfig, Data2VecVisionModel

    return Data2VecVisionModel(
        Data2VecVisionConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            image_size=32,
            patch_size=4,
            layer_norm_eps=1e-6,
            use_mask_token=True,
            use_shared_relative_position_bias=True,
            layer_scale_init_value=0.1,
            use_mean_pooling=False,
        ),
        add_pooling_layer=False,
    )


def text_model(task: Pretrain) -> nn.Module:
    from transformers import Data2VecTextConfig, Data2VecTextModel

    return Data2VecTextModel(
        Data2VecTextConfig(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=42,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
        ),
        add_pooling_layer=False,
    )


MODELS: dict[str, Any] = {"speech": audio_model, "vision": vision_model, "text": text_model}
ARGUMENTS = {"speech": "input_values", "vision": "pixel_values", "text": "input_ids"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("modality", MODELS)
def test_transformers_encoder_gives_the_same_outputs(modality: str) -> None:
    task = shaken(f"v1_{modality}").eval()
    rules = HUGGING_FACE[modality, "1.0"]
    state = task.student.state_dict()
    model = MODELS[modality](task).eval()
    theirs = to_theirs(state, rules)
    assert theirs.keys() == model.state_dict().keys()
    model.load_state_dict(theirs, strict=True)
    encoder = {name: value for name, value in state.items() if name.startswith("encoder.")}
    same(to_ours(model.state_dict(), rules), encoder)

    samples = variants.examples(task, 40, 40)
    batch = task.modalities[modality].unmasked(samples)
    with torch.no_grad():
        found = model(**{ARGUMENTS[modality]: batch.inputs}, output_hidden_states=True)
        x, extra, layers = task.student.encoder.whole(
            batch, task.student.encoder.features(batch), collect=3
        )
    expected = found.last_hidden_state
    if extra is not None:  # before the class token's
        expected = expected[:, 1:]
    difference = (x - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5, f"outputs differ by {difference:.1e}"
    for (_, block), hidden in zip(layers, found.hidden_states[1:], strict=True):
        hidden = hidden[:, hidden.shape[1] - block.shape[1] :]
        assert (block - hidden).abs().max() / hidden.abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("modality", ["text"])
def test_transformers_encoder_with_padding(modality: str) -> None:
    task = shaken(f"v1_{modality}").eval()
    model = MODELS[modality](task).eval()
    model.load_state_dict(to_theirs(task.student.state_dict(), HUGGING_FACE[modality, "1.0"]))
    batch = task.modalities[modality].unmasked(variants.examples(task, 40, 25))
    assert batch.valid is not None
    with torch.no_grad():
        found = model(input_ids=batch.inputs, attention_mask=batch.valid.long()).last_hidden_state
        x, _, _ = task.student.encoder.whole(batch, task.student.encoder.features(batch))
    valid = batch.valid
    assert (x - found)[valid].abs().max() / np.float32(found[valid].abs().max()) < 1e-5
