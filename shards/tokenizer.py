"""sentencepiece: training a model on a sample of a corpus, and text <-> token ids.

    text files -> sentences -> a random sample of them -> model file        (d2v-shards tokenizer)
    text -> Tokenizer.encode -> ids -> Tokenizer.decode -> the same text

Models trained here neither normalise nor drop anything, and fall back to bytes, so that decoding
gives the original text whatever it was. The mask token is no piece of the model, so no text can
contain it: its id is the one after the model's last, as in fairseq.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from d2v_ds.errors import UserError
from shards.arguments import number

DESCRIPTION = (
    "Train a sentencepiece model on a random sample of the sentences of text files: unigram "
    "(slow to train, fast to use) or bpe, with byte fallback. Ids: 0 bos, 1 pad, 2 eos, 3 unk, "
    "the pieces, and the last for the mask."
)
SPACE = "▁"  # what stands for a space inside of sentencepiece
SPACE_BYTES = [f"<0x{byte:02X}>" for byte in SPACE.encode()]
LONGEST = 1_000  # characters of a sentence for training; longer ones are cut
ENCODED_AT_ONCE = 1 << 20  # characters: sentencepiece takes many times as many bytes
THREADS = 8  # whatever the machine has: the model depends on their number


class Tokenizer:
    """A sentencepiece model. Raises UserError when the bytes are none, or lack what is needed."""

    def __init__(self, model: bytes, name: str) -> None:
        from sentencepiece import SentencePieceProcessor

        self.name, self.sha256 = name, hashlib.sha256(model).hexdigest()
        self._pieces = SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(model)
        except RuntimeError:
            raise UserError(
                f"{name}: is no sentencepiece model; make one with `d2v-shards tokenizer`"
            ) from None
        self._space = [self._pieces.PieceToId(byte) for byte in SPACE_BYTES]
        self.eos_id: int = self._pieces.eos_id()
        # Packed text has no bos, so it can stand for padding where a model has none (as LLaMA's).
        self.pad_id: int = max(self._pieces.pad_id(), -1)
        if self.pad_id < 0:
            self.pad_id = self._pieces.bos_id()
        for piece, found in (("</s>", self.eos_id), ("<pad> or <s>", self.pad_id)):
            if found < 0:
                raise UserError(f"{name}: has no {piece}, which packed text needs; train another")
        self.mask_id: int = self._pieces.GetPieceSize()
        self.vocab_size = self.mask_id + 1

    @staticmethod
    def load(path: Path) -> Tokenizer:
        try:
            return Tokenizer(path.read_bytes(), str(path))
        except (FileNotFoundError, IsADirectoryError):
            raise UserError(
                f"{path}: no such file; give a sentencepiece model or make one with "
                f"`d2v-shards tokenizer SOURCE {path}`"
            ) from None

    def about(self) -> dict[str, Any]:
        """What index.json says of it, and a run is held against."""
        return {
            "sha256": self.sha256,
            "vocab_size": self.vocab_size,
            "pad_id": self.pad_id,
            "eos_id": self.eos_id,
            "mask_id": self.mask_id,
        }

    def encode(self, text: str) -> list[int]:
        """Ids, without eos. Raises ValueError for text that is not Unicode (half of a surrogate
        pair)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"is not Unicode text ({error.reason})") from None
        ids: list[int] = []
        for i, part in enumerate(text.split(SPACE)):
            if i:  # sentencepiece would take it for a space
                ids += self._space
            for stretch in _stretches(part):
                ids += self._pieces.EncodeAsIds(stretch)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._pieces.DecodeIds([int(i) for i in ids]))


def _stretches(text: str) -> Iterable[str]:
    """In pieces of bounded size, cut behind a newline where there is one."""
    start = 0
    while len(text) - start > ENCODED_AT_ONCE:
        end = text.rfind("\n", start, start + ENCODED_AT_ONCE) + 1 or start + ENCODED_AT_ONCE
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


# ----------------------------------------------------------------------------------------- training


def train(texts: Iterable[str], *, vocab_size: int, kind: str, sample: int, seed: int) -> bytes:
    """A model of vocab_size ids, the mask's among them, from at most `sample` sentences, which are
    all that is held in memory. The same texts give the same bytes. Raises UserError."""
    import sentencepiece

    chosen = sample_sentences(texts, sample, seed)
    if not chosen:
        raise UserError("SOURCE has no text in it to train on")
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
            max_sentence_length=4 * LONGEST + 1,  # bytes; longer ones would be left out
            num_threads=THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_what_size(vocab_size, str(error))) from None
    return model.getvalue()


def sample_sentences(texts: Iterable[str], sample: int, seed: int) -> list[str]:
    """So many lines of the texts, each as likely as any other (Vitter's algorithm R)."""
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
                elif (place := int(draw.random() * seen)) < sample:
                    chosen[place] = sentence
    return chosen


def _what_size(vocab_size: int, message: str) -> str:
    """sentencepiece's complaint about --vocab-size, for a person."""
    if found := re.search(r"value <= (\d+)", message):
        return (
            f"--vocab-size {vocab_size}: the text has too little in it for so many pieces; "
            f"take at most {int(found[1]) + 1}, or more text"
        )
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"--vocab-size {vocab_size}: is too small for 256 bytes, the specials and every "
            f"character of the text; take at least {int(found[1]) + 1}"
        )
    return f"--vocab-size {vocab_size}: sentencepiece cannot train this model ({message.strip()})"


# ------------------------------------------------------------------------------------------ command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from shards.text import sources

    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help=f"a folder or a file: {sources.KINDS}"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the model to write, NAME.model")
    parser.add_argument(
        "--vocab-size",
        type=number(int, 262, 1_000_000),
        default=32_000,
        help="ids, all together (%(default)s)",
    )
    parser.add_argument(
        "--model", choices=("unigram", "bpe"), default="unigram", help="(%(default)s)"
    )
    parser.add_argument(
        "--sentences",
        type=number(int, 1, 100_000_000),
        default=300_000,
        help="to sample; of these, about 5 KB of memory each for unigram, 2 for bpe (%(default)s)",
    )
    parser.add_argument(
        "--seed", type=number(int, 0, 2**63), default=0, help="of the sample (%(default)s)"
    )
    sources.add_key_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    from d2v_ds.files import write_atomically
    from shards.text import sources

    out: Path = arguments.out
    if out.suffix != ".model":
        raise UserError(f"{out}: name a file for the model, as in {out}/tokenizer.model")
    if out.exists():
        raise UserError(f"{out}: exists; name another file or delete this one")
    source = sources.TextSource.open(arguments.source, "line", arguments.text_key)
    rejected: list[tuple[str, str]] = []
    model = train(
        (text for part in source.parts() for _, text, _ in source.documents(part, rejected)),
        vocab_size=arguments.vocab_size,
        kind=arguments.model,
        sample=arguments.sentences,
        seed=arguments.seed,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, model)
    print(f"{out}: {arguments.model}, {Tokenizer.load(out).vocab_size} ids with the mask's")
    if rejected:
        name, reason = rejected[0]
        print(f"{len(rejected)} inputs could not be read, the first: {name}: {reason}")
    return 0
