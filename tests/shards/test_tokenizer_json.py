"""Text sets of Hugging Face tokenizers: ids equal those of the library, decoding returns the text,
and runs, exports and weights know the tokenizer."""

from __future__ import annotations

import dataclasses
import json
import logging
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_ds.data.shard_format import open_set
from d2v_ds.data.tokenizer_json import digest, special_tokens
from d2v_ds.errors import UserError
from d2v_ds.export.text import open_tokenizer
from d2v_ds.export.text_json import JsonTokenizer
from d2v_ds.export.writer import Options, export
from d2v_ds.loader.tokenizer_file import keep_tokenizer, refuse_mixed, refuse_other
from d2v_ds.modalities.text import Text, TextConfig
from d2v_ds.run.run_folder import RunFolder
from shards import samples
from shards.text.tokenizer import Tokenizer
from tests.export.helpers import weights_of
from tests.helpers import variants
from tests.helpers.corpora import put
from tests.shards.text_sets import MODEL, about, convert, documents

tokenizers = pytest.importorskip("tokenizers")

CORPUS = samples.path("text") / "seen.jsonl"
LINES = [json.loads(line)["text"] for line in CORPUS.read_text().split("\n") if line]
SPECIAL = {
    "gpt2": ["<|endoftext|>"],
    "roberta": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
}
ODD = [
    "",
    "  Two  spaces, a tab\tand\r\nlines\n\n\n",
    "naïve Ærøskøbing ÀÁõö 東京 🙂👩‍🔬 ▁ ▁▁x",
    "<s> </s> <pad> <mask> <unk> <|endoftext|> [SEP]",
    "\x01\x7f\x85\u2028\ufeff e\u0301 \ud7ff\U0010ffff",
]


def trained(special: list[str], size: int = 600) -> bytes:
    """A byte-level BPE as GPT-2's and RoBERTa's, whose special tokens come first."""
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES[:100], trainer)
    if "</s>" in special:
        pair = [(name, tokenizer.token_to_id(name)) for name in ("</s>", "<s>")]
        tokenizer.post_processor = processors.RobertaProcessing(*pair)
        tokenizer.enable_truncation(20)
        tokenizer.enable_padding(pad_id=1, pad_token="<pad>", length=20)
    return str(tokenizer.to_str()).encode()


MODELS = {kind: trained(special) for kind, special in SPECIAL.items()}


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def file(kind: str, tmp_path: Path) -> Path:
    return put(tmp_path / "some name.json", MODELS[kind])


# ------------------------------------------------------------------------------------------ the ids


def test_special_tokens() -> None:
    roberta = Tokenizer(MODELS["roberta"], "r")
    assert (roberta.pad_id, roberta.eos_id, roberta.mask_id, roberta.vocab_size) == (1, 2, 4, 600)
    gpt2 = Tokenizer(MODELS["gpt2"], "g")
    assert (gpt2.eos_id, gpt2.mask_id, gpt2.vocab_size) == (0, 600, 601)
    raw = json.loads(MODELS["gpt2"])
    assert special_tokens(raw)["pad"] == ("À", gpt2.pad_id)  # a byte that UTF-8 does not have


@settings(max_examples=150, deadline=None)
@given(st.text() | st.sampled_from([*ODD, *LINES[:20]]), st.sampled_from(sorted(MODELS)))
def test_decoding_restores_any_text(text: str, kind: str) -> None:
    tokenizer = Tokenizer(MODELS[kind], kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.pad_id, tokenizer.eos_id, tokenizer.mask_id} & set(ids)
    theirs = tokenizers.Tokenizer.from_str(MODELS[kind].decode())
    theirs.no_truncation()
    theirs.no_padding()
    if not any(name in text for names in SPECIAL.values() for name in names):
        assert ids == theirs.encode(text, add_special_tokens=False).ids


