"""d2v-shards speech: recordings in every format and state, used, altered or left out by name."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from d2v_ds.data import audio, audio_files
from d2v_ds.data.checks import Finding
from d2v_ds.modalities.speech import Speech, SpeechConfig
from shards.cli import main
from shards.family import Converted, Input, Sample
from shards.speech.converter import SpeechConverter
from shards.speech.folder import Folder
from tests.helpers.corpora import contents, found, notes, put, recording

ALL = ("--max-bad", "100%", "-j1")
RATE = 16_000


def convert(*arguments: object) -> int:
    return main(["speech", *map(str, arguments), *ALL])


def encoded(x: Any, kind: str = "WAV", subtype: str = "PCM_16", rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, x, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def tone(seconds: float = 1.0, peak: float = 0.5, rate: int = RATE) -> NDArray[np.float64]:
    """It reaches its peak exactly."""
    t = np.arange(int(seconds * rate)) / rate
    x = np.sin(2 * np.pi * 440 * t) * (1 + 0.3 * np.sin(7 * t))
    return x * (peak / abs(x).max())


def samples_of(out: Path) -> dict[str, NDArray[np.float32]]:
    return {key: audio.decode(members["flac"]) for key, members in contents(out).items()}


def left_out(out: Path) -> dict[str, str]:
    """{name: kind}"""
    return {name: kind for name, (_, kind) in found(out, "quarantine.jsonl").items()}


def converted(
    folder: Path, inputs: list[Input], **options: Any
) -> tuple[list[Converted], list[Finding]]:
    """(samples, findings) of inputs of one file each."""
    samples = [Sample(f"{i}", (one,), {}, 0) for i, one in enumerate(inputs)]
    made = list(SpeechConverter(Folder.open(folder, None), RATE, **options).convert(samples))
    return [one for one in made if one.members], [f for one in made for f in one.findings]


def pcm_of(one: Converted) -> NDArray[Any]:
    assert one.members[0]
    return audio.Recording(one.members[0]).pcm()


# -------------------------------------------------------------------------------------------- types


def test_every_extension_is_read_in_either_case(tmp_path: Path) -> None:
    x = tone()
    kinds = {
        "wav": "WAV", "wave": "WAV", "aiff": "AIFF", "aif": "AIFF", "aifc": "AIFF", "au": "AU",
        "snd": "AU", "caf": "CAF", "w64": "W64", "rf64": "RF64", "sph": "NIST", "nist": "NIST",
        "voc": "VOC", "flac": "FLAC", "avr": "AVR", "paf": "PAF", "pvf": "PVF", "svx": "SVX",
        "sf": "IRCAM", "ircam": "IRCAM", "sds": "SDS",
    }  # fmt: skip
    files = {extension: encoded(x, kind) for extension, kind in kinds.items()}
    files |= {"oga": encoded(x, "OGG", "VORBIS"), "mp3": encoded(x, "MP3", "MPEG_LAYER_III")}
    for extension, data in files.items():
        put(tmp_path / f"in/a-{extension}.{extension}", data)
        put(tmp_path / f"in/b-{extension}.{extension.upper()}", data)
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert not left_out(tmp_path / "out") and not notes(tmp_path / "out")
    made = samples_of(tmp_path / "out")
    assert len(made) == 2 * len(files)
    for key, y in made.items():
        assert len(y) == RATE, key
        assert np.corrcoef(x, y)[0, 1] > 0.99, key


def test_content_counts_not_the_extension(tmp_path: Path) -> None:
    for name, kind, subtype in (
        ("a.wav", "FLAC", "PCM_16"),
        ("b.flac", "WAV", "PCM_16"),
        ("c.mp3", "OGG", "OPUS"),
        ("d.wav", "MP3", "MPEG_LAYER_III"),
        ("e.ogg", "NIST", "PCM_16"),
    ):
        put(tmp_path / "in" / name, encoded(tone(), kind, subtype))
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert sorted(contents(tmp_path / "out")) == list("abcde")


def test_types_that_need_ffmpeg_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "in/a.m4a", b"\0\0\0\x20ftypM4A " + bytes(90))
    put(tmp_path / "in/b.WEBM", b"\x1a\x45\xdf\xa3")
    assert main(["speech", str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    assert "1 .m4a, 1 .webm" in (said := capsys.readouterr().err)
    assert "convert it first: ffmpeg -i FILE FILE.flac" in said
    put(tmp_path / "in/c.wav", recording())
    put(tmp_path / "in/d.txt", "hello")
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    told = found(tmp_path / "out", "notes.jsonl")
    assert {name: kind for name, (_, kind) in told.items()} == dict.fromkeys(
        ("a.m4a", "b.WEBM", "d.txt"), "type"
    )
    assert "ffmpeg" in told["a.m4a"][0] and "ffmpeg" in told["b.WEBM"][0]
    assert "ffmpeg" not in told["d.txt"][0]
    put(tmp_path / "list.tsv", "path\nin/a.m4a\nin/c.wav\n")
    assert convert(tmp_path / "list.tsv", tmp_path / "listed") == 0
    ((name, (reason, kind)),) = found(tmp_path / "listed", "quarantine.jsonl").items()
    assert (name, kind) == ("in/a.m4a", "format") and "ffmpeg" in reason


# ------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "CAF", "W64", "RF64", "AU"])
@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_floats_beyond_full_scale(kind: str, subtype: str, tmp_path: Path) -> None:
    x = tone()
    files = {
        "sound": x,
        "full": tone(peak=1.0),
        "amplified": 3.2 * x,
        "int16": np.rint(32767 * x),
        "int24": np.rint(2.0**23 * x),
        "int32": np.rint(2.0**31 * x),
        "resampled16": 30_000.4 * x,
    }
    bad = {"between": 100 * x, "whole": np.rint(90 * x), "huge": 1e30 * x, "nan": x * np.nan}
    for name, y in (files | bad).items():
        put(tmp_path / f"in/{name}.wav", encoded(y, kind, subtype))
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    expected = dict.fromkeys(("between.wav", "huge.wav", "whole.wav"), "range")
    assert left_out(tmp_path / "out") == expected | {"nan.wav": "not finite"}
    made = samples_of(tmp_path / "out")
    for name, y in files.items():
        assert np.corrcoef(made[name], x)[0, 1] > 0.9999, name
        peak = {"full": 1.0, "amplified": 1.0}.get(name, abs(y).max() if name == "sound" else 0.5)
        assert abs(made[name]).max() == pytest.approx(peak, rel=0.1), name
    altered = {f"{name}.wav" for name in files} - {"sound.wav", "full.wav"}
    assert notes(tmp_path / "out") == dict.fromkeys(altered, "scaled")
    reasons = {name: reason for name, (reason, _) in found(tmp_path / "out", "notes.jsonl").items()}
    assert reasons["amplified.wav"] == "peaks at 1.6; divided by it"
    assert "16-bit integers" in reasons["int16.wav"] and "32768" in reasons["int16.wav"]


def test_parts_of_a_float_file_have_one_scale(tmp_path: Path) -> None:
    x = np.concatenate([0.1 * tone(2), 1.6 * tone(2, peak=1.0)])
    put(tmp_path / "a.wav", encoded(x, "WAV", "FLOAT"))
    made, findings = converted(tmp_path, [Input("a.wav")], max_seconds=2.0)
    np.testing.assert_allclose(
        np.concatenate([pcm_of(one) for one in made]), x / 1.6 * 32768, atol=1.01
    )
    assert [f.kind for f in findings] == ["scaled"]
    made, findings = converted(tmp_path, [Input("a.wav", None, (0.0, 1.0))])
    np.testing.assert_allclose(pcm_of(made[0]), x[:RATE] / 1.6 * 32768, atol=0.51)


def test_altered_files_are_never_kept_as_they_are(tmp_path: Path) -> None:
    whole = encoded(tone(), "FLAC")
    files = {
        "loud.wav": encoded(3 * tone(), "WAV", "FLOAT"),
        "joined.flac": whole + whole,
        "streamed.flac": whole[:21] + bytes([whole[21] & 0xF0]) + bytes(4) + whole[26:],
        "sound.flac": whole,
    }
    for name, data in files.items():
        put(tmp_path / name, data)
    made, _ = converted(tmp_path, [Input(name) for name in files], keep=True)
    for one, (name, data) in zip(made, files.items(), strict=True):
        assert (data in one.members) == (name == "sound.flac"), name
        assert one.members[0] and soundfile.info(io.BytesIO(one.members[0])).frames == one.length


@pytest.mark.parametrize("subtype, kind", [("MPEG_LAYER_III", "MP3"), ("VORBIS", "OGG")])
def test_lossy_codecs_overshoot(subtype: str, kind: str, tmp_path: Path) -> None:
    """A few clipped samples are usual; a recording that clips throughout is scaled."""
    clicks = 0.6 * tone(2)
    clicks[::4000] = 1.0
    loud = np.sign(tone(2)) * 0.98
    put(tmp_path / "few.x", encoded(clicks, kind, subtype))
    put(tmp_path / "loud.x", encoded(loud, kind, subtype))
    made, findings = converted(tmp_path, [Input("few.x"), Input("loud.x")])
    assert abs(audio.decode(tmp_path / "loud.x")).max() > 1.05
    assert [(f.name, f.kind) for f in findings] == [("loud.x", "scaled")]
    assert abs(pcm_of(made[1]).astype(int)).max() >= 32767
    y = audio.to_int16(audio.decode(tmp_path / "few.x"))
    assert (pcm_of(made[0]) == y).all()


@pytest.mark.parametrize(
    "kind, subtype",
    [
        *(("WAV", "PCM_16"), ("WAV", "PCM_U8"), ("WAV", "ULAW"), ("AIFF", "ALAW")),
        *(("FLAC", "PCM_24"), ("CAF", "FLOAT"), ("AU", "DOUBLE"), ("W64", "PCM_16")),
    ],
)
def test_clipped_recordings_are_told(kind: str, subtype: str, tmp_path: Path) -> None:
    """Noise with the amplitudes of speech, at several levels."""
    speech = np.random.default_rng(0).laplace(0, 0.1, 8 * RATE)
    speech = np.convolve(speech, np.ones(20) / 5, "same")  # low frequencies, as in vowels
    speech /= np.abs(speech).max()
    files = {
        "loud": (speech, False),
        "a little": (1.3 * speech, False),
        "clipped": (4 * speech, True),
        "quiet": (0.5 * np.clip(4 * speech, -1, 1), False),  # below full scale: not known
        "one side": (np.stack([0.5 * speech, 4 * speech], 1), True),
        "upwards": (np.maximum(4 * speech, -0.8), True),
    }
    for name, (x, _) in files.items():
        put(tmp_path / f"{name}.x", encoded(np.clip(x, -1, 1), kind, subtype))
    _, findings = converted(tmp_path, [Input(f"{name}.x") for name in files])
    assert [(f.name, f.kind) for f in findings] == [
        (f"{name}.x", "clipped") for name, (_, told) in files.items() if told
    ]
    _, findings = converted(tmp_path, [Input("one side.x", channel=i) for i in (0, 1)])
    assert [f.name for f in findings] == ["one side.x, channel 1"]


# ----------------------------------------------------------------------------------------- channels


@pytest.mark.parametrize("kind, subtype", [("WAV", "PCM_16"), ("FLAC", "PCM_24"), ("CAF", "FLOAT")])
def test_channels_that_cancel_each_other(kind: str, subtype: str, tmp_path: Path) -> None:
    x, noise = tone(), np.random.default_rng(0).normal(0, 0.001, RATE)
    other = np.random.default_rng(1).normal(0, 0.1, RATE)
    files = {
        "antiphase": ([x, -x], 0),
        "nearly": ([x, -1.1 * x + noise], 1),
        "four": ([x, -x, 0.5 * x, -0.5 * x], 0),
        "same": ([x, x], None),
        "unrelated": ([x, other], None),
        "one side": ([x, 0 * x], None),
        "one of eight": ([x, *[0 * x] * 7], None),
    }
    for name, (channels, _) in files.items():
        put(tmp_path / f"{name}.x", encoded(np.stack(channels, 1), kind, subtype))
    made, findings = converted(tmp_path, [Input(f"{name}.x") for name in files])
    assert {f.name: f.kind for f in findings} == {
        f"{name}.x": "one channel" for name, (_, used) in files.items() if used is not None
    }
    for one, (channels, used) in zip(made, files.values(), strict=True):
        expected = np.mean(channels, axis=0) if used is None else channels[used]
        np.testing.assert_allclose(pcm_of(one) / 32768, expected, atol=5e-5)
    named, findings = converted(tmp_path, [Input("antiphase.x", channel=1)])
    np.testing.assert_allclose(pcm_of(named[0]) / 32768, -x, atol=4e-5)
    assert not findings


def test_the_channel_of_the_corpus_comes_first(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(-9000, 9000, (RATE, 2)).astype(np.int16)
    put(tmp_path / "call.wav", encoded(x))
    inputs = [Input("call.wav", channel=0), Input("call.wav", channel=1), Input("call.wav")]
    inputs += [Input("call.wav", None, (0.25, 0.5), 0), Input("call.wav", channel=2)]
    made, findings = converted(tmp_path, inputs, channel=1)
    expected = [x[:, 0], x[:, 1], x[:, 1], x[4000:8000, 0]]
    for one, samples in zip(made, expected, strict=True):
        assert (pcm_of(one) == samples).all()
    assert [f.kind for f in findings] == ["channel"]


def test_stated_durations(tmp_path: Path) -> None:
    put(tmp_path / "a.wav", encoded(tone(30)))
    stated = [30.0, 30.4, 29.5, 30.6, 29.0, 9.0, 40.0]
    made, findings = converted(tmp_path, [Input("a.wav", seconds=s) for s in stated])
    assert len(made) == 6 and all(one.length == 30 * RATE for one in made)
    assert [(f.kind, f.reason) for f in findings] == [
        ("duration", "the manifest states 29 s; all 30 s are used"),
        ("duration", "the manifest states 9 s; all 30 s are used"),
        ("length", "is 30 s long, but the manifest states 40 s"),
    ]


# ------------------------------------------------------------------------------------------ silence


def silent_files() -> dict[str, bytes]:
    """Recordings around the limit of silence: names with `silent` are."""
    rng, zeros = np.random.default_rng(0), np.zeros(3 * RATE, np.int16)
    click, dither, speck = zeros.copy(), rng.integers(-1, 2, 3 * RATE), zeros.copy()
    click[7000], speck[7000] = 300, 7
    x = tone(3)
    return {
        "silent zeros": encoded(zeros),
        "silent offset": encoded(zeros + 500),
        "silent dither": encoded(dither.astype(np.int16), "FLAC"),
        "silent speck": encoded(speck),
        "silent flac 24": encoded(rng.uniform(-9e-5, 9e-5, 3 * RATE), "FLAC", "PCM_24"),
        "silent stereo": encoded(np.stack([zeros, zeros], 1)),
        "click": encoded(click),
        "quiet": encoded(rng.integers(-4, 5, 3 * RATE).astype(np.int16)),
        "antiphase": encoded(np.stack([x, -x], 1)),
        "speech": encoded(x),
    }


def test_conversion_verify_and_training_agree_on_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    speech = Speech(SpeechConfig(min_seconds=1.0, crop_seconds=2.0))
    for name, data in silent_files().items():
        put(tmp_path / f"in/{name}.wav", data)
        wanted = name.startswith("silent")
        try:
            speech.decode({"wav": data}, np.random.default_rng(0))
            assert not wanted, name
        except ValueError as error:
            assert wanted and str(error) == "is silent", name
        try:
            length = Speech.check_sample({"wav": data}, {"sample_rate": RATE})
            assert not wanted and length == 3 * RATE
        except ValueError as error:
            assert wanted and str(error) == "wav: is silent", name
    assert convert(tmp_path / "in", tmp_path / "out", "--encode", "keep") == 0
    expected = {f"{name}.wav": "silent" for name in silent_files() if name.startswith("silent")}
    assert left_out(tmp_path / "out") == expected
    assert main(["verify", str(tmp_path / "out"), "-j1"]) == 0, capsys.readouterr().out


def test_silent_parts_are_named(tmp_path: Path) -> None:
    zeros = np.zeros(4 * RATE)
    put(tmp_path / "in/a.wav", encoded(np.concatenate([tone(2), zeros, tone(2)])))
    put(tmp_path / "in/b.wav", encoded(np.zeros(8 * RATE)))
    assert convert(tmp_path / "in", tmp_path / "out", "--max-seconds", "2") == 0
    assert sorted(contents(tmp_path / "out")) == ["a@0000", "a@0003"]
    assert left_out(tmp_path / "out") == dict.fromkeys(
        ("a.wav, 2 to 4", "a.wav, 4 to 6", "b.wav"), "silent"
    )
    about = json.loads((tmp_path / "out/index.json").read_text())
    assert about["inputs"] == 5, "the parts of the one, and the other"
    assert main(["verify", str(tmp_path / "out"), "-j1"]) == 0


def test_a_silent_crop_of_a_long_recording_is_drawn_again() -> None:
    """Training rejects a recording only if all of it is silent."""
    speech = Speech(SpeechConfig(min_seconds=1.0, crop_seconds=2.0))
    x = np.zeros(60 * RATE)
    data = encoded(x)
    with pytest.raises(ValueError, match="is silent"):
        speech.decode({"wav": data}, np.random.default_rng(0))
    x[41 * RATE : 42 * RATE] = tone(1)
    for kind in ("wav", "flac"):
        data = encoded(x, kind.upper())
        for seed in range(20):
            crop = speech.decode({kind: data}, np.random.default_rng(seed))
            assert len(crop) == 2 * RATE and crop.std() > 0.9, seed


# ------------------------------------------------------------------------------------- rates, costs


def with_rate(data: bytes, rate: int) -> bytes:
    return data[:24] + rate.to_bytes(4, "little") + data[28:]


def test_rates(tmp_path: Path) -> None:
    data = encoded(tone())
    for rate in (1, 100, 3999, 4000, 11_127, 22_254, 384_000, 384_001, 4_000_000_000):
        put(tmp_path / f"{rate}.wav", with_rate(data, rate))
    good = ["4000.wav", "11127.wav", "22254.wav", "384000.wav"]
    bad = ["1.wav", "100.wav", "3999.wav", "384001.wav", "4000000000.wav"]
    made, findings = converted(tmp_path, [Input(name) for name in good + bad])
    assert [one.length for one in made] == [-(-RATE * RATE // int(name[:-4])) for name in good]
    assert {f.name for f in findings} == set(bad)
    assert {f.kind for f in findings} <= {"rate", "format"}
    assert findings[0].reason == "has 1 Hz, but speech has 4000 to 384000 Hz"


def test_parts_at_an_odd_rate_equal_slices_of_the_whole(tmp_path: Path) -> None:
    put(tmp_path / "a.wav", encoded(tone(5, rate=22_254), rate=22_254))
    (whole,), _ = converted(tmp_path, [Input("a.wav")])
    parts, _ = converted(tmp_path, [Input("a.wav")], max_seconds=1.0)
    assert len(parts) == 5
    assert (np.concatenate([pcm_of(one) for one in parts]) == pcm_of(whole)).all()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of frames that libsndfile decodes."""
    numbers: list[int] = []
    original = audio_files.Stream._next

    def counted(self: audio_files.Stream, frames: int) -> NDArray[Any]:
        result = original(self, frames)
        numbers.append(len(result))
        return result

    monkeypatch.setattr(audio_files.Stream, "_next", counted)
    return numbers


