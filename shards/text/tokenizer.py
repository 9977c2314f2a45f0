"""Converts between text and token ids, and trains sentencepiece models on a sample of a corpus.

    text files -> sentences -> a random sample of them -> model file        (d2v-shards tokenizer)
    text -> Tokenizer.encode -> ids -> Tokenizer.decode -> the same text

A tokenizer is a sentencepiece model, or the tokenizer.json of Hugging Face tokenizers.

Models trained by this module neither normalise nor drop characters, and fall back to bytes, so
decoding returns the original text. The mask token is not a piece of the model, so that no text can
contain it: its id follows the last id of the model, as in fairseq.
"""

from __future__ import annotations

import hashlib
import io
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from d2v_ds.data.tokenizer_json import SENTENCEPIECE_FILE, is_json
from d2v_ds.errors import UserError
from shards.encoding import check_unicode

SPACE = "▁"  # the character that sentencepiece uses for a space
SPACE_BYTES = [f"<0x{byte:02X}>" for byte in SPACE.encode()]
LONGEST = 1_000  # characters of a training sentence; longer ones are cut
LARGEST = 1 << 28  # bytes of a file; those with 256,000 tokens have about 30 MB
ENCODED_AT_ONCE = 1 << 20  # characters; the libraries need a multiple of that in bytes
DIFFERENT = {  # texts whose ids are different, unless the tokenizer does not hold the difference
    "upper case": ("WATER", "water"),
    "accents": ("água", "agua"),
    "repeated spaces": ("a  b", "a b"),
    "line ends": ("a\nb", "a b"),
    "ligatures and full-width forms": ("ﬁ１", "fi1"),
    "characters of rare scripts": ("\u1208", "\u1210"),
    "emoji": ("\U0001f600", "\U0001f601"),
}
THREADS = 8  # on every machine, because the model depends on their number


class Model(Protocol):
    """A tokenizer's library, with the ids of its special tokens."""

    file: str  # its name in a set
    sha256: str  # of what determines the ids
    vocab_size: int
    pad_id: int
    eos_id: int
    mask_id: int

    def encode(self, text: str) -> list[int]:
        """The ids of a text of limited size, without special ones."""

    def decode(self, ids: list[int]) -> str: ...


class Tokenizer:
    """A sentencepiece model or a tokenizer.json. name: for messages. Raises UserError if the
    content is neither, or lacks a needed token."""

    def __init__(self, content: bytes, name: str) -> None:
        self.name = name
        self._model: Model
        if is_json(content):
            from shards.text.tokenizer_json import JsonTokenizer

            self._model = JsonTokenizer(content, name)
        else:
            self._model = SentencePiece(content, name)
        self.file, self.sha256 = self._model.file, self._model.sha256
        self.eos_id, self.pad_id = self._model.eos_id, self._model.pad_id
        self.mask_id, self.vocab_size = self._model.mask_id, self._model.vocab_size

    @staticmethod
    def load(path: Path) -> Tokenizer:
        try:
            if (size := path.stat().st_size) > LARGEST:
                raise UserError(f"{path}: has {size:,} bytes, more than a tokenizer ({LARGEST:,})")
            return Tokenizer(path.read_bytes(), str(path))
        except (FileNotFoundError, IsADirectoryError):
            raise UserError(
                f"{path}: no such file; give a sentencepiece model or a tokenizer.json, or train a "
                f"model with `d2v-shards tokenizer SOURCE {path}`"
            ) from None

    def about(self) -> dict[str, Any]:
        """Its entry of index.json, which a run is checked against."""
        return {
            "sha256": self.sha256,
            "vocab_size": self.vocab_size,
            "pad_id": self.pad_id,
            "eos_id": self.eos_id,
            "mask_id": self.mask_id,
        }

    def encode(self, text: str) -> list[int]:
        """Ids, without eos. Raises Unusable for text that is not valid Unicode (half a surrogate
        pair)."""
        check_unicode(text)
        if len(text) <= ENCODED_AT_ONCE:
            return self._model.encode(text)
        ids: list[int] = []
        for part in _cut(text):
            ids += self._model.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids])

    def losses(self) -> str:
        """What the ids do not hold of a text; "" if nothing is known."""
        lost = [n for n, (a, b) in DIFFERENT.items() if self.encode(a) == self.encode(b)]
        return f"the ids of this tokenizer do not tell {', '.join(lost)}" if lost else ""


