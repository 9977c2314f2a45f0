"""transformers keeps copies of remote code; the tests give it a folder of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2v_ds.data.audio import import_torchaudio


@pytest.fixture(scope="session", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import_torchaudio()  # before transformers does, with our workaround for a mismatched wheel
    from transformers import dynamic_module_utils

    folder = tmp_path_factory.mktemp("modules")
    dynamic_module_utils.HF_MODULES_CACHE = str(folder)
    return folder
