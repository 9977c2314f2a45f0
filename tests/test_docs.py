"""The documentation: its commands run, its output is real, its links and names exist.

Fenced blocks of a page:

    sh       run in order, in one new folder per page that contains a link to shards/
    output   what the sh block before it prints: line by line; `...` stands for any text, and a
             line `...` for any number of lines
    bash     has requirements that the text before it names; its syntax and names are checked
    python   compiled, and its imports are resolved
    text     pictures and folder trees; the entries of a tree exist
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from d2v_ds import cli, exit_codes, recipes
from d2v_ds.config import reference
from d2v_ds.errors import UserError
from d2v_ds.modalities import REGISTRY
from d2v_ds.pretrain_report import PretrainReport
from d2v_ds.run.run_folder import RunFolder
from d2v_ds.telemetry.metrics import TAGS
from shards import cli as shards_cli
from shards import speech
from tests import ROOT

SKIPPED = {".git", ".venv", "runs", "build", "dist", ".pytest_cache", ".ruff_cache", ".hypothesis"}
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in ROOT.rglob("*.md")
    if not SKIPPED.intersection(path.relative_to(ROOT).parts)
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block, with the paragraph before it and the output block after it."""

    kind: str
    code: str
    before: str
    output: list[str] = field(default_factory=list)


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text()


@cache
def blocks(page: str) -> list[Block]:
    found: list[Block] = []
    for match in FENCE.finditer(text_of(page)):
        if match[1] == "output":
            assert found and found[-1].kind == "sh", f"{page}: output of what?\n{match[2]}"
            found[-1].output.extend(match[2].splitlines())
        else:
            before = text_of(page)[: match.start()].rstrip().split("\n\n")[-1]
            found.append(Block(match[1], match[2], before))
    return found


def blocks_of(kind: str, *, pages: list[str] = PAGES) -> list[tuple[str, Block]]:
    return [(page, block) for page in pages for block in blocks(page) if block.kind == kind]


def prose(page: str) -> str:
    return FENCE.sub("", text_of(page))


def words(page: str) -> list[str]:
    """The inline code of a page."""
    return [re.sub(r"\s+", " ", found) for found in re.findall(r"`([^`]+)`", prose(page))]


RUN = [page for page in PAGES if any(block.kind == "sh" for block in blocks(page))]


# ------------------------------------------------------------------------------- commands that run

# Pages need the same sets and runs. The first page makes them, the others get copies: commands
# with equal words must mean the same on all pages.
SHIM = """#!/bin/bash
set -euo pipefail
out=
case "$1" in
  speech | images | text | tokenizer) out=$3 ;;
  train | finetune) for word; do case $word in run.dir=*) out=${word#run.dir=} ;; esac; done ;;
esac
kept="$KEPT/$(printf '%s\\n' NAME "$@" | sha256sum | cut -c -16)"
if [[ -z $out || (-e $out && ! -e $kept) ]]; then exec PYTHON -m MODULE "$@"; fi
if [[ ! -e $kept/whole ]]; then
  mkdir -p "$kept"
  PYTHON -m MODULE "$@" | tee "$kept/printed"
  cp -r "$out" "$kept/whole"
else
  mkdir -p "$(dirname "$out")"
  cp -r "$kept/whole" "$out"
  cat "$kept/printed"
fi
"""
MARK = "@@ block"


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    (folder / "kept").mkdir()
    for name, module in (("d2v-ds", "d2v_ds"), ("d2v-shards", "shards.cli")):
        script = SHIM.replace("PYTHON", shlex.quote(sys.executable)).replace("MODULE", module)
        (folder / name).write_text(script.replace("NAME", name))
        (folder / name).chmod(0o755)
    return folder


FolderOf = Callable[[str], Path]


