"""Who may import whom: lower layers never import higher ones, and each foreign system has one home.

Walks the syntax trees, so imports inside functions count as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

LAYERS = [
    {
        "errors",
        "schedules",
        "decoding",
        "config",
        "shard_format",
        "checksum",
        "tar_scan",
        "foreign",
        "download",
        "shard_cache",
        "find_set",
        "run_folder",
        "preflight",
    }
    | {"status", "environment", "watchdog"},
    {"audio", "images", "batch", "masking", "transformer", "loss", "distributed"},
    {"modalities", "student", "teacher", "key_maps", "engine", "checkpoint", "metrics"}
    | {"rank_check", "staging"},
    {"pretrain", "finetune", "loader", "health", "telemetry"},
    {"train", "evaluate", "export", "memory", "show"},
    {"recipes", "cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
SHARDS_MAY_IMPORT = {"errors", "shard_format", "checksum", "tar_scan", "foreign"} | {
    "audio",
    "images",
}
HOMES = {
    "deepspeed": {"d2v_ds/engine/zero.py"},
    "webdataset": {"d2v_ds/loader", "shards/writer.py"},
    "tensorboard": {"d2v_ds/metrics.py"},
    "transformers": {"d2v_ds/export.py"},
    "safetensors": {"d2v_ds/checkpoint", "d2v_ds/export.py"},
    "torchaudio": {"d2v_ds/audio.py"},
    "soundfile": {"d2v_ds/audio.py"},
    "PIL": {"d2v_ds/images.py", "shards/samples/make_images.py"},
    "sentencepiece": {"shards/tokenizer.py"},
    "pyarrow": {"shards/parquet.py"},
    "zstandard": {"shards/text/sources.py"},
}
FILES = sorted(
    path.relative_to(ROOT)
    for folder in ("d2v_ds", "shards")
    for path in (ROOT / folder).rglob("*.py")
)


def imports(path: Path) -> Iterator[str]:
    """Full dotted names that a file imports; `from a import b` counts as a.b."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module(name: str) -> str | None:
    """The module of d2v_ds that a dotted name lies in: d2v_ds.engine.zero -> engine."""
    pieces = name.split(".")
    return pieces[1] if pieces[0] == "d2v_ds" and len(pieces) > 1 else None


def test_every_module_has_a_layer() -> None:
    names = {path.parts[1].removesuffix(".py") for path in FILES if path.parts[0] == "d2v_ds"}
    assert names - {"__init__"} <= LEVEL.keys()


@pytest.mark.parametrize("path", FILES, ids=str)
def test_lower_layers_never_import_higher_ones(path: Path) -> None:
    if path.parts[0] == "shards":
        used = {m for name in imports(path) if (m := module(name))}
        assert used <= SHARDS_MAY_IMPORT
        return
    own = path.parts[1].removesuffix(".py")
    for name in imports(path):
        assert not name.startswith("shards"), f"{path} imports {name}"
        other = module(name)
        if other in LEVEL and own in LEVEL:
            assert LEVEL[other] <= LEVEL[own], f"{path} (layer {LEVEL[own]}) imports {name}"


def test_layer_0_needs_no_torch() -> None:
    for path in FILES:
        own = path.parts[1].removesuffix(".py")
        if path.parts[0] == "d2v_ds" and LEVEL.get(own) == 0:
            roots = {name.split(".")[0] for name in imports(path)}
            assert not roots & {"torch", "numpy", "deepspeed"}, path


@pytest.mark.parametrize("package", HOMES)
def test_each_foreign_system_has_one_home(package: str) -> None:
    for path in FILES:
        if any(str(path).startswith(home) for home in HOMES[package]):
            continue
        foreign = [n for n in imports(path) if package in n.split(".")]
        assert not foreign, f"{path} imports {foreign}; {package} belongs in {HOMES[package]}"
