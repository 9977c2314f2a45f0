"""Classes under the names of libraries that are not installed, to pickle their objects."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest


def class_of(monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> type:
    """An empty class that pickles as module.name, until the end of the test."""
    pieces = module.split(".")
    for n in range(1, len(pieces) + 1):
        full = ".".join(pieces[:n])
        monkeypatch.setitem(sys.modules, full, sys.modules.get(full, ModuleType(full)))
    made = type(name, (), {"__module__": module})
    monkeypatch.setattr(sys.modules[module], name, made, raising=False)
    return made
