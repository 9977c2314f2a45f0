"""What a run ran on: versions, code, host, settings of the environment with secrets masked."""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("d2v-ds", "torch", "deepspeed", "numpy", "webdataset", "soundfile", "torchaudio")
KEPT = re.compile(
    r"^(SLURM_|CUDA_|NCCL_|GLOO_|TORCH|OMP_|MASTER_|WORLD_SIZE|RANK|LOCAL_RANK|DS_|D2V_|PATH$|"
    r"LD_LIBRARY_PATH$|PYTHON|VIRTUAL_ENV$|CONDA_|HF_|WANDB_|AWS_)"
)
SECRET = re.compile(r"(TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH)", re.IGNORECASE)


def describe() -> dict[str, Any]:
    """For environment.json; reads, never raises for what is missing."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in PACKAGES},
        "git": git_revision(Path(__file__).parent),
        "environment": {
            key: "***" if SECRET.search(key) else value
            for key, value in sorted(os.environ.items())
            if KEPT.match(key)
        },
    }


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_revision(folder: Path) -> str | None:
    """Commit of the code, with "+changes" when the work tree differs; None outside a checkout."""
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
