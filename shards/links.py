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
        try:
            status = os.stat(f"{root}/{file.path}")
        except OSError as error:
            broken = of_error(file.path, error)
            if broken.kind == "link":
                findings.append(broken)
            else:  # the conversion reports the reason
                yield file
            continue
        first = seen.setdefault((status.st_dev, status.st_ino), file.path)
        if first == file.path:
            yield file
        else:
            findings.append(Finding(file.path, f"is a link to {first}", "linked twice"))
