"""Third-party tars as a shard set: an index from headers alone, lengths as decoders report them."""

from __future__ import annotations

import gzip
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from d2v_ds.data import audio
from d2v_ds.data.shard_format import INDEX_FILE, open_set
from d2v_ds.data.shard_index import read_index
from d2v_ds.data.tar_index import guess_format, index_set
from d2v_ds.errors import UserError
from d2v_ds.modalities import sample_formats
from shards.cli import main
from tests.data.test_headers import WHOLE
from tests.helpers.corpora import contents, notes, put, put_tar, quarantine, recording

# --------------------------------------------------------------------------------------------- sets


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    sounds = [recording("flac" if i % 2 else "wav", 0.1 + i / 100, seed=i) for i in range(9)]
    for t in range(3):
        named = []
        for i in range(3 * t, 3 * t + 3):
            named += [(f"x/{i}.{'flac' if i % 2 else 'wav'}", sounds[i]), (f"x/{i}.cls", b"7")]
            named += [(f"x/{i}.extra.bin", b"not of interest")]
        put_tar(tmp_path / f"tars/part-{t}.tar", named)
    return tmp_path / "tars"


def test_an_index_next_to_the_tars(tars: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {tar: tar.read_bytes() for tar in tars.iterdir()}
    assert main(["index", str(tars), "-j1"]) == 0
    line, passed_over = capsys.readouterr().out.splitlines()
    assert line == f"{tars}: 9 samples, 0.000 hours, 3 shards"
    assert passed_over.startswith("9 files were passed over (9 unused)")
    shards = open_set(tars, "speech")
    assert (shards.samples, shards.sample_rate, shards.length_unit) == (9, 16_000, "frames")
    found = contents(tars)
    assert list(found) == [f"x/{i}" for i in range(9)]
    lengths = [n for s in shards.shards for n in read_index(shards.index(s)).lengths]
    decoded = [audio.decode(m["flac" if "flac" in m else "wav"]) for m in found.values()]
    assert lengths == list(map(len, decoded))
    assert found["x/3"]["cls"] == b"7" and "extra.bin" not in found["x/3"]
    assert all(tar.read_bytes() == data for tar, data in before.items())
    assert main(["verify", str(tars), "-j1"]) == 0
    assert main(["stats", str(tars)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["cls", "9"] in rows and ["flac", "4"] in rows and ["7", "9"] in rows


def test_an_index_in_another_folder_with_several_processes(tars: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    assert main(["index", str(tars), str(out), "--checksums", "-j2"]) == 0
    assert main(["index", str(tars), "--checksums", "-j1"]) == 0
    for name in ("part-0.idx", "part-1.idx", "part-2.idx", "quarantine.jsonl"):
        assert (out / name).read_bytes() == (tars / name).read_bytes()
    assert sorted(out.glob("*.tar")) == [] and contents(out) == contents(tars)
    assert main(["verify", str(out), "-j1"]) == 0
    shards = open_set(out)
    assert shards.tar(shards.shards[0]).samefile(tars / "part-0.tar")


def test_checksums_detect_later_damage(tars: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", str(tars), "--checksums"]) == 0
    data = bytearray((tars / "part-1.tar").read_bytes())
    data[data.index(b"x/4.wav") + 512 + 900] ^= 1
    (tars / "part-1.tar").write_bytes(data)
    capsys.readouterr()
    assert main(["verify", str(tars), "-j1"]) == 1
    conversion, line, kinds, _ = capsys.readouterr().out.splitlines()
    assert conversion == "note: conversion: 9 passed over (9 unused)"
    assert line == "part-1: sample 'x/4': the checksum of its .wav differs from the index"
    assert kinds == "note: 1 sample cannot be used (1 damaged)"


def test_one_tar_and_other_modalities(tmp_path: Path) -> None:
    images = put_tar(tmp_path / "i/a.tar", [("0.jpg", WHOLE["jpg"]), ("1.png", WHOLE["png"])])
    text = put_tar(tmp_path / "t/b.c.tar", [("0.npy", WHOLE["npy"]), ("0.json", b"{}")])
    assert tuple(guess_format(tar, sample_formats()).modality for tar in (images, text)) == (
        "vision",
        "text",
    )
    for tar, length, name in ((images, 2 * 37 * 21, "a"), (text, 99, "b.c")):
        assert main(["index", str(tar), "-j1"]) == 0
        shards = open_set(tar.parent)
        assert (shards.length, shards.sample_rate, shards.shards[0].name) == (length, 0, name)


# ------------------------------------------------------------------------------------------- errors


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["index", *map(str, arguments), "-j1"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("d2v-shards: ") and line.count("\n") == 1
    return line


def test_damaged_and_truncated_tars_are_refused(
    tars: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = (tars / "part-1.tar").read_bytes()
    at = data.index(b"x/4.wav")
    for damaged, message in [
        (data[: at + 700], "x/4.wav: its 4524 bytes extend past the end"),
        (data[:at], "ends without its end-of-archive mark"),
        (data[:at] + bytes(512) + data[at + 512 :], "zeros"),
        (data[:at] + b"\1" * 512 + data[at + 512 :], "damaged header"),
        (b"", "ends without"),
    ]:
        (tars / "part-1.tar").write_bytes(damaged)
        line = refused(capsys, tars)
        assert "part-1.tar: " in line and message in line and "copy it again" in line
        assert not (tars / INDEX_FILE).exists()


def test_samples_without_a_length_are_left_out_or_too_many(
    tars: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [(f"{i}.wav", WHOLE["wav"]) for i in range(150)]
    put_tar(tars / "part-1.tar", [*good, ("b.wav", b"no sound"), ("c.txt", b"alone")])
    line = refused(capsys, tars)
    assert "2 of 158 samples cannot be used; the first: part-1.tar, b.wav: is not WAV" in line
    assert "if more than 1% cannot be used, convert the tars: `d2v-shards speech SOURCE OUT" in line
    put_tar(tars / "part-1.tar", [*good, ("c.txt", b"alone")])
    assert main(["index", str(tars), "-j1"]) == 0
    assert "1 of 157 inputs were left out" in capsys.readouterr().out
    assert quarantine(tars) == {"part-1.tar, c": "has only txt, none of flac, wav"}


def test_one_sample_rate_per_set(tars: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_tar(tars / "part-1.tar", [("a.wav", recording(rate=8000))])
    line = refused(capsys, tars)
    assert "a set has one sample rate (found 8000 Hz in part-1.tar, 16000 Hz in part-0.tar)" in line
    assert "--layout webdataset" in line


def test_sources_that_cannot_be_indexed(
    tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is neither a tar nor a folder" in refused(capsys, tmp_path / "nowhere")
    assert "is neither a tar nor a folder" in refused(capsys, tmp_path)
    other = put_tar(tmp_path / "other/a.tar", [("a.txt", b"x")])
    line = refused(capsys, other)
    assert (
        "its first sample has txt, which does not identify a modality (speech: flac, wav;" in line
    )
    assert "cannot be used" in refused(capsys, other, "--modality", "speech")
    assert main(["index", str(tars)]) == 0
    assert "is already a shard set" in refused(capsys, tars)
    with pytest.raises(UserError, match="must be in one folder"):
        index_set([tars / "part-0.tar", other], tmp_path / "new", sample_formats("speech"))


def test_links_in_tars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sounds = [recording(seed=i) for i in range(150)]
    named = [(f"{i}.{kind}", data) for i in range(150) for kind, data in
             (("wav", sounds[i]), ("cls", b"7"))]  # fmt: skip
    tar = put_tar(tmp_path / "a.tar", named)
    with tarfile.open(tar, "a") as file:
        for name, kind, target in (
            ("x.wav", tarfile.LNKTYPE, "3.wav"),
            ("x.cls", tarfile.SYMTYPE, "./4.cls"),
            ("y.wav", tarfile.SYMTYPE, "5.wav"),
            ("y.cls", tarfile.LNKTYPE, "gone.cls"),
            ("z.wav", tarfile.SYMTYPE, "gone.wav"),
        ):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            file.addfile(link)
    assert main(["index", str(tmp_path), "--checksums", "-j1"]) == 0
    lines = capsys.readouterr().out
    assert "1 of 153 inputs were left out (1 link)" in lines and "1 no metadata" in lines
    reason = "is a link to gone.wav, which the tar does not contain"
    assert quarantine(tmp_path) == {"a.tar, z.wav": reason}
    assert notes(tmp_path) == {"a.tar, y.cls": "no metadata"}
    found = contents(tmp_path)
    assert found["x"] == {"wav": sounds[3], "cls": b"7", "json": {}}
    assert found["y"] == {"wav": sounds[5], "json": {}}
    assert main(["verify", str(tmp_path), "-j1"]) == 0
    assert "note: a: sample 'x' has the same content as '3'" in capsys.readouterr().out


def test_tars_that_are_compressed_or_in_capitals_say_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = put_tar(tmp_path / "a.tar", [("a.wav", recording())]).read_bytes()
    packed = put(tmp_path / "in/a.tar.gz", gzip.compress(data))
    todo = "is a compressed tar; unpack it with `gunzip a.tar.gz`"
    assert todo in refused(capsys, packed) and todo in refused(capsys, tmp_path / "in")
    renamed = put(tmp_path / "renamed/a.tar", gzip.compress(data))
    line = refused(capsys, renamed)
    assert "is not a tar but compressed; rename it to a.tar.gz and unpack it with `gunzip" in line
    capitals = put(tmp_path / "capitals/A.TAR", data)
    assert "A.TAR: the names of indexed tars end in .tar; rename it" in refused(capsys, capitals)


def test_a_name_with_several_dots_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = put_tar(tmp_path / "a.tar", [("v1.0/talk v1.0.flac", recording("flac"))])
    line = refused(capsys, tar, "--modality", "speech")
    assert (
        "has only 0.flac, none of flac, wav; WebDataset cuts the name v1.0/talk v1.0.flac" in line
    )


def test_index_json_says_how_it_was_made(tars: Path) -> None:
    shutil.rmtree(tars.parent / "x", ignore_errors=True)
    assert main(["index", str(tars)]) == 0
    about = json.loads((tars / INDEX_FILE).read_text())
    assert about["indexed"] is True and about["inputs"] == 9 and about["quarantined"] == 0
