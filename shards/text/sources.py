"""Text as it lies there: txt, JSON lines (also .gz, .zst) and Parquet -> parts -> documents.

    folder or file -> TextSource.parts (a stretch of a file, cut between documents; row groups)
        -> TextSource.documents of a part: (name, text, columns), one after the other

A part is what one process reads at a time, so its size bounds nothing but the work that is lost
when it is killed; compressed files cannot be entered in the middle and are one part each. Text is
UTF-8 and stays as it is, but for a byte order mark and the newline that ends a line.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, cast

from d2v_ds.errors import UserError, suggestion
from shards import parquet

if TYPE_CHECKING:
    from shards.family import Input, Sample

Document = tuple[str, str, dict[str, Any]]  # its name for messages, text, what is said about it
Rejected = tuple[str, str]  # name, reason
Divided = Literal["line", "blank-line", "file"]

LINES = (".txt", ".text")
JSON_LINES = (".jsonl", ".ndjson", ".json")
TABLE = ".parquet"
COMPRESSED = (".gz", ".zst")
KINDS = ".txt or .jsonl (also .gz, .zst), .parquet"
STRETCH = 4_000_000  # bytes of a file that make a part, about
BOM = b"\xef\xbb\xbf"
SCALAR = (str, int, float)


@dataclass(frozen=True)
class TextSource:
    """Where text is read from, and how; it travels to the worker processes."""

    root: Path  # of the paths in parts
    files: tuple[str, ...]
    divided: Divided = "file"  # of .txt: what a document is
    text_key: str = "text"  # of .jsonl and .parquet
    label_key: str = ""  # "": no labels

    @staticmethod
    def open(
        source: Path, divided: Divided = "file", text_key: str = "text", label_key: str = ""
    ) -> TextSource:
        """A folder, everything below it, or one file. Raises UserError."""
        if source.is_file():
            root, files = source.parent, [source.name]
            if not _kind(source.name):
                raise UserError(f"{source}: is neither a folder nor a file of {KINDS}")
        elif source.is_dir():
            root, files = source, list(_walk(source))
        else:
            raise UserError(f"{source}: no such folder or file")
        if label_key and any(_kind(file) in LINES for file in files):
            raise UserError(f"--label-key {label_key}: .txt has no labels; take .jsonl or .parquet")
        return TextSource(root, tuple(files), divided, text_key, label_key)

    # ------------------------------------------------------------------------------------- parts

    def samples(self) -> Iterator[Sample]:
        """Each part as a sample of a plan."""
        from shards.family import Sample
        from shards.keys import make_key, part_key

        for file in self.files:
            key = make_key(file)
            for i, (part, size) in enumerate(self._parts_of(file)):
                yield Sample(part_key(key, i), (part,), {}, size)

    def parts(self) -> Iterator[Input]:
        for file in self.files:
            yield from (part for part, _ in self._parts_of(file))

    def _parts_of(self, file: str) -> Iterator[tuple[Input, int]]:
        """With the bytes of each. A file that cannot be read is one part: reading it says why."""
        from shards.family import Input

        path = self.root / file
        kind = _kind(file)
        try:
            size = path.stat().st_size
            if kind == TABLE:
                yield from parquet.row_groups(self.root, file)
            elif size <= STRETCH or file.endswith(COMPRESSED) or self._whole(file):
                yield Input(file), size
            else:
                with path.open("rb") as opened:
                    blank = kind in LINES and self.divided == "blank-line"
                    yield from (
                        (Input(file, (start, end - start)), end - start)
                        for start, end in _stretches(opened, size, blank)
                    )
        except OSError:
            yield Input(file), 0

    def _whole(self, file: str) -> bool:
        return _kind(file) in LINES and self.divided == "file"

    # --------------------------------------------------------------------------------- documents

    def documents(self, part: Input, rejected: list[Rejected]) -> Iterator[Document]:
        """Those of one part. What cannot be used is added to `rejected`, with the reason."""
        read = self._rows if _kind(part.path) == TABLE else self._texts
        try:
            yield from read(part, rejected)
        except UserError:  # a package is missing
            raise
        except OSError as error:
            rejected.append((str(part), error.strerror or str(error)))
        except (EOFError, ValueError, zlib.error) as error:
            rejected.append((str(part), f"cannot be read to its end ({error})"))

    def _texts(self, part: Input, rejected: list[Rejected]) -> Iterator[Document]:
        as_json = _kind(part.path) in JSON_LINES
        with open_bytes(self.root / part.path) as file:
            if as_json or self.divided == "line":
                pieces = _lines(file, part)
            elif self.divided == "blank-line":
                pieces = _paragraphs(file, part)
            else:
                pieces = iter([("", file.read().removeprefix(BOM))])
            for where, data in pieces:
                name = part.path + where
                try:
                    text = data.decode()
                    text, columns = self._from_json(text) if as_json else (text, {})
                except UnicodeDecodeError as error:
                    rejected.append((name, f"is not UTF-8 ({error.reason} at {error.start})"))
                except ValueError as error:
                    rejected.append((name, str(error)))
                else:
                    yield name, text, columns

    def _from_json(self, line: str) -> tuple[str, dict[str, Any]]:
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError("is no JSON object")
        return self._of_row(row)

    def _of_row(self, row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        for key in filter(None, (self.text_key, self.label_key)):
            if key not in row:
                raise ValueError(f"has no {key!r}{suggestion(key, row)}")
        text = row[self.text_key]
        if not isinstance(text, str):
            raise ValueError(f"{self.text_key!r} is no text but {type(text).__name__}")
        if not self.label_key:
            return text, {}
        label = row[self.label_key]
        if not isinstance(label, SCALAR):
            raise ValueError(f"{self.label_key!r} is no text or number: {type(label).__name__}")
        columns = {key: value for key, value in row.items() if isinstance(value, SCALAR)}
        return text, {**_without(columns, self.text_key, self.label_key), "label": label}

    def _rows(self, part: Input, rejected: list[Rejected]) -> Iterator[Document]:
        table = parquet.open_table(self.root / part.path)
        names = table.schema_arrow.names
        for key in filter(None, (self.text_key, self.label_key)):
            if key not in names:
                raise ValueError(f"has no column {key!r}{suggestion(key, names)}")
        columns = names if self.label_key else [self.text_key]
        for number, row in parquet.rows(table, part, columns):
            name = f"{part.path}, row {number}"
            try:
                text, about = self._of_row(row)
            except ValueError as error:
                rejected.append((name, str(error)))
            else:
                yield name, text, about


def _without(columns: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in columns.items() if key not in keys}


def add_key_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--text-key",
        default="text",
        metavar="NAME",
        help="where .jsonl and .parquet have the text (%(default)s)",
    )


# -------------------------------------------------------------------------------------- files


def _kind(name: str) -> str:
    """The extension that tells what is in a file, without that of its compression; "" unknown."""
    stem, extension = os.path.splitext(name.lower())
    packed = extension in COMPRESSED
    if packed:
        extension = os.path.splitext(stem)[1]
    known = (*LINES, *JSON_LINES) if packed else (*LINES, *JSON_LINES, TABLE)
    return extension if extension in known else ""


def _walk(root: Path) -> Iterator[str]:
    """Text files below a folder, sorted. Raises UserError when there are none."""
    others: Counter[str] = Counter()
    found = False
    for folder, names, files in os.walk(root):
        names.sort()
        for name in sorted(files):
            if name.startswith("."):
                continue
            if _kind(name):
                found = True
                yield os.path.relpath(os.path.join(folder, name), root)
            else:
                others[os.path.splitext(name)[1] or name] += 1
    if not found:
        there = ", ".join(f"{n} {kind}" for kind, n in others.most_common(5)) or "nothing"
        raise UserError(f"{root}: has no file of {KINDS} in it (found: {there})")


def open_bytes(path: Path) -> IO[bytes]:
    """Decompressed on the way. Raises UserError where the package for that is missing."""
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path))
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{path}: takes `pip install zstandard`") from None
        file = path.open("rb")
        reader = _ZstdErrors(zstandard.ZstdDecompressor().stream_reader(file, closefd=True))
        return cast(IO[bytes], io.BufferedReader(reader, 1 << 20))
    return path.open("rb")


class _ZstdErrors(io.RawIOBase):
    """Its reader's own error as a ValueError, and an end in the middle of a frame as one, too."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import zstandard

        try:
            return int(self.reader.readinto(buffer))
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from None

    def close(self) -> None:
        self.reader.close()
        super().close()


