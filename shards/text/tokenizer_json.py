"""Hugging Face tokenizers, by their tokenizer.json. The only module of shards that uses the library
tokenizers, which is optional."""

from __future__ import annotations

from d2v_ds.data.tokenizer_json import JSON_FILE, digest, parsed, special_tokens, vocab_size
from d2v_ds.errors import UserError


class JsonTokenizer:
    """A tokenizer.json. Names of special tokens in a text are ordinary characters, and nothing is
    padded or truncated, whatever the file says. Decoding is exact for byte-level tokenizers, such
    as GPT-2's and RoBERTa's."""

    file = JSON_FILE

    def __init__(self, content: bytes, name: str) -> None:
        try:
            import tokenizers
        except ImportError:
            raise UserError(
                f"{name}: a tokenizer.json needs tokenizers; run `pip install tokenizers`"
            ) from None
        try:
            raw = parsed(content)
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
            special, self.vocab_size = special_tokens(raw), vocab_size(raw)
            self.sha256 = digest(content)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the library is no Exception
            raise UserError(f"{name}: is not a tokenizer.json ({error})") from None
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        for kind, usual in (("eos", "</s> or <|endoftext|>"), ("pad", "<pad>")):
            if kind not in special:
                raise UserError(
                    f"{name}: lacks {usual}, which packed text needs; add it to added_tokens"
                )
        self.eos_id, self.pad_id = special["eos"][1], special["pad"][1]
        self.mask_id = special["mask"][1]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))
