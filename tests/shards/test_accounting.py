"""Random corpora of sound, damaged, lying and odd files: every file found is a sample, is left out
or is passed over, by name."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from d2v_ds.data.shard_format import open_set
from d2v_ds.loader.reading import read_samples
from shards import samples
from shards.cli import main
from shards.text.tokenizer import Tokenizer
from tests.helpers.corpora import notes, put, quarantine

MODEL = samples.path("text") / "tokenizer.model"
USED, LEFT_OUT, PASSED_OVER = "used", "left out", "passed over"
CORPORA = 20

Kind = tuple[str, str, Callable[[int], bytes]]  # extension, outcome, content for a seed


def noise(seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(4000) * 0.1).astype(np.float32)


def sound(form: str, subtype: str | None = None, gain: float = 1.0) -> Callable[[int], bytes]:
    def make(seed: int) -> bytes:
        file = io.BytesIO()
        soundfile.write(file, noise(seed) * gain, 16000, format=form, subtype=subtype)
        return file.getvalue()

    return make


def picture(form: str, mode: str = "RGB") -> Callable[[int], bytes]:
    def make(seed: int) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(file, form)
        return file.getvalue()

    return make


def cut(make: Callable[[int], bytes], share: float = 0.4) -> Callable[[int], bytes]:
    def shortened(seed: int) -> bytes:
        data = make(seed)
        return data[: int(len(data) * share)]

    return shortened


def prose(seed: int) -> str:
    return f"document number {seed} has its own words"


def text(seed: int) -> bytes:
    return prose(seed).encode()


def constant(data: bytes) -> Callable[[int], bytes]:
    return lambda seed: data


COMMON: list[Kind] = [
    (".docx", PASSED_OVER, constant(b"PK")),
    ("", PASSED_OVER, constant(b"no extension")),
]
SPEECH: list[Kind] = [
    *COMMON,
    (".wav", USED, sound("WAV")),
    (".WAV", USED, sound("WAV", "FLOAT", gain=3)),
    (".flac", USED, sound("FLAC")),
    (".ogg", USED, sound("OGG")),
    (".opus", USED, sound("OGG", "OPUS")),
    (".mp3", USED, sound("MP3")),
    (".aiff", USED, sound("AIFF")),
    (".w64", USED, sound("W64")),
    (".wav", LEFT_OUT, cut(sound("WAV"))),
    (".aiff", LEFT_OUT, cut(sound("AIFF"))),
    (".au", LEFT_OUT, cut(sound("AU"))),
    (".ogg", LEFT_OUT, cut(sound("OGG"))),
    (".flac", LEFT_OUT, cut(sound("FLAC"))),
    (".wav", LEFT_OUT, sound("WAV", gain=0)),
    (".wav", LEFT_OUT, constant(b"")),
    (".mp3", LEFT_OUT, constant(b"not a recording")),
    (".m4a", PASSED_OVER, constant(b"\0\0\0\x20ftypM4A ")),
]
IMAGES: list[Kind] = [
    *COMMON,
    (".jpg", USED, picture("JPEG")),
    (".PNG", USED, picture("PNG")),
    (".webp", USED, picture("WEBP")),
    (".gif", USED, picture("GIF")),
    (".bmp", USED, picture("BMP")),
    (".png", USED, picture("PNG", "I;16")),
    (".jpg", LEFT_OUT, cut(picture("JPEG"))),
    (".png", LEFT_OUT, cut(picture("PNG"))),
    (".png", LEFT_OUT, constant(b"<html>not found</html>")),
    (".webp", LEFT_OUT, constant(b"")),
    (".txt", PASSED_OVER, constant(b"a note")),
]
TEXT: list[Kind] = [
    *COMMON,
    (".txt", USED, text),
    (".TXT", USED, text),
    (".txt.gz", USED, lambda seed: gzip.compress(text(seed))),
    (".jsonl", USED, lambda seed: json.dumps({"text": prose(seed)}).encode()),
    (".txt", LEFT_OUT, lambda seed: prose(seed).encode("utf-16")),
    (".txt", LEFT_OUT, constant(b"caf\xe9 in Latin-1")),
    (".txt.gz", LEFT_OUT, constant(b"not gzip")),
    (".png", PASSED_OVER, picture("PNG")),
]


def corpora(kinds: list[Kind]) -> st.SearchStrategy[list[tuple[str, Kind]]]:
    """Files as (folder, kind), at least one of which is usable."""
    folders = st.sampled_from(["", "a", "a/b", ".hidden", "c d"])
    files = st.lists(st.tuples(folders, st.sampled_from(kinds)), min_size=1, max_size=14)
    return files.filter(lambda found: any(f != ".hidden" and k[1] == USED for f, k in found))


def write(root: Path, files: list[tuple[str, Kind]]) -> dict[str, tuple[str, int]]:
    """{path: (outcome, seed)} of a corpus with links beside its files."""
    expected = {}
    for seed, (folder, (extension, outcome, make)) in enumerate(files):
        name = os.path.join(folder, f"file{seed}{extension}")
        put(root / name, make(seed))
        expected[name] = (PASSED_OVER if folder == ".hidden" else outcome, seed)
    (root / "gone.wav").symlink_to(root / "nothing")
    (root / "again").symlink_to(root)
    return expected


def outcomes(out: Path, root: Path, used: set[str]) -> dict[str, list[str]]:
    """{path of a file: its outcomes}. A folder that is passed over stands for its files."""
    left_out, passed_over = set(quarantine(out)), set[str]()
    about = json.loads((out / "index.json").read_text())
    altered = sum(about["altered"].values())
    listed = notes(out)
    passed_over = {name for name, kind in listed.items() if kind in ("type", "hidden")}
    passed_over |= {name for name, kind in listed.items() if kind in ("linked twice", "unused")}
    assert len(listed) - len(passed_over) <= altered
    assert about["quarantined"] == len(left_out)
    assert about["inputs"] == len(used) + len(left_out)
    assert sum(about["passed_over"].values()) == len(passed_over)
    result: dict[str, list[str]] = {}
    for file in (path for path in root.rglob("*") if path.is_file() and not path.is_symlink()):
        name = str(file.relative_to(root))
        places = {name, *map(str, Path(name).parents)}
        result[name] = [
            outcome
            for outcome, names in (
                (USED, used),
                (LEFT_OUT, {path.partition(", ")[0] for path in left_out}),
                (PASSED_OVER, passed_over),
            )
            if not places.isdisjoint(names)
        ]
    return result


def check(tmp: Path, files: list[tuple[str, Kind]], family: str, *more: str) -> None:
    root, out = tmp / "in", tmp / "out"
    expected = write(root, files)
    if family == "text":
        (root / "gone.wav").unlink()
    arguments = [family, str(root), str(out), "--layout", "folder", "-j1", "--max-bad", "100%"]
    assert main([*arguments, *more]) == 0
    found = outcomes(out, root, used_files(out, family, expected))
    assert found == {name: [outcome] for name, (outcome, _) in expected.items()}
    assert main(["verify", str(out), "-j1"]) == 0


def used_files(out: Path, family: str, expected: dict[str, tuple[str, int]]) -> set[str]:
    """Names in the metadata of samples; for packed text, files whose own words are in the set."""
    shards = open_set(out)
    if family != "text":
        metas = [json.loads(m["json"]) for _, m in read_samples(shards, ["json"])]
        return {name for meta in metas for name in meta.get("paths", [meta.get("path")])}
    tokenizer = Tokenizer.load(MODEL)
    [field] = shards.fields
    blocks = [members[field] for _, members in read_samples(shards, [field])]
    ids = np.frombuffer(b"".join(blocks), "<u2")
    content = tokenizer.decode([int(i) for i in ids if i != tokenizer.eos_id])
    return {name for name, (_, seed) in expected.items() if prose(seed) in content}


many = settings(max_examples=CORPORA, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@many
@given(corpora(SPEECH))
def test_speech(tmp_path_factory: pytest.TempPathFactory, files: list[tuple[str, Kind]]) -> None:
    check(tmp_path_factory.mktemp("corpus"), files, "speech")


@many
@given(corpora(IMAGES))
def test_images(tmp_path_factory: pytest.TempPathFactory, files: list[tuple[str, Kind]]) -> None:
    check(tmp_path_factory.mktemp("corpus"), files, "images")


@many
@given(corpora(TEXT))
def test_text(tmp_path_factory: pytest.TempPathFactory, files: list[tuple[str, Kind]]) -> None:
    more = ("--tokenizer", str(MODEL), "--block", "64", "--document", "file")
    check(tmp_path_factory.mktemp("corpus"), files, "text", *more)
