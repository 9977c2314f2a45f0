"""MP3, FLAC and Ogg: all frames are decoded, whatever the first header says."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from d2v_ds.data import audio, flac, mpeg
from d2v_ds.data.checks import Unusable
from tests.helpers.corpora import FORMATS, recording

ID3 = b"ID3\x04\0\0\0\0\0\x0a" + bytes(10)
TAG = b"TAG" + bytes(125)
APE = b"APETAGEX" + struct.pack("<IIII", 2000, 40, 1, 0xA0000000) + bytes(8 + 40)


def voice(seconds: float, rate: int = 16_000, seed: int = 0, kind: str = "mp3") -> bytes:
    """A tone with noise: its compressed frames differ in size."""
    t = np.arange(int(seconds * rate)) / rate
    x = 0.3 * np.sin(2 * np.pi * (300 + 50 * seed) * t) * (np.sin(9 * t) > 0)
    x += 0.01 * np.random.default_rng(seed).standard_normal(len(t))
    buffer = io.BytesIO()
    container, subtype = FORMATS[kind]
    soundfile.write(buffer, x, rate, format=container, subtype=subtype)
    return buffer.getvalue()


def opened(data: bytes) -> tuple[NDArray[np.float32], list[str]]:
    """(samples, kinds of notes)."""
    with audio.Recording(data) as file:
        x = audio.as_float(file.pcm())
        assert len(x) == file.info.frames and (file.repaired or not file.notes)
        return x, [note.kind for note in file.notes]


def refused(data: bytes) -> str:
    with pytest.raises(Unusable) as raised:
        opened(data)
    return raised.value.kind


def loudness(x: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(x**2)))


# ---------------------------------------------------------------------------------------------- MP3


def headless(data: bytes) -> bytes:
    """An MP3 without its Xing header, which is the first frame."""
    frame = mpeg.frame_of(data[:4])
    assert frame and data[frame.xing : frame.xing + 4] in (b"Xing", b"Info")
    return data[frame.size :]


@pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000])
def test_frames_of_an_mp3(rate: int) -> None:
    data = voice(3, rate)
    found = mpeg.scan(data)
    assert found.exact and not found.cut and found.kind == (3, rate, 1)
    assert 3 <= found.seconds(found.frames) < 3.25  # the encoder pads both ends
    x, notes = opened(data)
    assert len(x) == 3 * rate and not notes


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_mp3_without_a_xing_header(rate: int) -> None:
    data = voice(6, rate)
    assert abs(soundfile.info(io.BytesIO(headless(data))).duration - 6) > 0.3, "an estimate"
    x, notes = opened(headless(data))
    assert 6 <= len(x) / rate < 6.2 and notes == ["length corrected"]
    whole = opened(data)[0]
    assert loudness(x) == pytest.approx(loudness(whole), rel=0.03)
    wrapped, notes = opened(ID3 + headless(data) + APE + TAG)
    assert (wrapped == x).all() and notes == ["length corrected"]


@pytest.mark.parametrize("between", [b"", TAG + ID3, bytes(300), b"a few odd bytes"])
def test_joined_mp3(between: bytes) -> None:
    parts = [voice(seconds, seed=seed) for seed, seconds in enumerate((1, 3, 2))]
    assert len(soundfile.read(io.BytesIO(parts[0] + between + parts[1]))[0]) == 16_000
    x, notes = opened(between.join(parts))
    assert 6 <= len(x) / 16_000 < 6.6 and notes == ["length corrected"]
    for seed in range(3):  # each tone is there
        spectrum = np.abs(np.fft.rfft(x))
        at = round((300 + 50 * seed) * len(x) / 16_000)
        assert spectrum[at - 50 : at + 50].max() > 50 * np.median(spectrum)


def test_mp3_of_other_rates_or_channels_joined() -> None:
    assert refused(voice(1) + voice(1, 24_000)) == "format"
    assert refused(voice(1) + recording("mp3", 1, channels=2)) == "format"


@settings(max_examples=40, deadline=None)
@given(st.integers(400, 8600))
def test_truncated_mp3(size: int) -> None:
    data = voice(3)
    assert size < len(data) - 400
    assert refused(data[:size]) in ("truncated", "format")
    bare = headless(data)[:size]
    if mpeg.scan(bare).cut and mpeg.scan(bare).frames:
        assert refused(bare) == "truncated"


def test_damage_between_mp3_frames() -> None:
    data = voice(3)
    middle = 0
    while middle < len(data) // 2:
        frame = mpeg.frame_of(data[middle : middle + 4])
        assert frame
        middle += frame.size
    noise = np.random.default_rng(0).integers(0, 255, 9000).astype(np.uint8).tobytes()
    assert refused(data[:middle] + noise + data[middle:]) == "damaged"
    x, notes = opened(data + noise)
    assert len(x) == 48_000 and not notes, "what follows the last frame does not matter"


ART = bytes(np.random.default_rng(3).integers(0, 256, 20_000, dtype=np.uint8))
ITEM = struct.pack("<II", len(ART), 2) + b"Cover Art (Front)\0" + ART


def ape(flags: int) -> bytes:
    """The header or the footer of an APE tag with ITEM."""
    return b"APETAGEX" + struct.pack("<IIII", 2000, len(ITEM) + 32, 1, flags) + bytes(8)


def id3(size: int, content: bytes, flags: int = 0) -> bytes:
    lengths = bytes(size >> shift & 127 for shift in (21, 14, 7, 0))
    return b"ID3\x04\0" + bytes([flags]) + lengths + content


FOOTER = b"3DI" + id3(len(ART), b"", 0x10)[3:]
LYRICS = b"LYRICSBEGIN" + b"IND00002" + b"LYR00010" + b"hellohello"


@pytest.mark.parametrize(
    "after",
    [
        ITEM + ape(0),
        ape(0xA0000000) + ITEM + ape(0x80000000) + TAG,
        LYRICS + b"000037LYRICS200" + TAG,
        b"LYRICSBEGIN" + b"words " * 300 + b"LYRICSEND" + TAG,
        b"TAG+" + bytes(223) + TAG,
        id3(len(ART), ART, 0x10) + FOOTER,
        ART[:700],
        ART,
    ],
)
def test_what_follows_the_last_frame_of_an_mp3(after: bytes) -> None:
    data = voice(3)
    expected = opened(data)[0]
    x, notes = opened(data + after)
    assert np.array_equal(x, expected) and not notes
    if after not in (ART, ART[:700]):  # without a header, other bytes may be damaged frames
        x, notes = opened(headless(data) + after)
        assert np.array_equal(x, opened(headless(data))[0]) and notes == ["length corrected"]
    elif after == ART:
        assert refused(headless(data) + after) == "damaged"


@pytest.mark.parametrize(
    "before, notes",
    [
        (bytes(5000), []),
        (bytes(50) + ID3, []),
        (ape(0xA0000000) + ITEM + ape(0x80000000), []),
        (id3(len(ART), ART, 0x10) + FOOTER, []),
        (id3(len(ART) - 9000, ART), ["length corrected"]),
        (b"not a tag ", ["length corrected"]),
    ],
)
def test_what_precedes_the_first_frame_of_an_mp3(before: bytes, notes: list[str]) -> None:
    data = voice(3)
    x, found = opened(before + data)
    assert np.array_equal(x, opened(data)[0]) and found == notes


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "opus"])
@pytest.mark.parametrize("before", [ID3, bytes(100), ID3 + APE])
def test_what_precedes_other_formats(kind: str, before: bytes) -> None:
    data = voice(2, 48_000 if kind == "opus" else 16_000, kind=kind)
    assert np.array_equal(opened(before + data)[0], opened(data)[0])
    assert refused(before + data[: len(data) // 2]) in ("truncated", "damaged")
    assert refused(before) == "empty"


def test_mp3_whose_header_counts_itself() -> None:
    data = bytearray(voice(2))
    at = data.index(b"Xing") + 8
    frames = int.from_bytes(data[at : at + 4], "big")
    data[at : at + 4] = (frames + 1).to_bytes(4, "big")
    assert opened(bytes(data))[1] == ["length corrected"]
    data[at : at + 4] = (frames + 2).to_bytes(4, "big")
    assert refused(bytes(data)) == "truncated"


# --------------------------------------------------------------------------------------------- FLAC


def stating(data: bytes, frames: int) -> bytes:
    return flac.with_frames(data, 0, len(data), frames)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.99])
def test_truncated_flac(share: float, tmp_path: Path) -> None:
    data = voice(3, kind="flac")
    for whole in (data, stating(data, 0), ID3 + data):
        cut = whole[: int(len(whole) * share)]
        assert refused(cut) == "truncated"
        (tmp_path / "a.flac").write_bytes(cut)
        with pytest.raises(Unusable, match="is truncated"):
            audio.decode(tmp_path / "a.flac")
    damaged = bytearray(data)
    damaged[len(data) // 3] ^= 255
    assert refused(bytes(damaged)) == "damaged"


@pytest.mark.parametrize("seconds", [0.01, 0.3, 1.0, 2.7])
def test_flac_without_a_length(seconds: float) -> None:
    data = voice(seconds, kind="flac")
    with audio.Recording(stating(data, 0)) as file:
        assert (file.pcm() == audio.Recording(data).pcm()).all()
        assert file.repaired and not file.notes
    x, notes = opened(data)
    assert len(x) == int(seconds * 16_000) and not notes


def test_flac_that_states_too_little_or_too_much() -> None:
    data = voice(2, kind="flac")
    x, notes = opened(stating(data, 10_000))
    assert (x == opened(data)[0]).all() and notes == ["length corrected"]
    assert refused(stating(data, 40_000)) in ("truncated", "damaged")
    assert refused(stating(data, 0)[: len(data) // 2]) in ("truncated", "damaged")


def test_last_frames_of_flac() -> None:
    """Frame headers are found in every kind of file that libsndfile writes."""
    for rate, frames, subtype in (
        (16_000, 100, "PCM_16"),
        (44_100, 4096, "PCM_24"),
        (22_254, 50_001, "PCM_S8"),
        (96_000, 300_000, "PCM_16"),
    ):
        buffer = io.BytesIO()
        x = np.random.default_rng(0).uniform(-0.4, 0.4, frames)
        soundfile.write(buffer, x, rate, format="FLAC", subtype=subtype)
        data = buffer.getvalue()
        assert flac.last_frame(data, 0, len(data)) == frames == flac.stated_frames(data, 0)
        assert flac.last_frame(stating(data, 0), 0, len(data)) == frames


@pytest.mark.parametrize("kind", ["flac", "ogg", "opus"])
def test_joined_files(kind: str) -> None:
    parts = [voice(seconds, seed=seed, kind=kind) for seed, seconds in enumerate((1, 1, 2.5))]
    expected = [opened(part)[0] for part in parts]
    assert len(soundfile.read(io.BytesIO(b"".join(parts)))[0]) == len(expected[0])
    x, notes = opened(b"".join(parts))
    assert (x == np.concatenate(expected)).all() and notes == ["length corrected"]
    with audio.Recording(b"".join(parts)) as file:
        for start, frames in ((15_990, 20), (100, 17_000), (40_000, 30)):
            found = audio.as_float(file.pcm(start, frames))
            assert (found == x[start : start + frames]).all()
    assert refused(parts[0] + voice(1, 24_000, kind=kind)) == "format" or kind == "opus"
    assert refused(parts[0] + recording(kind, 1, channels=2)) == "format"
    assert refused(parts[0] + parts[1][: len(parts[1]) // 2]) in ("truncated", "damaged")


def test_ogg_with_two_streams_at_once() -> None:
    data = voice(1, kind="ogg")
    second = data.index(b"OggS", 4)
    other = voice(1, seed=1, kind="ogg")
    first_of_other = other[: other.index(b"OggS", 4)]
    assert refused(data[:second] + first_of_other + data[second:]) == "format"


@pytest.mark.parametrize("kind", ["mp3", "ogg", "opus"])
def test_parts_of_compressed_files_are_exact(kind: str) -> None:
    """libsndfile's own seeking is not."""
    data = voice(5, kind=kind)
    whole = audio.decode(data)
    with audio.Recording(data) as file:
        for start in (0, 10_000, 10_500, 30_000, 70_000, 4000, 0):
            part = file.pcm(start, 9000)
            assert (part == whole[start : start + 9000]).all(), start
        assert (file.pcm() == whole).all() and (file.pcm() == whole).all()
        assert (file.pcm(5, 10) == whole[5:15]).all()
