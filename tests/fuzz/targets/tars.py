"""Tars that others made: their index, the samples in it, and the pipeline of webdataset."""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import soundfile

from d2v_ds.data.shard_index import read_index
from d2v_ds.data.tar_index import index_tar
from d2v_ds.data.tar_scan import BLOCK, DamagedTar, members
from d2v_ds.errors import UserError
from d2v_ds.loader.webdataset import items_of
from d2v_ds.modalities import sample_formats
from shards.tars import grouped
from tests.fuzz.harness import Target
from tests.fuzz.mutations import NUMBERS, any_bytes

NAME = "a.tar"


def _wav() -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(-9000, 9000, 99).astype(np.int16)
    soundfile.write(buffer, noise, 16_000, format="WAV")
    return buffer.getvalue()


def _npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.arange(4, 30, dtype=np.uint16))
    return buffer.getvalue()


def tars(folder: Path) -> Sequence[bytes]:
    """In several formats, with long names, pax records, links and folders."""
    ustar, gnu, pax = tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT
    long = "long/" * 30
    return [
        _tar(ustar, [("0.wav", _wav()), ("0.json", b"{}"), ("p", tarfile.FIFOTYPE)]),
        _tar(ustar, [("0.npy", _npy()), ("s/1.npy", _npy())]),
        _tar(gnu, [("s/0.wav", _wav()), ("s/1.wav", "../s/0.wav"), (long + "2.wav", _wav())]),
        _tar(pax, [("0.wav", _wav()), ("t/1.wav", "l/2.wav"), ("l", "s"), ("s/2.wav", _wav())]),
        _tar(pax, [(long + "0.wav", _wav()), ("1.wav", long + "0.wav"), ("s", tarfile.DIRTYPE)]),
    ]  # fmt: skip


def _tar(form: int, entries: list[tuple[str, Any]]) -> bytes:
    """entries: (name, content, target of a link or type)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, what in entries:
            member = tarfile.TarInfo(name)
            if form == tarfile.PAX_FORMAT:
                member.pax_headers = {"comment": "x" * 9}
            if isinstance(what, str):
                member.type, member.linkname = tarfile.SYMTYPE, what
            elif len(what) == 1:
                member.type = what
            else:
                member.size = len(what)
            tar.addfile(member, io.BytesIO(what) if member.size else None)
    data = buffer.getvalue().rstrip(b"\0")
    return data + bytes(-len(data) % BLOCK + 2 * BLOCK)


@lru_cache
def _headers(data: bytes) -> list[int]:
    """Where the headers of a tar are."""
    file, places = io.BytesIO(data), []
    with tarfile.open(fileobj=file) as tar:
        for member in tar:
            places += range(member.offset, member.offset_data, BLOCK)
    return places


def hostile(data: bytes, rng: Random) -> bytes:
    """A changed field of a header, whose checksum is then corrected, or a changed pax record; in
    other inputs any bytes."""
    if rng.random() < 0.3:
        return any_bytes(data, rng)
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.choice(_headers(data))
        block = found[at : at + BLOCK]
        if b"=" in block and block[257:262] != b"ustar":
            found[at : at + BLOCK] = _pax_record(rng)
            continue
        _change_field(block, rng)
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        found[at : at + BLOCK] = block
    return bytes(found)


def _change_field(block: bytearray, rng: Random) -> None:
    kind = rng.randrange(5)
    if kind == 0:
        block[156] = rng.choice(b"0123456789LKxgSMVDX\0")
    elif kind == 1:
        block[124:136] = b"%011o\0" % rng.choice(NUMBERS[:11])
    elif kind == 2:
        block[124:136] = rng.choice((b"\x80", b"\xff")) + rng.randbytes(11)
    elif kind == 3:
        names = (b"../x.wav", b"/x.wav", b"a\xff.wav", b"s/000.wav", b".wav", b"a.", b"x" * 100,
                 b"a\nb.wav", b"./././", b"s/000.npy")  # fmt: skip
        start = rng.choice((0, 157))
        block[start : start + 100] = rng.choice(names).ljust(100, b"\0")
    else:
        start = rng.randrange(BLOCK)
        block[start : start + 4] = rng.randbytes(4)[: BLOCK - start]


def _pax_record(rng: Random) -> bytes:
    key = rng.choice((b"size", b"path", b"linkpath", b"GNU.sparse.name", b"GNU.sparse.map", b"x"))
    value = rng.choice((b"abc", b"-1", b"1e9", b"9" * 19, b"9" * 300, b"a\0b.wav", b"\xff.wav", b"",
                        b"0", b"100", b"a=b", b"../../x.wav", b"a/" * 150 + b"x.wav"))  # fmt: skip
    record = key + b"=" + value + b"\n"
    size = rng.choice((len(record) + 3, len(record) + 4, 0, 1, 999, len(record) + 4))
    return (b"%d %s" % (size, record))[:BLOCK].ljust(BLOCK, b"\0")


def _read(data: bytes, folder: Path) -> Any:
    """What the pipeline, a conversion and an index find in a tar."""
    tar = folder / NAME
    tar.write_bytes(data)
    file = io.BytesIO(data)
    found: list[Any] = [[(key, field, sorted(group)) for key, field, group in _converted(file)]]
    with contextlib.suppress(UserError):
        for item in items_of(file, NAME, {"u16": "npy"}):
            found.append((item["__key__"], sorted(map(len, item.values()))))
    forms = [*sample_formats("speech"), *sample_formats("text")]
    indexed = index_tar((tar, forms[b".npy" in data], "crc32"))
    (folder / "a.idx").write_bytes(indexed.idx)
    index = read_index(folder / "a.idx")
    keys = [index.key(i) for i in range(index.count)]
    assert len(keys) == indexed.entry.samples == len(index.lengths)
    return found, keys, list(index.lengths), [left.kind for left in indexed.left_out]


def _converted(file: io.BytesIO) -> Iterator[Any]:
    """Also what is behind damage. All of it lies within the file."""
    size = len(file.getbuffer())
    for member in members(file, damage=list[DamagedTar]()):
        assert 0 <= member.offset <= member.offset + member.size <= size, member
    yield from grouped(file, NAME, ["wav", "npy"], "recording", [])


TARGETS = [Target("foreign tars", tars, _read, hostile, (UserError,), protected=False)]
