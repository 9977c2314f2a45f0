"""The bundled corpora: size, content, disjoint splits, and the scripts that make them."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from d2v_ds.data import audio
from shards import samples
from shards.samples import make_images, make_speech, make_text
from shards.text.tokenizer import Tokenizer, train

SPEECH, TEXT, IMAGES = (samples.path(name) for name in ("speech", "text", "images"))


def rows(split: str) -> list[list[str]]:
    header, *lines = (SPEECH / f"{split}.tsv").read_text().splitlines()
    assert header.split("\t") == ["path", "label", "speaker"]
    return [line.split("\t") for line in lines]


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# ------------------------------------------------------------------------------------------ speech


def test_size_and_licence() -> None:
    assert size(SPEECH) <= make_speech.LIMIT <= 2_000_000
    readme = (SPEECH / "README.md").read_text()
    assert "CC BY-SA 4.0" in readme and "Zohar Jackson" in readme


def test_splits_do_not_overlap() -> None:
    paths = {split: {row[0] for row in rows(split)} for split in ("train", "seen", "unseen")}
    everything = [path for split in paths for path in paths[split]]
    assert len(set(everything)) == len(everything) == 630
    assert set(everything) == {f"recordings/{f.name}" for f in (SPEECH / "recordings").iterdir()}
    speakers = {split: {row[2] for row in rows(split)} for split in paths}
    assert speakers["train"] == speakers["seen"] and len(speakers["train"]) == 5
    assert speakers["unseen"] == {"theo"} and "theo" not in speakers["train"]


def test_labels() -> None:
    for split, each in (("seen", 5), ("unseen", 10)):
        labels = [row[1] for row in rows(split)]
        assert {label: labels.count(label) for label in labels} == {str(d): each for d in range(10)}
    for path, label, speaker in rows("train"):
        assert Path(path).name.startswith(f"{label}_{speaker}_")


def test_recordings_are_made_by_the_script(tmp_path: Path) -> None:
    source = tmp_path / "fsdd/recordings"
    source.mkdir(parents=True)
    for file in (SPEECH / "recordings").iterdir():
        data, rate = soundfile.read(file, dtype="int16")
        assert rate == 8000 and data.ndim == 1
        soundfile.write(source / f"{file.stem}.wav", data, rate, subtype="PCM_16")
    make_speech.make(source.parent, tmp_path / "made")
    for split in ("train", "seen", "unseen"):
        name = f"{split}.tsv"
        assert (tmp_path / "made" / name).read_bytes() == (SPEECH / name).read_bytes()
    for file in (SPEECH / "recordings").iterdir():
        made = audio.decode(tmp_path / "made/recordings" / file.name)
        assert (made == audio.decode(file)).all()


# -------------------------------------------------------------------------------------------- text


def paragraphs(split: str) -> list[dict[str, str]]:
    lines = (TEXT / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_text_and_images_are_small_and_have_licences() -> None:
    assert size(TEXT) + size(IMAGES) <= 3_000_000
    assert size(TEXT) - (TEXT / "tokenizer.model").stat().st_size <= make_text.LIMIT
    assert size(IMAGES) <= make_images.LIMIT
    readme = (TEXT / "README.md").read_text()
    assert "CC BY-SA 3.0" in readme and "Merity" in readme
    readme = (IMAGES / "README.md").read_text()
    assert all(f"| `{name}` |" in readme for name in make_images.PICTURES) and "CC0" in readme


def test_held_out_text_is_not_in_the_training_text() -> None:
    trained = gzip.decompress((TEXT / "train.txt.gz").read_bytes()).decode()
    assert len(trained.split("\n\n")) == 81
    for split, is_in in (("labelled", True), ("seen", False), ("unseen", False)):
        assert all((row["text"] in trained) is is_in for row in paragraphs(split)), split
    topics = [Counter(row["topic"] for row in paragraphs(s)) for s in ("labelled", "unseen")]
    assert set(topics[0]) == set(topics[1]) == set(make_text.TRAINED) == set(make_text.UNSEEN)
    assert min(min(count.values()) for count in topics) >= 20


def test_text_is_made_by_the_script(tmp_path: Path) -> None:
    """On a corpus in the format of WikiText-2, which is not part of the repository."""

    def article(name: str, i: int) -> str:
        body = f"{name} {i} " + "word " * make_text.WORDS
        lines = [f"= {name} {i} =", body + "one", "= = part = =", "short", body + "two"]
        return "".join(f" {line} \n \n" for line in lines)

    for name in ("valid", "test"):
        text = " \n" + "".join(article(name, i) for i in range(62))
        (tmp_path / f"{name}.txt").write_text(text)
    make_text.make(tmp_path, tmp_path / "out")
    made = gzip.decompress((tmp_path / "out/train.txt.gz").read_bytes()).decode().split("\n\n")
    rows = [json.loads(line) for line in (tmp_path / "out/unseen.jsonl").read_text().splitlines()]
    held_out = make_text.topics(make_text.UNSEEN)
    assert len(made) == 62 + 62 - len(held_out) and len(rows) == 2 * len(held_out)
    for row in rows:
        assert held_out[int(row["article"].split()[1])] == row["topic"]
        assert row["text"].startswith(f"{row['article']} word")
    assert (
        made[0].startswith(" = valid 0 = \n valid 0 word") and " = = part = = \n short" in made[0]
    )


def test_the_tokenizer_fits_the_text() -> None:
    model = Tokenizer.load(TEXT / "tokenizer.model")
    assert model.vocab_size == 4096
    text = paragraphs("unseen")[0]["text"]
    assert model.decode(model.encode(text)) == text and len(model.encode(text)) < len(text) / 2.5


@pytest.mark.slow
def test_the_tokenizer_is_made_as_its_readme_says() -> None:
    text = gzip.decompress((TEXT / "train.txt.gz").read_bytes()).decode()
    made = train([text], vocab_size=4096, kind="unigram", sample=300_000, seed=0)
    assert made == (TEXT / "tokenizer.model").read_bytes()


# ------------------------------------------------------------------------------------------ images


def test_tiles() -> None:
    for split, (most, _) in make_images.SPLITS.items():
        assert {folder.name for folder in (IMAGES / split).iterdir()} == set(make_images.PICTURES)
        for folder in (IMAGES / split).iterdir():
            files = sorted(folder.iterdir())
            assert 0.9 * most <= len(files) <= most
            with Image.open(files[0]) as image:
                assert (image.mode, image.size) == ("L", (32, 32))
                assert len(set(image.tobytes())) > 3


def test_tiles_of_the_splits_come_from_different_parts(tmp_path: Path) -> None:
    """On pictures with a dark left and a bright right part, so that a tile reveals its side."""
    rng, seen = np.random.default_rng(0), {}
    for name in make_images.PICTURES.values():
        pixels = rng.integers(0, 40, (96, 320), dtype=np.uint8)
        pixels[:, 224:] += 200  # 0.7 of the width, the position of the cut
        Image.fromarray(pixels).save(tmp_path / name)
    picture = np.asarray(Image.open(tmp_path / "brick.png"), dtype=np.float64)
    cut = int(320 * make_images.TRAINED) // 32 * 32
    assert cut == 224
    for split, between in (("train", (0, cut)), ("unseen", (cut, 320))):
        step = make_images.SPLITS[split][1]
        seen[split] = {t.mean() > 100 for t in make_images.tiles(picture, *between, step)}
    assert seen == {"train": {False}, "unseen": {True}}
    make_images.make(tmp_path, tmp_path / "a")
    make_images.make(tmp_path, tmp_path / "b")
    a, b = ({f.relative_to(tmp_path / n): f.read_bytes() for f in (tmp_path / n).rglob("*.png")}
            for n in "ab")  # fmt: skip
    assert a == b and len({data for data in a.values()}) > 100


def test_unknown_corpus() -> None:
    with pytest.raises(AssertionError, match="no bundled corpus 'music'"):
        samples.path("music")