@pytest.mark.parametrize("kind", ["mp3", "ogg", "opus", "flac"])
def test_long_recordings_are_decoded_once(kind: str, tmp_path: Path, decoded: list[int]) -> None:
    put(tmp_path / f"a.{kind}", recording(kind, seconds=40))
    made, _ = converted(tmp_path, [Input(f"a.{kind}")], max_seconds=1.0)
    assert len(made) == 40 and sum(decoded) == 40 * RATE
    assert max(decoded) <= 40 * RATE // 2 or kind == "flac"


@pytest.mark.parametrize("kind", ["wav", "mp3", "ogg", "flac"])
def test_segments_of_a_file_read_it_once(
    kind: str, tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = recording(kind, seconds=30)
    put(tmp_path / f"a.{kind}", data)
    put(tmp_path / "b.wav", recording(seed=1))
    opened: list[object] = []
    original = audio.Recording.__init__

    def counted(self: audio.Recording, source: bytes | Path, **options: bool) -> None:
        opened.append(source)
        original(self, source, **options)

    whole = audio.Recording(data).pcm()
    decoded.clear()
    monkeypatch.setattr(audio.Recording, "__init__", counted)
    starts = [0.0, 0.5, 3.0, 3.25, 11.0, 20.0, 28.0]
    parts = [Input(f"a.{kind}", None, (start, start + 1)) for start in starts]
    outside = Input(f"a.{kind}", None, (31.0, 32.0))
    made, findings = converted(tmp_path, [*parts, outside, Input("b.wav")])
    assert len(opened) == 2 and opened[0] == tmp_path / f"a.{kind}"
    assert sum(decoded) <= (30 if kind in ("mp3", "ogg") else len(parts)) * RATE
    assert [f.kind for f in findings] == ["segment"]
    for one, start in zip(made, starts, strict=False):
        piece = whole[int(start * RATE) :][:RATE]
        expected = piece if piece.dtype == np.int16 else audio.to_int16(piece)
        assert (pcm_of(one) == expected).all(), start


def test_segments_of_unusable_files_are_left_out_by_name(tmp_path: Path) -> None:
    put(tmp_path / "cut.wav", recording()[:5000])
    put(tmp_path / "empty.wav", b"")
    put(tmp_path / "good.wav", recording(seconds=2))
    part = (0.0, 0.1)
    inputs = [Input(f"{name}.wav", None, part) for name in ("good", "cut", "empty", "none")]
    made, findings = converted(tmp_path, [*inputs, Input("empty.wav"), inputs[0]])
    assert len(made) == 2 and [f.kind for f in findings] == [
        "truncated", "empty", "unreadable", "empty",
    ]  # fmt: skip
    assert findings[0].name == "cut.wav, 0 to 0.1"


def test_a_recording_that_is_too_long_to_decode_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real limit, the file would have more than 4 GB."""
    put(tmp_path / "in/a.flac", recording("flac", seconds=2, channels=2))
    put(tmp_path / "in/b.flac", recording("flac", seconds=1, channels=2))
    monkeypatch.setattr(audio_files, "AT_ONCE", 3 * RATE)
    assert convert(tmp_path / "in", tmp_path / "out", "--encode", "keep") == 0
    assert found(tmp_path / "out", "quarantine.jsonl")["a.flac"][1] == "size"
    assert convert(tmp_path / "in", tmp_path / "parts", "--max-seconds", "1") == 0
    assert len(contents(tmp_path / "parts")) == 3
