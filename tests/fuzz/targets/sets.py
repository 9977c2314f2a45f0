"""The files of a shard set, local and remote: index.json, .idx, tokenizer.json; and what a
conversion that resumes reads back."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from array import array
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import unquote, urlsplit

from d2v_ds.data.checksum import checksum_of
from d2v_ds.data.download import url_of
from d2v_ds.data.shard_format import (
    INDEX_FILE,
    ShardEntry,
    ShardSet,
    open_set,
    set_json,
    set_of,
)
from d2v_ds.data.shard_index import index_bytes, index_of, read_lengths
from d2v_ds.data.tokenizer_json import digest, is_byte_level, parsed, special_tokens, vocab_size
from d2v_ds.errors import UserError
from shards.resume import parse_plan, parse_report
from shards.stats import describe
from shards.verify import verify_shard
from shards.writer import header
from tests.fuzz.harness import Target
from tests.fuzz.mutations import first_line, json_values

KEYS = ("a", "b/c", "déjà")
FIELDS = ("flac", "json")
LENGTHS = (1, 2, 3)
NAME = "s-0"


def _tar() -> tuple[bytes, list[int], list[int], list[int]]:
    """(a small tar; offsets, sizes, checksums of its members)"""
    data, offsets, sizes, checksums = bytearray(), [], [], []
    checksum = checksum_of("crc32")
    assert checksum
    for key in KEYS:
        for field, payload in zip(FIELDS, (b"sound", b'{"x": 1}'), strict=True):
            data += header(f"{key}.{field}", len(payload))
            offsets.append(len(data))
            sizes.append(len(payload))
            checksums.append(checksum(payload))
            data += payload.ljust(512, b"\0")
    return bytes(data) + bytes(10_240 - len(data)), offsets, sizes, checksums


TAR, OFFSETS, SIZES, CHECKSUMS = _tar()
INDEX = index_bytes(
    FIELDS,
    len(TAR),
    KEYS,
    array("q", OFFSETS),
    array("I", SIZES),
    array("I", CHECKSUMS),
    array("I", LENGTHS),
    "crc32",
)
OLD_INDEX = re.sub(rb', "head": \d+}', b"}", INDEX)  # as earlier versions wrote it
ENTRY = ShardEntry(NAME, len(KEYS), len(TAR), sum(LENGTHS), sha256(TAR).hexdigest())


def _set(folder: Path, shards: int = 1) -> ShardSet:
    entries = tuple(dataclasses.replace(ENTRY, name=f"s-{i}") for i in range(shards))
    return ShardSet(folder, "speech", "frames", 16_000, FIELDS, entries)


def _read_index(data: bytes, folder: Path) -> Any:
    """The index as every reader uses it: of a set with this tar."""
    shards = _set(folder)
    shards.index(ENTRY).write_bytes(data)
    shards.tar(ENTRY).write_bytes(TAR)
    lengths = read_lengths(shards.index(ENTRY), ENTRY, shards.fields).tolist()
    found = index_of(shards, ENTRY)
    assert lengths == found.lengths.tolist() and found.fields == FIELDS
    ends = [o + s for o, s in zip(found.offsets, found.sizes, strict=True)]
    assert min(found.offsets) >= 0 and max(ends) <= len(TAR)
    return [found.key(i) for i in range(found.count)], lengths, found.offsets.tolist()


def _verify(data: bytes, folder: Path) -> None:
    """`d2v-shards verify` reports every damage of the index as a problem."""
    shards = _set(folder)
    shards.index(ENTRY).write_bytes(data)
    shards.tar(ENTRY).write_bytes(TAR)
    if problems := verify_shard((shards, ENTRY, None)).problems:
        raise UserError(problems[0])


def _sets(folder: Path) -> Sequence[bytes]:
    more: dict[str, Any] = {
        "left_out": {"damaged": 1},
        "options": {"rate": 16_000, "split": {"train": 1.0}},
        "inputs": 7,
        "quarantined": 1,
        "remarks": ["one"],
        "tokenizer": {"file": "tokenizer.model", "sha256": "0" * 64, "vocab_size": 3},
    }
    return [set_json(_set(folder, 2), **more).encode()]


def _open_set(data: bytes, folder: Path) -> Any:
    (folder / INDEX_FILE).write_bytes(data)
    found = open_set(folder, check_tars=False)
    assert all(found.tar(s).parent == (found.tars or folder) for s in found.shards)
    assert all(found.index(s).parent == folder for s in found.shards)
    return found, found.samples, found.length, [found.tar(s) for s in found.shards]


def _describe(data: bytes, folder: Path) -> Any:
    """A complete set, with its tars, as `d2v-shards stats` reads it."""
    shards = _set(folder, 2)
    for entry in shards.shards:
        if not shards.tar(entry).exists():
            shards.tar(entry).write_bytes(TAR)
            shards.index(entry).write_bytes(INDEX)
    (folder / INDEX_FILE).write_bytes(data)
    return [table.rows for table in describe(folder)]


PLACES = ("pipe:cat '/far/{}'", "https://far.example/set", "s3://far/set")


def _names(data: bytes, folder: Path) -> Any:
    """What a server names must remain a name: in the cache, in a command and in a URL."""
    shards = set_of(data, folder, "https://far.example/set/index.json", "upload it again")
    command, web, bucket = PLACES
    found = []
    for entry in shards.shards:
        name = f"{entry.name}.tar"
        assert shards.index(entry).parent == folder and not name.startswith(".")
        assert unquote(urlsplit(url_of(web, name)).path) == f"/set/{name}"
        try:
            found += [url_of(command, name), url_of(bucket, name)]
        except UserError:  # only the web takes every name
            continue
        assert shlex.split(found[-2].removeprefix("pipe:")) == ["cat", f"/far/{name}"]
    return found, shards.samples


def _reports(folder: Path) -> Sequence[bytes]:
    entry = {"name": NAME, "samples": 1, "bytes": 10_240, "length": 5, "sha256": "0" * 64}
    findings = [["a.wav", "is silent", "silent"]]
    return [json.dumps({"entry": entry, "findings": findings, "found": 0}).encode()]


def _report(data: bytes, folder: Path) -> Any:
    return parse_report(data, NAME)


def _plans(folder: Path) -> Sequence[bytes]:
    plan = {
        "plan": "0" * 64,
        "converter": 4,
        "options": {"rate": 16_000, "split": {"train": {"train": 0.9, "dev": 0.1}}},
        "shards": 3,
        "inputs": 12,
        "findings": [["a.wav", "is silent", "silent"]],
        "modality": "speech",
        "unit": "frames",
        "sample_rate": 16_000,
        "fields": ["flac", "json"],
        "about": {},
    }
    return [json.dumps(plan).encode()]


def _tokenizers(folder: Path) -> Sequence[bytes]:
    added = [{"id": 5, "content": "<s>", "special": True}, {"id": 6, "content": "</s>"}]
    step = {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}]}
    bpe = {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b", ["a", "b"]]}
    unigram = {"vocab": [["a", -1.5], ["b", -2.0]]}
    return [
        json.dumps({"model": model, "added_tokens": added, "pre_tokenizer": step}).encode()
        for model in (bpe, unigram)
    ]


def _read_tokenizer(data: bytes, folder: Path) -> Any:
    raw = parsed(data)
    return digest(data), special_tokens(raw), vocab_size(raw), is_byte_level(raw)


def _head(data: bytes, rng: Random) -> bytes:
    return first_line(json_values)(data, rng)


USER, VALUE = (UserError,), (ValueError,)
TARGETS = [
    Target("idx", lambda f: [INDEX], _read_index, _head, USER, protected=True),
    Target("idx-old", lambda f: [OLD_INDEX], _read_index, _head, USER, protected=True),
    Target("idx-verify", lambda f: [INDEX, OLD_INDEX], _verify, _head, USER, protected=True),
    Target("index.json", _sets, _open_set, json_values, USER, protected=False),
    Target("index.json-stats", _sets, _describe, json_values, USER, protected=False),
    Target("index.json-remote", _sets, _names, json_values, USER, protected=False),
    Target("plan.json", _plans, lambda d, f: parse_plan(d), json_values, VALUE, protected=False),
    Target("report.json", _reports, _report, json_values, VALUE, protected=False),
    Target("tokenizer.json", _tokenizers, _read_tokenizer, json_values, VALUE, protected=False),
]
