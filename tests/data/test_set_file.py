"""index.json: every fault is one clear error, and a name is never more than the name of a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from d2v_ds.data.download import url_of
from d2v_ds.data.set_file import parse_set, plain_name
from d2v_ds.data.shard_format import INDEX_FILE, open_set
from d2v_ds.errors import UserError
from d2v_ds.loader.find_set import find_set
from shards.cli import main
from tests.data.test_shard_format import write_set

HOSTILE = [
    "../x", "/etc/x", "a/b", "a\\b", "..", ".", "", ".hidden", "-rf", "a\nb", "a\0b", "a\x1b[2J",
    "\ud800", "x" * 300, None, 3, ["a"],
]  # fmt: skip
FOR_A_SHELL = [
    "x;id",
    "$(id)",
    "`id`",
    "a b",
    "a'b",
    'a"b',
    "a|b",
    "a&b",
    "a>b",
    "~root",
    "a*",
    "{}",
]

FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"modality": 3}, "its modality is 3, not a text"),
    ({"unit": None}, "its unit is None, not a text"),
    ({"sample_rate": -1}, "its sample_rate is -1, not an integer from 0"),
    ({"sample_rate": 1.5}, r"its sample_rate is 1\.5, not an integer"),
    ({"sample_rate": True}, "its sample_rate is True, not an integer"),
    ({"fields": "flac"}, "its fields are not a list of names"),
    ({"fields": ["flac", "flac"]}, "a field occurs twice"),
    ({"fields": ["a/b"]}, "its field 'a/b' is not the extension"),
    ({"shards": {}}, "it has no list of shards"),
    ({"shards": [3]}, "a shard is 3, not an object"),
    ({"samples": 5}, "its samples is 5, but its shards have 4 in total"),
    ({"bytes": 0}, "its bytes is 0, but its shards have 7 in total"),
    ({"length": 10**400}, "its length is 1000.*not an integer from 0"),
    ({"length": None}, "its length is None"),
    ({"tars": "a\nb"}, r"its tars is 'a\\nb', not a text"),
    ({"tars": 3}, "its tars is 3"),
    ({"indexed": "yes"}, "its indexed is 'yes', not true or false"),
    ({"left_out": {"silent": "3"}}, "left_out 'silent' is '3', not an integer"),
    ({"left_out": []}, r"its left_out is \[\], not an object"),
    ({"inputs": "many"}, "its inputs is 'many'"),
    ({"options": [1]}, r"its options is \[1\], not an object"),
    ({"remarks": "x"}, "its remarks is 'x', not a list"),
    ({"tokenizer": {"file": "../../secret"}}, "'../../secret' is not a plain file name"),
    ({"tokenizer": {"vocab_size": "9"}}, "vocab_size of its tokenizer is '9'"),
]


@pytest.mark.parametrize(
    ("change", "fault"), FAULTS, ids=[str(change)[:40] for change, _ in FAULTS]
)
def test_a_fault_of_index_json(
    tmp_path: Path, change: dict[str, Any], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_set(tmp_path / "set").root / INDEX_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=rf"set/index\.json: is damaged \({fault}.*copy it again"):
        open_set(tmp_path / "set")
    assert main(["verify", str(tmp_path / "set")]) == 1
    assert "index.json: is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["name", "samples", "bytes", "length", "sha256"])
def test_a_fault_of_a_shard(tmp_path: Path, key: str) -> None:
    file = write_set(tmp_path / "set").root / INDEX_FILE
    whole = json.loads(file.read_text())
    for value in (None, -1, 0.5, "x/y", [], True):
        broken = {**whole, "shards": [{**whole["shards"][0], key: value}, whole["shards"][1]]}
        file.write_text(json.dumps(broken))
        with pytest.raises(UserError, match=r"index\.json: is damaged"):
            open_set(tmp_path / "set")
    del whole["shards"][0][key]
    file.write_text(json.dumps(whole))
    with pytest.raises(UserError, match=r"index\.json: is damaged"):
        open_set(tmp_path / "set")


def test_two_shards_of_a_name(tmp_path: Path) -> None:
    file = write_set(tmp_path / "set").root / INDEX_FILE
    whole = json.loads(file.read_text())
    whole["shards"][1]["name"] = whole["shards"][0]["name"]
    file.write_text(json.dumps(whole))
    with pytest.raises(UserError, match="it lists the shard speech-000000 twice"):
        open_set(tmp_path / "set")


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff", b"{", b'{"format": 1'])
def test_what_is_no_json(content: bytes) -> None:
    with pytest.raises(ValueError, match="not valid JSON"):
        parse_set(content)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission(tmp_path: Path) -> None:
    file = write_set(tmp_path / "set").root / INDEX_FILE
    file.chmod(0)
    with pytest.raises(UserError, match=r"index\.json: cannot be read \(Permission denied\)"):
        find_set(tmp_path / "set")


# -------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_name_is_the_name_of_a_file(tmp_path: Path, name: object) -> None:
    with pytest.raises(ValueError, match="name"):
        plain_name(name)
    file = write_set(tmp_path / "set").root / INDEX_FILE
    whole = json.loads(file.read_text())
    whole["shards"][0]["name"] = name
    file.write_text(json.dumps(whole))
    with pytest.raises(UserError, match=r"index\.json: is damaged"):
        open_set(tmp_path / "set", check_tars=False)


@pytest.mark.parametrize("name", ["speech-000000", "a b", "déjà", "x;y", "été.v2", "a+b=c,d@e%f"])
def test_names_of_local_files(name: str) -> None:
    assert plain_name(name) == name


@pytest.mark.parametrize("name", FOR_A_SHELL)
def test_names_never_reach_a_shell(name: str) -> None:
    """Quotes would not help: the command of the user may have its own around {}."""
    for where in ("pipe:cat '/far/{}'", "pipe:cat {}", "s3://bucket/set", "scp://host/set"):
        with pytest.raises(UserError, match="cannot be part of a command; rename the file"):
            url_of(where, f"{name}.tar")
    assert " " not in url_of("https://host/set", f"{name}.tar")


def test_urls_of_names() -> None:
    assert url_of("https://h/set/", "a b?é.tar") == "https://h/set/a%20b%3F%C3%A9.tar"
    assert url_of("http://h/set", "speech-000000.idx") == "http://h/set/speech-000000.idx"
    assert url_of("pipe:cat /x/{} {}", "é-1.tar") == "pipe:cat /x/é-1.tar é-1.tar"
    with pytest.raises(UserError, match="cannot be part of a command"):
        url_of("s3://bucket/set", "a::file.tar")  # fsspec would read two URLs
    with pytest.raises(UserError, match="is not a plain file name"):
        url_of("https://h/set", "../index.json")