@pytest.fixture(scope="session")
def folder_of(commands: Path, tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    """folder_of(page) is the folder in which the commands of the page have run."""

    @cache
    def run(page: str) -> Path:
        folder = tmp_path_factory.mktemp("page")
        run_page(page, commands, folder)
        return folder

    return run


def run_page(page: str, commands: Path, folder: Path) -> None:
    """Runs the commands of a page and compares what they print."""
    (folder / "shards").symlink_to(ROOT / "shards")
    chosen = [block for block in blocks(page) if block.kind == "sh"]
    script = "".join(f"echo '{MARK}'\n{block.code}" for block in chosen)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{commands}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "KEPT": str(commands / "kept"),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    printed = done.stdout.split(f"{MARK}\n")[1:]
    for block, text in zip(chosen, printed, strict=True):
        compare(block.output, text.splitlines(), page)


def compare(shown: list[str], printed: list[str], page: str) -> None:
    """Asserts that the printed lines match the output block."""
    at, gap = 0, False
    for line in shown:
        if line.strip() == "...":
            gap = True
            continue
        pattern = ".*".join(map(re.escape, line.rstrip().split("...")))
        rest = [i for i in range(at, len(printed)) if re.fullmatch(pattern, printed[i].rstrip())]
        near = rest[:1] if gap else [i for i in rest if i == at]
        assert near, f"{page} shows {line!r}, printed was\n" + "\n".join(printed)
        at, gap = near[0] + 1, False
    assert not shown or gap or at == len(printed), f"{page}: more was printed: {printed[at:]}"


@pytest.mark.parametrize("page", RUN)
def test_commands_run_and_print_what_the_page_shows(page: str, folder_of: FolderOf) -> None:
    assert folder_of(page).is_dir()


def test_compare_can_fail() -> None:
    compare(["a", "...", "c: ..."], ["a", "b", "c: 1"], "page")
    for shown in (["a", "c: 1"], ["b", "..."], ["a", "...", "d"], ["a", "b"]):
        with pytest.raises(AssertionError):
            compare(shown, ["a", "b", "c: 1"], "page")


def test_other_commands_name_what_they_need() -> None:
    assert blocks_of("bash")
    for page, block in blocks_of("bash"):
        assert re.search(r"\bneeds?\b", block.before), f"{page}: what does this need?\n{block.code}"
        subprocess.run(["bash", "-n", "-c", block.code], check=True)


def test_python_blocks_compile_and_their_imports_exist() -> None:
    for page, block in blocks_of("python"):
        for node in ast.walk(ast.parse(block.code, page)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{page}: {node.module}.{alias.name}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)


# ------------------------------------------------------------- folders that the commands have made


def test_folder_trees_are_real(folder_of: FolderOf) -> None:
    run = folder_of("docs/training.md") / "runs/first"
    known = {path.name for path in members(RunFolder(run))}
    made = {path.name for path in run.iterdir()}
    shown = entries("docs/training.md", "runs/first/")
    assert set(shown) == known and made <= known
    shown = entries("docs/corpora.md", "data/train/")
    assert set(shown) == {p.name for p in (folder_of("docs/corpora.md") / "data/train").iterdir()}
    checkpoint = max((run / "checkpoints").iterdir())
    shown = entries("docs/teacher-and-checkpoints.md", "checkpoints/00000600/")
    assert set(shown) <= {path.name for path in checkpoint.iterdir()}


def members(run: RunFolder) -> Iterator[Path]:
    """The paths of a run folder, from the properties of RunFolder."""
    for name in dir(RunFolder):
        if isinstance(getattr(RunFolder, name), property):
            yield getattr(run, name)
    yield from (run.root / "logs", run.bad_samples(0).parent)


def entries(page: str, root: str) -> list[str]:
    """The names directly below `root` in the folder tree that starts with it."""
    [block] = [b for b in blocks(page) if b.kind == "text" and b.code.startswith(root)]
    names = []
    for line in block.code.splitlines()[1:]:
        for name in re.split(r"  +", line.strip())[0].split(", "):
            if name != "...":
                names.append(name.split("/")[0])
    return names


@pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")
@pytest.mark.parametrize("page", sorted({page for page, _ in blocks_of("python")}))
def test_python_blocks_run(
    page: str, folder_of: FolderOf, remote_code: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs the blocks in the folder of their page if its commands make a run, else in that of
    training.md. Programs that start a command are skipped."""
    own = page in ("docs/export.md", "docs/finetuning.md")
    monkeypatch.chdir(folder_of(page if own else "docs/training.md"))
    monkeypatch.setattr(speech, "LAYOUTS", [*speech.LAYOUTS])
    for _, block in blocks_of("python", pages=[page]):
        if "sys.exit" not in block.code:
            exec(compile(block.code, page, "exec"), {"__name__": "page"})


def test_trees_of_the_repository_are_real() -> None:
    for page, block in [*blocks_of("text"), *blocks_of("")]:
        folders: list[tuple[int, Path]] = []
        for line in block.code.splitlines():
            if not folders and not (line.endswith("/") and (ROOT / line.strip()).is_dir()):
                break
            name = line.split()[0] if line.strip() else ""
            indent = len(line) - len(line.lstrip())
            folders = [(i, path) for i, path in folders if i < indent]
            path = (folders[-1][1] if folders else ROOT) / name
            if re.fullmatch(r"[\w.-]+(/|\.\w+)", name):
                assert path.exists(), f"{page}: {path.relative_to(ROOT)} does not exist"
                folders.append((indent, path))


# ------------------------------------------------------------------------------------------- links


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_exist(page: str) -> None:
    for target in re.findall(r"\[[^]]*\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        other = (ROOT / page).parent / path if path else ROOT / page
        assert other.exists(), f"{page} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", other.read_text()), re.M)
            assert anchor in map(slug, headings), f"{page} links to {target}"


def test_every_page_is_in_the_index() -> None:
    pages = {page for page in PAGES if page.startswith("docs/")} - {"docs/README.md"}
    for index in ("README.md", "docs/README.md"):
        folder = (ROOT / index).parent
        targets = re.findall(r"\]\(([\w./-]+\.md)\)", text_of(index))
        linked = {os.path.relpath(folder / target, ROOT) for target in targets}
        assert pages <= linked, f"{index} lacks {pages - linked}"


# ------------------------------------------------------------------------------------------- names


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    [action] = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(action.choices)


def options(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


PARSERS = {
    "d2v-ds": subcommands(cli.parser()),
    "d2v-shards": subcommands(shards_cli.parser()),
}


@cache
def known_options() -> set[str]:
    """Options of both commands and the benchmarks, and the sbatch options in the batch scripts."""
    known = {o for each in PARSERS.values() for parser in each.values() for o in options(parser)}
    files = [*(ROOT / "slurm").iterdir(), *(ROOT / "benchmarks").glob("*.py"), ROOT / "Makefile"]
    for file in files:
        known |= set(re.findall(r"--[\w-]+", file.read_text()))
    return known | {"--help", "--version"}


COMMAND = re.compile(r"(?:^|[$] |batch )(d2v-ds|d2v-shards) ([a-z]+(?:\|[a-z]+)*)((?: .*)?)")


def command_lines(page: str) -> Iterator[str]:
    yield from words(page)
    for block in blocks(page):
        if block.kind in ("sh", "bash", "text", ""):
            yield from re.sub(r"\\\n\s*", " ", block.code).splitlines()


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_exist(page: str) -> None:
    for line in command_lines(page):
        for command, names, rest in COMMAND.findall(line):
            for name in names.split("|"):
                assert name in PARSERS[command], f"{page}: {command} {name}"
                unquoted = re.sub(r"""'[^']*'|"(?:[^"\\]|\\.)*\"""", "", rest)
                for option in re.findall(r"(?<!\S)--?[a-z][\w-]*", unquoted):
                    assert option in options(PARSERS[command][name]), f"{page}: {line}"
    for word in words(page):
        if re.fullmatch(r"--[\w-]+( \S+|=\S+)?", word):
            assert re.split(r"[ =]", word)[0] in known_options(), f"{page}: {word}"
    for target in re.findall(r"\bmake ([a-z-]+)`", text_of(page)):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), f"make {target}"


