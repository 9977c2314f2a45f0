"""Labels: what a sample's .json says <-> the numbers that a head predicts.

    transcript --Letters or Pieces.encode--> ids        ids --decode--> transcript
    class name --Classes.encode--> number

Every error is a ValueError whose text continues "SET, sample KEY: ".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from d2v_ds.errors import UserError, suggestion

Ids = npt.NDArray[np.int64]

BLANK = "<blank>"  # the first symbol of CTC
BOUNDARY = "|"  # between words, as in fairseq's dictionaries of letters
LABELS_FILE = "labels.model"  # the copy of finetune.tokenizer in run folders and exports


class Labels(ABC):
    """How labels become numbers. names: the outputs of the head in order."""

    names: tuple[str, ...]

    @abstractmethod
    def encode(self, label: Any) -> Any:
        """The numbers of a label. Raises ValueError if it has none."""


class Classes(Labels):
    """One class per sample."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._number = {name: i for i, name in enumerate(self.names)}

    def encode(self, label: Any) -> int:
        name = str(label)
        if name not in self._number:
            hint = suggestion(name, self.names)
            raise ValueError(f"its label {name!r} is not among the {len(self.names)} classes{hint}")
        return self._number[name]


class Numbers(Labels):
    """One number per sample."""

    names = ("value",)

    def encode(self, label: Any) -> float:
        try:
            value = float(label)
        except (TypeError, ValueError):
            value = float("nan")
        if not np.isfinite(value):
            raise ValueError(f"its label {label!r} is not a number")
        return value


class Transcripts(Labels):
    """Symbols of CTC; number 0 is the blank."""

    def encode(self, label: Any) -> Ids:
        if not isinstance(label, str):
            raise ValueError(f"its transcript is not text but {type(label).__name__}")
        symbols = self.symbols(label)
        unknown = sorted({s for s in symbols if s not in self._number})
        if unknown:
            shown = ", ".join(map(repr, unknown[:5]))
            raise ValueError(f"its transcript has {shown}, not among the {len(self.names)} symbols")
        return np.array([self._number[s] for s in symbols], dtype=np.int64)

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._number = {name: i for i, name in enumerate(self.names)}

    @abstractmethod
    def symbols(self, text: str) -> list[str]:
        """The symbols of a transcript."""

    @abstractmethod
    def text(self, symbols: Sequence[str]) -> str:
        """The transcript of symbols."""

    def decode(self, ids: Iterable[int]) -> str:
        """The transcript of ids without blanks."""
        return self.text([self.names[i] for i in ids])

    def greedy(self, best: Ids) -> str:
        """The transcript of the best symbol of each token, [T]: repeats are merged, blanks
        removed."""
        changed = np.append(True, best[1:] != best[:-1])
        return self.decode(best[changed & (best != 0)].tolist())


class Letters(Transcripts):
    """Characters; words are separated by |."""

    @staticmethod
    def collect(texts: Iterable[str]) -> tuple[str, ...]:
        """The symbols of these transcripts."""
        found: set[str] = set()
        for text in texts:
            found.update("".join(text.split()))
        return (BLANK, BOUNDARY, *sorted(found - {BOUNDARY}))

    def symbols(self, text: str) -> list[str]:
        if BOUNDARY in text:
            raise ValueError(f"its transcript has {BOUNDARY!r}, which separates words")
        return list(BOUNDARY.join(text.split()))

    def text(self, symbols: Sequence[str]) -> str:
        return " ".join("".join(symbols).replace(BOUNDARY, " ").split())


class Pieces(Transcripts):
    """Pieces of a sentencepiece model."""

    def __init__(self, names: Sequence[str], model: str) -> None:
        super().__init__(names)
        self.model = model
        self._pieces = load_pieces(model)

    @staticmethod
    def collect(model: str) -> tuple[str, ...]:
        pieces = load_pieces(model)
        return (BLANK, *(pieces.IdToPiece(i) for i in range(pieces.GetPieceSize())))

    def symbols(self, text: str) -> list[str]:
        return [str(piece) for piece in self._pieces.EncodeAsPieces(" ".join(text.split()))]

    def text(self, symbols: Sequence[str]) -> str:
        return " ".join(str(self._pieces.DecodePieces(list(symbols))).split())

    def __getstate__(self) -> dict[str, Any]:  # loader workers read the model themselves
        return {"names": self.names, "model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Pieces.__init__(self, state["names"], state["model"])


def load_pieces(model: str) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor()
        pieces.LoadFromSerializedProto(Path(model).read_bytes())
    except (OSError, RuntimeError):
        raise UserError(
            f"finetune.tokenizer: {model}: cannot be read as a sentencepiece model; train one with "
            "`d2v-shards tokenizer`"
        ) from None
    return pieces
