"""Import rules: a module imports only from its own and lower layers, modules and packages form no
cycle, and each large third-party library is imported in one place.

The tests parse the source, so imports inside functions count too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

# From the lowest up, as in docs/architecture.md: modules and packages of d2v_ds.
LAYERS = [
    ["errors", "exit_codes", "files", "arguments", "records", "secrets"],
    ["config", "recipes", "schedules"],
    ["seeding", "distributed"],
    ["data", "shard_format"],
    ["scores", "ctc"],
    ["batch", "masking", "loss", "transformer", "student"],
    ["modalities"],
    ["engine", "key_maps"],
    ["loader"],
    ["task", "teacher", "step", "train_state"],
    ["run"],
    ["pretrain_report", "pretrain"],
    ["checkpoint"],
    ["telemetry"],
    ["weights"],
    ["encoder", "evaluate", "export", "features", "finetune", "show"],
    ["validation", "best", "probing", "training", "start", "train"],
    ["cli", "cli_evaluate", "__init__", "__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
WITHOUT_TORCH = [
    *("errors", "exit_codes", "files", "arguments", "records", "secrets"),
    *("config", "recipes", "schedules"),
]
SHARDS_MAY_IMPORT = ["errors", "exit_codes", "files", "arguments", "secrets", "data", "modalities"]
PLACES = {
    "deepspeed": ["d2v_ds/engine/zero.py"],
    "tensorboard": ["d2v_ds/telemetry/events.py"],
    "safetensors": ["d2v_ds/checkpoint", "d2v_ds/export", "d2v_ds/weights"],
    "transformers": ["d2v_ds/export"],
    "tokenizers": ["shards/text/tokenizer_json.py", "d2v_ds/export"],
    "torchaudio": ["d2v_ds/data/audio.py", "d2v_ds/ctc.py"],
    "soundfile": ["d2v_ds/data/audio_files.py"],
    "PIL": [
        "d2v_ds/data/image_files.py",
        "d2v_ds/data/images.py",
        "d2v_ds/data/rand_augment.py",
        "d2v_ds/export/remote/image_processing_d2v.py",
        "shards/samples/make_images.py",
    ],
    "sentencepiece": ["shards/text/tokenizer.py", "d2v_ds/export", "d2v_ds/finetune/labels.py"],
    "pyarrow": ["shards/parquet.py", "d2v_ds/features"],
    "sklearn": ["d2v_ds/evaluate", "d2v_ds/scores.py"],
    "scipy": ["d2v_ds/evaluate", "d2v_ds/scores.py"],
    "zstandard": ["shards/text"],
    "webdataset": ["d2v_ds/loader/webdataset.py", "d2v_ds/data/answer.py"],
}
REMOTE = Path("d2v_ds/export/remote")
EXPORTED = [path.stem for path in (ROOT / REMOTE).glob("*.py")]
FILES = sorted(
    path.relative_to(ROOT)
    for folder in ("d2v_ds", "shards")
    for path in (ROOT / folder).rglob("*.py")
)


def imports(path: Path, typing_only: bool = True) -> Iterator[str]:
    """Full dotted names that a file imports; `from a import b` counts as a.b. typing_only: include
    imports under `if TYPE_CHECKING`."""
    tree = ast.parse((ROOT / path).read_text())
    skipped: set[ast.AST] = set()
    if not typing_only:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                skipped.update(inner for child in node.body for inner in ast.walk(child))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Exported files import each other by relative names, as transformers requires.
            assert node.level == (path.parent == REMOTE and node.module in EXPORTED), (
                f"{path}:{node.lineno}: relative import"
            )
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(path: Path) -> str:
    return path.parts[1].removesuffix(".py")


def module(name: str) -> str | None:
    """The module or package of a dotted name: d2v_ds.engine.zero -> engine; None outside d2v_ds."""
    pieces = name.split(".")
    return pieces[1] if pieces[0] == "d2v_ds" and len(pieces) > 1 else None


def test_every_module_has_a_layer_and_exists() -> None:
    assert {module_of(path) for path in FILES if path.parts[0] == "d2v_ds"} == LEVEL.keys()
    for package, places in PLACES.items():
        for place in places:
            assert (ROOT / place).exists(), f"{package}: no {place}"


def test_the_documentation_has_these_layers() -> None:
    table = (ROOT / "docs/architecture.md").read_text().split("| layer | contents |")[1]
    rows = [line.split("|")[1] for line in table.split("\n\n")[0].splitlines()[2:]]
    shown = [[name.strip("`/") for name in row.strip().split(", ")] for row in rows]
    assert shown == [[name for name in names if name[0] != "_"] for names in LAYERS]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_lower_layers_never_import_higher_ones(path: Path) -> None:
    if path.parts[0] == "shards":
        used = {found for name in imports(path) if (found := module(name))}
        assert used <= set(SHARDS_MAY_IMPORT)
        return
    own = module_of(path)
    for name in imports(path, typing_only=False):
        assert not name.startswith("shards"), f"{path} imports {name}"
        other = module(name)
        if other in LEVEL:
            assert LEVEL[other] <= LEVEL[own], f"{path} (layer {LEVEL[own]}) imports {name}"


def test_exported_files_import_nothing_of_this_project() -> None:
    """They are copied into exports, where d2v_ds need not be installed."""
    assert EXPORTED
    for name in EXPORTED:
        roots = {found.split(".")[0] for found in imports(REMOTE / f"{name}.py")}
        assert not roots & {"d2v_ds", "shards"}, name


def test_modules_and_packages_form_no_cycle() -> None:
    uses: dict[str, set[str]] = {name: set() for name in LEVEL}
    for path in FILES:
        if path.parts[0] == "d2v_ds":
            others = {module(name) for name in imports(path, typing_only=False)}
            uses[module_of(path)] |= {o for o in others if o in LEVEL and o != module_of(path)}
    while free := [name for name, others in uses.items() if not others & uses.keys()]:
        for name in free:
            del uses[name]
    assert not uses, f"these import each other: {uses}"


def test_files_form_no_cycle() -> None:
    """Also within a package, and with imports that are only for type checkers. An __init__.py hands
    names of its package on, so its own imports do not count."""
    files = [path for path in FILES if path.name != "__init__.py"]
    uses = {path: {f for name in imports(path) if (f := file_of(name)) != path} for path in files}
    while free := [path for path, others in uses.items() if not others & uses.keys()]:
        for path in free:
            del uses[path]
    assert not uses, f"among these files is a cycle: {', '.join(map(str, uses))}"


def file_of(name: str) -> Path | None:
    """The file that defines a dotted name of this repository; None for other names."""
    pieces = name.split(".")
    for n in range(len(pieces), 0, -1):
        for path in (Path(*pieces[:n]).with_suffix(".py"), Path(*pieces[:n], "__init__.py")):
            if (ROOT / path).exists():
                return path
    return None


def test_modules_for_listing_and_checking_need_no_torch() -> None:
    for path in FILES:
        if path.parts[0] == "d2v_ds" and module_of(path) in WITHOUT_TORCH:
            roots = {name.split(".")[0] for name in imports(path, typing_only=False)}
            assert not roots & {"torch", "numpy", "deepspeed"}, path


@pytest.mark.parametrize("package", PLACES)
def test_each_third_party_library_is_imported_in_one_place(package: str) -> None:
    for path in FILES:
        if any(str(path).startswith(place) for place in PLACES[package]):
            continue
        names = list(imports(path, typing_only=False))
        found = [n for n in names if n.split(".")[0] == package]
        found += [n for n in names if n.startswith(f"torch.utils.{package}")]
        assert not found, f"{path} imports {found}; {package} belongs in {PLACES[package]}"
