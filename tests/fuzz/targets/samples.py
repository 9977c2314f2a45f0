"""Samples as training, `verify` and the conversion decode them: recordings, images, token ids."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from d2v_ds.data import audio, image_files
from d2v_ds.data.tar_scan import Member
from d2v_ds.loader.webdataset import _rows
from d2v_ds.modalities import sample_formats
from d2v_ds.modalities.speech import Speech, SpeechConfig
from d2v_ds.modalities.text import Text, TextConfig
from d2v_ds.modalities.vision import Vision, VisionConfig
from tests.fuzz.harness import Target
from tests.fuzz.mutations import any_bytes, head_bytes

RATE = 16_000
KINDS = (  # (format, subtype) of libsndfile
    ("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "FLOAT"), ("WAV", "DOUBLE"), ("WAV", "PCM_24"),
    ("WAV", "PCM_U8"), ("WAV", "ULAW"), ("WAV", "IMA_ADPCM"), ("WAV", "GSM610"), ("RF64", "PCM_16"),
    ("W64", "PCM_16"), ("AIFF", "PCM_16"), ("AIFF", "FLOAT"), ("AU", "FLOAT"), ("CAF", "ALAC_16"),
    ("CAF", "PCM_16"), ("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"), ("NIST", "PCM_16"), ("VOC", "PCM_16"), ("SVX", "PCM_16"),
    ("SDS", "PCM_16"),
)  # fmt: skip
SPEECH = Speech(SpeechConfig(min_seconds=0.05, crop_seconds=0.06))
VISION = Vision(VisionConfig(image_size=32, jitter=0.1))
TEXT = Text(TextConfig())
READERS = {name: read for form in sample_formats() for name, read in form.readers.items()}


def _both(parts: Sequence[Callable[[], Any]]) -> Any:
    """The results of all parts; None for those that refuse the input. Raises the first error if
    all of them do."""
    results, errors = [], []
    for part in parts:
        try:
            results.append(part())
        except ValueError as error:
            results.append(None)
            errors.append(error)
    if len(errors) == len(parts):
        raise errors[0]
    return results


# --------------------------------------------------------------------------------------- recordings


def recordings(seconds: float = 0.1) -> Iterator[bytes]:
    noise = np.random.default_rng(0).normal(0, 0.1, (int(RATE * seconds), 2))
    for number, (kind, subtype) in enumerate(KINDS):
        buffer = io.BytesIO()
        channels = 1 + (kind == "WAV" and number % 2)
        soundfile.write(buffer, noise[:, :channels], RATE, format=kind, subtype=subtype)
        yield buffer.getvalue()


def _decode_recording(data: bytes, folder: Path) -> Any:
    def converted() -> Any:
        with audio.Recording(data, clipping=True) as recording:
            pcm = audio.as_float(recording.pcm()) / recording.scale
            return _digest(pcm), [note.kind for note in recording.notes]

    members = {"wav": data}
    return _both(
        [
            lambda: Speech.check_sample(members, {"sample_rate": RATE}),
            lambda: _digest(SPEECH.decode(members, None)),
            lambda: _digest(SPEECH.decode(members, np.random.default_rng(0))),
            converted,
        ]
    )


def _digest(x: Any) -> Any:
    if not np.isfinite(x).all():
        raise FloatingPointError("not finite")
    return len(x), [round(float(value), 3) for value in x[:: max(1, len(x) // 8)]]


# ------------------------------------------------------------------------------------------- images


def images() -> Iterator[bytes]:
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 255, (23, 19, 3), dtype=np.uint8))
    grey16 = Image.fromarray(rng.integers(0, 60_000, (9, 7), dtype=np.uint16))
    clear = Image.fromarray(rng.integers(0, 255, (9, 7, 4), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for picture, kind, options in (
        (rgb, "JPEG", {}),
        (rgb, "JPEG", {"progressive": True, "exif": exif}),
        (rgb, "PNG", {"exif": exif}),
        (clear, "PNG", {}),
        (grey16, "PNG", {}),
        (rgb.convert("P"), "PNG", {"transparency": 3}),
        (rgb, "WEBP", {"exif": exif}),
        (clear, "WEBP", {"lossless": True}),
        (rgb, "GIF", {"save_all": True, "append_images": [rgb.rotate(90)]}),
        (rgb, "BMP", {}),
        (rgb, "TIFF", {"exif": exif}),
        (rgb, "TIFF", {"compression": "tiff_lzw"}),
        (grey16, "TIFF", {}),
        (Image.fromarray(rng.random((9, 7), dtype=np.float32)), "TIFF", {}),
        (rgb, "PPM", {}),
        (rgb, "JPEG2000", {}),
        (rgb, "TGA", {}),
        (rgb, "PCX", {}),
        (rgb, "SGI", {}),
    ):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        yield buffer.getvalue()


def _decode_image(data: bytes, folder: Path) -> Any:
    members = {"jpg": data}

    def stored() -> Any:
        found = image_files.stored(data, shorter=8)
        return found.kind, found.width, found.height, [note.kind for note in found.notes]

    return _both(
        [
            lambda: Vision.check_sample(members, {}),
            lambda: int(VISION.decode(members, None).sum()),
            lambda: int(VISION.decode(members, np.random.default_rng(0)).sum()),
            stored,
        ]
    )


# -------------------------------------------------------------------------------------------- texts


def arrays() -> Iterator[bytes]:
    for values, version in (
        (np.arange(4, 40, dtype=np.uint16), (1, 0)),
        (np.arange(4, 40, dtype=np.uint32), (2, 0)),
        (np.arange(4, 40, dtype=np.uint16).reshape(4, 9), (1, 0)),
    ):
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, values, version=version)
        yield buffer.getvalue()


def _decode_ids(data: bytes, folder: Path) -> Any:
    packed = list(_rows({"__key__": "k", "__url__": "u", "npy": data}, {"u16": "npy"}))
    return _both(
        [
            lambda: TEXT.decode({"npy": data}, None).tolist(),
            lambda: Text.check_sample({"npy": data}, {}),
            lambda: _length("npy", data),
            lambda: TEXT.decode({k: v for k, v in packed[0].items() if k[0] == "u"}, None).tolist(),
        ]
    )


# ------------------------------------------------------------------------------------------ headers


def _length(field: str, data: bytes) -> Any:
    found = READERS[field](io.BytesIO(data), Member("", 0, len(data)))
    if found.length < 0:
        raise ArithmeticError("a negative length")
    return found


def _read_headers(data: bytes, folder: Path) -> Any:
    return _both([lambda field=field: _length(field, data) for field in READERS])


def _of(make: Callable[[], Iterator[bytes]]) -> Callable[[Path], Sequence[bytes]]:
    return lambda folder: list(make())


def _heads(folder: Path) -> Sequence[bytes]:
    found = [*recordings(), *images(), *list(arrays())[:2]]
    return [one for one in found if one[:4] in (b"RIFF", b"fLaC", b"\x89PNG", b"\x93NUM")] + [
        one for one in found if one[:2] == b"\xff\xd8"
    ]


def floats(data: bytes, rng: Random) -> bytes:
    """As head_bytes; in one of four inputs a float of the samples becomes any other."""
    if rng.random() < 0.75 or len(data) < 600:
        return head_bytes(data, rng, 64)
    at = rng.randrange(100, len(data) - 8)
    return data[:at] + rng.randbytes(4) + data[at + 4 :]


def _target(name: str, make: Any, parse: Any, mutate: Any) -> Target:
    return Target(name, make, parse, mutate, (ValueError,), protected=False)


TARGETS = [
    _target("recordings", _of(recordings), _decode_recording, floats),
    _target("images", _of(images), _decode_image, head_bytes),
    _target("token ids", _of(arrays), _decode_ids, any_bytes),
    _target("headers of samples", _heads, _read_headers, lambda d, r: head_bytes(d, r, 100)),
]
