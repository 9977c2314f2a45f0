"""Configuration of a data2vec encoder that d2v-ds exported."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


class D2vConfig(PreTrainedConfig):
    """d2v_ds: the entry of config.json that d2v-ds writes. Its `model` has the settings of the
    trunk, its `modality` those of each front end, by name: speech, vision, text. vocab_size: the
    symbols of D2vForCTC, or the token ids of text. pool: what a classifier sees, the `mean` over
    tokens or the `first` token; empty: the default of the modality."""

    model_type = "d2v_ds"

    def __init__(
        self,
        d2v_ds: dict[str, Any] | None = None,
        vocab_size: int = 32,
        pool: str = "",
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.pool = vocab_size, pool
        self.d2v_ds = d2v_ds or {"model": {}, "modality": {}}
        trunk = self.d2v_ds["model"]
        # The names that tools of transformers look for.
        self.hidden_size = trunk.get("dim", 0)
        self.num_hidden_layers = trunk.get("depth", 0)
        self.num_attention_heads = trunk.get("heads", 0)
        text = self.d2v_ds["modality"].get("text", {})
        kwargs.setdefault("pad_token_id", text.get("pad_id", 0))
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            kwargs.pop(name, None)
        super().__init__(**kwargs)
