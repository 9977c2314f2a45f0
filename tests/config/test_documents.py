"""YAML and JSON from people: strict, bounded, and one line for each mistake."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from d2v_ds.config.documents import MAX_BYTES, NotValid, load_json, load_yaml, parse_yaml, shown
from d2v_ds.errors import UserError


def test_ordinary_documents() -> None:
    assert parse_yaml("a: {b: [1, 2.5, x, true, null]}\n'c': '2020-01-01'") == {
        "a": {"b": [1, 2.5, "x", True, None]},
        "c": "2020-01-01",
    }
    assert parse_yaml("") is None and parse_yaml("3") == 3


def test_aliases_become_copies() -> None:
    found = parse_yaml("a: &x {n: 1}\nb: *x\nc: {<<: *x, m: 2}\nd: {<<: [{n: 3}, *x], m: 4}")
    assert found == {
        "a": {"n": 1},
        "b": {"n": 1},
        "c": {"n": 1, "m": 2},
        "d": {"n": 3, "m": 4},
    }
    assert found["a"] is not found["b"]


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 30)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim:\n  lr: 1\nrun: {}\noptim:\n  lr: 2", "line 4, column 1: 'optim' is given twice"),
        ("optim: {lr: 1, lr: 2}", "line 1, column 16: 'lr' is given twice in one mapping"),
        (
            "run:\n\tsteps: 3",
            "line 2, column 1: found character '\\t' that cannot start any token;",
        ),
        ("{1: 2}", "line 1, column 2: the key 1 is not text; put it in quotes"),
        ("yes: 2", "the key True is not text"),
        ("? [a]\n: 2", "the key ['a'] is not text"),
        ("? {a: b}\n: 2", "the key {'a': 'b'} is not text"),
        ("a: 2020-01-01", "line 1, column 4: 2020-01-01 is read as a date; put it in quotes"),
        ("a: 2020-13-45", "2020-13-45 is read as a date"),
        ("a: !!int x", "line 1, column 4: 'x' is not int"),
        ("a: !!bool x", "'x' is not bool"),
        ("a: !!float x", "'x' is not float"),
        ("a: !!binary x", "the tag tag:yaml.org,2002:binary is not allowed; remove it"),
        ("a: !!python/object/apply:os.system [id]", "is not allowed; remove it"),
        ("a: !mine x", "the tag !mine is not allowed"),
        ("a: !!set {x}", "is not allowed"),
        ("a: " + "9" * 5000, "is not int"),
        ("a: [", "line 1, column 5: expected the node content"),
        ("a: \0", "special characters are not allowed"),
        ("a: *x", "found undefined alias 'x'"),
        ("a: &x [*x]", "line 1, column 4: a value contains itself"),
        ("a: {<<: 3}", "<< needs a mapping"),
        ("[" * 3000, "nested more than 50 levels deep"),
        ("[" * 60 + "]" * 60, "nested more than 50 levels deep"),
        ("{a: " * 3000, "nested more than 50 levels deep"),
        (BOMB, "more than 200,000 values, with aliases written out"),
        (MERGES, "more than 200,000 values, with aliases written out"),
        ("a\n---\nb", "but found another document"),
    ],
)
def test_what_is_refused_and_where(text: str, message: str) -> None:
    with pytest.raises(NotValid) as caught:
        parse_yaml(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(b"\xef\xbb\xbfrun: {steps: 3}\n")  # with a byte order mark
    assert load_yaml(file) == {"run": {"steps": 3}}

    def refused(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            load_yaml(path)
        return str(caught.value).removeprefix(f"{path}: ")

    file.write_bytes("run: é".encode("latin-1"))
    assert refused(file) == "not valid YAML (byte 5 is not UTF-8)"
    file.write_text("a: 1\na: 2\n")
    assert refused(file).startswith("not valid YAML (line 2, column 1: 'a' is given twice")
    with file.open("wb") as opened:
        opened.truncate(MAX_BYTES + 1)
    assert refused(file).startswith("has more than 10 MB, so it is not a configuration in YAML")
    assert refused(tmp_path) == "cannot be read (Is a directory)"
    assert refused(tmp_path / "none.yaml") == "no such file"
    assert refused(tmp_path / ("x" * 300)) == "cannot be read (File name too long)"
    assert refused(tmp_path / "a\0b").startswith("cannot be read (embedded null")
    if os.geteuid():
        file.chmod(0)
        assert refused(file) == "cannot be read (Permission denied)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "'a' is given twice in one object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ("[1]", "expected a JSON object"),
        ("", "not valid JSON"),
    ],
)
def test_json(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_json(file, "a file in JSON")
    assert str(caught.value).startswith(f"{file}: ") and message in str(caught.value)
    file.write_text('{"a": [1, {"a": 2}]}')
    assert load_json(file, "a file in JSON") == {"a": [1, {"a": 2}]}


def test_values_in_messages_are_short() -> None:
    assert shown("x") == "'x'" and shown(3) == "3"
    assert shown(int("9" * 400)) == "an integer of 400 digits"
    assert shown(-(16**5000)).startswith("-an integer of 60")
    assert shown(list(range(30))) == "a list of 30 values"
    assert len(shown("x" * 1000)) == 100
    assert shown([16**5000]) == "a list"
