"""--only and --except: which samples of a corpus are converted.

Each takes files that list keys or paths, one per line, and patterns of paths, such as
`train-clean-*/**`. A pattern also selects everything below a folder that it matches.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from d2v_ds.data.checks import Finding, listed
from d2v_ds.errors import UserError
from d2v_ds.files import sha256
from shards.family import Sample
from shards.findings import outcome

MOST_PLACES = 1000  # first parts of paths that are counted for a message
OF_ROW = re.compile(r"[^/]+, (?:line|item) \d+")  # of SOURCE: a row that names no path


class Chooser:
    """What two lists of options choose, and what they have chosen so far."""

    def __init__(self, only: Sequence[str], leave_out: Sequence[str]) -> None:
        self.not_chosen = 0
        self._only, self._except = _Option("--only", only), _Option("--except", leave_out)
        self._places: Counter[str] = Counter()

    def takes(self, names: Iterable[str]) -> bool:
        """Whether an input with these names, its key and its paths, is chosen."""
        names = list(names)
        wanted = self._only.has(names) if self._only.given else True
        return not self._except.has(names) and wanted

    def chosen(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        if not self._only.given and not self._except.given:
            yield from samples
            return
        patterns = bool(self._only.patterns or self._except.patterns)
        for sample in samples:
            names = [sample.key, *(item.path for item in sample.inputs)]
            if patterns and len(self._places) < MOST_PLACES:
                first, slash, _ = names[1].partition("/")
                self._places[first + slash] += 1
            if self.takes(names):
                yield sample
            else:
                self.not_chosen += sum(item.rows for item in sample.inputs)

    def findings(self, findings: Sequence[Finding]) -> list[Finding]:
        """Those about chosen files. Raises UserError if a name or pattern matches nothing; call it
        after `chosen`."""
        kept = []
        for found in findings:
            names = _names_of(found.name)
            about_all = self._only.patterns and OF_ROW.fullmatch(found.name)
            is_listed = self._only.has(names)
            wanted = is_listed or not self._only.patterns or about_all
            if not self._except.has(names) and wanted:
                kept.append(found)
            elif outcome(found.kind) == "left_out":
                self.not_chosen += 1
        for option in (self._only, self._except):
            option.check(self._places)
        return kept


class _Option:
    """The values of one option."""

    def __init__(self, name: str, values: Sequence[str]) -> None:
        self.name, self.given = name, bool(values)
        self.files = [value for value in values if Path(value).is_file()]
        self.patterns = [value for value in values if value not in self.files]
        self._listed: set[str] = set().union(*(_read_list(Path(file)) for file in self.files))
        self._missing = set(self._listed)
        self._unmatched = {pattern: self._matcher([pattern]) for pattern in self.patterns}
        self._matches = self._matcher(self.patterns) if self.patterns else None

    def _matcher(self, patterns: Sequence[str]) -> Callable[[str], re.Match[str] | None]:
        try:
            return re.compile("|".join(map(_as_regex, patterns)), re.DOTALL).fullmatch
        except re.error as error:  # such as the range [z-a]
            raise UserError(f"{self.name} {patterns[0]}: is not a pattern ({error})") from None

    def has(self, names: Sequence[str]) -> bool:
        self._note(names)
        if not self._listed.isdisjoint(names):
            return True
        return self._matches is not None and any(map(self._matches, names))

    def _note(self, names: Sequence[str]) -> None:
        """Removes what these names match from what matches nothing."""
        if self._missing:
            self._missing.difference_update(names)
        for pattern, matches in list(self._unmatched.items()):
            if any(map(matches, names)):
                del self._unmatched[pattern]

    def check(self, places: Counter[str]) -> None:
        """Raises UserError if a name or pattern matched nothing."""
        if self._missing:
            raise UserError(
                f"{self.name} {', '.join(self.files)}: {len(self._missing)} of its names are "
                f"neither a key nor a path of the corpus; the first: {min(self._missing)!r}. "
                "A file is read as a list of names; to choose the file itself, give a pattern that "
                "is not its name, such as 'a.wa?'"
            )
        for pattern in self._unmatched:
            there = listed(dict(places.most_common())) or " (nothing)"
            raise UserError(
                f"{self.name} {pattern}: is neither a file nor a pattern that matches a path below "
                f"SOURCE. It contains{there}"
            )


def _as_regex(pattern: str) -> str:
    """`*` and `?` do not match `/`, `**` matches any number of folders. What the pattern matches
    may be a folder above the path. A name with brackets, `take [1].wav`, matches itself too."""
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    regex = "/" if pattern.startswith("/") else ""
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if part == "**":
            regex += ".+" if last else "(?:[^/]+/)*"
        else:
            regex += _part_as_regex(part) + ("(?:/.*)?" if last else "/")
    itself = f"|{re.escape('/'.join(parts))}(?:/.*)?" if "[" in pattern else ""
    return f"(?:{regex}{itself})"


def _part_as_regex(part: str) -> str:
    pieces = re.split(r"(\*+|\?|\[!?[^\]]+\])", part)
    result = ""
    for piece in pieces:
        if piece.startswith("*"):
            result += "[^/]*"
        elif piece == "?":
            result += "[^/]"
        elif piece.startswith("[") and len(piece) > 2:
            negated = piece[1] == "!"
            members = re.sub(r"[\\^\[&~|]", r"\\\g<0>", piece[1 + negated : -1])
            result += f"[{'^' * negated}{members}]"
        else:
            result += re.escape(piece)
    return result


def _names_of(name: str) -> list[str]:
    """The name of a finding, and the same without what follows the path: `a.tar, key`."""
    names = [name]
    while ", " in name:
        name = name.rpartition(", ")[0]
        names.append(name)
    return names


def options(values: Sequence[str]) -> str:
    """The values of an option as index.json records them: lists by their content."""
    return ", ".join(_digest_of(Path(v)) if Path(v).is_file() else v for v in values)


def _read_list(path: Path) -> frozenset[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a list of keys or paths ({error})") from None
    return frozenset(line.strip(" \t\r") for line in lines if line.strip())


def _digest_of(path: Path) -> str:
    try:
        return sha256(path)[:12]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
