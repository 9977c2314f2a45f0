"""Links between the files of a corpus."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from d2v_ds.data.checks import Finding
from shards.family import Sample
from shards.findings import of_error
from shards.walking import FoundFile


def unbroken(
    root: Path, files: Iterable[FoundFile], findings: list[Finding]
) -> Iterator[FoundFile]:
    """The files without broken links, which are added to `findings`."""
    for file in files:
        if file.place is None:
            try:
                os.stat(root / file.path)
            except OSError as error:
                broken = of_error(file.path, error)
                if broken.kind == "link":
                    findings.append(broken)
                    continue
        yield file  # the conversion reports other reasons


def once(samples: Iterable[Sample], findings: list[Finding]) -> Iterator[Sample]:
    """The samples without those of files that are, by a symbolic or hard link, files of an earlier
    sample; such files are added to `findings`. The samples are already chosen, because a name that
    is not chosen must not hide another."""
    first: dict[tuple[int, int], str] = {}
    last = ""  # path that was reported; a file may have several samples, one after another
    for sample in samples:
        path = sample.inputs[0].path
        if sample.place is None or (known := first.setdefault(sample.place, path)) == path:
            yield sample
        elif path != last:
            findings.append(Finding(path, f"is a link to {known}", "linked twice"))
            last = path
