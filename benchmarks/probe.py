"""Shows what the tiny recipes learn: the demo of one modality, or of all, for one or more seeds.

    python benchmarks/probe.py speech|vision|text|joint [key.path=value ...] [--seeds 0 1 2]
        [--out FOLDER] [--cifar10 FOLDER]

Converts the bundled corpora, pre-trains the recipe MODALITY_tiny, and measures the accuracy of a
kNN probe on features of the frozen encoder, compared with the same network before training, with
plain features of the input and with chance. For text it also compares the error of the model for a
paragraph with that for a copy in which neighbouring tokens are swapped. Prints every command that
it runs and, for several seeds, a table. The last line is JSON.

B samples, M masked views per sample, T tokens, N masked tokens, D width.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from d2v_ds.config import Config
from d2v_ds.config.decoding import decode
from d2v_ds.data.shard_format import open_set
from d2v_ds.evaluate import read_labelled
from d2v_ds.modalities.base import Modality
from d2v_ds.modalities.text import Text
from d2v_ds.pretrain import Pretrain, at_masked
from d2v_ds.weights import load_weights, open_newest
from shards import samples

MODULES = {"d2v-ds": "d2v_ds", "d2v-shards": "shards.cli"}
Accuracies = dict[str, dict[str, float]]  # {encoder: {test set: accuracy}}
Ids = npt.NDArray[np.int64]

CIFAR10_SIZES = {"train": 1000, "test": 100}  # images used per class


@dataclass(frozen=True)
class Corpus:
    """The demo of one modality. sets: {name: arguments of d2v-shards}; `train` is for pre-training,
    the set named by `gallery` has the labelled neighbours, and `tests`, {name: description}, are
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
            "unseen": "digits of a speaker who is not in the training data",
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
        tests={"unseen": "tiles from parts of the ten pictures that are not in the training data"},
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
            "unseen": "topics of paragraphs from articles that are not in the training data",
            "seen": "topics of other paragraphs of the training articles",
        },
        layer=2,
    )


def cifar10(source: Path, lists: Path) -> Corpus:
    """The first images of each class of a folder tree {train,test}/CLASS/IMAGE; writes lists of
    them into `lists`."""
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
    """Prints and runs a command of the project; prints and returns its output."""
    print(f"\n$ {shlex.join([name, *map(str, words)])}".replace(f"{Path.cwd()}/", ""), flush=True)
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
    """{probe: accuracies}. words: further arguments of `d2v-ds train`."""
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
        if modality == "text":
            found["order of words"] = order_accuracy(run, folder / "unseen")
    return found


# --------------------------------------------------------------------------------------- word order

SWAPS = (1, 4)  # swapped pairs of neighbouring tokens
LENGTH = 100  # tokens used per paragraph; shorter paragraphs are left out
VIEWS = 8  # masks per error, the same for original and copy


def order_accuracy(run: Path, paragraphs: Path) -> Accuracies:
    """The fraction of paragraphs whose masked tokens are predicted better than in a copy with
    swapped pairs of neighbours. A bag of words is the same for both and scores one half."""
    found = open_newest(run)
    task = Pretrain.create(decode(Config, found.state["config"])).eval()
    load_weights(task, found)
    config = dataclasses.replace(task.modalities["text"].config, views=VIEWS)
    modality = Text(config)
    examples = read_labelled(open_set(paragraphs, "text"), modality, "label").decoded()
    real = [ids[:LENGTH] for ids in examples if len(ids) >= LENGTH]
    rng = np.random.default_rng(0)
    error = errors(task, modality, real)
    trained = {}
    for pairs in SWAPS:
        swapped = errors(task, modality, [swap(ids, pairs, rng) for ids in real])
        right = (error < swapped).float() + 0.5 * (error == swapped).float()
        trained[f"{pairs} swapped"] = float(right.mean())
    print(f"\norder accuracy on {len(real)} paragraphs from articles not in the training data")
    for name, share in trained.items():
        print(f"{name:<14}{100 * share:5.1f}%  (bag of words, chance: 50.0%)")
    return {"trained model": trained, "chance": dict.fromkeys(trained, 0.5)}


def swap(ids: Ids, pairs: int, rng: np.random.Generator) -> Ids:
    """A copy with this number of neighbouring pairs swapped, at random positions."""
    ids = ids.copy()
    for position in rng.choice(len(ids) - 1, pairs, replace=False):
        ids[position : position + 2] = ids[position : position + 2][::-1]
    return ids


@torch.no_grad()
def errors(task: Pretrain, modality: Modality, examples: list[Ids]) -> torch.Tensor:
    """The squared error over the masked tokens of each example, relative to the squared targets,
    [n]. The masks are the same in every call."""
    shares = []
    for start in range(0, len(examples), 16):
        group = examples[start : start + 16]
        rngs = [np.random.default_rng(start + i) for i in range(len(group))]
        batch = modality.collate(group, rngs, 0)
        tokens = task.student.encoder.features(batch)  # [B, T, D]
        targets = at_masked(task.targets(batch, tokens), batch)  # [N, D]
        predictions, _ = task.student.predict(batch, tokens)
        example = batch.masked // (batch.views * batch.seen.shape[1])  # [N], of the group
        error, total = (
            torch.zeros(len(group)).index_add_(0, example, x.square().sum(1))
            for x in (predictions - targets, targets)
        )
        shares.append(error / total)
    return torch.cat(shares)


# ------------------------------------------------------------------------------------------ command


def table(name: str, of_seeds: dict[int, Accuracies]) -> str:
    """Percentages as a Markdown table with one row per seed."""
    [heads, *_] = of_seeds.values()
    [scored, *_] = heads.values()
    lines = [
        f"{name}, percent: {' / '.join(scored)}",
        f"| seed | {' | '.join(heads)} |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for seed, accuracies in of_seeds.items():
        cells = [
            " / ".join(f"{100 * share:.0f}" for share in row.values())
            for row in accuracies.values()
        ]
        lines.append(f"| {seed} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modality", choices=[*CORPORA, "joint"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--out", type=Path, help="folder to keep sets and runs in; default: a temporary one"
    )
    parser.add_argument("--nproc", default="2", help="number of ranks (%(default)s)")
    parser.add_argument(
        "--cifar10", type=Path, help="for vision: a folder tree {train,test}/CLASS/IMAGE"
    )
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
        for name in found[arguments.seeds[0]]:
            print("\n" + table(name, {seed: of[name] for seed, of in found.items()}))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
