"""All tests of this folder load exports with transformers."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def prepared(remote_code: None) -> None:
    return None
