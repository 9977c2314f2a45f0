"""The tars that d2v-shards writes equal those of webdataset and tarfile."""

from __future__ import annotations

import hashlib
import io
import resource
import tarfile
from pathlib import Path

import pytest
import webdataset as wds

from shards.writer import ShardWriter, header


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 1024, 10_240])
def test_padding_equals_webdatasets(size: int, tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "speech-000000", ("flac", "json")) as writer:
        for key in ("a", "b/c"):
            writer.add(key, (bytes(size), b"{}"), 1)
        entry = writer.finish()
    theirs = io.BytesIO()
    with wds.TarWriter(theirs, mtime=0, encoder=False) as peer:
        for key in ("a", "b/c"):
            peer.write({"__key__": key, "flac": bytes(size), "json": b"{}"})
    assert (tmp_path / "speech-000000.tar").read_bytes() == theirs.getvalue()
    assert entry.sha256 == hashlib.sha256(theirs.getvalue()).hexdigest()


@pytest.mark.parametrize("name", ["", "a.json", "ä/ö.flac", "x" * 100, "dir/" * 24 + "abc.flac"])
@pytest.mark.parametrize("size", [0, 1, 4095, 8**11 - 1])
def test_headers_equal_tarfiles(name: str, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.uname, member.gname = size, 0o444, "bigdata", "bigdata"
    assert header(name, size) == member.tobuf(tarfile.USTAR_FORMAT, "utf-8")


def test_an_abandoned_shard_leaves_no_files(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "speech-000000", ("flac",)) as writer:
        writer.add("a", (b"x",), 1)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_files(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError), ShardWriter(tmp_path, "speech-000000", ("flac",)) as writer:
            writer.add("a", (bytes(1 << 20),), 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
