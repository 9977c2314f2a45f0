"""Helpers that several tests of the configuration share."""

from __future__ import annotations

import subprocess
import sys

from d2v_ds import recipes
from d2v_ds.config import Config


def load(*overrides: str) -> Config:
    """speech_tiny with overrides."""
    return recipes.load("speech_tiny", list(overrides))


def modules_after(code: str) -> set[str]:
    """The modules that a new process has imported after running `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint('\\n'.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())
