"""d2v-shards verify: every kind of damage is reported."""

from __future__ import annotations

import json
import re
import shutil
from array import array
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset as wds

from d2v_ds.data.checks import Unusable
from d2v_ds.data.shard_format import INDEX_FILE, ShardSet, open_set
from d2v_ds.data.shard_index import index_bytes, read_index
from d2v_ds.loader.reading import Reader
from shards import samples
from shards.cli import main
from shards.verify import NOTE
from tests.shards.speech_sets import build

SPEECH = samples.path("speech")


@pytest.mark.parametrize("jobs", ["-j1", "-j2"])
def test_sound_set(sound: Path, jobs: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(sound), jobs]) == 0
    assert capsys.readouterr().out == f"{sound}: no problems\n"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def flip_payload(tar: Path, offset: int) -> None:
    flip(tar, offset + 700)


def flip_header(tar: Path, offset: int) -> None:
    flip(tar, offset - 512 + 3)


def zero(tar: Path, offset: int) -> None:
    data = bytearray(tar.read_bytes())
    data[offset - 512 : offset + 4096] = bytes(4608)
    tar.write_bytes(data)


def cut_at_member(tar: Path, offset: int) -> None:
    tar.write_bytes(tar.read_bytes()[: offset - 512])


def cut_in_payload(tar: Path, offset: int) -> None:
    tar.write_bytes(tar.read_bytes()[: offset + 100])


def remove(tar: Path, offset: int) -> None:
    tar.unlink()


def flip_index(tar: Path, offset: int) -> None:
    flip(tar.with_suffix(".idx"), 200)


def remove_index(tar: Path, offset: int) -> None:
    tar.with_suffix(".idx").unlink()


def no_end(tar: Path, offset: int) -> None:
    data = tar.read_bytes()
    tar.write_bytes(data.rstrip(b"\0").ljust(len(data), b"\1"))


CHECKSUM = "sample 'KEY': the checksum of its .flac differs"
ENDS = "sample 'KEY': the tar ends within its .flac"

DAMAGE: list[tuple[Callable[[Path, int], None], list[str]]] = [
    (flip_payload, ["sha256", CHECKSUM]),
    (flip_header, ["sha256", "at KEY.flac: damaged header (bad checksum) at byte"]),
    (zero, ["sha256", "at KEY.flac: zeros", CHECKSUM]),
    (cut_at_member, ["bytes, but index.json has", "KEY.flac: ends without its end", ENDS]),
    (cut_in_payload, ["but index.json has", "KEY.flac: its", "extend past the end", ENDS]),
    (remove, ["speech-000001.tar: No such file"]),
    (flip_index, ["speech-000001.idx: is damaged"]),
    (remove_index, ["speech-000001.idx: is missing"]),
    (no_end, ["sha256", "damaged header"]),
]


def damaged_copy(
    sound: Path, out: Path, damage: Callable[[Path, int], None]
) -> tuple[ShardSet, str]:
    """(a set whose second shard is damaged at the middle sample, the key of this sample)."""
    shards = open_set(shutil.copytree(sound, out))
    index = read_index(shards.index(shards.shards[1]))
    row = index.count // 2
    damage(shards.tar(shards.shards[1]), index.offsets[2 * row])
    return shards, index.key(row)


