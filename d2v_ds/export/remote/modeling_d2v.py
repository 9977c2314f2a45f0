"""A data2vec encoder for speech, images or text, exported by d2v-ds: plain torch and transformers.

    input_values [B, S]         waveforms --.
    pixel_values [B, 3, h, w]   images    --+-- front end --> tokens [B, E + T, D] --> trunk
    input_ids    [B, T]         token ids --'

One model may have several front ends, which share the trunk. Padding never influences the result.

B samples, T tokens, E extra tokens in front of them, D width, H heads, L blocks, S audio samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    CausalLMOutput,
    SequenceClassifierOutput,
)
from transformers.utils import ModelOutput

from .configuration_d2v import D2vConfig
from .layers_d2v import FrontEnd, Settings, Trunk


class Encoded(NamedTuple):
    last: Tensor  # [B, E + T, D]
    states: tuple[Tensor, ...]
    exists: Tensor | None  # [B, E + T]


@dataclass
class D2vOutput(ModelOutput):
    """Features of a padded batch. Extra tokens come first; the last of them is the class token."""

    last_hidden_state: Tensor | None = None
    """[B, E + T, D]: the output of the trunk; undefined for padding."""

    hidden_states: tuple[Tensor, ...] | None = None
    """The input of the first block and the output of each of the L blocks."""

    token_mask: Tensor | None = None
    """[B, E + T] bool: which tokens exist; None if all of them do."""


class Encoder(nn.Module):
    def __init__(self, config: D2vConfig) -> None:
        super().__init__()
        model = config.d2v_ds["model"]
        self.front_ends = nn.ModuleDict(
            {name: FrontEnd(name, model, each) for name, each in config.d2v_ds["modality"].items()}
        )
        self.trunk = Trunk(model, model["depth"], model["layer_drop"], final_norm=True)


# ------------------------------------------------------------------------------------------ models

INPUTS = {"input_values": "speech", "pixel_values": "vision", "input_ids": "text"}


class D2vPreTrainedModel(PreTrainedModel):
    config_class = D2vConfig
    base_model_prefix = "encoder"
    _supports_sdpa = True
    _keys_to_ignore_on_load_unexpected = (r"^head\.",)

    def __init__(self, config: D2vConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)

    def encode(self, name: str, inputs: Tensor, attention_mask: Tensor | None) -> Encoded:
        """Features of a batch of one modality; attention_mask: 0 for padding."""
        if name not in self.encoder.front_ends:
            known = ", ".join(self.encoder.front_ends)
            raise ValueError(f"this model has no front end for {name} (it has: {known})")
        exists = self.existing_tokens(name, inputs, attention_mask)
        x, bias, exists = self.encoder.front_ends[name](inputs, exists)
        x, states = self.encoder.trunk(x, bias)
        return Encoded(x, states, exists)

    def existing_tokens(self, name: str, inputs: Tensor, mask: Tensor | None) -> Tensor | None:
        """[B, T] bool, False for padding; None if there is none."""
        settings = self.config.d2v_ds["modality"][name]
        if name == "text":
            exists = inputs != settings["pad_id"] if mask is None else mask.bool()
        elif mask is None or name == "vision":
            return None
        else:  # waveforms end with their padding
            T = token_count(torch.tensor(inputs.shape[1]), settings["convs"]).item()
            lengths = token_count(mask.sum(1), settings["convs"])
            exists = torch.arange(T, device=inputs.device) < lengths[:, None]
        return None if bool(exists.all()) else exists

    def last_block(
        self, name: str, inputs: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """For heads: the last block's output without extra tokens [B, T, D], which of its tokens
        exist [B, T], and all states. Heads replace the norm after the last block."""
        found = self.encode(name, inputs, attention_mask)
        E = self.config.d2v_ds["modality"][name]["extra_tokens"]
        x = found.states[-1][:, E:]
        exists = x.new_ones(x.shape[:2], dtype=torch.bool)
        return x, exists if found.exists is None else found.exists[:, E:], found.states


def token_count(samples: Tensor, convs: Sequence[Sequence[int]]) -> Tensor:
    """The number of tokens T of S audio samples."""
    for _, kernel, stride in convs:
        samples = ((samples - kernel) // stride + 1).clamp(min=0)
    return samples


class D2vModel(D2vPreTrainedModel):
    """The encoder, for each modality that the model has."""

    def __init__(self, config: D2vConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        input_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> D2vOutput | tuple[Any, ...]:
        """input_values [B, S]: normalised waveforms, padded at the end; pixel_values [B, 3, h, w]:
        normalised images; input_ids [B, T]. attention_mask: [B, S] or [B, T], 0 for padding."""
        values = {
            "input_values": input_values,
            "pixel_values": pixel_values,
            "input_ids": input_ids,
        }
        given = {INPUTS[key]: value for key, value in values.items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(INPUTS)}")
        [(name, inputs)] = given.items()
        found = self.encode(name, inputs, attention_mask)
        output = D2vOutput(last_hidden_state=found.last, token_mask=found.exists)
        if wanted(self.config, "output_hidden_states", output_hidden_states):
            output["hidden_states"] = found.states
        return output if wanted(self.config, "return_dict", return_dict) else output.to_tuple()


def wanted(config: D2vConfig, name: str, given: bool | None) -> bool:
    return bool(getattr(config, name) if given is None else given)


def result(config: D2vConfig, output: ModelOutput, states: Any, options: Settings) -> Any:
    """An output with a loss and logits, in the form that the caller asked for."""
    if wanted(config, "output_hidden_states", options.get("output_hidden_states")):
        output["hidden_states"] = states
    return (
        output if wanted(config, "return_dict", options.get("return_dict")) else output.to_tuple()
    )


class Head(nn.Module):
    """norm for a mean over tokens, or dense for the first token; proj: the outputs."""

    def __init__(self, kind: str, D: int, outputs: int) -> None:
        super().__init__()
        if kind == "mean":
            self.norm = nn.LayerNorm(D, eps=1e-6)
        if kind == "first":
            self.dense = nn.Linear(D, D)
        self.proj = nn.Linear(D, outputs)


class D2vForCTC(D2vPreTrainedModel):
    """Speech recognition: one linear layer on every token. Output 0 is the blank."""

    main_input_name = "input_values"

    def __init__(self, config: D2vConfig) -> None:
        super().__init__(config)
        self.head = Head("ctc", config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """labels [B, N]: ids of the transcript's symbols, negative for padding. Logits [B, T, V]
        are undefined for padding."""
        x, exists, states = self.last_block("speech", input_values, attention_mask)
        logits = self.head.proj(x)
        loss = None
        if labels is not None:
            loss = F.ctc_loss(
                logits.float().log_softmax(-1).transpose(0, 1),
                labels[labels >= 0],
                exists.sum(1),
                (labels >= 0).sum(1),
                zero_infinity=True,
            )
        output = CausalLMOutput(loss=loss, logits=logits)
        return result(self.config, output, states, options)


class D2vForClassification(D2vPreTrainedModel):
    """Classes, or one number, per sample. The mean over tokens, a norm and a linear layer; or, the
    default for text, a linear layer, tanh and a linear layer on the first token."""

    modality = ""

    def __init__(self, config: D2vConfig) -> None:
        super().__init__(config)
        self.pool = config.pool or ("first" if self.modality == "text" else "mean")
        self.head = Head(self.pool, config.hidden_size, config.num_labels)
        self.post_init()

    def classify(
        self, inputs: Tensor, mask: Tensor | None, labels: Tensor | None, options: Settings
    ) -> Any:
        """labels [B]: class ids, or numbers if the model has one output. Logits [B, C]."""
        x, exists, states = self.last_block(self.modality, inputs, mask)
        if self.pool == "mean":
            weight = exists[:, :, None].to(x.dtype)
            x = self.head.norm((x * weight).sum(1) / weight.sum(1))
        else:
            x = torch.tanh(self.head.dense(x[:, 0]))
        logits = self.head.proj(x)
        loss = None
        if labels is not None and self.config.num_labels == 1:
            loss = F.mse_loss(logits[:, 0].float(), labels.float())
        elif labels is not None:
            loss = F.cross_entropy(logits.float(), labels)
        output = SequenceClassifierOutput(loss=loss, logits=logits)
        return result(self.config, output, states, options)


class D2vForAudioClassification(D2vForClassification):
    main_input_name = "input_values"
    modality = "speech"

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Any:
        return self.classify(input_values, attention_mask, labels, options)


class D2vForImageClassification(D2vForClassification):
    main_input_name = "pixel_values"
    modality = "vision"

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **options: Any) -> Any:
        return self.classify(pixel_values, None, labels, options)


class D2vForSequenceClassification(D2vForClassification):
    main_input_name = "input_ids"
    modality = "text"

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Any:
        return self.classify(input_ids, attention_mask, labels, options)
