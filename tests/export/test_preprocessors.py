"""Preprocessors of an export give the inputs that our own decoding gives."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2

from d2v_ds.data import image_files, images
from d2v_ds.errors import UserError
from d2v_ds.export.text import SentencePiece, converted, open_tokenizer
from d2v_ds.modalities.speech import normalised
from shards.text.tokenizer import Tokenizer, train
from tests import ROOT
from tests.export.helpers import LABELS, TOKENIZER, joint_weights, weights_of, with_head, write
from tests.helpers.pictures import encoded

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

PIECES = [
    *"aeinorst THE,.!?0123456789<>/|\\\n\t\r",
    *("  ", "▁", "▁▁", "é", "e\u0301", "東京", "🙂", "👩‍🔬", "\u200b", "\ufeff", "\x00", "\u2028"),
    *("<s>", "</s>", "<pad>", "<unk>", "<mask>", "<0x41>", "<0x", "unk>", "lobster", " the", "007"),
]


def texts() -> list[str]:
    rng = random.Random(0)
    made = ["".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 50))) for _ in range(1500)]
    lines = (ROOT / "shards/samples/text/labelled.jsonl").read_text().splitlines()[:60]
    return [*made, *(json.loads(line)["text"] for line in lines)]


def corpus() -> list[str]:
    lines = (ROOT / "shards/samples/text/labelled.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def models() -> dict[str, bytes]:
    """Sentencepiece models: two as d2v-shards trains them, the bundled one, and one as others are
    trained, which normalises text."""
    found = {
        kind: train(corpus(), vocab_size=900, kind=kind, sample=2000, seed=0)
        for kind in ("unigram", "bpe")
    }
    other = io.BytesIO()
    SentencePieceTrainer.Train(
        sentence_iterator=iter(corpus()),
        model_writer=other,
        vocab_size=900,
        byte_fallback=True,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )
    return {**found, "bundled": (ROOT / TOKENIZER).read_bytes(), "other": other.getvalue()}


def text_folder(model: bytes, out: Path) -> Path:
    """An export of a small text model with this tokenizer."""
    tokenizer = Tokenizer(model, "model")
    found = weights_of(
        "v2_text",
        f"modality.text.vocab_size={tokenizer.vocab_size}",
        f"modality.text.mask_id={tokenizer.mask_id}",
        f"modality.text.pad_id={tokenizer.pad_id}",
    )
    file = out.with_suffix(".model")
    file.write_bytes(model)
    write(found, out, tokenizer=file)
    return out


@pytest.mark.parametrize("kind", ["unigram", "bpe", "bundled", "other"])
def test_token_ids_are_equal(kind: str, models: dict[str, bytes], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = text_folder(models[kind], tmp_path / "out")
    fast = (folder / "tokenizer.json").exists()
    assert fast == (kind != "other")
    assert fast != (folder / "tokenization_d2v.py").exists()
    found = AutoTokenizer.from_pretrained(folder, trust_remote_code=not fast)
    ours = Tokenizer(models[kind], kind)
    for text in texts():
        expected = [*ours.encode(text), ours.eos_id]
        assert found(text)["input_ids"] == expected, repr(text)
        assert found(text, add_special_tokens=False)["input_ids"] == expected[:-1]
        if kind != "other":  # the others normalise
            assert found.decode(expected, skip_special_tokens=True) == text
    assert len(found) == ours.vocab_size
    assert found.pad_token_id == ours.pad_id and found.eos_token_id == ours.eos_id
    assert found.mask_token_id == ours.mask_id
    batch = found(["a", "a longer text"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    padding = batch["attention_mask"] == 0
    assert padding.any() and bool((batch["input_ids"][padding] == ours.pad_id).all())
    pair = found("a b", "c")["input_ids"]
    assert pair == [*ours.encode("a b"), ours.eos_id, *ours.encode("c"), ours.eos_id]


@pytest.mark.parametrize("kind", ["unigram", "other"])
def test_fine_tuned_models_keep_their_prefix(
    kind: str, models: dict[str, bytes], tmp_path: Path
) -> None:
    """The id that fine-tuning prepends, which the head reads."""
    from transformers import AutoTokenizer

    ours = Tokenizer(models[kind], kind)
    settings = [f"vocab_size={ours.vocab_size}", f"mask_id={ours.mask_id}", f"pad_id={ours.pad_id}"]
    found = with_head(weights_of("v2_text", *(f"modality.text.{each}" for each in settings)))
    prefix = 1 if kind == "other" else 0
    assert found.finetune["bos_id"] == 0
    found.finetune["bos_id"] = prefix
    file = tmp_path / "x.model"
    file.write_bytes(models[kind])
    write(found, tmp_path / "out", tokenizer=file)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    a, b = ours.encode("a text"), ours.encode("another")
    assert tokenizer("a text")["input_ids"] == [prefix, *a, ours.eos_id]
    pair = tokenizer("a text", "another")["input_ids"]
    assert pair == [prefix, *a, ours.eos_id, *b, ours.eos_id]


def test_saved_tokenizers_load_again(models: dict[str, bytes], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for kind in ("unigram", "other"):
        folder = text_folder(models[kind], tmp_path / kind)
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        found.save_pretrained(tmp_path / f"{kind}-again")
        again = AutoTokenizer.from_pretrained(tmp_path / f"{kind}-again", trust_remote_code=True)
        for text in texts()[:50]:
            assert again(text)["input_ids"] == found(text)["input_ids"]


def test_models_that_tokenizers_cannot_express_are_not_converted(models: dict[str, bytes]) -> None:
    proto = sentencepiece_model_pb2.ModelProto.FromString(models["unigram"])
    assert converted(SentencePiece(proto.SerializeToString(), 512))
    proto.pieces[-1].piece = "<="  # would be split where a special token's name is isolated
    assert converted(SentencePiece(proto.SerializeToString(), 512)) is None
    proto.pieces[-1].piece = "x="
    proto.normalizer_spec.add_dummy_prefix = True
    assert converted(SentencePiece(proto.SerializeToString(), 512)) is None


def test_a_wrong_tokenizer_is_an_error(models: dict[str, bytes], tmp_path: Path) -> None:
    file = tmp_path / "x.model"
    file.write_bytes(models["bpe"])
    settings = {"vocab_size": 900, "pad_id": 1, "mask_id": 899, "max_tokens": 40}
    assert open_tokenizer(file, settings).special_ids["eos"] == 2
    with pytest.raises(UserError, match=r"vocab_size=900, but the model was trained with .*=901"):
        open_tokenizer(file, {**settings, "vocab_size": 901})
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="is not a sentencepiece model"):
        open_tokenizer(file, settings)


# ------------------------------------------------------------------------------ speech and images


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the preprocessors of speech and vision."""
    out = tmp_path_factory.mktemp("joint") / "out"
    write(joint_weights(), out)
    return out


