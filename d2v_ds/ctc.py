"""CTC decoding: the outputs of a model for each frame -> text.

    log-probabilities [T, V] --greedy--> text
    log-probabilities [T, V] --BeamSearch, lexicon and n-gram language model--> text

labels[0] is the blank. Labels are letters with "|" as the word boundary, or sentencepiece units, in
which "▁" begins a word. T frames, V labels.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from d2v_ds.data.audio import import_torchaudio
from d2v_ds.errors import UserError

log = logging.getLogger("d2v_ds")

BOUNDARY = "|"
BEGIN = "▁"  # of a word, in sentencepiece units
SPECIAL = ("<", ">")  # around labels that no text contains: <blank>, <unk>
NAMED = 3  # words that a message names


def text_of(units: Iterable[str]) -> str:
    """The text of labels without blanks and repetitions: words with single spaces."""
    kept = (u for u in units if not (u[:1] == SPECIAL[0] and u[-1:] == SPECIAL[1]))
    return " ".join("".join(kept).replace(BOUNDARY, " ").replace(BEGIN, " ").split())


def greedy(log_probs: Tensor, labels: Sequence[str]) -> str:
    """The text of the most probable label of each frame of [T, V]: repetitions are merged, then
    blanks removed."""
    _check(log_probs, labels)
    best = [label for label, _ in groupby(log_probs.argmax(-1).tolist())]
    return text_of(labels[label] for label in best if label != 0)


def _check(log_probs: Tensor, labels: Sequence[str]) -> None:
    if log_probs.dim() != 2 or log_probs.shape[1] != len(labels):
        raise ValueError(f"shape {list(log_probs.shape)}, expected [T, {len(labels)}]")


class BeamSearch:
    """Beam search with a lexicon and an n-gram language model (flashlight-text and KenLM, through
    torchaudio's decoder).

    words: the lexicon; only these words are found. None: any sequence of labels; the language model
    is then one of labels. lm: a language model in ARPA or KenLM's binary format; None: without.
    beam: hypotheses kept after each frame. lm_weight: factor of its log-probabilities. word_score:
    added for each word; above 0 favours more words. Raises UserError.
    """

    def __init__(
        self,
        labels: Sequence[str],
        *,
        words: Sequence[str] | None = None,
        lm: Path | None = None,
        beam: int = 50,
        lm_weight: float = 2.0,
        word_score: float = 0.0,
    ) -> None:
        self.labels = list(labels)
        create = _import_decoder(lm is not None)
        if lm is not None and not lm.is_file():
            raise UserError(f"{lm}: no such file; expected a language model, ARPA or binary")
        spellings = None if words is None else _spellings(words, self.labels)
        with tempfile.TemporaryDirectory() as folder:
            lexicon = Path(folder, "lexicon.txt")
            if spellings is not None:
                lexicon.write_text("".join(f"{line}\n" for line in spellings), encoding="utf-8")
            try:
                self.decoder = create(
                    lexicon=None if spellings is None else str(lexicon),
                    tokens=self.labels,
                    lm=None if lm is None else str(lm),
                    beam_size=beam,
                    lm_weight=lm_weight,
                    word_score=word_score,
                    blank_token=self.labels[0],
                    sil_token=BOUNDARY if BOUNDARY in self.labels else self.labels[0],
                )
            except RuntimeError as error:
                if lm is None:
                    raise
                reason = str(error).strip().splitlines()[-1]  # the first has KenLM's source line
                raise UserError(f"{lm}: cannot be used as a language model ({reason})") from None

    def __call__(self, log_probs: Tensor) -> str:
        """The best text for [T, V]; "" if the lexicon allows none."""
        _check(log_probs, self.labels)
        [[*found]] = self.decoder(log_probs[None].float().cpu().contiguous())
        if not found:
            return ""
        if found[0].words:
            return " ".join(found[0].words)
        return text_of(self.decoder.idxs_to_tokens(found[0].tokens))


def read_words(path: Path) -> list[str]:
    """The words of a file, the first of each line; so a word list and a lexicon with spellings both
    work. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a list of words ({error})") from None
    words = [line.split()[0] for line in lines if line.strip()]
    if not words:
        raise UserError(f"{path}: contains no words")
    return words


def _spellings(words: Sequence[str], labels: Sequence[str]) -> list[str]:
    """Lines of a lexicon: each word with its letters and the word boundary. Words with other
    letters cannot be recognised; they are reported and left out."""
    if BOUNDARY not in labels:
        raise UserError(
            f"words: a lexicon needs letters and the word boundary {BOUNDARY!r} as labels; decode "
            "sentencepiece units without one"
        )
    letters = set(labels[1:])
    usable = [word for word in dict.fromkeys(words) if letters.issuperset(word)]
    lost = [word for word in dict.fromkeys(words) if not letters.issuperset(word)]
    if not usable:
        raise UserError(
            f"words: none of {len(lost)} words can be spelt with the labels, for example "
            f"{lost[0]!r} with {''.join(sorted(x for x in letters if len(x) == 1))!r}; "
            "check upper and lower case"
        )
    if lost:
        named = ", ".join(map(repr, lost[:NAMED]))
        log.warning("%d of %d words cannot be spelt: %s ...", len(lost), len(words), named)
    return [f"{word} {' '.join(word)} {BOUNDARY}" for word in usable]


def _import_decoder(with_lm: bool) -> Any:
    """torchaudio's ctc_decoder. Raises UserError if its packages are not installed."""
    import_torchaudio()
    try:
        from torchaudio.models.decoder import _ctc_decoder
    except ImportError:
        missing = "flashlight-text"
    else:
        if _ctc_decoder._KenLM is not None or not with_lm:
            return _ctc_decoder.ctc_decoder
        missing = "kenlm"
    raise UserError(f"beam search needs {missing}; run `pip install 'd2v-ds[lm]'`")
