"""`d2v-ds show`: the text of `describe`, computed without a GPU."""

from __future__ import annotations

import re

import pytest
import torch
import yaml

from d2v_ds import recipes, show
from d2v_ds.cli import main
from d2v_ds.config.decoding import to_dict
from d2v_ds.errors import UserError
from d2v_ds.pretrain import Pretrain
from d2v_ds.show.memory import activation_bytes, largest_batch, sizes, state_bytes

MIB, GIB = 2**20, 2**30


def described(recipe: str, *overrides: str, ranks: int = 2, memory: int | None = None) -> str:
    return show.describe(recipes.load(recipe, list(overrides)), ranks, memory)


def on_meta(recipe: str, *overrides: str) -> Pretrain:
    with torch.device("meta"):
        return Pretrain.create(recipes.load(recipe, list(overrides))).train()


def part(text: str, first: str) -> list[str]:
    """The indented lines under the line that begins with `first`."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(first)) + 1
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("  "))
    return lines[start:end]


# ---------------------------------------------------------------------------- one modality


def test_it_begins_with_the_resolved_configuration() -> None:
    text = described("speech_tiny", "optim.lr=2e-3")
    shown = yaml.safe_load(text.split("\nparameters\n")[0])
    config = recipes.load("speech_tiny", ["optim.lr=2e-3"])
    assert shown == to_dict(Pretrain.resolve(config)) and shown["optim"]["lr"] == 2e-3
    assert shown["modality"]["speech"]["decoder"]["noise"] == 0.01  # defaults are written out


def test_parameters_by_part() -> None:
    lines = part(described("vision_tiny"), "parameters")
    counts = {line.split()[0]: int(line.split()[1].replace(",", "")) for line in lines}
    P, A = sizes(on_meta("vision_tiny"))
    positions = 64 * 128  # the fixed positions of student and teacher are counted, too
    assert counts["student"] == P + positions and counts["teacher"] == A + positions
    assert counts["student"] == sum(
        count for name, count in counts.items() if name.startswith(("encoder.", "predictors."))
    )
    assert counts["encoder.front_ends.vision.extra"] == 128
    assert "shared" not in counts and not any(line.startswith("  of ") for line in lines)


def test_memory_by_stage_and_precision() -> None:
    text = described("speech_base", ranks=4)
    header, *rows = part(text, "GiB per rank on 4 ranks, without activations")
    assert re.findall(r"ZeRO (\d)", header) == ["0", "1", "2", "3"]
    P, A = sizes(on_meta("speech_base"))
    for row, name, width in zip(rows, ("bf16", "fp32"), (2, 4), strict=True):
        expected = [f"{state_bytes(P, A, stage, 4, width) / GIB:.3f}" for stage in range(4)]
        assert row.split() == [name, *expected]
    assert "GiB per rank on 1 rank, " in described("speech_tiny", ranks=1)


def test_the_split_of_a_step() -> None:
    text = described("speech_base", ranks=4)
    assert "\na step (500 s) is split into 8 micro-batches of at most 62.5 s\n" in text
    assert "\nruns on 1, 2, 4 or 8 ranks, with the same batches\n" in text
    assert text.endswith("\non 4 ranks, each rank computes 2 micro-batches per step")
    uneven = described("speech_base", ranks=3)
    assert uneven.endswith("\nruns on 1, 2, 4 or 8 ranks, with the same batches")
    one = described("text_tiny", "batch.micro_batches=1", ranks=1)
    assert "is split into 1 micro-batch of at most 2048 tokens\nruns on 1 rank, with" in one
    assert one.endswith("on 1 rank, each rank computes 1 micro-batch per step")


def test_warnings_are_shown() -> None:
    settings = [
        "modality.speech.positions={depth: 5, kernel: 19}",
        "modality.speech.crop_seconds=1",
    ]
    assert "\nwarning: modality.speech.positions: 5 convolutions" in described(
        "speech_tiny", *settings
    )
    assert "warning" not in described("speech_tiny")


# ------------------------------------------------------------------- several sources, modalities


def test_the_shares_of_several_corpora() -> None:
    text = described(
        "speech_tiny",
        "data.shards={speech/a: /a, speech/b: /b}",
        "data.weights={speech/a: 1, speech/b: 3}",
    )
    assert "each step reads one source; shares of the steps: speech/a 25.0%, speech/b 75.0%" in text
    assert "each step reads one source" not in described("speech_tiny")


@pytest.fixture(scope="module")
def joint() -> str:
    """Three modalities on GPUs that are small for one of them."""
    return described("joint_tiny", "batch.micro_batches=16", ranks=8, memory=25 * MIB)


def test_several_modalities_have_a_line_each(joint: str) -> None:
    assert re.findall(r"^a step of (\w+) \((\S+ \w+)\)", joint, re.M) == [
        ("speech", "8.05 s"),
        ("vision", "32 images"),
        ("text", "2048 tokens"),
    ]
    assert re.findall(r"^  (?:of )?(shared|speech|vision|text) +[\d,]+$", joint, re.M) == [
        "shared",
        "speech",
        "vision",
        "text",
    ]
    assert re.findall(r"^(\w+): activations of", joint, re.M) == ["speech", "vision", "text"]


# --------------------------------------------------------------------------------- --gpu-memory


def test_the_smallest_stage_that_fits() -> None:
    wide = described("speech_base", ranks=8, memory=80 * GIB)
    assert "with 80 GiB per GPU, 10% of it kept free, on 8 ranks" in wide
    assert "smallest ZeRO stage that fits: engine.config=zero0" in wide
    assert wide.endswith("a checkpoint takes 1.83 GB on disk")
    narrow = described("speech_tiny", ranks=8, memory=40 * MIB)
    assert "smallest ZeRO stage that fits: engine.config=zero1" in narrow
    tight = described("speech_tiny", ranks=8, memory=10 * MIB)
    assert "does not fit at any ZeRO stage: use more ranks, raise batch.micro_batches or" in tight
    assert "per GPU" not in described("speech_tiny", ranks=8)


def test_the_largest_micro_batch_of_each_stage() -> None:
    rows = [
        line.split()
        for line in described("vision_base", ranks=8, memory=24 * GIB).splitlines()
        if re.match(r"  (ZeRO \d|largest micro-batch \(images\))  ", line)
    ]
    assert rows[0][-2:] == ["plain", "checkpointed"]
    plain, checkpointed = ([int(row[i]) for row in rows[1:]] for i in (2, 3))
    assert plain == sorted(plain) and checkpointed == sorted(checkpointed)
    assert all(0 < a < b for a, b in zip(plain, checkpointed, strict=True))


def test_a_run_of_several_modalities_needs_the_largest_of_their_stages(joint: str) -> None:
    stages = re.findall(r"^  smallest ZeRO stage .*(zero\d)$", joint, re.M)
    assert stages == ["zero3", "zero1", "zero1"]
    assert "\nsmallest ZeRO stage that fits all modalities: engine.config=zero3\n" in joint
    some = described("joint_tiny", "batch.micro_batches=16", ranks=8, memory=15 * MIB)
    assert "smallest ZeRO stage that fits: engine.config" in some
    assert "the run does not fit at any ZeRO stage, because not all of its" in some


@pytest.mark.parametrize(
    ("recipe", "samples"), [("vision_base", 20), ("vision_base", 40), ("text_base_v1", 9)]
)
def test_the_largest_micro_batch_fits_and_a_few_more_samples_do_not(
    recipe: str, samples: int
) -> None:
    """For text with checkpointing, most of a small batch's memory is the embedding's gradient."""
    task, modality = on_meta(recipe), recipe.partition("_")[0]
    needed = show.activations(task, modality, 2, 12, recipe.startswith("text"))
    batch = largest_batch(task, modality, samples)
    room = activation_bytes(task, batch, torch.bfloat16, fused=True)
    assert 0.75 * samples <= show.most_samples(needed, room) <= samples


def test_most_samples() -> None:
    needed = {1: 100, 8: 100, 16: 180}
    rooms = (99, 100, 109, 110, 180, 1000)
    assert [show.most_samples(needed, room) for room in rooms] == [0, 8, 8, 9, 16, 98]


# ------------------------------------------------------------------------------------ --measure


def test_it_measures_the_longest_micro_batch() -> None:
    config = recipes.load("speech_tiny", ["modality.speech.views=1"])
    text = show.describe(config, 2, GIB, measure=True)
    [line] = [line for line in text.splitlines() if line.startswith("speech: measured")]
    found = re.fullmatch(
        r"speech: measured on this machine's cpu in fp32: a micro-batch of 2.005 s takes (\S+) GiB "
        r"of activations and (\S+) s",
        line,
    )
    assert found, line
    assert 0 < float(found[1]) < 1 and float(found[2]) > 0
    assert "smallest ZeRO stage that fits: engine.config=zero0" in text
    alone = show.describe(config, 2, measure=True)
    assert "speech: measured" in alone and "smallest ZeRO stage" not in alone


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("target.top_k=9", "target.top_k: 9 exceeds model.depth=4"),
        ("model.heads=3", "model: dim=128 is not divisible by heads=3"),
        ("modality.speech.cls_weight=1", "modality.speech: cls_weight=1.0 needs extra_tokens"),
        ("modality.speech.wrong=1", "modality.speech.wrong: no such setting"),
    ],
)
def test_wrong_settings_are_errors(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        described("speech_tiny", override)
    assert str(caught.value).startswith(message)


def test_measuring_in_a_precision_that_is_not_available_is_an_error() -> None:
    config = recipes.load("speech_tiny", ["engine.precision=fp16"])
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        show.describe(config, 2, measure=True)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["show", "speech_tiny", "--ranks", "2", "run.steps=500", "--gpu-memory", "80GiB"]
    assert main(words) == 0
    expected = described("speech_tiny", "run.steps=500", ranks=2, memory=80 * GIB)
    assert capsys.readouterr().out == expected + "\n"
    for wrong in (["--ranks", "0"], ["--gpu-memory", "much"]):
        with pytest.raises(SystemExit) as exit_:
            main(["show", "speech_tiny", *wrong])
        assert exit_.value.code == 2 and wrong[1] in capsys.readouterr().err
    assert main(["show", "speech_tin"]) == 2
    assert "did you mean 'speech_tiny'?" in capsys.readouterr().err
