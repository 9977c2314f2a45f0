"""d2v-shards speech: every layout as publicly documented, every format, every option."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset as wds

from d2v_ds.data import audio
from d2v_ds.data.shard_format import open_set
from shards.cli import main
from tests.helpers.corpora import contents, notes, ogg_problem, put, put_tar, quarantine, recording

ALL = ("--max-bad", "100%", "-j1")


def convert(*arguments: object) -> int:
    return main(["speech", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert convert(*arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("d2v-shards: ") and line.count("\n") == 1
    return line


def is_as(found: bytes, source: bytes) -> bool:
    """Whether a FLAC of a set equals a recording."""
    x = audio.decode(source)
    x = audio.resample(x, audio.info(source).rate, 16_000)
    return bool((audio.to_int16(audio.decode(found)) == audio.to_int16(x)).all())


# ------------------------------------------------------------------------------------------ layouts


def test_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, kind in enumerate(("wav", "flac", "mp3", "ogg", "opus")):
        put(tmp_path / f"in/{kind}/a.{kind}", recording(kind, seconds=1, seed=seed))
    assert convert(tmp_path / "in", tmp_path / "out", *ALL) == 0
    assert f"{tmp_path / 'in'}: layout folder" in capsys.readouterr().out
    found = contents(tmp_path / "out")
    assert sorted(found) == ["flac/a", "mp3/a", "ogg/a", "opus/a", "wav/a"]
    for key, members in found.items():
        path = tmp_path / "in" / members["json"]["paths"][0]
        assert path.parent.name == key[:-2] and is_as(members["flac"], path.read_bytes())
    assert main(["verify", str(tmp_path / "out"), "-j1"]) == 0


def test_librispeech(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chapter = tmp_path / "LibriSpeech/dev-clean/84/121123"
    for i in range(3):
        put(chapter / f"84-121123-{i:04d}.flac", recording("flac", seed=i))
    text = "84-121123-0000 GO DO YOU HEAR\n84-121123-0001 BUT IN LESS THAN\n84-121123-0009 LOST\n"
    put(chapter / "84-121123.trans.txt", text)
    put(tmp_path / "LibriSpeech/SPEAKERS.TXT", "; 84 | F | dev-clean")
    out = tmp_path / "out"
    assert convert(tmp_path / "LibriSpeech", out, *ALL) == 0
    assert "layout librispeech" in capsys.readouterr().out
    rows = {key: members["json"] for key, members in contents(out).items()}
    key = "dev-clean/84/121123/84-121123-0000"
    assert rows[key] == {
        "speaker": "84",
        "chapter": "121123",
        "text": "GO DO YOU HEAR",
        "paths": [f"{key}.flac"],
        "duration": 0.3,
    }
    assert "text" not in rows["dev-clean/84/121123/84-121123-0002"]
    lost = {"dev-clean/84/121123/84-121123-0009": "has a transcript but no recording"}
    assert quarantine(out) == lost
    assert convert(tmp_path / "LibriSpeech", tmp_path / "strict") == 2, (
        "a quarter of the inputs is more than --max-bad"
    )


def test_libri_light(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = tmp_path / "small/100/sea_fairies_0812_librivox_64kb_mp3"
    put(book / "01_baum_sea_fairies_64kb.flac", recording("flac"))
    about = {"speaker": "100", "book_meta": {"id": "2697"}, "snr": 8.2, "voice_activity": [[0, 1]]}
    put(book / "01_baum_sea_fairies_64kb.json", json.dumps(about))
    assert convert(tmp_path / "small", tmp_path / "out", *ALL) == 0
    assert "layout librispeech" in capsys.readouterr().out
    ((key, members),) = contents(tmp_path / "out").items()
    assert key == "100/sea_fairies_0812_librivox_64kb_mp3/01_baum_sea_fairies_64kb"
    assert (members["json"]["speaker"], members["json"]["snr"]) == ("100", 8.2)
    assert "book_meta" not in members["json"]


def test_common_voice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = (
        "client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccents\tlocale\tsegment"
    )
    rows = [
        'b64f\tcommon_voice_cy_1.mp3\tMae "hi" yn braf.\t2\t0\ttwenties\t\t\tcy\t',
        "c0de\tcommon_voice_cy_2.mp3\tBore da\t2\t1\t\t\t\tcy\t",
        "c0de\tcommon_voice_cy_3.mp3\tBle?\t2\t1\t\t\t\tcy\t",
        "c0de\t\tNos da\t2\t1\t\t\t\tcy\t",
    ]
    corpus = tmp_path / "cv/cy"
    put(corpus / "validated.tsv", "\n".join([header, *rows]) + "\n")
    for i in (1, 2):
        put(corpus / f"clips/common_voice_cy_{i}.mp3", recording("mp3", rate=32_000, seed=i))
    out = tmp_path / "out"
    assert convert(corpus, out, *ALL) == 0
    assert "layout commonvoice" in capsys.readouterr().out
    found = contents(out)
    assert sorted(found) == ["common_voice_cy_1", "common_voice_cy_2"]
    about = found["common_voice_cy_1"]["json"]
    assert about.pop("duration") > 0.2
    assert about == {
        "age": "twenties",
        "locale": "cy",
        "text": 'Mae "hi" yn braf.',
        "speaker": "b64f",
        "paths": ["clips/common_voice_cy_1.mp3"],
    }
    left_out = quarantine(out)
    assert left_out["validated.tsv, line 5"] == "names no clip"
    assert "No such file" in left_out["clips/common_voice_cy_3.mp3"] and len(left_out) == 2
    put(corpus / "train.tsv", "\n".join([header, rows[1]]) + "\n")
    assert convert(corpus / "train.tsv", tmp_path / "train", *ALL) == 0
    assert list(contents(tmp_path / "train")) == ["common_voice_cy_2"]


def test_fairseq(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        put(tmp_path / f"data/19/{i}.flac", recording("flac", seed=i))
    put(tmp_path / "m/train.tsv", f"{tmp_path}/data\n19/0.flac\t4800\n19/1.flac\t4800\n19/2.flac\n")
    put(tmp_path / "m/train.ltr", "H E L L O | Y O U |\nG O |\nN O |\n")
    assert convert(tmp_path / "m/train.tsv", tmp_path / "ltr", *ALL) == 0
    assert "layout fairseq" in capsys.readouterr().out
    rows = {key: members["json"] for key, members in contents(tmp_path / "ltr").items()}
    assert rows["19/0"]["letters"] == "H E L L O | Y O U |" and rows["19/0"]["text"] == "HELLO YOU"
    put(tmp_path / "m/train.wrd", "Hello you\nGo\nNo\n")
    assert convert(tmp_path / "m/train.tsv", tmp_path / "wrd", *ALL) == 0
    assert contents(tmp_path / "wrd")["19/0"]["json"]["text"] == "Hello you"
    put(tmp_path / "m/train.wrd", "Hello you\nGo\n")
    line = refused(capsys, tmp_path / "m/train.tsv", tmp_path / "no")
    assert "train.tsv, train.wrd, train.ltr must have one line per recording" in line
    put(tmp_path / "m/bad.tsv", f"{tmp_path}/data\n19/0.flac\t4800\n19/1.flac\tmany\n\n")
    assert convert(tmp_path / "m/bad.tsv", tmp_path / "bad", *ALL) == 0
    assert set(quarantine(tmp_path / "bad")) == {"bad.tsv, line 3", "bad.tsv, line 4"}
    put(tmp_path / "m/none.tsv", f"{tmp_path}/data\n")
    assert "none.tsv: lists no recordings" in refused(capsys, tmp_path / "m/none.tsv", "x")
    put(tmp_path / "m/moved.tsv", "/nowhere/at/all\n19/0.flac\t4800\n")
    assert "there is no folder '/nowhere/at/all'" in refused(capsys, tmp_path / "m/moved.tsv", "x")


def test_jsonl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = recording("wav", seconds=3)
    put(tmp_path / "long.wav", whole)
    rows = [
        {"audio_filepath": "long.wav", "duration": 3.0, "text": "all of it", "lang": "cy", "n": 1},
        {"audio_filepath": "long.wav", "offset": 0.5, "duration": 0.75, "text": "a part"},
        {"path": "long.wav", "start": 2, "end": 3},
        {"path": "long.wav", "start": 2, "end": 4},
        {"path": "long.wav", "start": 5, "end": 6},
        {"path": "long.wav", "start": 3},
        {"path": "long.wav", "start": "two", "end": 3},
        {"text": "nothing"},
        [1],
    ]
    lines = [json.dumps(row) for row in rows] + ["{", "", "\xff"]
    put(tmp_path / "train.jsonl", "\n".join(lines).encode("latin-1"))
    out = tmp_path / "out"
    assert convert(tmp_path / "train.jsonl", out, *ALL) == 0
    assert "layout jsonl" in capsys.readouterr().out
    found = contents(out)
    assert found["long"]["json"] == {
        "text": "all of it",
        "lang": "cy",
        "n": 1,
        "paths": ["long.wav"],
        "duration": 3.0,
    }
    x = audio.to_int16(audio.decode(whole))
    for key, start, stop in [
        ("long-00000500-00001250", 0.5, 1.25),
        ("long-00002000-00003000", 2, 3),
    ]:
        part = audio.to_int16(audio.decode(found[key]["flac"]))
        assert (part == x[int(start * 16_000) : int(stop * 16_000)]).all()
    assert found["long-00000500-00001250"]["json"]["paths"] == ["long.wav, 0.5 to 1.25"]
    left_out = quarantine(out)
    assert len(found) == 3 and len(left_out) == 8
    assert "its segment ends later" in left_out["long.wav, 2 to 4"]
    assert "but its segment is outside of it" in left_out["long.wav, 5 to 6"]
    assert "ends at 3 s, before it starts at 3 s" in left_out["train.jsonl, line 6"]
    assert "must be in seconds" in left_out["train.jsonl, line 7"]
    assert "exactly one of path and audio_filepath" in left_out["train.jsonl, line 8"]
    assert "not a JSON object" in left_out["train.jsonl, line 9"]
    assert all("is not JSON" in left_out[f"train.jsonl, line {n}"] for n in (10, 12))


def test_webdataset_tars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sounds = [recording(kind, seed=i) for i, kind in enumerate(("wav", "flac", "ogg"))]
    (tmp_path / "in").mkdir()
    with wds.ShardWriter(f"{tmp_path}/in/s-%d.tar", maxcount=2, encoder=False, verbose=0) as writer:
        writer.write({"__key__": "a/1", "wav": sounds[0], "txt": b"eins", "cls": b"7"})
        writer.write({"__key__": "a/2", "flac": sounds[1], "json": b'{"speaker": "theo"}'})
        writer.write({"__key__": "a/3", "ogg": sounds[2], "json": b"[]"})
        writer.write({"__key__": "a/4", "txt": b"no sound"})
    out = tmp_path / "out"
    assert convert(tmp_path / "in", out, *ALL) == 0
    assert "layout webdataset" in capsys.readouterr().out
    found = contents(out)
    for key, sound in zip(("a/1", "a/2", "a/3"), sounds, strict=True):
        assert is_as(found[key]["flac"], sound)
    assert (found["a/1"]["json"]["text"], found["a/1"]["json"]["label"]) == ("eins", "7")
    assert found["a/2"]["json"]["speaker"] == "theo"
    assert quarantine(out) == {"s-1.tar, a/4": "has no recording, only txt"}
    assert notes(out) == {"s-1.tar, a/3.json": "no metadata"}
    assert convert(tmp_path / "in/s-0.tar", tmp_path / "one", *ALL) == 0
    assert sorted(contents(tmp_path / "one")) == ["a/1", "a/2"]


def test_a_damaged_tar_loses_only_what_is_damaged(tmp_path: Path) -> None:
    tar = put_tar(tmp_path / "in.tar", [(f"{i}.wav", recording(seed=i)) for i in range(6)])
    data = bytearray(tar.read_bytes())
    at = data.index(b"2.wav")
    data[at : at + 512] = bytes(512)
    tar.write_bytes(data[: data.index(b"5.wav") + 2000])
    assert convert(tar, tmp_path / "out", *ALL) == 0
    assert sorted(contents(tmp_path / "out")) == ["0", "1", "3", "4"]
    lines = (tmp_path / "out/quarantine.jsonl").read_text().splitlines()
    assert len(lines) == 2 and f"at byte {at}; only what is intact is used" in lines[0]
    assert "5.wav: its 9644 bytes extend past the end" in lines[1]


# ------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize("kind, rate", [("wav", 16_000), ("flac", 44_100), ("ogg", 8000)])
def test_parts_of_long_recordings_equal_slices_of_the_whole(
    kind: str, rate: int, tmp_path: Path
) -> None:
    whole = recording(kind, seconds=7.003, rate=rate)
    put(tmp_path / f"in/a.{kind}", whole)
    put(tmp_path / "in/b.wav", recording(seconds=1.5))
    out = tmp_path / "out"
    assert convert(tmp_path / "in", out, "--max-seconds", "2", *ALL) == 0
    found = contents(out)
    assert sorted(found) == ["a@0000", "a@0001", "a@0002", "a@0003", "b"]
    parts = [audio.to_int16(audio.decode(found[f"a@{i:04d}"]["flac"])) for i in range(4)]
    expected = audio.to_int16(audio.resample(audio.decode(whole), rate, 16_000))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1 and len(parts[0]) <= 32_000
    assert (np.concatenate(parts) == expected).all()
    starts = [found[f"a@{i:04d}"]["json"]["start"] for i in range(4)]
    assert starts == [round(sum(map(len, parts[:i])) / 16_000, 4) for i in range(4)]
    assert "start" not in found["b"]["json"]
    assert main(["verify", str(out), "-j1"]) == 0


def test_parts_carry_no_text_of_the_whole(tmp_path: Path) -> None:
    put(tmp_path / "a.wav", recording(seconds=3))
    put(tmp_path / "list.tsv", "path\ttext\tspeaker\na.wav\tall of it\ttheo\n")
    assert convert(tmp_path / "list.tsv", tmp_path / "out", "--max-seconds", "2", *ALL) == 0
    for members in contents(tmp_path / "out").values():
        assert members["json"]["speaker"] == "theo" and "text" not in members["json"]


def test_channels(tmp_path: Path) -> None:
    stereo, mono = recording(channels=2), recording(seed=1)
    put(tmp_path / "in/stereo.wav", stereo)
    put(tmp_path / "in/mono.wav", mono)
    x = soundfile.read(io.BytesIO(stereo), dtype="int16")[0]
    for name, expected in [("left", x[:, 0]), ("right", x[:, 1]), ("1", x[:, 1])]:
        out = tmp_path / name
        assert convert(tmp_path / "in", out, "--channel", name, *ALL) == 0
        found = contents(out)
        assert (audio.to_int16(audio.decode(found["stereo"]["flac"])) == expected).all()
        if name == "left":
            assert is_as(found["mono"]["flac"], mono)
        else:
            assert "has no channel 1: it has 1" in quarantine(out)["mono.wav"]
    assert convert(tmp_path / "in", tmp_path / "mix", *ALL) == 0
    mixed = audio.decode(contents(tmp_path / "mix")["stereo"]["flac"])
    assert np.abs(mixed - x.mean(axis=1) / 32768).max() <= 0.5 / 32768 + 1e-7


def test_min_seconds_does_not_count_as_damage(tmp_path: Path) -> None:
    for i in range(4):
        put(tmp_path / f"in/{i}.wav", recording(seconds=0.5 + i, seed=i))
    out = tmp_path / "out"
    assert convert(tmp_path / "in", out, "--min-seconds", "2", "-j1") == 0
    assert sorted(contents(out)) == ["2", "3"]
    reasons = {f"{i}.wav": f"is {i + 0.5} s long, below --min-seconds 2" for i in (0, 1)}
    assert quarantine(out) == reasons
    assert json.loads((out / "index.json").read_text())["quarantined"] == 2


def test_keep(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    x = np.random.default_rng(0).uniform(-0.5, 0.5, 4000)
    soundfile.write(buffer, x, 16_000, format="FLAC", subtype="PCM_24")
    files = {
        "deep.flac": buffer.getvalue(),
        "same.wav": recording(),
        "slow.wav": recording(rate=8000),
        "two.wav": recording(channels=2),
        "short.mp3": recording("mp3"),
    }
    for name, data in files.items():
        put(tmp_path / "in" / name, data)
    assert convert(tmp_path / "in", tmp_path / "out", "--encode", "keep", *ALL) == 0
    found = contents(tmp_path / "out")
    assert found["deep"]["flac"] == files["deep.flac"] and "wav" not in found["deep"]
    assert found["same"]["wav"] == files["same.wav"] and "flac" not in found["same"]
    for key in ("slow", "two", "short"):
        info = audio.info(found[key]["flac"])
        assert (info.rate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
        assert "wav" not in found[key]
    assert open_set(tmp_path / "out").fields == ("flac", "json", "wav")
    assert main(["verify", str(tmp_path / "out"), "-j1"]) == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--channel", "middle"], "middle: expected mix, left, right or a number"),
        (["--layout", "kaldi"], "invalid choice: 'kaldi'"),
        (["--max-seconds", "0"], "0: expected a number from 1"),
        (["--encode", "mp3"], "invalid choice: 'mp3'"),
    ],
)
def test_bad_options(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        convert("in", "out", *arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["librispeech", "folder", "commonvoice", "fairseq", "jsonl"])
def test_a_source_without_data_of_the_layout(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    line = refused(capsys, tmp_path / "in", tmp_path / "out", "--layout", layout)
    assert str(tmp_path / "in") in line
    line = refused(capsys, tmp_path / "nowhere", tmp_path / "out", "--layout", layout)
    assert str(tmp_path / "nowhere") in line and not (tmp_path / "out").exists()


def test_joining_and_dividing_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "in", "out", "--join", "speaker", "--max-seconds", "9")
    assert "--join and --max-seconds cannot be combined" in line


# ---------------------------------------------------------------------------------- damaged formats


@pytest.mark.parametrize("kind", ["ogg", "opus"])
def test_ogg_is_whole_or_left_out(kind: str) -> None:
    """libsndfile decodes all of these without an error."""
    data = recording(kind, seconds=5)
    assert ogg_problem(data) == ""
    pages = [i for i in range(len(data)) if data[i : i + 4] == b"OggS"]
    assert len(pages) > 3
    for size in (pages[-1], pages[-1] + 10, len(data) - 1, pages[2]):
        assert "is truncated" in ogg_problem(data[:size])
    assert "page 2 is missing" in ogg_problem(data[: pages[2]] + data[pages[3] :])
    flipped = bytearray(data)
    flipped[pages[2] + 200] ^= 1
    assert f"the checksum of its Ogg page at byte {pages[2]} is wrong" in ogg_problem(
        bytes(flipped)
    )
    assert f"no Ogg page at byte {len(data)}" in ogg_problem(data + b"TAG" + data)
    assert ogg_problem(data + data) == "", "chained streams are allowed"


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "ogg", "opus"])
def test_truncated_recordings_are_named(kind: str, tmp_path: Path) -> None:
    data = recording(kind, seconds=4)
    for i, share in enumerate((0.1, 0.5, 0.9)):
        put(tmp_path / f"in/{i}.{kind}", data[: math.floor(len(data) * share)])
    put(tmp_path / f"in/whole.{kind}", data)
    assert convert(tmp_path / "in", tmp_path / "out", *ALL) == 0
    assert list(contents(tmp_path / "out")) == ["whole"]
    assert set(quarantine(tmp_path / "out")) == {f"{i}.{kind}" for i in range(3)}
