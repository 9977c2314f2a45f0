"""Exception types with a defined meaning, and suggestions for misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message says what was given, what is allowed and what to change; the commands
    print it as one line and exit with code 2."""


class Superseded(RuntimeError):
    """A newer start of the run owns the run folder; this one may no longer write into it."""


def suggestion(given: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for a similar name, otherwise the list of allowed names."""
    known = sorted(known)
    near = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f" (allowed: {', '.join(known)})"
