"""Forward passes, gradients, steps and schedules equal those of the original implementations.

Comparisons use the original names. D2V_GOLDEN names another folder of fixtures.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from d2v_ds import student
from d2v_ds.config import Optim
from d2v_ds.pretrain import at_masked
from d2v_ds.schedules import ema_decay, learning_rate
from d2v_ds.step import create_engine_and_ema
from tests.helpers.golden_fixture import Fixture, fixture_names
from tests.helpers.steps import take

RELATIVE = 1e-5
TRAJECTORY = 2e-5  # of losses; a relative change of the weights of 1e-7 causes 3e-6
FINAL = 5e-5  # of the weights after a trajectory


def close(ours: Tensor, theirs: Tensor, what: str, tolerance: float = RELATIVE) -> None:
    """Asserts a bound on the largest difference relative to the largest expected value."""
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} is not {tuple(theirs.shape)}"
    scale = theirs.abs().max().clamp(min=1e-12)
    error = ((ours.detach() - theirs).abs().max() / scale).item()
    assert error <= tolerance, f"{what}: off by {error:.2e} of its largest value"


@pytest.fixture(params=fixture_names())
def golden(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fixture]:
    fixture = Fixture(request.param)
    if "noise" in fixture.arrays:
        noise = fixture.arrays["noise"]
        monkeypatch.setattr(student, "mask_noise", lambda N, D, std, like: noise)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield fixture
    torch.set_num_threads(threads)


def stack(extra: Tensor | None, x: Tensor) -> Tensor:
    """Prepends the extra tokens, as in the original outputs."""
    return x if extra is None else torch.cat([extra, x], dim=1)


def compare_layers(
    golden: Fixture, layers: list[tuple[Tensor, Tensor]], kinds: Mapping[int, str], what: str
) -> None:
    """layers: (FFN output, block output) of all blocks. kinds: {index in the pair: array name}."""
    found = 0
    for i, layer in enumerate(layers):
        for part, name in kinds.items():
            array = golden.arrays.get(f"out/{name}/{i}")
            if array is not None:
                close(layer[part], array, f"{what}'s layer {i}, {name}")
                found += 1
    assert found, f"{golden.name} has no array of {sorted(kinds.values())}"


def test_golden_forward(golden: Fixture) -> None:
    task, batch = golden.task(), golden.batch()
    golden.separate(task)
    encoder, depth = task.student.encoder, len(task.student.encoder.trunk.blocks)
    tokens = encoder.features(batch)
    positions = getattr(encoder.front_end(golden.modality).features, "positions", None)
    before = tokens - positions if isinstance(positions, Tensor) else tokens
    for name in ("out/features", "out/local_features"):
        if name in golden.arrays:
            close(before, golden.arrays[name], "features")

    layers = task.teacher.layers(encoder, batch, tokens, top_k=depth)
    kinds = {0: "teacher_layer_ffn", 1: "teacher_layer_end"}
    compare_layers(golden, layers, kinds, "teacher")
    if batch.visible is None:
        compare_replaced(golden)
    else:
        compare_removed(golden)


def compare_replaced(golden: Fixture) -> None:
    """1.0: compares the student's blocks and output, first on masked input, then on whole input."""
    task, batch = golden.task(), golden.batch()
    encoder, depth = task.student.encoder, len(task.student.encoder.trunk.blocks)
    read = batch.corrupted if batch.corrupted is not None else batch.inputs
    tokens = encoder.front_end(golden.modality).features(read)  # type: ignore[misc]
    attend = encoder.attend
    encoder.attend = lambda *a: attend(*a[:-1], depth)  # type: ignore[method-assign]
    x, _, layers = encoder.views(batch, tokens)
    encoder.attend = attend  # type: ignore[method-assign]
    if "out/student_x" in golden.arrays:
        close(x, golden.arrays["out/student_x"], "student's output")
    if "out/student_layer_end/0" in golden.arrays:
        kinds = {0: "student_layer_ffn", 1: "student_layer_end"}
        compare_layers(golden, layers, kinds, "student")
    compare_unmasked(golden)