def test_a_set(kind: str, file: Path, tmp_path: Path) -> None:
    texts = [text for text in [*ODD, *LINES[:50]] if "\n" not in text and text]
    put(tmp_path / "in/a.txt", "\n".join(texts) + "\n")
    assert convert(tmp_path / "in", tmp_path / "out", "--block", 32, tokenizer=file) == 0
    tokenizer = Tokenizer.load(file)
    assert documents(tmp_path / "out", tokenizer) == texts
    entry = about(tmp_path / "out")["tokenizer"]
    assert entry == {"file": "tokenizer.json", **tokenizer.about()}
    assert (tmp_path / "out/tokenizer.json").read_bytes() == MODELS[kind]


def test_other_tokenizers_have_their_usual_names(tmp_path: Path) -> None:
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(LINES[:50], trainer)
    found = Tokenizer(tokenizer.to_str().encode(), "bert")
    assert (found.pad_id, found.eos_id, found.mask_id) == (0, 3, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not a tokenizer.json"),
        (b"{}", r"is not a tokenizer.json \(has no vocabulary"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": 3}}', "is not a tokenizer.json"),
        (trained([]), "lacks </s> or <|endoftext|>"),
    ],
)
def test_unusable_files(content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=f"some.json: {message}"):
        Tokenizer(content, "some.json")


def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = put(tmp_path / "t.json", MODELS["gpt2"])
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert convert(CORPUS, tmp_path / "out", tokenizer=file) == 2
    assert "a tokenizer.json needs tokenizers; run `pip install tokenizers`" in (
        capsys.readouterr().err
    )


# ------------------------------------------------------------------------------------ runs, exports


def small_set(file: Path, folder: Path) -> Any:
    put(folder / "a.txt", "\n".join(text.replace("\n", " ") for text in LINES[:9]))
    assert convert(folder / "a.txt", folder / "set", "--block", 32, tokenizer=file) == 0
    return open_set(folder / "set", "text")


def test_a_run_is_checked_and_keeps_the_file(kind: str, file: Path, tmp_path: Path) -> None:
    shards, tokenizer = small_set(file, tmp_path), Tokenizer.load(file)
    ids = {name: getattr(tokenizer, name) for name in ("vocab_size", "pad_id", "mask_id")}
    Text(TextConfig(**ids)).check_set(shards.about)
    with pytest.raises(UserError, match=r"its tokenizer does not fit modality\.text\.pad_id=3; se"):
        Text(TextConfig(**{**ids, "pad_id": 3})).check_set(shards.about)
    (tmp_path / "run").mkdir()
    put(tmp_path / "run/tokenizer.model", "of another set")
    keep_tokenizer(shards, tmp_path / "run/tokenizer.model")
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["tokenizer.json"]
    assert (tmp_path / "run/tokenizer.json").read_bytes() == MODELS[kind]


