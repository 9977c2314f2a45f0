"""Times conversion to shards against one process of plain webdataset's ShardWriter.

    python benchmarks/convert.py speech FOLDER [--repeat 4] [--rounds 3]
    python benchmarks/convert.py images FOLDER [--repeat 1]

FOLDER contains WAV files, or images in one folder per class. The baseline (`peer`) does the same
work on each file (decode, resample to 16 kHz, encode FLAC; or copy the bytes of the image) with the
same functions and writes the same members, but no index and no checksums, and it does not shuffle.
`--repeat N` converts N copies of the corpus, because a small corpus is finished before a second
process has started. Whole commands are timed, interleaved, from a warm cache into memory (/dev/shm
if it exists); the best round counts. `per_core` is files per second of CPU time, which depends
little on other load; `files_per_second` is files per second of wall time. `peers_2_to_1`, two
independent baselines at the same time, shows the limit for two cores. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from subprocess import PIPE

import numpy as np

from d2v_ds.data import audio


def peer(family: str, source: Path, out: Path) -> None:
    """The baseline: a plain webdataset writer."""
    import webdataset as wds

    out.mkdir()
    with wds.ShardWriter(f"{out}/%06d.tar", maxsize=256e6, encoder=False, verbose=0) as writer:
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            key = str(path.relative_to(source).with_suffix("")).replace(".", "_")
            data = path.read_bytes()
            about: dict[str, object]
            if family == "speech":
                x = audio.resample(audio.decode(data), audio.info(data).rate, 16_000)
                x16 = audio.to_int16(x)
                about = {"duration": len(x16) / 16_000, "paths": [str(path)]}
                sample = {"flac": audio.encode_flac(x16, 16_000)}
            else:
                about = {"label": path.parent.name, "paths": [str(path)]}
                sample = {path.suffix[1:]: data}
            writer.write({"__key__": key, "json": json.dumps(about).encode(), **sample})


def timed(*commands: list[str]) -> tuple[float, float]:
    """(wall time, CPU time) in seconds of concurrent processes and their children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    running = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=PIPE) for c in commands]
    for process in running:
        _, said = process.communicate()
        assert process.returncode == 0, said.decode()
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def copies(source: Path, number: int, folder: Path) -> Path:
    for i in range(number):
        shutil.copytree(source, folder / f"copy{i}")
    return folder


def measure(family: str, source: Path, rounds: int, work: Path) -> dict[str, object]:
    files = sum(path.is_file() for path in source.rglob("*"))
    out, other = str(work / "out"), str(work / "other")
    ours = [sys.executable, "-m", "shards.cli", family, str(source), out]
    peer = [sys.executable, __file__, family, str(source), "--peer"]
    variants = {
        "peer": [[*peer, out]],
        "two peers": [[*peer, out], [*peer, other]],
        "ours -j1": [[*ours, "-j1"]],
        "ours -j2": [[*ours, "-j2"]],
    }
    best = {name: np.full(2, np.inf) for name in variants}
    for i in range(rounds):
        for name, commands in variants.items():
            best[name] = np.minimum(best[name], timed(*commands))
            for made in (out, other):
                shutil.rmtree(made, ignore_errors=True)
        print(f"round {i + 1} of {rounds}", file=sys.stderr)
    made_by = {name: files * len(commands) for name, commands in variants.items()}
    clock = {name: round(made_by[name] / wall, 1) for name, (wall, _) in best.items()}
    core = {name: round(made_by[name] / used, 1) for name, (_, used) in best.items()}
    return {
        "files": files,
        "files_per_second": clock,
        "per_core": core,
        "ours_to_peer_per_core": round(core["ours -j1"] / core["peer"], 2),
        "j2_to_j1": round(clock["ours -j2"] / clock["ours -j1"], 2),
        "peers_2_to_1": round(clock["two peers"] / clock["peer"], 2),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("family", choices=("speech", "images"))
    parser.add_argument("source", type=Path)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", type=Path, metavar="OUT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        peer(arguments.family, arguments.source, arguments.peer)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        work = Path(folder)
        source = copies(arguments.source, arguments.repeat, work / "in")
        print(json.dumps(measure(arguments.family, source, arguments.rounds, work), indent=1))


if __name__ == "__main__":
    main()