def compare_removed(golden: Fixture) -> None:
    """2.0: compares the encoder's scattered output, the decoder's input, and unmasked input."""
    task, batch = golden.task(), golden.batch()
    encoder = task.student.encoder
    x, extra, _ = encoder.views(batch, encoder.features(batch))
    (R, T), visible = batch.seen.shape, batch.visible
    assert visible is not None
    placed = torch.zeros(R, T, x.shape[-1]).scatter(1, visible[:, :, None].expand_as(x), x)
    last = golden.meta["resolved"]["depth"] - 1
    close(placed, golden.arrays[f"out/student_block_end/{last}"], "student's encoder output")
    if extra is not None:
        close(extra, golden.arrays[f"out/student_block_end_extra/{last}"], "extra tokens")
        close(extra[:, -1], golden.arrays["out/cls_pred"], "class prediction")
    decoder = task.student.predictors[golden.modality]
    close(decoder.fill(batch, x), golden.arrays["out/decoder_in"], "decoder's input")
    expected = golden.arrays["out/decoder_out"].flatten(0, 1)[batch.masked]
    close(decoder(batch, x), expected, "decoder's output")
    compare_unmasked(golden)


def compare_unmasked(golden: Fixture) -> None:
    task, batch = golden.task().eval(), golden.batch()
    if golden.modality == "text" and golden.variant[1] == "1.0":
        # In these fixtures, `inputs` is the teacher's input.
        batch = dataclasses.replace(batch, inputs=golden.arrays["batch/orig_tokens"], shown=None)
    encoder = task.student.encoder
    x, extra, _ = encoder.whole(batch, encoder.features(batch))
    close(stack(extra, x), golden.arrays["eval/x"], "unmasked student")


def test_golden_targets_loss_and_gradients(golden: Fixture) -> None:
    task, batch = golden.task(), golden.batch()
    golden.separate(task)
    count = int(golden.arrays["loss/sample_size"])
    tokens = task.student.encoder.features(batch)
    targets = task.targets(batch, tokens)
    close(targets, golden.arrays["out/targets_full"], "targets of all tokens")
    close(at_masked(targets, batch), golden.arrays["out/targets"], "targets")
    predictions, _ = task.student.predict(batch, tokens)
    close(predictions, golden.arrays["out/pred"], "predictions")

    loss, stats = task(batch, count)
    close(loss, golden.arrays["loss/scaled"], "loss")
    close(stats["masked"], golden.arrays["loss/sample_size"].float(), "masked tokens")
    loss.backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in task.student.named_parameters()
    }
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients.values()]))
    close(norm, golden.arrays["grad_norm"], "gradient norm")
    expected, ours = golden.group("grad"), golden.theirs(gradients)
    assert expected
    for name, gradient in expected.items():
        # A sum over all rows and pairs of tokens, so the order of summation matters.
        tolerance = 5e-5 if name.endswith("alibi_scale") else RELATIVE
        close(ours[name], gradient, f"gradient of {name}", tolerance)


@dataclass
class Trained:
    """The state after optimizer and EMA steps, under the original names of student parameters."""

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]  # includes shared parts, which the original copies
    gradients: dict[str, Tensor]  # of the first step, after clipping
    losses: list[float]


def train(golden: Fixture, decays: list[float]) -> Trained:
    """Trains one step per EMA decay, on the fixture's batch."""
    config, task, batch = golden.config, golden.task(), golden.batch()
    engine, ema = create_engine_and_ema(
        task,
        settings=config.engine,
        optim=config.optim,
        accumulation=1,
        device=torch.device("cpu"),
    )
    assert ema is not None
    with torch.no_grad():  # the fixture's teacher is not a copy of its student
        for name, value in golden.averages(task).items():
            ema.values[name][1].copy_(value.flatten())
    ema.publish()
    golden.separate(task)
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    for decay in decays:
        [loss] = take(
            engine,
            None,
            [batch],
            count=int(golden.arrays["loss/sample_size"]),
            lr=config.optim.lr,
            weight_decay=config.optim.weight_decay,
        )
        golden.share(task)  # after the optimizer and before the EMA, as in the original code
        ema.update(decay, golden.modality)
        losses.append(loss)
        if not gradients:
            gradients = {
                name.removeprefix("student."): (partition.exp_avg / (1 - config.optim.betas[0]))
                .view_as(task.get_parameter(name))
                .clone()
                for name, partition in engine.partitions().items()
            }
    state = task.student.state_dict()
    teacher = state | dict(task.teacher.state_dict())
    return Trained(golden.theirs(state), golden.theirs(teacher), golden.theirs(gradients), losses)


NOT_PARAMETERS = {"encoder.sentence_encoder.version"}  # the format of fairseq's checkpoints
# A teacher never uses these, so ours lacks them; the original code still averages them.
UNUSED = ("mask_token", "lm_head.weight", "lm_head.bias")


