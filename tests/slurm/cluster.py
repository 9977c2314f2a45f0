"""A real Slurm on this machine, and jobs submitted as users submit them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
SCRIPTS = HERE.parent.parent / "slurm"
VSLURM = HERE / "vslurm.sh"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL"}


def clean_environment() -> dict[str, str]:
    """The environment without variables of a Slurm job that the tests may run in."""
    foreign = ("SLURM_", "SBATCH_", "SRUN_", "D2V_")
    return {key: value for key, value in os.environ.items() if not key.startswith(foreign)}


class Cluster:
    """Virtual nodes vn1, vn2 ... with 8 GPUs each; a GPU is /dev/null."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        self.environment = {**clean_environment(), "VSLURM_DIR": str(folder), **settings}
        self.job_environment = {**clean_environment(), "SLURM_CONF": str(folder / "slurm.conf")}

    def __call__(self, *words: str) -> str:
        """Runs one command of vslurm.sh: up, down, crash NODE, boot NODE, cut NODE ..."""
        done = subprocess.run(
            [VSLURM, *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"vslurm.sh {' '.join(words)}: {done.stderr}"
        return done.stdout

    @property
    def namespaces(self) -> bool:
        """Whether every node has its own network and node-local disk."""
        return "MODE=ns" in (self.folder / "run/layout").read_text()

    def command(self, *words: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        """Runs a Slurm command as a user on the login node does."""
        environment = {**self.job_environment, **kwargs.pop("environment", {})}
        return subprocess.run(
            words, env=environment, capture_output=True, text=True, timeout=60, **kwargs
        )


class Job:
    """A submitted job."""

    def __init__(self, cluster: Cluster, number: str, folder: Path) -> None:
        self.cluster, self.number, self.folder = cluster, number, folder

    def field(self, name: str) -> str:
        shown = self.cluster.command("scontrol", "show", "job", "-o", self.number).stdout
        found = re.search(rf"(?:^|\s){name}=(\S*)", shown)
        return found[1] if found else ""

    @property
    def state(self) -> str:
        return self.field("JobState")

    @property
    def code(self) -> int:
        """Exit code of the batch script."""
        return int(self.field("ExitCode").split(":")[0])

    def log(self) -> str:
        shown = self.cluster.command("scontrol", "show", "job", self.number).stdout
        found = re.search(r"StdOut=(.*)", shown)  # the path may have spaces
        path = Path(found[1] if found else "")
        return path.read_text() if path.is_file() else ""

    def until(self, reached: Callable[[], Any], what: str, seconds: float = 60) -> Job:
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline, (
                f"job {self.number}: {what} not within {seconds:g} s; it is {self.state}, "
                f"{self.field('Reason')}\n{self.log()}"
            )
            time.sleep(0.1)
        return self

    def ends(self, state: str = "COMPLETED", seconds: float = 60) -> Job:
        self.until(lambda: self.state in ENDED, "the end", seconds)
        assert self.state == state, f"{self.state}, not {state}\n{self.log()}"
        return self

    def says(self, pattern: str, seconds: float = 60) -> Job:
        return self.until(lambda: re.search(pattern, self.log()), f"/{pattern}/", seconds)

    def reaches(self, state: str, seconds: float = 60) -> Job:
        return self.until(lambda: self.state == state, state, seconds)

    def script(self) -> psutil.Process:
        """The batch script."""
        found = [
            process
            for process in psutil.process_iter(["cmdline"])
            if any(word.endswith("/slurm_script") for word in process.info["cmdline"] or ())
            and process.environ().get("SLURM_JOB_ID") == self.number
        ]
        return min(found, key=lambda process: process.create_time())  # not one of its subshells

    def signal(self) -> None:
        """Sends the signal that Slurm sends some minutes before the time limit."""
        self.cluster.command("scancel", "--batch", "--signal=USR2", self.number)


class Workplace:
    """A user's folder on the shared file system with its cluster.env."""

    def __init__(self, cluster: Cluster, folder: Path, settings: str) -> None:
        self.cluster, self.folder = cluster, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.settings = folder / "cluster.env"
        self.settings.write_text(settings)

    def submit(self, script: str, *words: str | Path, options: tuple[str, ...] = ()) -> Job:
        done = self.cluster.command(
            "sbatch",
            "--parsable",
            *options,
            str(SCRIPTS / script),
            *map(str, words),
            cwd=self.folder,
            environment={"D2V_CLUSTER_ENV": str(self.settings)},
        )
        assert done.returncode == 0, done.stderr
        return Job(self.cluster, done.stdout.strip().split(";")[0], self.folder)

    def rows(self, run: str) -> list[dict[str, Any]]:
        path = self.folder / run / "metrics.jsonl"
        if not path.exists():
            return []
        return [
            json.loads(line)
            for line in path.read_text().splitlines(keepends=True)
            if line.endswith("\n")
        ]
