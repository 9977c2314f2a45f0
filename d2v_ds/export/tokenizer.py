"""What an export needs to know of the tokenizer of its training text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class TextTokenizer(ABC):
    """A tokenizer. model: the content of its file; prefix: the id that fine-tuning prepends to each
    text; None: none."""

    def __init__(self, model: bytes, max_tokens: int, prefix: int | None = None) -> None:
        self.model, self.max_tokens, self.prefix = model, max_tokens, prefix

    @property
    @abstractmethod
    def special_ids(self) -> dict[str, int]:
        """{bos, eos, pad, unk, mask: id}, as in the index of a shard set."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The number of ids, including the mask."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text, with eos and the prefix."""

    @abstractmethod
    def special_tokens(self) -> dict[str, str]:
        """{bos_token ...: its name}."""

    def settings(self) -> dict[str, Any]:
        """tokenizer_config.json, without the class."""
        return {
            **self.special_tokens(),
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
            "model_max_length": self.max_tokens,
            "model_input_names": ["input_ids", "attention_mask"],
            "padding_side": "right",
        }