# --------------------------------------------------------------------------------- stretches


def _stretches(file: IO[bytes], size: int, blank: bool) -> Iterator[tuple[int, int]]:
    """(first, end) of pieces of about STRETCH bytes, cut behind a newline (blank: behind an empty
    line)."""
    start = 0
    while start < size:
        file.seek(min(start + STRETCH, size))
        file.readline()  # what is left of a line
        while blank and file.readline().strip():
            pass
        yield start, file.tell()
        start = file.tell()


def _lines(file: IO[bytes], part: Input) -> Iterator[tuple[str, bytes]]:
    """(where, line without its newline) of the lines that have something in them."""
    for at, line in _raw_lines(file, part):
        if line.strip():
            yield f", byte {at}", line.removesuffix(b"\n")


def _paragraphs(file: IO[bytes], part: Input) -> Iterator[tuple[str, bytes]]:
    """(where, lines between empty ones without the last newline)."""
    begun, lines = 0, list[bytes]()
    for at, line in _raw_lines(file, part):
        if line.strip():
            begun = begun if lines else at
            lines.append(line)
        elif lines:
            yield f", byte {begun}", b"".join(lines).removesuffix(b"\n")
            lines = []
    if lines:
        yield f", byte {begun}", b"".join(lines).removesuffix(b"\n")


def _raw_lines(file: IO[bytes], part: Input) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of a part. A byte order mark is left out."""
    at, number = part.bytes or (0, None)
    if at:
        file.seek(at)
    end = None if number is None else at + number
    while end is None or at < end:
        line = file.readline()
        if not line:
            break
        yield at, line.removeprefix(BOM) if at == 0 else line
        at += len(line)
