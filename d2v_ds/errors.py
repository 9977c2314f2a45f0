"""The error that a person can cause; the commands turn it into one line and exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message says what was given, what is allowed and what to change."""


def suggestion(given: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for a near miss, else the list of what is allowed."""
    known = sorted(known)
    near = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f" (allowed: {', '.join(known)})"
