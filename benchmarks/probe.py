"""What the tiny recipes learn: the demo of one modality, or of all, for one or several seeds.

    python benchmarks/probe.py speech|vision|text|joint [--seeds 0 1 2] [--out FOLDER]
        [--cifar10 FOLDER] [key.path=value ...]

Converts the embedded corpora, pre-trains the recipe MODALITY_tiny, and asks with kNN what the
features of the frozen encoder tell of labels, beside those of the same network before training,
plain features of the input, and chance. Prints every command that it runs; several seeds end in a
table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from shards import samples

MODULES = {"d2v-ds": "d2v_ds", "d2v-shards": "shards.cli"}
Accuracies = dict[str, dict[str, float]]  # {encoder: {test set: share}}

CIFAR10_SIZES = {"train": 1000, "test": 100}  # images of each class that are used


@dataclass(frozen=True)
class Corpus:
    """How one modality is shown. sets: {name: what d2v-shards makes it of}, of which `train` is
    pre-trained on, `gallery` has the labelled neighbours and `tests`, {name: what they are}, are
    scored with the features of block `layer`."""

    sets: dict[str, list[str]]
    tests: dict[str, str]
    layer: int
    gallery: str = "gallery"


def speech() -> Corpus:
    source = samples.path("speech")
    train, joined = [f"{source}/train.tsv"], ["--join", "speaker", "--join-seconds", "4"]
    return Corpus(
        sets={
            "train": ["speech", *train, *joined],
            "gallery": ["speech", *train],
            "unseen": ["speech", f"{source}/unseen.tsv"],
            "seen": ["speech", f"{source}/seen.tsv"],
        },
        tests={
            "unseen": "digits of a speaker that was never heard",
            "seen": "new recordings of the five training speakers",
        },
        layer=2,
    )


def vision() -> Corpus:
    source = samples.path("images")
    return Corpus(
        sets={
            "train": ["images", f"{source}/train"],
            "unseen": ["images", f"{source}/unseen"],
        },
        tests={"unseen": "tiles of the same ten pictures, from parts that were never seen"},
        gallery="train",
        layer=2,
    )


def text() -> Corpus:
    source = samples.path("text")
    tokenizer = ["--tokenizer", f"{source}/tokenizer.model"]
    labelled = [*tokenizer, "--label-key", "topic"]
    packed = [*tokenizer, "--block", "128", "--document", "blank-line"]
    return Corpus(
        sets={
            "train": ["text", f"{source}/train.txt.gz", *packed],
            "gallery": ["text", f"{source}/labelled.jsonl", *labelled],
            "unseen": ["text", f"{source}/unseen.jsonl", *labelled],
            "seen": ["text", f"{source}/seen.jsonl", *labelled],
        },
        tests={
            "unseen": "topics of paragraphs of articles that were never read",
            "seen": "topics of other paragraphs of the training articles",
        },
        layer=2,
    )


def cifar10(source: Path, lists: Path) -> Corpus:
    """Of a tree {train,test}/CLASS/IMAGE the first images of each class; writes lists of them."""
    sets = {}
    for name, size in CIFAR10_SIZES.items():
        classes = sorted(path for path in (source / name).iterdir() if path.is_dir())
        chosen = [
            f"{folder.name}/{image.name}"
            for folder in classes
            for image in sorted(folder.iterdir())[:size]
        ]
        lists.mkdir(parents=True, exist_ok=True)
        listed = lists / f"{name}.txt"
        listed.write_text("\n".join(chosen) + "\n")
        sets[name] = ["images", f"{source}/{name}", "--only", str(listed)]
    return Corpus(sets=sets, tests={"test": "CIFAR-10, test images"}, gallery="train", layer=4)


CORPORA = {"speech": speech, "vision": vision, "text": text}


def command(name: str, *words: str | Path) -> str:
    """Shows and runs a command of the project, shows what it prints, and returns that."""
    shown = [f"'{w}'" if set(str(w)) & set(" {[*") else str(w) for w in words]
    print(f"\n$ {' '.join([name, *shown])}", flush=True)
    with subprocess.Popen(
        [sys.executable, "-m", MODULES[name], *map(str, words)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        sys.exit(process.returncode)
    return "".join(lines)


def convert(corpora: dict[str, Corpus], shards: Path) -> None:
    for modality, corpus in corpora.items():
        for name, words in corpus.sets.items():
            command("d2v-shards", *words[:2], shards / modality / name, *words[2:])


def train_and_probe(
    recipe: str, corpora: dict[str, Corpus], shards: Path, run: Path, words: list[str]
) -> dict[str, Accuracies]:
    """Of every modality. words: more for `d2v-ds train`."""
    trained_on = {modality: f"{shards}/{modality}/train" for modality in corpora}
    sets = [f"data.shards.{modality}={path}" for modality, path in trained_on.items()]
    if len(corpora) == 1:
        sets = [f"data.shards={path}" for path in trained_on.values()]
    command("d2v-ds", "train", recipe, f"run.dir={run}", *sets, *words)
    found = {}
    for modality, corpus in corpora.items():
        folder = shards / modality
        printed = command(
            *("d2v-ds", "evaluate", "knn", run, "--modality", modality, "--compare"),
            *("--layer", str(corpus.layer), "--gallery", f"{folder}/{corpus.gallery}"),
            *("--test", *(f"{folder}/{name}" for name in corpus.tests)),
        )
        found[modality] = json.loads(printed.splitlines()[-1])["accuracy"]
        print("".join(f"\n{name}: {what}" for name, what in corpus.tests.items()))
    return found


def table(modality: str, corpus: Corpus, of_seeds: dict[int, Accuracies]) -> str:
    """Percentages in Markdown: a row a seed, the test sets side by side."""
    heads = next(iter(of_seeds.values()))
    lines = [
        f"{modality}, kNN accuracy in percent: {' / '.join(corpus.tests)}",
        f"| seed | {' | '.join(heads)} |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for seed, accuracies in of_seeds.items():
        cells = [
            " / ".join(f"{100 * accuracy[name]:.0f}" for name in corpus.tests)
            for accuracy in accuracies.values()
        ]
        lines.append(f"| {seed} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modality", choices=[*CORPORA, "joint"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, help="keep sets and runs there; default: nothing")
    parser.add_argument("--nproc", default="2", help="ranks (%(default)s)")
    parser.add_argument("--cifar10", type=Path, help="vision on this tree {train,test}/CLASS/IMAGE")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = arguments.out or Path(temporary)
        names = list(CORPORA) if arguments.modality == "joint" else [arguments.modality]
        corpora = {name: CORPORA[name]() for name in names}
        if arguments.cifar10:
            corpora["vision"] = cifar10(arguments.cifar10, out / "lists")
        convert(corpora, out / "shards")
        found = {
            seed: train_and_probe(
                f"{arguments.modality}_tiny",
                corpora,
                out / "shards",
                out if len(arguments.seeds) == 1 else out / f"seed{seed}",
                ["--nproc", arguments.nproc, f"run.seed={seed}", *arguments.overrides],
            )
            for seed in arguments.seeds
        }
    if len(found) > 1:
        for name, corpus in corpora.items():
            print("\n" + table(name, corpus, {seed: of[name] for seed, of in found.items()}))


if __name__ == "__main__":
    main()
