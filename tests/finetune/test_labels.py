"""Labels and the numbers that a head predicts."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2v_ds.errors import UserError
from d2v_ds.finetune.labels import BLANK, BOUNDARY, Classes, Letters, Numbers, Pieces
from d2v_ds.finetune.settings import in_order
from shards import samples

MODEL = str(samples.path("text") / "tokenizer.model")
TEXTS = ["HELLO WORLD", "IT'S  A\tTEST", "ä ö", ""]


def letters() -> Letters:
    return Letters(Letters.collect(TEXTS))


def ids(*numbers: int) -> Any:
    return np.array(numbers, dtype=np.int64)


def test_letters_collect_every_character_after_blank_and_boundary() -> None:
    assert letters().names == (BLANK, BOUNDARY, *sorted(set("HELLOWORLDIT'SATESTäö")))
    assert Letters.collect([]) == (BLANK, BOUNDARY)


@pytest.mark.parametrize("text", TEXTS)
def test_letters_round_trip_up_to_spaces(text: str) -> None:
    found = letters().encode(text)
    assert found.dtype == np.int64 and (found != 0).all()
    assert letters().decode(found) == " ".join(text.split())


def test_letters_of_a_word() -> None:
    ours = Letters((BLANK, BOUNDARY, "a", "b"))
    assert ours.encode("ab  ba").tolist() == [2, 3, 1, 3, 2]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_greedy_matches_a_slow_reference(best: list[int]) -> None:
    slow = [n for i, n in enumerate(best) if n != 0 and (i == 0 or best[i - 1] != n)]
    ours = Letters((BLANK, BOUNDARY, "a", "b"))
    assert ours.greedy(np.array(best)) == ours.decode(slow)


def test_a_repeated_letter_needs_a_blank() -> None:
    ours = Letters((BLANK, BOUNDARY, "a"))
    assert (ours.greedy(ids(2, 2, 2)), ours.greedy(ids(2, 0, 2))) == ("a", "aa")
    assert ours.greedy(ids(1, 2, 1, 0, 1, 2, 1)) == "a a"


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("a cab", "its transcript has 'b', 'c', not among the 3 symbols"),
        ("a|a", "its transcript has '|', which separates words"),
        (3, "its transcript is not text but int"),
        (None, "its transcript is not text but NoneType"),
    ],
)
def test_bad_transcripts(label: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Letters((BLANK, BOUNDARY, "a")).encode(label)
    assert str(caught.value) == message


# ------------------------------------------------------------------------------------------ pieces


def pieces() -> Pieces:
    return Pieces(Pieces.collect(MODEL), MODEL)


@pytest.mark.parametrize("text", ["the european lobster", "naïve 東京 ❤", "  two  spaces ", ""])
def test_pieces_round_trip_with_byte_fallback(text: str) -> None:
    ours = pieces()
    found = ours.encode(text)
    assert (found > 0).all() and ours.decode(found) == " ".join(text.split())


def test_unknown_characters_become_bytes() -> None:
    ours = pieces()
    names = [ours.names[i] for i in ours.encode("東")]
    assert names[-3:] == ["<0xE6>", "<0x9D>", "<0xB1>"]
    assert ours.decode(ours.encode("東")[-2:]) != ""  # half a character does not fail


def test_pieces_reach_loader_workers() -> None:
    ours = pieces()
    there = pickle.loads(pickle.dumps(ours))
    assert there.names == ours.names
    assert there.encode("a lobster").tolist() == ours.encode("a lobster").tolist()
    assert len(pickle.dumps(ours)) < 2_000_000


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(b"no model")
    for path in (tmp_path / "x.model", tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match=r"finetune\.tokenizer: .*cannot be read as a senten"):
            Pieces.collect(str(path))


# ------------------------------------------------------------------------------ classes and numbers


def test_classes_compare_labels_as_text() -> None:
    ours = Classes(("0", "1", "True"))
    assert [ours.encode(label) for label in ("1", 1, 0, True)] == [1, 1, 0, 2]
    with pytest.raises(ValueError, match="'lft' is not among the 2 classes; did you mean 'left'"):
        Classes(("left", "right")).encode("lft")


def test_numbers() -> None:
    assert [Numbers().encode(label) for label in ("3.5", 2, -0.5)] == [3.5, 2.0, -0.5]
    for label in ("x", None, [1], float("nan"), "inf"):
        with pytest.raises(ValueError, match="is not a number"):
            Numbers().encode(label)


def test_the_order_of_classes() -> None:
    assert in_order({"10", "9", "-1"}) == ("-1", "9", "10")
    assert in_order({"b", "a", "10"}) == ("10", "a", "b")
    assert in_order({"--1", "2"}) == ("--1", "2")
    assert in_order({"1", "01", "001"}) == ("001", "01", "1")