RECIPE = re.compile(r"(?:speech|vision|text|joint|finetune|ctc|imagenet|glue)_\w+")
STARTED = re.compile(
    r"\b(?:d2v-ds (?:train|finetune|show)|(pretrain|finetune)(?:\.sbatch)?) ([a-z]\w*)(?!\S)(.*)"
)
SETTING = re.compile(
    r"((?:run|data|batch|model|target|modality|teacher|optim|finetune|valid|engine|log|save)\.\S+)"
)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/configuration.md"])
def test_recipes_and_settings_exist(page: str) -> None:
    """Skips the page that is generated from the settings; it has its own test."""
    for word in words(page):
        if RECIPE.fullmatch(word):
            assert word in recipes.RECIPES, f"{page}: {word}"
        if word.startswith("compat=") or (SETTING.fullmatch(word) and not is_code(word)):
            check_setting(page, word.partition("=")[0])
    for line in command_lines(page):
        for on_slurm, recipe, rest in STARTED.findall(line):
            given = shlex.split(re.split(r"[`;]| then ", rest)[0])
            config = recipes.load(recipe, [w for w in given if "=" in w and w[0] != "-"])
            per_node, nodes = (
                int((re.findall(rf"--{option}=(\d+)", line) or [default])[-1])
                for option, default in (("ntasks-per-node", 8), ("nodes", 1))
            )
            if on_slurm:
                assert config.batch.micro_batches % (per_node * nodes) == 0, f"{page}: {line}"


