"""The README's commands: those in ```sh blocks are run, in order, in one folder; those in ```bash
blocks need what the line before the block says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

README = (ROOT / "README.md").read_text()


def blocks(kind: str) -> list[tuple[str, str]]:
    """(the line before, the commands) of every block of a kind."""
    found = []
    for match in re.finditer(r"```(sh|bash)\n(.*?)```", README, re.S):
        before = README[: match.start()].rstrip().splitlines()[-1]
        if match[1] == kind:
            found.append((before, match[2]))
    return found


def test_commands_run_as_they_stand(tmp_path: Path) -> None:
    (tmp_path / "shards").symlink_to(ROOT / "shards")
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, module in (("d2v-ds", "d2v_ds"), ("d2v-shards", "shards.cli")):
        script = bin_folder / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        script.chmod(0o755)
    commands = "\n".join(code for _, code in blocks("sh"))
    assert commands.count("d2v-shards") >= 2 and "d2v-ds train" in commands
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=tmp_path,
        env={
            **os.environ,
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kNN accuracy" in done.stdout and "no problems" in done.stdout


def test_the_other_commands_say_what_they_need() -> None:
    assert blocks("bash")
    for before, code in blocks("bash"):
        assert "needs" in before.lower(), f"what does this need?\n{code}"
        subprocess.run(["bash", "-n", "-c", code], check=True)


def test_the_file_tree_is_whole() -> None:
    """Every module, and every folder at the top, has its line."""
    modules = [
        path.name if path.is_file() else path.name + "/"
        for path in sorted((ROOT / "d2v_ds").iterdir())
        if (path.suffix == ".py" and path.name != "__init__.py")
        or (path.is_dir() and (path / "__init__.py").exists())
    ]
    for name in modules:
        assert re.search(rf"\b{re.escape(name)}", README), f"README's tree lacks {name}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.M), f"make {target}"


@pytest.mark.parametrize("path", ["slurm/README.md", "docs/differences.md"])
def test_linked_pages_exist(path: str) -> None:
    if path in README:
        assert (ROOT / path).is_file()
