"""Ogg files page by page: what is missing or changed, for synthetic pages."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pytest
import soundfile

from d2v_ds.data import audio
from tests.helpers.corpora import ogg_problem, recording

FIRST, LAST = 2, 4  # bits of the header type


def crc(data: bytes) -> int:
    """Ogg's checksum (RFC 3533): polynomial 0x04c11db7, initial value 0, highest bit first."""
    found = 0
    for byte in data:
        found ^= byte << 24
        for _ in range(8):
            found = (found << 1 ^ 0x04C11DB7 if found & 1 << 31 else found << 1) & 0xFFFFFFFF
    return found


def page(number: int, kind: int = 0, content: bytes = b"content", serial: int = 7) -> bytes:
    table = bytes([255] * (len(content) // 255) + [len(content) % 255])
    head = b"OggS\0" + bytes([kind]) + bytes(8) + serial.to_bytes(4, "little")
    head += number.to_bytes(4, "little")
    tail = bytes([len(table)]) + table + content
    checksum = crc(head + bytes(4) + tail)
    return head + checksum.to_bytes(4, "little") + tail


def stream(number: int = 4, serial: int = 7) -> list[bytes]:
    kinds = [FIRST, *[0] * (number - 2), LAST]
    return [page(i, kind, bytes(300 * i), serial) for i, kind in enumerate(kinds)]


def problem(pages: Sequence[bytes]) -> str:
    return ogg_problem(b"".join(pages))


def test_intact_streams() -> None:
    assert problem(stream()) == ""
    assert problem([page(0, FIRST | LAST)]) == ""
    assert problem([*stream(), *stream(3, serial=8)]) == "", "one stream after the other"
    numbered = [page(70 + i, kind) for i, kind in enumerate((FIRST, 0, LAST))]
    assert problem(numbered) == "", "the first number is not always 0"


@pytest.mark.parametrize("kind", ["ogg", "opus"])
def test_the_checksum_matches_libsndfile(kind: str) -> None:
    data = recording(kind, seconds=1)
    second = data.index(b"OggS", 4)
    assert int.from_bytes(data[22:26], "little") == crc(data[:22] + bytes(4) + data[26:second])
    assert ogg_problem(data) == ""


def test_missing_pages() -> None:
    pages = stream()
    assert (
        problem([])
        == problem(pages[:-1])
        == ("is truncated: its last Ogg page does not end the stream")
    )
    assert problem([pages[0], *pages[2:]]) == (
        f"is damaged: Ogg page 1 is missing before byte {len(pages[0])}"
    )
    assert "Ogg page 2 is missing" in problem([*pages[:2], pages[3]])
    assert "page 0 is missing" in problem(pages[1:])
    assert "Ogg page 2 is missing" in problem([*pages[:2], pages[1], *pages[2:]]), "twice"


def test_a_stream_cut_off_by_another_one() -> None:
    pages = stream()
    cut = [*pages[:-1], *stream(serial=8)]
    assert problem(cut) == (
        f"is damaged: the Ogg stream before byte {len(b''.join(pages[:-1]))} does not end"
    )


def test_every_truncation_is_found() -> None:
    data = b"".join(stream(3))
    for size in range(len(data)):
        assert "is truncated" in ogg_problem(data[:size]), size


def test_every_flipped_bit_is_found() -> None:
    data = b"".join(stream(3))
    for at in range(0, len(data), 7):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        assert ogg_problem(bytes(flipped)), at


NOISE = bytes(range(1, 256)) * 300


@pytest.mark.parametrize(
    "after, noted",
    [(b"TAG" + bytes(125), False), (bytes(100), False), (bytes(500_000), False), (NOISE, True)],
)
@pytest.mark.parametrize("kind", ["ogg", "opus"])
def test_something_after_the_last_page(kind: str, after: bytes, noted: bool) -> None:
    data = recording(kind, 1, 48_000)
    for whole in (data, data + recording(kind, 1, 48_000, seed=1)):
        with audio.Recording(whole) as expected, audio.Recording(whole + after) as found:
            assert np.array_equal(found.pcm(), expected.pcm())
            assert len(found.notes) - len(expected.notes) == noted
            assert found.repaired
    assert ogg_problem(b"RIFF" + bytes(100)).endswith("no Ogg page at byte 0")
    pages = b"".join(stream())
    expected_problem = f"is truncated or damaged: no Ogg page at byte {len(pages)}"
    assert ogg_problem(pages + NOISE + pages) == expected_problem


def test_libsndfile_reports_no_damage() -> None:
    """The reason for having this check."""
    data = recording("ogg", seconds=5)
    last = data.rindex(b"OggS")
    samples, _ = soundfile.read(io.BytesIO(data[:last]))
    assert 0 < len(samples) < 5 * 16_000 and ogg_problem(data[:last])
