"""Small real corpora that are part of the package, for demos and tests."""

from __future__ import annotations

from pathlib import Path


def path(name: str) -> Path:
    """The folder of a bundled corpus: "speech", "images" or "text". Its README.md names the source
    and the licence."""
    folder = Path(__file__).parent / name
    assert folder.is_dir(), f"no bundled corpus {name!r}"
    return folder