@cache
def check_setting(page: str, path: str) -> None:
    for name in [*REGISTRY] if "NAME" in path else [""]:
        try:
            reference.find(path.replace("NAME", name).removesuffix(".*"))
        except UserError as error:
            raise AssertionError(f"{page}: {error}") from None


def is_code(word: str) -> bool:
    return word.endswith((".py", ".sh", ".sbatch", ".md", ".safetensors", ")"))


def test_every_recipe_is_documented() -> None:
    for title, page in (("pre-training", "training"), ("fine-tuning", "finetuning")):
        missing = set(recipes.GROUPS[title]) - set(words(f"docs/{page}.md"))
        assert not missing, missing


FOLDERS = ("d2v_ds", "docs", "tests", "shards", "slurm", "benchmarks", "ds_configs")


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_files_and_variables_exist(page: str) -> None:
    places = [ROOT, (ROOT / page).parent, *(ROOT / f for f in ("d2v_ds", "tests", "slurm"))]
    for word in words(page):
        if re.fullmatch(r"[\w./-]+\.(py|sh|sbatch|toml)|[\w./-]+/", word) and (
            not word.endswith("/") or word.split("/")[0] in FOLDERS
        ):
            assert any((place / word).exists() for place in places), f"{page}: {word}"
        for module in re.findall(r"\b(?:d2v_ds|shards)(?:\.\w+)+", word):
            path = ROOT / module.replace(".", "/")
            parts = (path, path.parent)  # path of a module, or of a name in a module
            assert any(p.with_suffix(".py").exists() or p.is_dir() for p in parts), (
                f"{page}: {word}"
            )
    source = "".join(
        path.read_text()
        for f in ("d2v_ds", "slurm", "tests")
        for path in (ROOT / f).rglob("*.*sh*")
    ) + "".join(path.read_text() for path in (ROOT / "d2v_ds").rglob("*.py"))
    for variable in set(re.findall(r"\bD2V_[A-Z_]+", text_of(page))) - {"D2V_REQUIRE_BROWSER"}:
        assert variable in source or variable in "D2V_REQUIRE_SLURM D2V_GOLDEN", variable


def test_tags_match_the_code() -> None:
    tags = {*TAGS.values(), *PretrainReport.tags.values()}
    tags |= {f"mask/{name}" for name in ("MODALITY", *REGISTRY)}
    documented = set()
    for page in PAGES:
        for word in words(page):
            if re.fullmatch(r"(loss|repr|optim|ema|perf|data|mask)/[a-z_]+(/[a-z]+)?", word):
                tag = re.sub(rf"/({'|'.join(REGISTRY)})$", "", word)
                tag = "loss/total" if tag == "loss" else tag
                assert word in tags or tag in tags or is_folder(word), f"{page}: {word}"
                documented |= {word} if page == "docs/tensorboard.md" else set()
    assert {*TAGS.values(), *PretrainReport.tags.values()} <= documented


def is_folder(word: str) -> bool:
    return (ROOT / word).exists() or word.startswith("data/")


@pytest.mark.parametrize("page", ["docs/training.md", "docs/slurm.md"])
def test_exit_codes_match_the_code(page: str) -> None:
    table = text_of(page).split("\n## Exit codes\n")[1].split("\n## ")[0]
    shown = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.M)}
    assert shown == exit_codes.OF_D2V_DS.keys()


def test_every_promise_names_tests_that_exist() -> None:
    rows = re.findall(r"^\| (?!promise|---)(.*) \| (.*) \|$", text_of("docs/promises.md"), re.M)
    assert len(rows) > 40
    for promise, kept_by in rows:
        names = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", kept_by)
        assert names, promise
        for file, name in names:
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.M), (file, name)
