"""The demo's run for several seeds: what the encoder learns, as a table and one JSON object.

    python benchmarks/speech_probe.py [--seeds 0 1 2] [--out FOLDER] [key.path=value ...]

Each seed converts the embedded corpus, pre-trains `speech_tiny` with ZeRO-2 on two ranks, and
probes the trained student with kNN beside the untrained encoder and plain log-mel features.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from shards import samples


def command(module: str, *words: str | Path) -> str:
    """Runs `python -m module words`, shows what it prints, and returns it."""
    with subprocess.Popen(
        [sys.executable, "-m", module, *map(str, words)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", file=sys.stderr, flush=True)
            lines.append(line)
    if process.returncode:
        sys.exit(process.returncode)
    return "".join(lines)


def run(seed: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    source = samples.path("speech")
    train = folder / "shards/train"
    command(
        "shards.cli",
        "speech",
        source / "train.tsv",
        train,
        "--join",
        "speaker",
        "--join-seconds",
        "4",
    )
    sets = {name: folder / "shards/labelled" / name for name in ("train", "unseen", "seen")}
    for name, path in sets.items():
        command("shards.cli", "speech", source / f"{name}.tsv", path)
    run_dir = folder / f"seed{seed}"
    settings = [f"run.dir={run_dir}", f"run.seed={seed}", f"data.shards={train}", *overrides]
    command("d2v_ds", "train", "speech_tiny", "--nproc", "2", *settings)
    probe = ["evaluate", "knn", run_dir, "--compare", "--gallery", sets["train"]]
    printed = command("d2v_ds", *probe, "--test", sets["unseen"], sets["seen"])
    summary: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="keep the runs there; default: nothing is kept")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = arguments.out or Path(folder)
        found = {seed: run(seed, out, arguments.overrides) for seed in arguments.seeds}
    print("| seed | " + " | ".join(next(iter(found.values()))["accuracy"]) + " |  (unseen / seen)")
    for seed, summary in found.items():
        cells = [
            f"{100 * a['unseen']:.0f} / {100 * a['seen']:.0f}" for a in summary["accuracy"].values()
        ]
        print(f"| {seed} | " + " | ".join(cells) + " |")
    print(json.dumps({seed: summary["accuracy"] for seed, summary in found.items()}))


if __name__ == "__main__":
    main()