class SentencePiece:
    """A sentencepiece model."""

    file = SENTENCEPIECE_FILE

    def __init__(self, model: bytes, name: str) -> None:
        from sentencepiece import SentencePieceProcessor

        self.sha256 = hashlib.sha256(model).hexdigest()
        self._pieces = SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(model)
        except (RuntimeError, UnicodeDecodeError):  # the second one by its message about the model
            raise UserError(
                f"{name}: is not a sentencepiece model, nor a tokenizer.json; train a model with "
                "`d2v-shards tokenizer`"
            ) from None
        self._space = [self._pieces.PieceToId(byte) for byte in SPACE_BYTES]
        self.eos_id: int = self._pieces.eos_id()
        # Packed text has no bos, so bos serves as padding in models without pad, such as LLaMA's.
        self.pad_id: int = max(self._pieces.pad_id(), -1)
        if self.pad_id < 0:
            self.pad_id = self._pieces.bos_id()
        for piece, found in (("</s>", self.eos_id), ("<pad> or <s>", self.pad_id)):
            if found < 0:
                raise UserError(
                    f"{name}: lacks {piece}, which packed text needs; use another model"
                )
        self.mask_id: int = self._pieces.GetPieceSize()
        self.vocab_size = self.mask_id + 1

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(text.split(SPACE)):
            if i:  # sentencepiece would treat it as a space
                ids += self._space
            ids += self._pieces.Encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        return str(self._pieces.DecodeIds(ids))


def _cut(text: str) -> Iterable[str]:
    """The text in pieces of limited size, cut after a newline if possible."""
    start = 0
    while len(text) - start > ENCODED_AT_ONCE:
        end = text.rfind("\n", start, start + ENCODED_AT_ONCE) + 1 or start + ENCODED_AT_ONCE
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


# ----------------------------------------------------------------------------------------- training


def train(texts: Iterable[str], *, vocab_size: int, kind: str, sample: int, seed: int) -> bytes:
    """A model with vocab_size ids, including the mask, trained on at most `sample` sentences. Only
    these are held in memory. The same texts give the same bytes. Raises UserError."""
    import sentencepiece

    chosen = sample_sentences(texts, sample, seed)
    if not chosen:
        raise UserError("SOURCE contains no text to train on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(chosen),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size - 1,  # the mask is not in the model
            bos_id=0,
            pad_id=1,
            eos_id=2,
            unk_id=3,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            max_sentence_length=4 * LONGEST + 1,  # bytes; sentencepiece skips longer ones
            num_threads=THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_size_error(vocab_size, str(error))) from None
    return model.getvalue()


def sample_sentences(texts: Iterable[str], sample: int, seed: int) -> list[str]:
    """`sample` lines of the texts, chosen with equal probability (Vitter's algorithm R)."""
    chosen: list[str] = []
    draw, seen = random.Random(seed), 0
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), LONGEST):
                sentence = line[start : start + LONGEST]
                if not sentence.strip():
                    continue
                seen += 1
                if len(chosen) < sample:
                    chosen.append(sentence)
                elif (i := int(draw.random() * seen)) < sample:
                    chosen[i] = sentence
    return chosen


def _size_error(vocab_size: int, message: str) -> str:
    """The message for an error of sentencepiece about --vocab-size."""
    if found := re.search(r"value <= (\d+)", message):
        return (
            f"--vocab-size {vocab_size}: too large for this text; use at most "
            f"{int(found[1]) + 1}, or more text"
        )
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"--vocab-size {vocab_size}: too small for 256 bytes, the special tokens and the "
            f"characters of the text; use at least {int(found[1]) + 1}"
        )
    return f"--vocab-size {vocab_size}: sentencepiece cannot train this model ({message.strip()})"
