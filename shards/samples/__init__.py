"""Small real corpora that are part of the package, for demos and tests."""

from __future__ import annotations

from pathlib import Path


def path(name: str) -> Path:
    """The folder of an embedded corpus: "speech", "images" or "text". Its README.md names source
    and licence."""
    folder = Path(__file__).parent / name
    assert folder.is_dir(), f"no embedded corpus {name!r}"
    return folder