def test_sets_and_weights_are_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sets, files = {}, {}
    for kind in MODELS:
        files[kind] = put(tmp_path / kind / "tokenizer.json", MODELS[kind])
        sets[kind] = small_set(files[kind], tmp_path / kind)
    refuse_mixed([sets["gpt2"], sets["gpt2"]])
    with pytest.raises(UserError, match=r"same one, for example with .*/gpt2/set/tokenizer\.json"):
        refuse_mixed(sets.values())
    for kind in MODELS:
        # An export has other special tokens around a text, but gives the same ids.
        exported = JsonTokenizer(MODELS[kind], 512).exported()
        assert digest(exported.encode()) == digest(MODELS[kind])
        weights = {"tokenizer.json": put(tmp_path / f"{kind}-export/tokenizer.json", exported)}
        other = sets["gpt2" if kind == "roberta" else "roberta"]
        with caplog.at_level(logging.WARNING, "d2v_ds"):
            refuse_other(tmp_path, weights, [sets[kind]])
            assert not caplog.records
        with pytest.raises(UserError, match="was trained with another tokenizer"):
            refuse_other(tmp_path, weights, [other])
    with caplog.at_level(logging.WARNING, "d2v_ds"):
        refuse_other(Path("old"), {"tokenizer.model": MODEL}, [sets["gpt2"]])
        assert "init: old has no tokenizer.json, so the tokenizers" in caplog.text


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("prefix", [None, 0])
def test_an_export_gives_the_ids_of_the_set(
    kind: str, prefix: int | None, file: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.load(file)
    names = ("vocab_size", "pad_id", "mask_id")
    found = weights_of(
        "v2_text", *(f"modality.text.{name}={getattr(tokenizer, name)}" for name in names)
    )
    if prefix is None:
        export(found, tmp_path / "out", Options(tokenizer=file))  # transformers verifies it
    else:
        text = open_tokenizer(file, found.modality["text"], prefix)
        assert isinstance(text, JsonTokenizer)
        put(tmp_path / "out/tokenizer.json", text.exported())
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **text.settings()}
        put(tmp_path / "out/tokenizer_config.json", json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    draw = random.Random(0)
    pieces = [*ODD, *LINES[:9], *"À <mask> </s>".split()]
    texts = ["".join(draw.choices(pieces, k=draw.randrange(1, 9))) for _ in range(50)]
    first = [] if prefix is None else [prefix]
    for text in [*ODD, *texts]:
        ours = [*first, *tokenizer.encode(text), tokenizer.eos_id]
        assert theirs(text)["input_ids"] == ours
    assert theirs.pad_token_id == tokenizer.pad_id and theirs.mask_token_id == tokenizer.mask_id
    assert theirs.eos_token_id == tokenizer.eos_id


def test_the_export_of_a_run_has_the_file_of_its_folder(file: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(file)
    names = ("vocab_size", "pad_id", "mask_id")
    found = weights_of(
        "v2_text", *(f"modality.text.{name}={getattr(tokenizer, name)}" for name in names)
    )
    kept = put(tmp_path / "run/tokenizer.json", file.read_bytes())
    assert RunFolder(tmp_path / "run").tokenizer == kept
    found = dataclasses.replace(found, files={kept.name: kept}, config=variants.config("v2_text"))
    export(found, tmp_path / "out", Options(verify=False))
    exported = (tmp_path / "out/tokenizer.json").read_bytes()
    assert digest(exported) == tokenizer.sha256 and not (tmp_path / "out/tokenizer.model").exists()


def lossy(kind: str) -> bytes:
    """A tokenizer whose ids do not hold everything."""
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    if kind == "lower":
        raw = json.loads(trained(SPECIAL["roberta"]))
        raw["normalizer"] = {"type": "Lowercase"}
        return json.dumps(raw).encode()
    if kind == "bert":
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(special_tokens=special, show_progress=False)
    else:
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            special_tokens=special, unk_token="<unk>", show_progress=False
        )
    tokenizer.train_from_iterator([*LINES[:200], "á à ñ"], trainer)
    return str(tokenizer.to_str()).encode()


@pytest.mark.parametrize(
    ("kind", "lost", "kept"),
    [
        ("lower", ["upper case"], ["accents", "spaces", "line ends", "emoji"]),
        ("bert", ["upper case", "accents", "repeated spaces", "line ends", "rare scripts"], []),
        ("unigram", ["ligatures", "rare scripts"], ["upper case", "accents"]),
    ],
)
def test_what_the_ids_do_not_hold_is_told(
    kind: str, lost: list[str], kept: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = put(tmp_path / "tokenizer.json", lossy(kind))
    put(tmp_path / "a.txt", "\n".join(LINES[:50]))
    assert convert(tmp_path / "a.txt", tmp_path / "out", tokenizer=model) == 0
    [remark] = about(tmp_path / "out")["remarks"]
    assert f"{model}: {remark}\n" in capsys.readouterr().out
    assert all(name in remark for name in lost) and not any(name in remark for name in kept)


def test_tokenizers_that_hold_everything() -> None:
    assert Tokenizer(trained(SPECIAL["gpt2"]), "x").losses() == ""
    assert Tokenizer.load(MODEL).losses() == ""
