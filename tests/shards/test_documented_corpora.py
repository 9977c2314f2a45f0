"""The commands of docs/corpora.md that need a published corpus convert small corpora of the same
structure, and every number that they print is right."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shards import samples
from shards.cli import main
from tests.helpers.corpora import put, recording
from tests.shards.layout_corpora import put_parquet
from tests.shards.pictures import picture

DOCS = Path(__file__).parents[2] / "docs" / "corpora.md"
ROWS = 4  # of every file of a corpus from the Hub


def librispeech() -> None:
    for split, number in (
        *(("train-clean-100", 3), ("train-clean-360", 4), ("train-other-500", 5)),
        *(("dev-clean", 2), ("dev-other", 2), ("test-clean", 2), ("test-other", 2)),
    ):
        folder = Path("LibriSpeech", split, "7", "8")
        names = [f"7-8-{i:04d}" for i in range(number)]
        put(folder / "7-8.trans.txt", "".join(f"{name} SOME WORDS\n" for name in names))
        for name in names:
            put(folder / f"{name}.flac", recording("flac", 0.1))
    put(Path("LibriSpeech/README.TXT"), "about")


def nemo() -> None:
    put(Path("audio/hour.wav"), recording("wav", 20))
    rows = [{"audio_filepath": "audio/hour.wav", "offset": i, "duration": 0.9} for i in range(20)]
    put(Path("manifest.json"), "".join(json.dumps(row) + "\n" for row in rows))


def hub(folder: Path, column: str, content: Callable[[int], bytes]) -> None:
    """A download of the Hub with three splits."""
    splits = ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")
    for i, name in enumerate(splits):
        seeds = range(i * ROWS, (i + 1) * ROWS)
        cells = [{"bytes": content(seed), "path": f"{seed}"} for seed in seeds]
        put_parquet(folder / f"{name}.parquet", {column: cells, "label": [0, 1] * 2})


def imagenet() -> None:
    for split, number in (("train", 3), ("val", 2)):
        for name in ("n01440764", "n01443537"):
            for i in range(number):
                put(Path("imagenet", split, name, f"{i}.JPEG"), picture("JPEG", seed=i))


def common_voice() -> None:
    header = "client_id\tpath\tsentence\tage\n"
    for table, number in (("train", 3), ("dev", 2), ("validated", 6)):
        names = [f"{table}_{i}.mp3" for i in range(number)]
        rows = "".join(f"s\t{name}\ttext\t\n" for name in names)
        put(Path("cv-corpus/cy", f"{table}.tsv"), header + rows)
        for name in names:
            put(Path("cv-corpus/cy/clips", name), recording("mp3", 0.2))


def mixed() -> None:
    for i, kind in enumerate(("wav", "flac", "mp3", "ogg", "opus")):
        put(Path(f"recordings/{i}.{kind}"), recording(kind, 0.2, seed=i))
    put(Path("recordings/notes.docx"), "about")
    put(Path("recordings/talk.m4a"), b"....ftypM4A ")


def glue() -> None:
    put(Path("CoLA/train.tsv"), "".join(f"gj04\t1\t\tSentence {i}.\n" for i in range(5)))
    header = "index\tsentence1\tsentence2\tscore\n"
    rows = "".join(f'{i}\tOne "sentence.\tAnother {i}.\t{i}.5\n' for i in range(4))
    put(Path("STS-B/train.tsv"), header + rows)
    put(Path("data/text.model"), (samples.path("text") / "tokenizer.model").read_bytes())


BUILD: dict[str, Callable[[], object]] = {
    "LibriSpeech": librispeech,
    "manifest.json": nemo,
    "hub": lambda: hub(Path("hub/data"), "audio", lambda i: recording("wav", 0.1, seed=i)),
    "cifar10": lambda: hub(Path("cifar10/plain_text"), "img", lambda i: picture(seed=i)),
    "imagenet": imagenet,
    "cv-corpus": common_voice,
    "recordings": mixed,
    "CoLA": glue,
    "STS-B": glue,
}

# {SOURCE and OUT: samples, inputs that are not chosen, files that are passed over}
EXPECTED: dict[str, tuple[int, int, int]] = {
    "LibriSpeech data/librispeech": (12, 8, 0),
    "LibriSpeech/train-clean-100 LibriSpeech/train-clean-360 LibriSpeech/train-other-500 "
    "data/librispeech": (12, 0, 0),
    "manifest.json data/train": (20, 0, 0),
    "hub data/hub": (2 * ROWS, ROWS, 0),
    "cifar10 data/cifar10": (2 * ROWS, ROWS, 0),
    "imagenet/train data/imagenet/train": (6, 0, 0),
    "imagenet/val data/imagenet/val": (4, 0, 0),
    "cv-corpus/cy/train.tsv cv-corpus/cy/dev.tsv data/cy": (5, 0, 0),
    "recordings data/recordings": (5, 0, 2),
    "CoLA/train.tsv data/cola": (5, 0, 0),
    "STS-B/train.tsv data/stsb": (4, 0, 0),
}


def commands() -> list[list[str]]:
    """Of the blocks that need a corpus."""
    blocks = re.findall(r"```bash\n(.*?)```", DOCS.read_text(), re.DOTALL)
    found = [shlex.split(line) for block in blocks for line in block.strip().splitlines()]
    return [words[1:] for words in found if words[1:2] != ["index"]]


def positional(words: list[str]) -> str:
    return " ".join(words[: next((i for i, w in enumerate(words) if w[:2] == "--"), None)])


def test_every_documented_command_is_expected() -> None:
    assert sorted(positional(words[1:]) for words in commands()) == sorted(EXPECTED)


@pytest.mark.parametrize("words", commands(), ids=lambda words: positional(words[1:]))
def test_a_documented_command(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "hub" in words or "cifar10" in words:
        pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    build: Any = BUILD[words[1].partition("/")[0]]
    build()
    assert main([*words, "-j1"]) == 0
    printed = capsys.readouterr().out
    samples, not_chosen, passed_over = EXPECTED[positional(words[1:])]
    out = positional(words[1:]).rpartition(" ")[2]
    assert f"{out}: {samples} samples, " in printed
    assert "left out" not in printed and "altered" not in printed
    assert numbers(printed, "not chosen") == ([not_chosen] if not_chosen else [])
    assert numbers(printed, "passed over") == ([passed_over] if passed_over else [])


def numbers(printed: str, what: str) -> list[int]:
    return [int(line.split()[0]) for line in printed.splitlines() if what in line]
