"""Text and token ids by a sentencepiece model, exactly as d2v-ds converts text: each text ends with
eos, and begins with a prefix if the model was fine-tuned with one. Names of special tokens in a
text are ordinary characters."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizer

SPACE = "▁"  # the character that sentencepiece uses for a space


class D2vTokenizer(PreTrainedTokenizer):
    """vocab_file: the sentencepiece model; prefix_id: the id that is prepended to each text. The
    mask token's id follows the last id of the model."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, prefix_id: int | None = None, **kwargs: Any) -> None:
        self.vocab_file = vocab_file
        self.prefix = [] if prefix_id is None else [prefix_id]
        self.pieces = SentencePieceProcessor(model_file=vocab_file)
        self.space = [self.pieces.PieceToId(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        super().__init__(**{**kwargs, "prefix_id": prefix_id, "split_special_tokens": True})

    @property
    def vocab_size(self) -> int:
        return self.pieces.GetPieceSize()

    def get_vocab(self) -> dict[str, int]:
        ids = range(self.vocab_size)
        return {self.pieces.IdToPiece(i): i for i in ids} | self.added_tokens_encoder

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        ids: list[int] = []
        for i, part in enumerate(text.split(SPACE)):
            ids += self.space if i else []  # sentencepiece would treat it as a space
            ids += self.pieces.EncodeAsIds(part)
        return [self.pieces.IdToPiece(i) for i in ids]

    def _convert_token_to_id(self, token: str) -> int:
        return self.pieces.PieceToId(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.pieces.IdToPiece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.pieces.DecodePieces(tokens)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        second = [] if token_ids_1 is None else [*token_ids_1, self.eos_token_id]
        return [*self.prefix, *token_ids_0, self.eos_token_id, *second]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> Any:
        name = "tokenizer.model" if not filename_prefix else f"{filename_prefix}-tokenizer.model"
        target = Path(save_directory) / name
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
