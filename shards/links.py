"""Links between the files of a folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from d2v_ds.data.checks import Finding
from shards.findings import of_error
from shards.walking import FoundFile


def once(root: Path, files: Iterable[FoundFile], findings: list[Finding]) -> Iterator[FoundFile]:
    """The files without links, symbolic or hard, to a file that is among them already, and without
    broken links; these are added to `findings`."""
    seen: dict[tuple[int, int], str] = {}
    for file in files:
        if file.place is None:
            try:
                os.stat(root / file.path)
            except OSError as error:
                broken = of_error(file.path, error)
                if broken.kind == "link":
                    findings.append(broken)
                    continue
            yield file  # the conversion reports another reason
        elif (first := seen.setdefault(file.place, file.path)) == file.path:
            yield file
        else:
            findings.append(Finding(file.path, f"is a link to {first}", "linked twice"))
