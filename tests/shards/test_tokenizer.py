"""d2v-shards tokenizer: models are reproducible, and decoding returns the same bytes."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_ds.errors import UserError
from shards import samples
from shards.cli import main
from shards.text import tokenizer
from shards.text.tokenizer import Tokenizer, sample_sentences, train

TEXT = samples.path("text")
TEXTS = (TEXT / "seen.jsonl").read_text(encoding="utf-8").splitlines()
MODELS = {
    kind: train(TEXTS, vocab_size=600, kind=kind, sample=1000, seed=0)
    for kind in ("unigram", "bpe")
}
ODD = [
    "",
    " ",
    "  two  spaces ",
    "tab\tand\r\nlines\n\n\n",
    "▁ a▁b ▁▁",  # the character that sentencepiece uses for a space
    "<mask><s></s><pad><unk><0x41>",
    "\0\x01\x1f\x7f\x85\u2028\ufeff",
    "😀 👩‍👩‍👧 e\u0301 ﬁ Å ①　全角",
    "▅⁇ \u2047",
    "\ud7ff\ue000\U0010ffff",
]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(MODELS[request.param], "test.model")


# ------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("text", ODD)
def test_decoding_restores_the_text(model: Tokenizer, text: str) -> None:
    assert model.decode(model.encode(text)) == text


@settings(max_examples=150, deadline=None)
@given(st.text(), st.sampled_from(sorted(MODELS)))
def test_decoding_restores_any_text(text: str, kind: str) -> None:
    model = Tokenizer(MODELS[kind], "test.model")
    ids = model.encode(text)
    assert model.decode(ids).encode() == text.encode()
    assert all(3 < i < model.mask_id for i in ids)


def test_no_text_contains_a_special_id(model: Tokenizer) -> None:
    assert not {0, 1, 2, 3, model.mask_id} & set(model.encode("<mask> </s> <pad> <unk> <s>"))


def test_long_texts_are_encoded_in_pieces(
    model: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n".join(TEXTS)[:5000] + "x" * 300
    whole = model.encode(text)
    monkeypatch.setattr(tokenizer, "ENCODED_AT_ONCE", 100)
    assert [len(part) <= 100 for part in tokenizer._cut(text)].count(False) == 0
    assert model.decode(model.encode(text)) == text == model.decode(whole)


def test_half_a_surrogate_pair_is_no_text(model: Tokenizer) -> None:
    with pytest.raises(ValueError, match="is not Unicode text"):
        model.encode("a\ud800")


# ----------------------------------------------------------------------------------------- models


def test_ids(model: Tokenizer) -> None:
    assert (model.pad_id, model.eos_id, model.mask_id, model.vocab_size) == (1, 2, 599, 600)
    assert model.about() == {
        "sha256": model.sha256,
        "vocab_size": 600,
        "pad_id": 1,
        "eos_id": 2,
        "mask_id": 599,
    }


def test_the_same_texts_give_the_same_model() -> None:
    again = train(TEXTS, vocab_size=600, kind="unigram", sample=1000, seed=0)
    assert again == MODELS["unigram"]
    other = train(TEXTS, vocab_size=600, kind="bpe", sample=30, seed=1)
    assert other != train(TEXTS, vocab_size=600, kind="bpe", sample=30, seed=0)


def test_sentences_are_sampled_from_all_texts() -> None:
    read = []

    def texts() -> object:
        for i in range(1000):
            read.append(i)
            yield f"sentence {i}\n\n  \n"

    chosen = sample_sentences(texts(), 20, seed=3)  # type: ignore[arg-type]
    assert len(chosen) == len(set(chosen)) == 20 and len(read) == 1000
    assert all(re.fullmatch(r"sentence \d+", sentence) for sentence in chosen)
    assert max(map(len, sample_sentences(["x" * 2500], 9, 0))) == tokenizer.LONGEST


def test_every_sentence_is_equally_likely() -> None:
    counts: Counter[str] = Counter()
    for seed in range(2000):
        counts.update(sample_sentences(["a\nb\nc", "d\ne"], 2, seed))
    assert all(abs(counts[letter] - 800) < 100 for letter in "abcde")  # 4.5 standard deviations


def sentencepiece_model(**settings: object) -> bytes:
    import io

    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXTS),
        model_writer=file,
        vocab_size=300,
        minloglevel=2,
        **settings,
    )
    return file.getvalue()


def test_third_party_models() -> None:
    llama = Tokenizer(sentencepiece_model(), "other.model")  # <unk> 0, <s> 1, </s> 2, no <pad>
    assert (llama.pad_id, llama.eos_id, llama.mask_id) == (1, 2, 300)
    t5 = Tokenizer(sentencepiece_model(pad_id=0, eos_id=1, unk_id=2, bos_id=-1), "t5.model")
    assert (t5.pad_id, t5.eos_id) == (0, 1)
    with pytest.raises(UserError, match=r"other.model: lacks </s>"):
        Tokenizer(sentencepiece_model(eos_id=-1), "other.model")
    with pytest.raises(UserError, match=r"lacks <pad> or <s>"):
        Tokenizer(sentencepiece_model(bos_id=-1), "other.model")


@pytest.mark.parametrize("data", [b"", b"nothing", MODELS["bpe"][:100]])
def test_a_file_that_is_not_a_model(data: bytes) -> None:
    with pytest.raises(UserError, match=r"some\.model: is not a sentencepiece model"):
        Tokenizer(data, "some.model")


# ---------------------------------------------------------------------------------------- command


def run(*arguments: object) -> int:
    return main(["tokenizer", *map(str, arguments)])


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "models/small.model"
    arguments = ["--vocab-size", 400, "--model", "bpe", "--sentences", 50]
    assert run(TEXT / "unseen.jsonl", out, *arguments) == 0
    assert capsys.readouterr().out == f"{out}: bpe, 400 ids\n"
    assert Tokenizer.load(out).vocab_size == 400
    assert run(TEXT / "unseen.jsonl", out, *arguments) == 2
    assert "already exists; use another name" in capsys.readouterr().err
    assert run(TEXT, tmp_path / "folder") == 2
    assert "OUT must be a file NAME.model" in capsys.readouterr().err
    assert list(tmp_path.rglob("*")) == [tmp_path / "models", out]


@pytest.mark.parametrize(("size", "way"), [(262, "at least"), (100_000, "at most")])
@pytest.mark.parametrize("kind", MODELS)
def test_errors_of_wrong_sizes_suggest_a_valid_size(size: int, way: str, kind: str) -> None:
    with pytest.raises(UserError) as caught:
        train(TEXTS, vocab_size=size, kind=kind, sample=200, seed=0)
    [right] = re.findall(rf"{way} (\d+)", str(caught.value))
    made = Tokenizer(train(TEXTS, vocab_size=int(right), kind=kind, sample=200, seed=0), "")
    assert made.vocab_size == int(right)
    closer = int(right) + (1 if way == "at most" else -1)
    with pytest.raises(UserError, match=f"--vocab-size {closer}"):
        train(TEXTS, vocab_size=closer, kind=kind, sample=200, seed=0)


def test_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    assert run(tmp_path / "empty.txt", tmp_path / "a.model") == 2
    assert "SOURCE contains no text" in capsys.readouterr().err
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\n" + b"fine words here \n" * 200)
    assert run(tmp_path, tmp_path / "b.model", "--vocab-size", 272) == 0
    out = capsys.readouterr().out
    assert "2 inputs were left out: 1 x is not UTF-8" in out and "bad.txt" in out