@pytest.mark.parametrize("damage, expected", DAMAGE, ids=[d.__name__ for d, _ in DAMAGE])
def test_damage_is_detected(
    damage: Callable[[Path, int], None],
    expected: list[str],
    sound: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, key = damaged_copy(sound, tmp_path / "set", damage)
    assert main(["verify", str(tmp_path / "set"), "-j1"]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    lines = [line for line in lines if not line.startswith(NOTE)]
    assert all(line.startswith("speech-000001: ") for line in lines), lines
    for text in expected:
        text = text.replace("KEY", key)
        assert any(text in line for line in lines), (text, lines)
    assert last.endswith(f"{len(lines)} problem{'s' if len(lines) > 1 else ''}")


@pytest.mark.parametrize("damage", [flip_payload, zero, cut_at_member, cut_in_payload])
def test_training_counts_the_same_samples_by_the_same_kinds(
    damage: Callable[[Path, int], None],
    sound: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shards, _ = damaged_copy(sound, tmp_path / "set", damage)
    reader = Reader(shards, shards.fields)
    bad = {}
    for sample_id in range(shards.samples):
        try:
            reader.read(sample_id)
        except Unusable as error:
            bad[reader.key(sample_id)] = error.kind
    reader.close()
    output = problems(tmp_path / "set", capsys)
    assert "same content" not in output, "of members behind the end of the tar"
    assert set(re.findall("sample '(.*?)': ", output)) == bad.keys() and bad
    kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(bad.values()).most_common())
    assert re.search(rf"^{NOTE}{len(bad)} samples? cannot be used \({kinds}\)$", output, re.M)


def problems(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["verify", str(path), "-j1"]) == 1
    return capsys.readouterr().out


def test_content_is_really_decoded(
    flac: tuple[bytes, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, frames = flac
    other = (SPEECH / "recordings/0_theo_0.flac").read_bytes()[:-40]
    rows = [
        ("good", data, b"{}", frames),
        ("length", data, b"{}", frames + 1),
        ("json", data, b"{", frames),
        ("list", data, b"[]", frames),
        ("cut", other, b"{}", frames),
    ]
    text = problems(build(tmp_path / "set", [rows]), capsys)
    assert f"sample 'length': has length {frames}, but the index has {frames + 1}" in text
    assert "sample 'json'" in text and "sample 'list': json: is not an object" in text
    assert "sample 'cut'" in text and "sample 'good'" not in text


def test_wrong_rate(
    flac: tuple[bytes, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = build(tmp_path / "set", [[("a", flac[0], b"{}", flac[1])]])
    file = folder / INDEX_FILE
    file.write_text(file.read_text().replace('"sample_rate": 8000', '"sample_rate": 16000'))
    assert "flac: has 8000 Hz, but the set has 16000 Hz" in problems(folder, capsys)


def test_keys_used_twice(
    flac: tuple[bytes, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = ("a", flac[0], b"{}", flac[1])
    twice = "sample 'a' has the same key as 'a' in speech-000000"
    text = problems(build(tmp_path / "one", [[row, row]]), capsys)
    assert f"speech-000000: {twice}" in text and "the members of 'a' are not adjacent" in text
    assert f"speech-000001: {twice}" in problems(build(tmp_path / "two", [[row], [row]]), capsys)


def test_equal_content_is_a_note(
    flac: tuple[bytes, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(f"k{i:02d}", flac[0], b'{"n": %d}' % i, flac[1]) for i in range(30)]
    assert main(["verify", str(build(tmp_path / "set", [rows[:2], rows[2:]])), "-j1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "note: speech-000000: sample 'k01' has the same content as 'k00' in speech-000000"
    )
    assert "note: speech-000001: sample 'k02'" in lines[1]
    assert lines[-2] == "note: and 9 more samples with the content of another sample"
    assert lines[-1].endswith("no problems")


def test_members_of_a_sample_that_are_not_adjacent(
    flac: tuple[bytes, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """webdataset would read three incomplete samples."""
    folder = build(tmp_path / "set", [[("a", flac[0], b"{}", flac[1])]])
    tar = folder / "speech-000000.tar"
    with wds.TarWriter(str(tar), mtime=0, encoder=False) as writer:
        writer.write({"__key__": "a", "flac": flac[0]})
        writer.write({"__key__": "b", "flac": flac[0], "json": b"{}"})
        writer.write({"__key__": "a", "json": b"{}"})
    assert "the members of 'a' are not adjacent" in problems(folder, capsys)


def test_index_of_another_shard(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(sound, tmp_path / "set")
    shutil.copy(folder / "speech-000000.idx", folder / "speech-000001.idx")
    text = problems(folder, capsys)
    assert "its index and index.json differ" in text and "the index expects" in text
    assert "more problems" in text, "the list of problems of a shard is limited"


def as_unknown(folder: Path) -> Path:
    """The same set, of a modality that is not installed."""
    file = folder / INDEX_FILE
    about = json.loads(file.read_bytes())
    about.update(modality="radar", unit="pulses")
    for name in ("options", "inputs", "quarantined"):  # sets of other converters may lack these
        del about[name]
    file.write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set whose members hold many samples each."""
    folder = tmp_path_factory.mktemp("packed")
    (folder / "a.txt").write_text("".join(f"line {i} of a text\n" for i in range(300)))
    words = ["--tokenizer", str(samples.path("text") / "tokenizer.model"), "--block", "16", "-j1"]
    assert main(["text", str(folder / "a.txt"), str(folder / "set"), *words]) == 0
    return folder / "set"


@pytest.mark.parametrize("kind", ["sound", "packed"])
def test_a_modality_that_is_not_installed(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """verify prints a note and checks everything but the content; stats describes the set."""
    folder = as_unknown(shutil.copytree(request.getfixturevalue(kind), tmp_path / "set"))
    capsys.readouterr()
    assert main(["verify", str(folder), "-j1"]) == 0
    note, *_, last = capsys.readouterr().out.splitlines()
    assert note.startswith(f"{NOTE}modality 'radar' is not installed: structure and checksums")
    assert last == f"{folder}: no problems"
    assert main(["stats", str(folder)]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines()]
    assert ["modality", "radar"] in rows and "Converted with" not in text
    shards = open_set(folder)
    assert kind == "sound" or ["pulses", f"{shards.length:,}"] in rows
    tar = shards.tar(shards.shards[0])
    flip(tar, read_index(shards.index(shards.shards[0])).offsets[0] + 5)
    assert "the checksum of its ." in problems(folder, capsys)


@pytest.mark.parametrize("command", ["verify", "stats"])
def test_no_set(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "is not a shard set" in error and error.count("\n") == 1


def test_a_member_that_the_index_does_not_list(
    flac: tuple[bytes, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = build(tmp_path / "set", [[(key, flac[0], b"{}", flac[1]) for key in "abc"]])
    index = read_index(folder / "speech-000000.idx")
    numbers = {name: array("I", getattr(index, name)) for name in ("sizes", "checksums", "lengths")}
    offsets = array("q", index.offsets)
    del offsets[2:4], numbers["sizes"][2:4], numbers["checksums"][2:4], numbers["lengths"][1]
    data = index_bytes(index.fields, index.bytes, ["a", "c"], offsets, **numbers)
    (folder / "speech-000000.idx").write_bytes(data)
    assert "b.flac at byte" in (text := problems(folder, capsys))
    assert "is not in the index" in text
