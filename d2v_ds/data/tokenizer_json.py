"""Special tokens of a tokenizer.json, the file of Hugging Face tokenizers. Reads the file without
the library, which is optional.

Both kinds of tokenizers are named by their files: tokenizer.model is a sentencepiece model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SENTENCEPIECE_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"
TOKENIZER_FILES = (SENTENCEPIECE_FILE, JSON_FILE)  # names of the copy in sets and run folders

# {name: usual tokens, the first that exists is used}: of RoBERTa, BERT, GPT-2 and later models.
SPECIAL = {
    "bos": ("<s>", "[CLS]", "<bos>", "<|begin_of_text|>", "<|endoftext|>"),
    "eos": ("</s>", "[SEP]", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "pad": ("<pad>", "[PAD]", "<|pad|>"),
    "unk": ("<unk>", "[UNK]", "<|unk|>"),
    "mask": ("<mask>", "[MASK]", "<|mask|>"),
}
# Bytes that UTF-8 does not contain, as byte-level tokenizers write them.
NEVER = "\xc0\xc1\xf5\xf6\xf7\xf8\xf9\xfa\xfb\xfc\xfd\xfe\xff"
CONTENT = ("normalizer", "pre_tokenizer", "model", "decoder")  # entries that determine the ids


def is_json(content: bytes) -> bool:
    """Whether the content of a tokenizer's file is a tokenizer.json."""
    return content.lstrip()[:1] == b"{"


def parsed(content: bytes) -> dict[str, Any]:
    """The entries of a tokenizer.json, of which those that are used here have valid types. Raises
    ValueError."""
    try:
        raw = json.loads(content)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    model = raw.get("model") if isinstance(raw, dict) else None
    if not isinstance(model, dict) or not _is_vocabulary(model.get("vocab")):
        raise ValueError("has no vocabulary")
    for one in _list(raw, "added_tokens"):
        if not (
            isinstance(one, dict) and isinstance(one.get("content"), str) and _is_id(one.get("id"))
        ):
            raise ValueError("an added token has no content or no id")
    for merge in _list(model, "merges"):
        if not isinstance(merge, str) and not (
            isinstance(merge, list) and all(isinstance(piece, str) for piece in merge)
        ):
            raise ValueError("a merge is not two pieces")
    step = raw.get("pre_tokenizer") or {}
    if not isinstance(step, dict) or not all(
        isinstance(each, dict) for each in _list(step, "pretokenizers")
    ):
        raise ValueError("its pre_tokenizer is not an object")
    return raw  # type: ignore[no-any-return]


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**32


def _is_vocabulary(vocab: object) -> bool:
    """{token: id}, or [[token, score] ...]; not empty."""
    if isinstance(vocab, dict):
        return bool(vocab) and all(map(_is_id, vocab.values()))
    return (
        isinstance(vocab, list)
        and bool(vocab)
        and all(isinstance(e, list) and len(e) == 2 and isinstance(e[0], str) for e in vocab)
    )


def _list(raw: Mapping[str, Any], key: str) -> list[Any]:
    value = raw.get(key) or []
    if not isinstance(value, list):
        raise ValueError(f"its {key} is not a list")
    return value


def ids_of(raw: Mapping[str, Any]) -> dict[str, int]:
    """{token: id} of a tokenizer.json."""
    vocab = raw["model"]["vocab"]
    if isinstance(vocab, list):  # unigram: [token, score]
        vocab = {token: i for i, (token, _) in enumerate(vocab)}
    added = {each["content"]: each["id"] for each in raw.get("added_tokens") or ()}
    return {**vocab, **added}


def special_tokens(raw: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    """{bos, eos, pad, unk, mask: (token, id)} of those that exist, found by their usual names.

    Without a padding token, the padding of byte-level tokenizers, such as GPT-2's, is a byte that
    no text contains, and otherwise bos, which packed text does not have. The end of text cannot be
    padding, because packed text has it between documents. A mask token that does not exist gets the
    id after the last one, as with sentencepiece, and an empty name.
    """
    ids = ids_of(raw)
    found = {
        name: (token, ids[token])
        for name, tokens in SPECIAL.items()
        for token in tokens[::-1]
        if token in ids
    }
    if "pad" not in found:
        never = [token for token in NEVER if token in ids] if is_byte_level(raw) else []
        if never:
            found["pad"] = (never[0], ids[never[0]])
        elif "bos" in found and found["bos"] != found.get("eos"):
            found["pad"] = found["bos"]
    found.setdefault("mask", ("", max(ids.values()) + 1))
    return found


def vocab_size(raw: Mapping[str, Any]) -> int:
    """The number of ids, including the mask."""
    return max(max(ids_of(raw).values()), special_tokens(raw)["mask"][1]) + 1


def is_byte_level(raw: Mapping[str, Any]) -> bool:
    """Whether the tokens are of bytes, each written as one character."""
    step = raw.get("pre_tokenizer") or {}
    steps = [step, *(step.get("pretokenizers") or ())]
    return any(each.get("type") == "ByteLevel" for each in steps)


def digest(content: bytes) -> str:
    """SHA-256 of what determines the ids of a text. Padding, truncation and special tokens around a
    text, which exports change, do not count. Raises ValueError."""
    raw = parsed(content)
    kept: dict[str, Any] = {name: raw.get(name) for name in CONTENT}
    merges = raw["model"].get("merges") or []
    kept["model"] = {
        **raw["model"],
        "merges": [" ".join(each) if isinstance(each, list) else each for each in merges],
    }
    added = raw.get("added_tokens") or ()
    kept["added"] = sorted((one["id"], one["content"]) for one in added if not one.get("special"))
    kept["eos"] = special_tokens(raw).get("eos")
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
