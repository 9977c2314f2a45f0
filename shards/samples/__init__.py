"""Small real corpora that come with the package: for the demo, the tests and a first try."""

from __future__ import annotations

from pathlib import Path


def path(name: str) -> Path:
    """The folder of an embedded corpus: "speech". Its README.md tells source and licence."""
    folder = Path(__file__).parent / name
    assert folder.is_dir(), f"no embedded corpus {name!r}"
    return folder
