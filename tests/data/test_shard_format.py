"""The format of shard sets: the index on disk, and every error of a set."""

from __future__ import annotations

import json
import subprocess
import sys
from array import array
from pathlib import Path

import numpy as np
import pytest

from d2v_ds.data.shard_format import (
    INDEX_FILE,
    PLAN_FILE,
    ShardEntry,
    ShardSet,
    fingerprint,
    open_set,
    set_json,
)
from d2v_ds.data.shard_index import index_bytes, read_index
from d2v_ds.errors import UserError


def write_index(path: Path, fields: tuple[str, ...] = ("flac", "json")) -> bytes:
    count = 3
    data = index_bytes(
        fields,
        10_240,
        ["a/b", "ключ", "c"],
        array("q", range(512, 512 + count * len(fields))),
        array("I", range(count * len(fields))),
        array("I", [2**32 - 1, 0, 7] * len(fields)),
        array("I", [16_000, 1, 2**32 - 1]),
    )
    path.write_bytes(data)
    return data


def write_set(root: Path, sizes: tuple[int, ...] = (3, 4), modality: str = "speech") -> ShardSet:
    root.mkdir(exist_ok=True)
    shards = tuple(
        ShardEntry(f"{modality}-{i:06d}", 2, size, 100, f"{i:064x}") for i, size in enumerate(sizes)
    )
    result = ShardSet(root, modality, "frames", 16_000, ("flac", "json"), shards)
    for shard in shards:
        result.tar(shard).write_bytes(bytes(shard.bytes))
    (root / INDEX_FILE).write_text(set_json(result, options={"rate": 16_000}))
    return result


@pytest.mark.parametrize("fields", [("flac",), ("flac", "json"), ("cls", "jpg", "json")])
def test_index_round_trip(tmp_path: Path, fields: tuple[str, ...]) -> None:
    write_index(tmp_path / "x.idx", fields)
    index = read_index(tmp_path / "x.idx")
    assert (index.count, index.bytes, index.fields) == (3, 10_240, fields)
    assert [index.key(i) for i in range(3)] == ["a/b", "ключ", "c"]
    offsets = np.frombuffer(index.offsets, np.int64).reshape(3, len(fields))
    assert offsets.ravel().tolist() == list(range(512, 512 + 3 * len(fields)))
    assert np.frombuffer(index.sizes, np.uint32).tolist() == list(range(3 * len(fields)))
    found = np.frombuffer(index.checksums, np.uint32).tolist()
    assert found == [2**32 - 1, 0, 7] * len(fields)
    assert np.frombuffer(index.lengths, np.uint32).tolist() == [16_000, 1, 2**32 - 1]


def test_index_is_wrapped_without_a_copy(tmp_path: Path) -> None:
    data = write_index(tmp_path / "x.idx")
    assert (data.index(b"\n") + 1) % 8 == 0, "the arrays are not aligned"
    index = read_index(tmp_path / "x.idx")
    offsets = np.frombuffer(index.offsets, np.int64)
    lengths = np.frombuffer(index.lengths, np.uint32)
    assert offsets.base is not None and not offsets.flags.owndata and not lengths.flags.writeable
    assert np.shares_memory(offsets, np.frombuffer(index.offsets, np.int64))


def test_index_size(tmp_path: Path) -> None:
    data = write_index(tmp_path / "x.idx")
    keys = len("a/b") + len("ключ".encode()) + len("c")
    assert len(data) == data.index(b"\n") + 1 + 3 * 40 + 4 + keys


@pytest.mark.parametrize("damage", ["flip", "cut", "header", "empty", "format", "list"])
def test_damaged_index(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.idx"
    data = bytearray(write_index(path))
    if damage == "flip":
        data[-9] ^= 1
    elif damage == "cut":
        del data[-5:]
    elif damage == "header":
        data[3] ^= 255
    elif damage == "format":
        data = bytearray(bytes(data).replace(b'"format": 2', b'"format": 9'))
    elif damage == "list":
        data = bytearray(b"[1]\n" + data)
    else:
        data.clear()
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"x\.idx: is damaged .*convert the corpus again"):
        read_index(path)


