"""JSON lines, or a JSON array: one object per recording, or per part of one (rows.py).

These are also the manifests of NVIDIA NeMo (https://docs.nvidia.com/nemo-framework/user-guide/latest/nemotoolkit/asr/datasets.html).
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from d2v_ds.data.checks import Finding, Unusable
from d2v_ds.errors import UserError
from shards.family import Sample
from shards.findings import of_error
from shards.json_array import DECODER, row_of, values
from shards.speech.layout import SpeechLayout
from shards.speech.rows import Rows
from shards.walking import extension_of

EXTENSIONS = (".jsonl", ".ndjson", ".json")
LONGEST = 1 << 24  # bytes of a line


class JsonLines(SpeechLayout):
    name = "jsonl"
    help = "JSON lines or array with `path` or `audio_filepath`, optionally parts in seconds"
    takes = "file"

    @classmethod
    def recognises(cls, source: Path) -> bool:
        return source.is_file() and extension_of(source.name) in EXTENSIONS

    def samples(self, findings: list[Finding]) -> Iterator[Sample]:
        rows = Rows(self.root)
        where = ""
        with self.source.open("rb") as file:
            for where, row in elements(file) if is_array(file) else lines(file):
                name = f"{self.source.name}, {where}"
                try:
                    sample = rows.sample(_object(row))
                    _check_tarred(sample)
                except ValueError as error:
                    findings.append(of_error(name, error))
                else:
                    yield sample
        if not where:
            raise UserError(f"{self.source}: is empty")


def _object(row: Any) -> dict[str, Any]:
    """Raises Unusable, also if the row is an error."""
    if isinstance(row, ValueError):
        raise row
    return row_of(row)


def _check_tarred(sample: Sample) -> None:
    """Raises Unusable for a row of a tarred manifest of NeMo, whose files are members of tars."""
    if "shard_id" in sample.columns and not sample.size:
        raise Unusable(
            "row",
            f"has a shard_id, but {sample.inputs[0].path} does not exist: the manifest describes "
            "recordings in tars; convert the tars instead, with --layout webdataset",
        )


def is_array(file: io.BufferedReader) -> bool:
    """Whether a file holds one JSON array, by its first character."""
    first = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    file.seek(0)
    return first == b"["


def lines(file: io.BufferedReader) -> Iterator[tuple[str, Any]]:
    """(where, value or the ValueError of the line) of each line that is not blank. Takes the memory
    of one line."""
    number = 0
    while line := file.readline(LONGEST):
        number += 1
        where = f"line {number}"
        if len(line) == LONGEST and not line.endswith(b"\n"):
            while (rest := file.readline(LONGEST)) and not rest.endswith(b"\n"):
                pass
            yield where, Unusable("size", f"is longer than {LONGEST:,} bytes")
        elif line.strip():
            try:
                yield where, DECODER.decode((line if number > 1 else without_bom(line)).decode())
            except (ValueError, RecursionError) as error:
                yield where, Unusable("row", f"is not JSON ({error})")


def without_bom(line: bytes) -> bytes:
    return line.removeprefix(codecs.BOM_UTF8)


def elements(file: io.BufferedReader) -> Iterator[tuple[str, Any]]:
    """(where, value) of each element of an array. Takes the memory of a few elements. Raises
    UserError where the array is damaged, since what follows cannot be read."""
    number = 0
    try:
        for number, value in enumerate(values(file, LONGEST, "strict"), start=1):
            yield f"item {number}", value
    except UnicodeDecodeError as error:
        raise UserError(f"{file.name}: is not JSON in UTF-8 ({error})") from None
    except Unusable as error:
        raise UserError(f"{file.name}, item {number + 1}: {error}") from None
