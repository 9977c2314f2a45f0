"""CTC decoding: greedy by hand, and a beam search whose language model corrects greedy decoding.

The beam search needs flashlight-text and kenlm, the extra `lm`.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from d2v_ds.ctc import BeamSearch, greedy, read_words, text_of
from d2v_ds.data.audio import import_torchaudio
from d2v_ds.errors import UserError

LABELS = ["<blank>", "|", "a", "b", "c", "t"]
WORDS = ["cat", "bat", "tab"]
# log10 probabilities: `cat` is frequent, above all at the beginning of a sentence.
ARPA = """\\data\\
ngram 1=6
ngram 2=2

\\1-grams:
-1.0\t<unk>
0\t<s>\t-0.3
-1.0\t</s>
-0.5\tcat\t-0.3
-3.0\tbat\t-0.3
-1.5\ttab\t-0.3

\\2-grams:
-0.2\t<s> cat
-0.2\tcat </s>

\\end\\
"""
needs_decoder = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("flashlight", "kenlm"))),
    reason="the beam search needs flashlight-text and kenlm: pip install 'd2v-ds[lm]'",
)


def frames(text: str, *also: tuple[int, str, float]) -> Tensor:
    """[T, V] log-probabilities of one label per frame. also: (frame, label, weight) of others."""
    weight = torch.full((len(text), len(LABELS)), 0.01)
    for i, letter in enumerate(text.replace("_", "<")):
        weight[i, LABELS.index("<blank>" if letter == "<" else letter)] = 1.0
    for i, letter, value in also:
        weight[i, LABELS.index(letter)] = value
    return (weight / weight.sum(1, keepdim=True)).log()


UNSURE = frames("bat|", (0, "c", 0.8))  # greedy: bat; cat is almost as probable


def test_greedy_merges_repetitions_and_removes_blanks() -> None:
    assert greedy(frames("bb_b|a||t_"), LABELS) == "bb a t"
    assert greedy(frames("____"), LABELS) == greedy(frames("||_|"), LABELS) == ""
    with pytest.raises(ValueError, match=r"expected \[T, 6\]"):
        greedy(frames("a")[None], LABELS)


def test_the_text_of_sentencepiece_units() -> None:
    assert text_of(["▁the", "▁ca", "t", "<unk>", "s"]) == "the cats"


def test_a_list_of_words_may_be_a_lexicon(tmp_path: Path) -> None:
    (tmp_path / "words").write_text("cat\n\nbat b a t |\n")
    assert read_words(tmp_path / "words") == ["cat", "bat"]
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UserError, match="contains no words"):
        read_words(tmp_path / "empty")
    with pytest.raises(UserError, match="cannot be read as a list of words"):
        read_words(tmp_path / "none")


@pytest.fixture
def lm(tmp_path: Path) -> Path:
    path = tmp_path / "lm.arpa"
    path.write_text(ARPA)
    return path


@needs_decoder
def test_the_language_model_corrects_greedy_decoding(lm: Path) -> None:
    assert greedy(UNSURE, LABELS) == "bat"
    assert BeamSearch(LABELS)(UNSURE) == "bat"
    assert BeamSearch(LABELS, words=WORDS)(UNSURE) == "bat"
    assert BeamSearch(LABELS, words=WORDS, lm=lm)(UNSURE) == "cat"
    assert BeamSearch(LABELS, words=WORDS, lm=lm, lm_weight=0.0)(UNSURE) == "bat"
    assert BeamSearch(LABELS, words=WORDS, lm=lm, lm_weight=0.5)(frames("bat|cat|")) == "bat cat"


@needs_decoder
def test_the_lexicon_and_the_word_score_change_the_result() -> None:
    assert BeamSearch(LABELS, words=["cat"])(UNSURE) == "cat"
    assert BeamSearch(LABELS, words=["tab"])(frames("bat")) == ""
    unsure = frames("ca_t|", (2, "|", 0.9))
    words = ["cat", "ca", "t"]
    assert BeamSearch(LABELS, words=words)(unsure) == "cat"
    assert BeamSearch(LABELS, words=words, word_score=2.0)(unsure) == "ca t"
    assert BeamSearch(["<blank>", "▁a", "b"])(torch.tensor([[0.1, 0.8, 0.1]]).log()) == "a"


@needs_decoder
def test_unusable_words_and_models_are_named(
    lm: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "d2v_ds"):
        assert BeamSearch(LABELS, words=["CAT", "zoo", "cat"])(UNSURE) == "cat"
    assert "2 of 3 words cannot be spelt: 'CAT', 'zoo'" in caplog.text
    with pytest.raises(UserError, match=r"none of 1 words can be spelt .* check upper and lower"):
        BeamSearch(LABELS, words=["CAT"])
    with pytest.raises(UserError, match="needs letters and the word boundary"):
        BeamSearch(["<blank>", "▁a"], words=["a"])
    with pytest.raises(UserError, match="no such file; expected a language model"):
        BeamSearch(LABELS, words=WORDS, lm=tmp_path / "none")
    lm.write_text("nonsense")
    with pytest.raises(UserError, match=r"lm\.arpa: cannot be used as a language model"):
        BeamSearch(LABELS, words=WORDS, lm=lm)


@needs_decoder
def test_a_missing_kenlm_names_the_extra(lm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_torchaudio()
    module = importlib.import_module("torchaudio.models.decoder._ctc_decoder")
    monkeypatch.setattr(module, "_KenLM", None)
    assert BeamSearch(LABELS)(UNSURE) == "bat"
    with pytest.raises(UserError, match=r"needs kenlm; run `pip install 'd2v-ds\[lm\]'`"):
        BeamSearch(LABELS, words=WORDS, lm=lm)


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import_torchaudio()
    package = importlib.import_module("torchaudio.models.decoder")
    monkeypatch.delattr(package, "_ctc_decoder", raising=False)
    monkeypatch.delitem(sys.modules, f"{package.__name__}._ctc_decoder", raising=False)
    monkeypatch.setitem(sys.modules, "flashlight.lib.text.decoder", None)
    with pytest.raises(UserError, match=r"needs flashlight-text; run `pip install 'd2v-ds\[lm\]'`"):
        BeamSearch(LABELS)