def rounding_of_step(golden: Fixture, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The largest error of Adam's first step, by element, for gradients within the tolerance. Adam
    divides each gradient by its magnitude, so rounding errors of near-zero gradients (such as the
    keys' bias) are amplified."""
    optim = golden.config.optim
    eps = optim.eps
    if optim.adam_eps == "fairseq":
        eps /= math.sqrt(1 - optim.betas[1])
    floor = 1e-7 * max(float(g.abs().max()) for g in gradients.values())
    result = {}
    for name, g in gradients.items():
        error = RELATIVE * g.abs().max() + floor
        steps = [x / (x.abs() + eps) for x in (g - error, g, g + error)]
        spread = torch.maximum(steps[1] - steps[0], steps[2] - steps[1])
        result[name] = optim.lr * spread
    return result


def test_golden_step(golden: Fixture) -> None:
    trained = train(golden, [golden.decay])
    rounding = rounding_of_step(golden, trained.gradients)
    student = golden.group("after/student")
    teacher = golden.teacher(golden.group("after/teacher"))
    assert trained.gradients.keys() <= trained.student.keys() == student.keys() - NOT_PARAMETERS
    for name in student.keys() - NOT_PARAMETERS:
        slack = rounding.get(name, 0.0)
        close_but(trained.student[name], student[name], slack, f"student's {name}")
    for name in teacher.keys() - NOT_PARAMETERS - set(UNUSED):
        slack = rounding.get(name, 0.0)
        close_but(trained.teacher[name], teacher[name], slack, f"teacher's {name}")


def close_but(ours: Tensor, theirs: Tensor, slack: Tensor | float, what: str) -> None:
    """Asserts that the difference, minus `slack`, is within RELATIVE of the largest value."""
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} is not {tuple(theirs.shape)}"
    excess = (ours - theirs).abs() - slack
    error = float(excess.max() / theirs.abs().max().clamp(min=1e-12))
    assert error <= RELATIVE, f"{what}: off by {error:.2e} of its largest value"


def test_golden_trajectory(golden: Fixture) -> None:
    if not golden.has_trajectory():
        pytest.skip(f"{golden.name} has no trajectory")
    expected = golden.trajectory
    trained = train(golden, expected["tau"].tolist())
    losses = torch.tensor(trained.losses, dtype=torch.float64)
    close(losses, expected["loss"], "losses", TRAJECTORY)
    for side, ours in (("student", trained.student), ("teacher", trained.teacher)):
        prefix = f"final/{side}/"
        values = {k.removeprefix(prefix): v for k, v in expected.items() if k.startswith(prefix)}
        values = golden.teacher(values) if side == "teacher" else values
        assert values
        for name, value in values.items():
            # Compares norms instead of maxima, for the reason in rounding_of_step
            error = float((ours[name] - value).norm() / value.norm())
            assert error <= FINAL, f"{side}'s {name} after four steps: off by {error:.2e}"


SCHEDULES = json.loads((Path(__file__).parent / "golden" / "schedules.json").read_text())


def schedule_of(golden: Mapping[str, object]) -> tuple[Optim, int]:
    """The learning rate settings and the number of steps."""
    if "scheduler" not in golden:  # BEiT's README: ten epochs of warm-up
        settings = {"schedule": "cosine_beit", "lr_end": golden["min_lr"]}
        warmup, steps = 10 * golden["iters_per_epoch"], golden["total_iters"]  # type: ignore[operator]
    else:
        scheduler, steps = golden["scheduler"], golden["max_update"]
        settings = {"schedule": scheduler["_name"]}  # type: ignore[index]
        warmup = scheduler.get("warmup_updates", 0)  # type: ignore[attr-defined]
        if settings["schedule"] == "tri_stage":
            warmup = int(scheduler["phase_ratio"][0] * steps)  # type: ignore[index]
    return Optim(lr=golden["peak_lr"], warmup_steps=warmup, **settings), steps  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("name", SCHEDULES)
def test_golden_schedules(name: str) -> None:
    golden = SCHEDULES[name]
    optim, steps = schedule_of(golden)
    for n, expected in golden["lr_at_update"]:
        if n >= steps and optim.schedule == "cosine":
            continue  # fairseq's cosine restarts after the last step; ours stays at its end
        ours = learning_rate(optim, steps, n)
        assert ours == pytest.approx(expected, rel=1e-9, abs=1e-18), f"learning rate of step {n}"
    ema = golden["ema"]
    anneal = ema.get("anneal_end_step", 0)
    for n, expected in golden["ema_tau_at_update"]:
        ours = ema_decay(n, ema["start"], ema["end"], anneal)
        assert ours == pytest.approx(expected, rel=1e-12), f"EMA decay of update {n}"
