"""The tokenizer of an export whose training text was made with a tokenizer.json."""

from __future__ import annotations

import json
from typing import Any

from d2v_ds.data.tokenizer_json import parsed, special_tokens, vocab_size
from d2v_ds.export.tokenizer import TextTokenizer

MASK = "<mask>"


class JsonTokenizer(TextTokenizer):
    """A tokenizer.json. Raises ValueError if the content is not one."""

    def __init__(self, model: bytes, max_tokens: int, prefix: int | None = None) -> None:
        import tokenizers

        super().__init__(model, max_tokens, prefix)
        self.raw = parsed(model)
        self._special = special_tokens(self.raw)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(model.decode())
        except Exception as error:  # the library has no type of its own
            raise ValueError(str(error)) from None
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    @property
    def special_ids(self) -> dict[str, int]:
        return {name: i for name, (_, i) in self._special.items()}

    @property
    def vocab_size(self) -> int:
        return vocab_size(self.raw)

    def encode(self, text: str) -> list[int]:
        ids = [] if self.prefix is None else [self.prefix]
        ids += self._tokenizer.encode(text, add_special_tokens=False).ids
        return [*ids, self.special_ids["eos"]]

    def special_tokens(self) -> dict[str, str]:
        return {f"{name}_token": token or MASK for name, (token, _) in self._special.items()}

    def exported(self) -> str:
        """tokenizer.json with the mask, and with the special tokens around a text that training
        used. What determines the ids of a text stays as it is."""
        names, ids = self.special_tokens(), self.special_ids
        added = list(self.raw.get("added_tokens") or ())
        known = {each["content"] for each in added}
        for name in ("pad", "mask"):
            token = names[f"{name}_token"]
            if token not in known:
                added.append(_added(token, ids[name]))
        added.sort(key=lambda each: int(each["id"]))
        eos = names["eos_token"]
        around = {eos: ids["eos"]}
        first = []
        if self.prefix is not None:
            token = self._tokenizer.id_to_token(self.prefix) or ""
            around[token] = self.prefix
            first = [_special(token, 0)]
        processor = {
            "type": "TemplateProcessing",
            "single": [*first, _sequence("A", 0), _special(eos, 0)],
            "pair": [
                *first,
                *(_sequence("A", 0), _special(eos, 0)),
                *(_sequence("B", 1), _special(eos, 1)),
            ],
            "special_tokens": {
                token: {"id": token, "ids": [i], "tokens": [token]} for token, i in around.items()
            },
        }
        changed = {
            "added_tokens": added,
            "post_processor": processor,
            "padding": None,
            "truncation": None,
        }
        return json.dumps({**self.raw, **changed}, indent=2, ensure_ascii=False)


def _added(token: str, number: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **flags, "special": True}


def _special(token: str, segment: int) -> dict[str, Any]:
    return {"SpecialToken": {"id": token, "type_id": segment}}


def _sequence(name: str, segment: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": segment}}
