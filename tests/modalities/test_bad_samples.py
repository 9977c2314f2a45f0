"""Damaged and hostile samples: decoding raises Unusable with a reason, and never gives NaN."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from d2v_ds.data import audio
from d2v_ds.data.checks import Unusable
from d2v_ds.data.headers import npy as length_of_npy
from d2v_ds.data.tar_scan import Member
from d2v_ds.modalities.speech import Speech, SpeechConfig
from d2v_ds.modalities.text import Text, TextConfig
from d2v_ds.modalities.vision import Vision, VisionConfig

RATE = 16_000
SPEECH = Speech(SpeechConfig(min_seconds=0.1, crop_seconds=0.2))


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def sound(size: int = 3000) -> Any:
    return generator().normal(0, 0.1, size)


def float_file(x: Any, kind: str = "WAV", subtype: str = "FLOAT") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, x, RATE, format=kind, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize("value", [3e38, -1e30, 3.3e9, math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 1500, -1])
@pytest.mark.parametrize("file", [("WAV", "FLOAT"), ("WAV", "DOUBLE"), ("AIFF", "FLOAT")])
def test_a_value_that_no_recording_has(value: float, place: int, file: tuple[str, str]) -> None:
    x = sound()
    x[place] = value
    data = float_file(x, *file)
    for rng in (None, generator()):
        with pytest.raises(Unusable) as caught:
            SPEECH.decode({"wav": data}, rng)
        assert caught.value.kind == ("range" if math.isfinite(value) else "not finite")


def test_every_flipped_exponent_bit_is_refused_or_stays_finite() -> None:
    data = bytearray(float_file(sound()))
    refused = 0
    for place in (len(data) - 1, len(data) - 6001, len(data) - 2):
        for bit in range(8):
            data[place] ^= 1 << bit
            try:
                assert np.isfinite(SPEECH.decode({"wav": bytes(data)}, None)).all()
            except Unusable as error:
                assert error.kind == "range"
                refused += 1
            data[place] ^= 1 << bit
    assert refused >= 2  # the largest bit of two exponents


def test_the_largest_allowed_value_is_normalised() -> None:
    x = sound().astype(np.float32)
    x[7] = audio.LARGEST
    assert np.isfinite(SPEECH.decode({"wav": float_file(x)}, None)).all()
    with pytest.raises(Unusable, match="fits no full scale"):
        SPEECH.prepare(x.astype(np.float64) * 1e40, rate=RATE)


@pytest.mark.parametrize("frames", [1 << 30, (1 << 36) - 1])
def test_a_flac_that_states_too_many_frames(frames: int) -> None:
    """Memory is taken for what is decoded, not for what is stated."""
    whole = bytearray(float_file(sound(), "FLAC", "PCM_16"))
    packed = int.from_bytes(whole[18:26], "big") >> 36 << 36 | frames
    whole[18:26] = packed.to_bytes(8, "big")
    with pytest.raises(Unusable):
        SPEECH.decode({"flac": bytes(whole)}, None)


# ------------------------------------------------------------------------------------------- arrays


def array(values: Any, order: str = "C") -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(values, order=order))  # type: ignore[call-overload]
    return buffer.getvalue()


IDS = array(np.arange(4, 40, dtype=np.uint16))


def with_header(text: bytes) -> bytes:
    return b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text + bytes(80)


@pytest.mark.parametrize(
    "data",
    [
        IDS.replace(b"}", b"("),
        IDS.replace(b"'shape'", b"'shap\n'"),
        with_header(b"(" * 4000 + b"\n"),
        with_header(b"[" * 60_000),
        with_header(b"{'descr': '<u2', 'fortran_order': False, 'shape': (-40,), }"),
        with_header(b"{'descr': '<u2', 'fortran_order': False, 'shape': (9999999999999,), }"),
        with_header(
            b"{'descr': '<u2', 'fortran_order': False, 'shape': (" + b"9" * 3000 + b",), }"
        ),
        with_header(b"{'descr': '<u2', 'fortran_order': True, 'shape': (40,), }"),
        with_header(b"{'descr': '|O', 'fortran_order': False, 'shape': (40,), }"),
        with_header(b"{'descr': [('a', '<u2')], 'fortran_order': False, 'shape': (40,), }"),
        with_header(b"{'descr': '<u2', 'fortran_order': False, 'shape': (39,), }"),
        b"PK\x03\x04" + IDS,
    ],
)
def test_a_damaged_array_is_unusable_for_all_that_read_it(data: bytes) -> None:
    for read in (
        lambda: Text(TextConfig()).decode({"npy": data}, None),
        lambda: Text.check_sample({"npy": data}, {}),
        lambda: length_of_npy(io.BytesIO(data), Member("", 0, len(data))),
    ):
        with pytest.raises(Unusable):
            read()


def test_headers_as_other_programs_write_them() -> None:
    for text in (
        b"{'shape':(40,),'fortran_order':False,'descr':'<u2'}",
        b"{ 'descr' : \"<u2\" , 'fortran_order': False, 'shape': ( 40, ), }   \n",
    ):
        assert Text(TextConfig(pad_id=1)).check_sample({"npy": with_header(text)}, {}) == 40


# ------------------------------------------------------------------------------------------- images


def test_a_strip_is_not_resized_to_a_gigabyte() -> None:
    buffer = io.BytesIO()
    Image.new("L", (1, 60_000)).save(buffer, "PNG")
    vision = Vision(VisionConfig(image_size=64))
    with pytest.raises(Unusable, match="too long for its width") as caught:
        vision.decode({"png": buffer.getvalue()}, None)
    assert caught.value.kind == "size"
    assert vision.decode({"png": buffer.getvalue()}, generator()).shape == (3, 64, 64)


# ------------------------------------------------------------------------------------- the boundary


class Odd(Text):
    error: Callable[[], BaseException]

    def decode(self, sample: Any, rng: Any) -> Any:
        raise self.error()


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("y"), AttributeError("z")])
def test_other_errors_of_decoders_are_unusable_samples(error: Exception) -> None:
    odd = Odd(TextConfig())
    odd.error = lambda: error
    with pytest.raises(Unusable, match="decode in test_bad_samples") as caught:
        odd.decoded({}, None)
    assert caught.value.kind == "damaged" and caught.value.__cause__ is error


def test_a_lack_of_memory_is_not_the_fault_of_a_sample() -> None:
    odd = Odd(TextConfig())
    odd.error = MemoryError
    with pytest.raises(MemoryError):
        odd.decoded({}, None)
