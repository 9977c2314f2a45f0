"""Does pre-training help? Fine-tunes tiny encoders on few labels, also from scratch.

    python benchmarks/finetune.py speech --corpus FSDD [--seeds 0 1 2] [--out FOLDER]
    python benchmarks/finetune.py vision --corpus CIFAR10
    python benchmarks/finetune.py text --corpus SST2 --more WIKITEXT2

speech: strings of spoken digits, made by joining recordings of one speaker; CTC on 10 % of the
transcripts; word error rate on speakers who are in no training data.
vision: CIFAR-10; a linear probe, and fine-tuning on 10 % of the labels.
text: SST-2, pre-trained on WikiText-2 and the text of SST-2's training part; a linear probe, and
fine-tuning on 10 % of the labels.

Both models are fine-tuned for the same number of steps with the same settings, but from scratch no
layer is frozen or has a lower learning rate. The checkpoint is chosen on a validation set that is
not the test set. Prints every command, a table of all seeds and, as the last line, JSON.
--setting gpu: larger models and more steps, for one GPU.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile

MODULES = {"d2v-ds": "d2v_ds", "d2v-shards": "shards.cli"}
DIGITS = "zero one two three four five six seven eight nine".split()
FEW = 10  # every tenth sample keeps its label


@dataclass(frozen=True)
class Experiment:
    """One corpus, converted."""

    recipe: str  # of pre-training
    finetune: str  # recipe
    sets: dict[str, Path]  # pretrain, few (labelled), all (labelled), valid, test
    evaluate: str  # the command of d2v-ds evaluate for the fine-tuned model
    metrics: tuple[str, ...]
    pretrain_settings: list[str] = field(default_factory=list)
    scratch_settings: list[str] = field(default_factory=list)  # of fine-tuning without weights
    linear: bool = True  # also a linear probe
    known: bool = False  # whether the validation set's score is in the table, too


def command(name: str, *words: str | Path) -> str:
    """Prints and runs a command of the project; returns its output."""
    shown = shlex.join([name, *map(str, words)])
    print(f"\n$ {shown}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", MODULES[name], *map(str, words)],
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = done.stdout.splitlines()
    print("\n".join(lines[-4:]), flush=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


# -------------------------------------------------------------------------------------- the corpora

TRAIN = ("jackson", "nicolas", "yweweler", "lucas")  # speakers
TEST = ("george", "theo")


def speech(corpus: Path, more: Path | None, out: Path) -> Experiment:
    """Strings of three to seven digits. Recordings 5 to 49 of four speakers are for training, their
    recordings 0 to 4 for validation; the two speakers of the test set are in no other set."""
    rng = np.random.default_rng(0)
    recordings = next(corpus.rglob("0_theo_0.wav")).parent
    parts = {
        "pretrain": strings(recordings, TRAIN, range(5, 50), 250, out / "pretrain", rng),
        "valid": strings(recordings, TRAIN, range(5), 15, out / "valid", rng),
        "test": strings(recordings, TEST, range(50), 60, out / "test", rng),
    }
    parts["few"] = parts["pretrain"][::FEW]
    sets = {}
    for name, rows in parts.items():
        listed = out / f"{name}.jsonl"
        listed.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sets[name] = out / "shards" / name
        command("d2v-shards", "speech", listed, sets[name])
    return Experiment(
        "speech_tiny",
        "finetune_speech_tiny",
        sets,
        "wer",
        ("wer", "cer"),
        ["run.steps=800"],
        ["finetune.freeze_steps=0"],  # random weights must not be frozen
        linear=False,
        known=True,
    )


def strings(
    recordings: Path,
    speakers: Sequence[str],
    numbers: Sequence[int],
    count: int,
    out: Path,
    rng: np.random.Generator,
) -> list[dict[str, str]]:
    """`count` joined recordings of each speaker, as WAV files, with their transcripts."""
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for speaker in speakers:
        for i in range(count):
            length = int(rng.integers(3, 8))
            digits, chosen = rng.integers(0, 10, length), rng.choice(numbers, length)
            pieces = [
                soundfile.read(recordings / f"{digit}_{speaker}_{number}.wav")
                for digit, number in zip(digits, chosen, strict=True)
            ]
            path = out / f"{speaker}_{i:04d}.wav"
            soundfile.write(path, np.concatenate([x for x, _ in pieces]), pieces[0][1])
            text = " ".join(DIGITS[digit] for digit in digits)
            rows.append({"audio_filepath": str(path), "text": text, "speaker": speaker})
    return rows


CIFAR10 = {"pretrain": (0, 1000), "few": (0, 100), "valid": (1000, 1100), "test": (0, 200)}


def vision(corpus: Path, more: Path | None, out: Path) -> Experiment:
    """Ranges of each class's images, in the order of their names."""
    root = next(corpus.rglob("train")).parent
    sets = {}
    for name, (first, last) in CIFAR10.items():
        folder = root / ("test" if name == "test" else "train")
        chosen = [
            f"{each.name}/{image.name}"
            for each in sorted(folder.iterdir())
            for image in sorted(each.iterdir())[first:last]
        ]
        out.mkdir(parents=True, exist_ok=True)
        listed = out / f"{name}.txt"
        listed.write_text("\n".join(chosen) + "\n")
        sets[name] = out / "shards" / name
        command("d2v-shards", "images", folder, sets[name], "--only", listed)
    sets["all"] = sets["pretrain"]
    return Experiment(
        "vision_tiny",
        "finetune_vision_tiny",
        sets,
        "accuracy",
        ("accuracy",),
        scratch_settings=["finetune.layer_decay=1"],  # lower rates only protect trained weights
    )


