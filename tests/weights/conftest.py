from __future__ import annotations

import pytest

from d2v_ds.data.audio import import_torchaudio


@pytest.fixture(scope="session", autouse=True)
def torchaudio_imported() -> None:
    """Imports torchaudio before transformers does, with our workaround for a mismatched wheel."""
    import_torchaudio()