def test_waveforms_are_equal(joint: Path) -> None:
    from transformers import AutoFeatureExtractor, Wav2Vec2FeatureExtractor

    process = AutoFeatureExtractor.from_pretrained(joint, trust_remote_code=True)
    rng = np.random.default_rng(0)
    pcm = [(scale * rng.standard_normal(n)).astype(np.int16) for scale, n in ((4000, 900), (9, 70))]
    batch = process(
        [each.astype(np.float32) / 32768 for each in pcm],
        sampling_rate=16_000,
        padding=True,
        return_tensors="pt",
    )
    for each, row, mask in zip(pcm, batch["input_values"], batch["attention_mask"], strict=True):
        assert mask.sum() == len(each)
        assert torch.equal(row[: len(each)], torch.from_numpy(normalised(each)))
        assert not row[len(each) :].any()
    stock = AutoFeatureExtractor.from_pretrained(joint, trust_remote_code=False)
    assert type(stock) is Wav2Vec2FeatureExtractor and stock.sampling_rate == 16_000


SIZES = ((16, 16), (18, 18), (40, 25), (25, 61), (200, 130), (33, 47), (640, 480))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_images_are_equal(kind: str, joint: Path) -> None:
    from transformers import AutoImageProcessor

    process = AutoImageProcessor.from_pretrained(joint, trust_remote_code=True)
    rng = np.random.default_rng(0)
    for size in SIZES:
        small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        data = encoded(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC), kind)
        crop = images.centre_crop(image_files.open_image(data), 16)
        expected = images.normalise(torch.from_numpy(crop)[None])
        picture = Image.open(io.BytesIO(data))
        found = process(picture, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert picture.size == size  # a JPEG that is decoded smaller is another object
        again = process([picture, picture], return_tensors="pt")["pixel_values"]
        assert torch.equal(again[0], again[1])


@pytest.mark.parametrize("turn", [1, 3, 6, 7])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_turned_and_transparent_images_are_equal(kind: str, turn: int, joint: Path) -> None:
    from transformers import AutoImageProcessor

    process = AutoImageProcessor.from_pretrained(joint, trust_remote_code=True)
    noise = np.random.default_rng(turn).integers(0, 256, (6, 6, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = turn
    for size in ((40, 25), (200, 130)):
        image = Image.fromarray(noise if kind == "PNG" else noise[..., :3])
        data = encoded(image.resize(size, Image.Resampling.BICUBIC), kind, exif=exif)
        crop = images.centre_crop(image_files.open_image(data), 16)
        expected = images.normalise(torch.from_numpy(crop)[None])
        found = process(Image.open(io.BytesIO(data)), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_an_image_of_sixteen_bits_is_refused(joint: Path) -> None:
    from transformers import AutoImageProcessor

    process = AutoImageProcessor.from_pretrained(joint, trust_remote_code=True)
    with pytest.raises(ValueError, match="expected 8 bits per channel"):
        process(Image.new("I;16", (20, 20)), return_tensors="pt")


def test_images_come_close_without_remote_code(joint: Path) -> None:
    from transformers import AutoImageProcessor

    process = AutoImageProcessor.from_pretrained(joint, trust_remote_code=False)
    assert type(process).__name__.startswith("ViTImageProcessor")
    pixels = np.random.default_rng(0).integers(0, 256, (36, 54, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(pixels))
    expected = images.centre_crop(image_files.open_image(data), 16)
    normal = process(Image.open(io.BytesIO(data)), return_tensors="pt")["pixel_values"]
    levels = (normal - images.normalise(torch.from_numpy(expected)[None])).abs() * 255 * 0.229
    assert levels.max() <= 1.5


def test_the_image_processor_saves_and_loads(joint: Path, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    process = AutoImageProcessor.from_pretrained(joint, trust_remote_code=True)
    process.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    image = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    a, b = (each(image, return_tensors="pt")["pixel_values"] for each in (process, again))
    assert torch.equal(a, b)


@pytest.mark.parametrize("variant", ["v1_speech", "v2_speech"])
def test_transcripts(variant: str, tmp_path: Path) -> None:
    from transformers import AutoProcessor, AutoTokenizer

    write(with_head(weights_of(variant)), tmp_path / "out")
    options: dict[str, Any] = {"trust_remote_code": True}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", **options)
    labels = LABELS["speech"][1]
    assert tokenizer.convert_ids_to_tokens(list(range(len(labels)))) == labels
    assert tokenizer.pad_token_id == 0
    ids = [2, 2, 0, 2, 1, 1, 3, 0, 0, 4]  # a _ a | b _ '
    assert tokenizer.decode(ids) == "aa b'"
    assert tokenizer("a b")["input_ids"] == [2, 1, 3]
    processor = AutoProcessor.from_pretrained(tmp_path / "out", **options)
    assert processor.decode(ids) == "aa b'"
    wave = np.random.default_rng(0).standard_normal(4000).astype(np.float32)
    assert processor(wave, sampling_rate=16_000)["input_values"][0].shape == (4000,)