def text(corpus: Path, more: Path | None, out: Path) -> Experiment:
    """The development set chooses the checkpoint; the test set is SST-2's own."""
    assert more is not None, "text needs --more WIKITEXT2"
    out.mkdir(parents=True, exist_ok=True)
    rows = {
        name: list(csv.reader(next(corpus.rglob(f"{name}.tsv")).open(), delimiter="\t", quoting=3))
        for name in ("train", "dev", "test")
    }
    plain = out / "pretrain.txt"
    wiki = [next(more.rglob(f"{name}.txt")).read_text() for name in ("valid", "test")]
    plain.write_text("\n".join([*wiki, *(row[0] for row in rows["train"])]) + "\n")
    model = out / "tokenizer.model"
    command("d2v-shards", "tokenizer", plain, model, "--vocab-size", "4096")
    sets = {"pretrain": out / "shards" / "pretrain"}
    words: list[str | Path] = ["--tokenizer", model]
    command("d2v-shards", "text", plain, sets["pretrain"], *words, "--block", "128")
    labelled = {"few": rows["train"][::FEW], "all": rows["train"], "valid": rows["dev"]}
    for name, chosen in {**labelled, "test": rows["test"]}.items():
        listed = out / f"{name}.jsonl"
        lines = [json.dumps({"text": sentence, "label": label}) for sentence, label in chosen]
        listed.write_text("\n".join(lines) + "\n")
        sets[name] = out / "shards" / name
        command("d2v-shards", "text", listed, sets[name], *words, "--label-key", "label")
    return Experiment(
        "text_tiny", "finetune_text_tiny", sets, "accuracy", ("accuracy",), ["run.steps=1000"]
    )


CORPORA = {"speech": speech, "vision": vision, "text": text}

# For one GPU, not tried yet: a larger model that is pre-trained for longer.
GPU = ["model.dim=384", "model.depth=8", "model.heads=6", "run.steps=20000"]

# -------------------------------------------------------------------------------------- one seed


def run_seed(
    of: Experiment, seed: int, out: Path, words: list[str], pretrain_words: list[str]
) -> dict[str, float]:
    """{what: value} of one seed. words: arguments of all training; pretrain_words: of the first."""
    common = [f"run.seed={seed}", *words]
    pretrained = out / "pretrained"
    command(
        *("d2v-ds", "train", of.recipe, f"run.dir={pretrained}"),
        *(f"data.shards={of.sets['pretrain']}", *of.pretrain_settings, *pretrain_words, *common),
    )
    found = {}
    if of.linear:
        printed = command(
            *("d2v-ds", "evaluate", "linear", pretrained, "--layer", "all", "--compare"),
            *("--train", of.sets["all"], "--test", of.sets["test"]),
        )
        accuracy = json.loads(printed.splitlines()[-1])["accuracy"]
        for name, value in accuracy.items():
            found[f"linear probe: {name}"] = value["test"]
    tests = [of.sets[name] for name in (("test", "valid") if of.known else ("test",))]
    for name, start in (("pre-trained", "student"), ("from scratch", "nothing")):
        tuned = out / name.replace(" ", "-")
        command(
            *("d2v-ds", "finetune", of.finetune, f"run.dir={tuned}", f"init={pretrained}"),
            *(f"init_from={start}", f"data.shards={of.sets['few']}"),
            *(f"data.valid={of.sets['valid']}", *common),
            *(of.scratch_settings if start == "nothing" else ()),
        )
        printed = command(
            *("d2v-ds", "evaluate", of.evaluate, tuned / "checkpoints" / "best"),
            "--test",
            *tests,
        )
        scores = json.loads(printed.splitlines()[-1])["scores"]
        for metric in of.metrics:
            found[f"{metric}, {name}"] = scores["test"][metric]
            if of.known:
                found[f"{metric}, speakers of the training set, {name}"] = scores["valid"][metric]
    return found


def table(of_seeds: dict[int, dict[str, float]]) -> str:
    """Percentages as a Markdown table, a row for each model."""
    seeds = list(of_seeds)
    lines = [
        f"| percent | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |",
        "|---" * (len(seeds) + 2) + "|",
    ]
    for name in of_seeds[seeds[0]]:
        values = [100 * of_seeds[seed][name] for seed in seeds]
        cells = [f"{value:.1f}" for value in [*values, float(np.mean(values))]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modality", choices=CORPORA)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--more", type=Path, help="text: the folder of WikiText-2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="folder to keep; default: a temporary one")
    parser.add_argument("--nproc", default="1", help="number of ranks (%(default)s)")
    parser.add_argument("--setting", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_intermixed_args()
    began = time.monotonic()
    pretrain_words, words = list[str](), ["--nproc", arguments.nproc, *arguments.overrides]
    if arguments.setting == "gpu":
        pretrain_words, words = GPU, [*words, "data.workers=8"]
    elif arguments.nproc == "1":
        words += ["engine.config=local"]
    with tempfile.TemporaryDirectory() as temporary:
        out = arguments.out or Path(temporary)
        experiment = CORPORA[arguments.modality](arguments.corpus, arguments.more, out)
        found = {
            seed: run_seed(experiment, seed, out / f"seed{seed}", words, pretrain_words)
            for seed in arguments.seeds
        }
    print(f"\n{table(found)}\n")
    print(f"{(time.monotonic() - began) / 60:.0f} minutes")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
