"""Audio: exact decoding, damage, resampling compared with torchaudio, features."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray

from d2v_ds.data import audio, resampling
from d2v_ds.data.checks import Unusable

RATE = 16_000


def noise(frames: int = 4000, channels: int = 1) -> NDArray[np.int16]:
    shape = (frames,) if channels == 1 else (frames, channels)
    return np.random.default_rng(0).integers(-32768, 32768, shape).astype(np.int16)


def encoded(samples: NDArray[np.generic], kind: str = "WAV", subtype: str = "PCM_16") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, format=kind, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_16_bit_is_exact(kind: str) -> None:
    samples = noise()
    x = audio.decode(encoded(samples, kind))
    assert x.dtype == np.float32 and x.shape == (4000,)
    assert (audio.to_int16(x) == samples).all()
    assert abs(x).max() <= 1


@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_crop_is_the_slice(kind: str, tmp_path: Path) -> None:
    data = encoded(noise(40_000), kind)
    whole = audio.decode(data)
    assert (audio.decode(data, 12_345, 678) == whole[12_345 : 12_345 + 678]).all()
    assert (audio.decode(data, 39_000) == whole[39_000:]).all()
    (tmp_path / "x").write_bytes(data)
    assert (audio.decode(tmp_path / "x", 5, 7) == whole[5:12]).all()


@pytest.mark.parametrize("start, frames", [(0, 4001), (4000, -1), (4001, 1), (3990, 11), (0, 0)])
def test_crop_outside(start: int, frames: int) -> None:
    with pytest.raises(ValueError, match="requested, but it has only 4000"):
        audio.decode(encoded(noise()), start, frames)


def test_channels_are_averaged() -> None:
    samples = noise(channels=2)
    expected = samples.astype(np.float64).mean(axis=1) / 32768
    np.testing.assert_allclose(audio.decode(encoded(samples)), expected, atol=1e-7)


@pytest.mark.parametrize(
    "kind, subtype, error",
    [
        ("WAV", "PCM_24", 1e-6),
        ("FLAC", "PCM_24", 1e-6),
        ("WAV", "FLOAT", 1e-7),
        ("WAV", "PCM_U8", 0.01),
    ],
)
def test_other_widths(kind: str, subtype: str, error: float) -> None:
    x = (np.sin(np.arange(3000) / 5) * 0.7).astype(np.float32)
    np.testing.assert_allclose(audio.decode(encoded(x, kind, subtype)), x, atol=error)


def test_info() -> None:
    found = audio.info(encoded(noise(500, channels=3), "FLAC"))
    assert found == audio.Info(RATE, 500, 3, "FLAC", "PCM_16")


def test_to_int16_clips() -> None:
    x = np.array([-2.0, -1.0, 0.0, 0.99999, 1.5], np.float32)
    assert audio.to_int16(x).tolist() == [-32768, -32768, 0, 32767, 32767]


def test_encode_flac_is_deterministic_and_lossless() -> None:
    samples = (np.sin(np.arange(20_000) / 9) * 9000).astype(np.int16)
    data = audio.encode_flac(samples, RATE)
    assert data == audio.encode_flac(samples, RATE)
    assert (audio.to_int16(audio.decode(data)) == samples).all()
    assert len(audio.encode_flac(samples, RATE, level=8)) <= len(data)


# ------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("read", [audio.info, audio.decode])
def test_not_audio(read, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="is empty"):
        read(b"")
    with pytest.raises(ValueError, match="is not audio that libsndfile reads"):
        read(b"<html></html>" * 20)
    with pytest.raises(ValueError, match="contains no audio"):
        read(encoded(noise(0)))
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "missing.wav")


@pytest.mark.parametrize("read", [audio.info, audio.decode])
def test_truncated_wav(read, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data = encoded(noise())
    with pytest.raises(Unusable, match="states 8000 bytes of samples, but 3978 are left"):
        read(data[:4022])
    (tmp_path / "x.wav").write_bytes(data[:4022])
    with pytest.raises(ValueError, match="is truncated"):
        read(tmp_path / "x.wav")


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFFFFF])
def test_streamed_wav_without_a_size_is_read(size: int) -> None:
    data = bytearray(encoded(noise()))
    data[4:8] = size.to_bytes(4, "little")
    assert len(audio.decode(bytes(data))) == 4000


@pytest.mark.parametrize("channels", [1, 2])
def test_a_plain_wav_with_other_chunks_is_read_as_libsndfile_reads_it(channels: int) -> None:
    samples = noise(channels=channels)
    data = encoded(samples)
    extra = b"LIST" + (5).to_bytes(4, "little") + b"INFO\0\0"  # odd size, so one byte of padding
    at = data.index(b"data")
    for changed in (data[:at] + extra + data[at:], data + extra):
        changed = changed[:4] + (len(changed) - 8).to_bytes(4, "little") + changed[8:]
        expected, rate = soundfile.read(io.BytesIO(changed), dtype="int16")
        assert audio.info(changed) == audio.Info(rate, len(expected), channels, "WAV", "PCM_16")
        for one in range(channels):
            found = audio.Recording(changed).pcm(channel=one)
            assert found.dtype == np.int16
            assert (found == expected.reshape(4000, channels)[:, one]).all()
        assert len(audio.decode(changed, 100, 50)) == 50


def test_a_plain_wav_is_not_copied() -> None:
    data = encoded(noise())
    assert np.shares_memory(audio.Recording(data).pcm(), np.frombuffer(data, np.uint8))


def test_damaged_flac() -> None:
    data = encoded(noise(40_000), "FLAC")
    with pytest.raises(ValueError, match="is truncated"):
        audio.decode(data[: len(data) // 2])
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 16
    with pytest.raises(ValueError, match=r"cannot be decoded|frames before the length"):
        audio.decode(bytes(flipped))


def test_mp3_shorter_than_its_header() -> None:
    data = encoded(
        (np.sin(np.arange(40_000) / 20) * 9000).astype(np.int16), "MP3", "MPEG_LAYER_III"
    )
    with pytest.raises(Unusable, match="is truncated: its header states") as raised:
        audio.decode(data[: len(data) // 2])
    assert raised.value.kind == "truncated"


@pytest.mark.parametrize("container", ["WAV", "AIFF", "CAF", "AU"])
def test_float64_beyond_float32(container: str) -> None:
    x = np.full(4000, 0.1)
    for value, kind in ((1e300, "range"), (-1e40, "range"), (np.inf, "not finite")):
        x[1000] = value
        with (
            pytest.raises(Unusable) as raised,
            audio.Recording(encoded(x, container, "DOUBLE")) as f,
        ):
            assert f.scale
        assert raised.value.kind == kind


def test_coding_that_libsndfile_does_not_read() -> None:
    """Half-precision floats, and AAC in a WAV."""
    plain = encoded(noise())
    for coding, bits, message in (
        (3, 16, "16-bit float samples, which libsndfile does not read; store it with 32-bit"),
        (0xFF, 16, "samples of coding 0x00ff, which libsndfile does not read; convert it first"),
    ):
        data = plain[:20] + struct.pack("<H12xH", coding, bits) + plain[36:]
        with pytest.raises(Unusable, match=message) as raised:
            audio.info(data)
        assert raised.value.kind == "format"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(value: float) -> None:
    x = np.zeros(100, np.float32)
    x[50] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        audio.decode(encoded(x, "WAV", "FLOAT"))
    assert len(audio.decode(encoded(x, "WAV", "FLOAT"), 0, 50)) == 50


# --------------------------------------------------------------------------------------- resampling

RATES = [
    (8000, 16_000),
    (44_100, 16_000),
    (48_000, 16_000),
    (22_050, 16_000),
    (16_000, 8000),
    (11_025, 16_000),
]


def sine(frequency: float, rate: int, seconds: float = 0.5) -> NDArray[np.float32]:
    return np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate).astype(np.float32)


@pytest.mark.parametrize("old, new", RATES)
def test_resampled_sine(old: int, new: int) -> None:
    frequency = 0.4 * min(old, new)
    y = audio.resample(sine(frequency, old), old, new)
    assert y.dtype == np.float32 and len(y) == -(-int(old * 0.5) * new // old)
    middle = slice(len(y) // 4, -len(y) // 4)
    error = abs(y - np.sin(2 * np.pi * frequency * np.arange(len(y)) / new))[middle].max()
    assert error < 1e-3, f"{old} -> {new}: {error}"


def test_nothing_aliases() -> None:
    """A tone above the new Nyquist frequency is removed, not folded back."""
    y = audio.resample(sine(8_400, 48_000), 48_000, 16_000)
    assert abs(y[1000:-1000]).max() < 5e-3


@pytest.mark.parametrize("old, new", RATES)
def test_resample_as_torchaudio(old: int, new: int) -> None:
    x = np.random.default_rng(1).standard_normal(old // 3).astype(np.float32)
    expected = audio.import_torchaudio().functional.resample(
        torch.from_numpy(x),
        old,
        new,
        lowpass_filter_width=resampling.ZERO_CROSSINGS,
        rolloff=resampling.ROLLOFF,
    )
    np.testing.assert_allclose(audio.resample(x, old, new), expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("length", [1, 2, 3, 100, 16_001])
def test_resample_lengths_and_blocks(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(2).standard_normal(length).astype(np.float32)
    whole = audio.resample(x, 44_100, 16_000)
    assert len(whole) == -(-length * 16_000 // 44_100)
    monkeypatch.setattr(resampling, "BLOCK", 2000)
    np.testing.assert_allclose(audio.resample(x, 44_100, 16_000), whole, atol=1e-7)


def test_resample_edges_of_rates() -> None:
    x = np.ones(10, np.float32)
    assert audio.resample(x, 16_000, 16_000) is x


def test_constant_stays_constant() -> None:
    y = audio.resample(np.full(8000, 0.25, np.float32), 8000, 16_000)
    np.testing.assert_allclose(y[200:-200], 0.25, atol=1e-6)


# ----------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("rate", [8000, 16_000])
def test_log_mel(rate: int) -> None:
    low, high = (audio.log_mel(sine(f, rate), rate) for f in (200, 3000))  # [T, 40]
    assert low.shape == (48, 40) and low.dtype == torch.float32  # 1 + (500 - 25) // 10 windows
    assert low.mean(0).argmax() < high.mean(0).argmax()
    louder = audio.log_mel(torch.from_numpy(2 * sine(200, rate)), rate)
    peak = low.mean(0).argmax()
    assert (louder - low)[:, peak].mean().item() == pytest.approx(2 * np.log(2), abs=0.05)


def test_log_mel_of_a_too_short_signal() -> None:
    with pytest.raises(ValueError, match="399 samples are shorter than one window of 25 ms"):
        audio.log_mel(np.zeros(399, np.float32), 16_000)


def test_torchaudio_imports_here() -> None:
    assert hasattr(audio.import_torchaudio().functional, "resample")