def test_an_unknown_kind_of_checksum(tmp_path: Path) -> None:
    path = tmp_path / "x.idx"
    none: dict[str, array[int]] = {code: array(code) for code in "qI"}
    path.write_bytes(index_bytes(("flac",), 0, [], none["q"], *[none["I"]] * 3, checksum="md5!"))
    with pytest.raises(UserError, match=r"x\.idx: checksum 'md5!': this version supports xxh3"):
        read_index(path)


def test_missing_index(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.idx: is missing"):
        read_index(tmp_path / "x.idx")


def test_open_set(tmp_path: Path) -> None:
    written = write_set(tmp_path / "set")
    assert open_set(tmp_path / "set", "speech") == written == open_set(str(tmp_path / "set"))
    assert (written.samples, written.length) == (4, 200)


def test_fingerprint_is_of_the_shards(tmp_path: Path) -> None:
    one, other = write_set(tmp_path / "a"), write_set(tmp_path / "b")
    assert fingerprint(one) == fingerprint(other)
    assert fingerprint(one) != fingerprint(write_set(tmp_path / "c", (3, 4, 5)))


def test_no_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such shard set; `d2v-shards --help`"):
        open_set(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: is a file, but a shard set is a folder"):
        open_set(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: is not a shard set, because"):
        open_set(tmp_path / "empty")


def test_tars_without_index(tmp_path: Path) -> None:
    (tmp_path / "train-000000.tar").write_bytes(bytes(10_240))
    with pytest.raises(
        UserError, match=r"has tars but no index\.json, so d2v-shards did not write"
    ):
        open_set(tmp_path)


def test_unfinished_conversion(tmp_path: Path) -> None:
    (tmp_path / PLAN_FILE).write_text("{}")
    (tmp_path / "speech-000000.tar").write_bytes(b"")
    with pytest.raises(UserError, match="not complete; run the same d2v-shards command again"):
        open_set(tmp_path)


def test_folder_of_sets(tmp_path: Path) -> None:
    write_set(tmp_path / "train")
    write_set(tmp_path / "test")
    with pytest.raises(UserError, match="but contains some: test, train"):
        open_set(tmp_path)


def test_another_modality(tmp_path: Path) -> None:
    write_set(tmp_path / "set", modality="images")
    with pytest.raises(UserError, match="set: holds images, but speech is required"):
        open_set(tmp_path / "set", "speech")


def test_missing_and_cut_tar(tmp_path: Path) -> None:
    written = write_set(tmp_path / "set")
    tar = written.tar(written.shards[1])
    tar.write_bytes(b"x")
    with pytest.raises(UserError, match=r"speech-000001\.tar: has 1 bytes, but index.json lists"):
        open_set(tmp_path / "set")
    tar.unlink()
    with pytest.raises(UserError, match=r"speech-000001\.tar: is missing, but index\.json lists"):
        open_set(tmp_path / "set")
    assert open_set(tmp_path / "set", check_tars=False) == written


def test_damaged_set_file(tmp_path: Path) -> None:
    file = write_set(tmp_path / "set").root / INDEX_FILE
    whole = json.loads(file.read_text())
    file.write_text("{")
    with pytest.raises(UserError, match=r"index\.json: is damaged \(not valid JSON: "):
        open_set(tmp_path / "set")
    file.write_text(json.dumps({**whole, "format": 2}))
    with pytest.raises(UserError, match="format 2, but this version reads format 1"):
        open_set(tmp_path / "set")
    file.write_text("[]")
    with pytest.raises(UserError, match="format None"):
        open_set(tmp_path / "set")
    file.write_text(json.dumps({**whole, "shards": [{"name": "x"}]}))
    with pytest.raises(UserError, match=r"index\.json: is damaged"):
        open_set(tmp_path / "set")
    file.write_text(json.dumps({**whole, "shards": [], "samples": 0, "bytes": 0, "length": 0}))
    with pytest.raises(UserError, match="has no samples"):
        open_set(tmp_path / "set")


def test_standard_library_only() -> None:
    code = "import sys, d2v_ds.data.shard_format; print({'numpy', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
