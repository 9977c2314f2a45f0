"""Types of command-line values for both commands. argparse prints their errors as one line."""

from __future__ import annotations

import argparse

from d2v_ds.files import parse_size


def positive(text: str) -> int:
    """An integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer of at least 1")
    return value


def size(text: str) -> int:
    """Bytes, in the notation of files.parse_size."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
