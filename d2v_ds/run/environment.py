"""The environment of a run: versions, code, host, and variables with secrets masked."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import socket
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from d2v_ds.secrets import mask_arguments, mask_environment

PACKAGE = Path(__file__).parent.parent  # d2v_ds
PACKAGES = ("d2v-ds", "torch", "deepspeed", "numpy", "webdataset", "soundfile", "torchaudio")
# What may explain how a run behaved. Other variables are left out, whatever they hold.
KEPT = re.compile(
    r"^(SLURM_|CUDA_|NCCL_|GLOO_|TORCH|OMP_|MASTER_|WORLD_SIZE|RANK|LOCAL_RANK|DS_|D2V_|PATH$|"
    r"LD_LIBRARY_PATH$|PYTHON|VIRTUAL_ENV$|CONDA_|HF_|WANDB_|AWS_)"
)


def describe(nodes: Sequence[str] = ()) -> dict[str, Any]:
    """The content of environment.json; what cannot be determined is None. nodes: by rank."""
    return {
        "command": mask_arguments(sys.argv),
        "nodes": list(nodes),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in PACKAGES},
        "git": git_revision(PACKAGE),
        "code": code_hash(),
        "environment": mask_environment(
            {key: value for key, value in sorted(os.environ.items()) if KEPT.match(key)}
        ),
    }


def node_name() -> str:
    """The name of this machine: Slurm's, under Slurm."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def code_files() -> list[Path]:
    """The modules and data files of the package, in a fixed order."""
    return sorted(
        path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    )


def code_hash() -> str:
    """A hash that is equal on two machines if and only if they run the same code."""
    digest = hashlib.sha256()
    for path in code_files():
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def keep_code(folder: Path) -> Path:
    """Stores a copy of the package in folder/HASH.tar.gz, unless it exists."""
    path = folder / f"{code_hash()}.tar.gz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        with tarfile.open(aside, "w:gz") as tar:
            for file in code_files():
                tar.add(file, Path(PACKAGE.name) / file.relative_to(PACKAGE))
        aside.replace(path)
    return path


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_revision(folder: Path) -> str | None:
    """The commit of the code, with "+changes" if the work tree differs; None outside a checkout."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(folder, "status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    return done.stdout.strip()
