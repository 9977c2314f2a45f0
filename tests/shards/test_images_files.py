"""d2v-shards images: types of files, formats of a set, and messages about files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.corpora import contents, found, put, quarantine
from tests.shards.pictures import picture
from tests.shards.test_images_family import convert

# ----------------------------------------------------------------------------------- types of files


def test_files_are_recognised_by_their_content(tmp_path: Path) -> None:
    jpeg, gif = picture("JPEG"), picture("GIF")
    used = {
        "a.jfif": jpeg,
        "b.JPG": jpeg,
        "c.GIF": gif,
        "d.png": jpeg,  # a wrong extension
        "noext": jpeg,
        "e.jpg_large": jpeg,
        "f.tiff": picture("TIFF"),
        "g.avif": picture("AVIF"),
        "h.jp2": picture("JPEG2000"),
        "i.mpo": jpeg,
        "j.apng": picture(),
        "v1.2 of it": picture("WEBP"),
        "slide": picture("TIFF"),
    }
    passed = {
        "raw.nef": picture("TIFF"),  # Pillow would read the thumbnail of a raw photo
        "k.jpg.bak": jpeg,
        "k.heic": b"\0\0\0\x18ftypheic",
        "l.mp4": b"\0\0\0\x18ftypisom",
        "README": b"text",
        "m.txt": jpeg,
        "n.svg": b"<svg/>",
    }
    for name, data in {**used, **passed}.items():
        put(tmp_path / "in" / name, data)
    assert convert(tmp_path / "in", tmp_path / "out", "-j1") == 0
    assert {s["json"]["path"] for s in contents(tmp_path / "out").values()} == set(used)
    notes = found(tmp_path / "out", "notes.jsonl")
    assert {name: kind for name, (_, kind) in notes.items()} == dict.fromkeys(passed, "type")
    assert quarantine(tmp_path / "out") == {}


def test_one_format_in_a_set(tmp_path: Path) -> None:
    for i, kind in enumerate(("JPEG", "PNG", "WEBP", "GIF")):
        put(tmp_path / f"in/{i}.{kind.lower()}", picture(kind, seed=i))
    for encode in ("jpg", "png"):
        assert convert(tmp_path / "in", tmp_path / encode, "--encode", encode, "-j1") == 0
        read = contents(tmp_path / encode)
        assert [sample.keys() for sample in read.values()] == [{"json", encode}] * 4
    assert contents(tmp_path / "jpg")["0"]["jpg"] == (tmp_path / "in/0.jpeg").read_bytes()
    assert contents(tmp_path / "png")["1"]["png"] == (tmp_path / "in/1.png").read_bytes()


# ---------------------------------------------------------------------------------------- messages


def test_reasons_are_the_same_each_time(tmp_path: Path) -> None:
    for i in range(4):
        put(tmp_path / f"in/{i}.jpg", b"<html>not found</html>")
    put(tmp_path / "in/ok.png", picture())
    texts = []
    for name in ("a", "b"):
        assert convert(tmp_path / "in", tmp_path / name, "--max-bad", "99%", "-j1") == 0
        texts.append((tmp_path / name / "quarantine.jsonl").read_bytes())
    assert texts[0] == texts[1] and b"0x" not in texts[0]
    assert set(quarantine(tmp_path / "a").values()) == {"is HTML, such as the page of an error"}


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict", "latin-1"])
def test_names_that_are_not_unicode(encoding: str, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "in") + b"/caf\xe9"
    os.makedirs(folder)
    for i in range(2):
        with open(folder + b"/%d.png" % i, "wb") as file:
            file.write(picture(seed=i))
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    for arguments in (
        ["images", tmp_path / "in", tmp_path / "out", "-j1"],
        ["images", os.fsdecode(folder), tmp_path / "out2", "-j1"],
        ["stats", tmp_path / "out"],
        ["stats", "--markdown", tmp_path / "out"],
        ["verify", tmp_path / "out", "-j1"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "shards.cli", *map(str, arguments)],
            env=environment,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        if arguments[0] == "stats":
            assert b"caf" in done.stdout
