"""Whole evaluations of a real run: tables, JSON, the choice of a block, records in the run."""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from d2v_ds import cli, scores
from d2v_ds.data.shard_format import open_set
from d2v_ds.encoder import load_encoder
from d2v_ds.errors import UserError
from d2v_ds.evaluate import embed, knn_accuracy, probes, read_labelled, run_knn, run_probe
from d2v_ds.evaluate.embedding import embed_blocks, embed_tokens
from d2v_ds.evaluate.labelled import Labelled
from d2v_ds.evaluate.probes import PROBES
from d2v_ds.evaluate.run import of_encoder
from d2v_ds.evaluate.scoring import Scorer
from d2v_ds.run.heartbeat import Heartbeat, beat
from d2v_ds.run.run_folder import RunFolder
from d2v_ds.run.status import describe, training
from tests.evaluate.conftest import Trained
from tests.helpers import joint_sets


def evaluate(
    trained: Trained, *words: str, capsys: pytest.CaptureFixture[str], modality: str = "text"
) -> tuple[list[str], dict[str, Any]]:
    """The lines of the command without the last, and the last."""
    probe, *options = words
    sets = ["--train", str(trained.sets[modality]), "--test", str(trained.sets[f"{modality} test"])]
    command = ["evaluate", probe, str(trained.root), "--modality", modality, *sets, *options]
    assert cli.main(command) == 0
    *table, last = capsys.readouterr().out.splitlines()
    return table, json.loads(last)


# ------------------------------------------------------------------------------ tables and JSON


def test_knn_prints_the_table_it_always_printed(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [str(trained.sets[name]) for name in ("text", "text test")]
    words = ["--gallery", sets[0], "--test", sets[1], "--modality", "text", "--compare"]
    assert cli.main(["evaluate", "knn", str(trained.root), *words]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    encoder = load_encoder(trained.root, modality="text")
    known, query = (read_labelled(open_set(s), encoder.modality, "label") for s in sets)
    features = [embed(encoder, list(each.decoded()), 1) for each in (known, query)]
    expected = knn_accuracy(features[0], known.labels, features[1], query.labels)
    assert found["accuracy"]["trained student"] == {"text_test": expected}
    assert list(found["accuracy"]) == [
        *("trained student", "untrained encoder", "bag of words", "chance")
    ]
    assert table[:2] == [
        "kNN accuracy at step 2, block 1 of 2, gallery of 40 labelled samples",
        " " * 19 + "text_test (24)",
    ]
    assert table[2] == f"trained student    {100 * expected:13.1f}%"
    assert table[5] == f"chance             {50.0:13.1f}%"
    text, summary = run_knn(
        trained.root, gallery=sets[0], tests=sets[1:], modality="text", compare=True
    )
    assert text.splitlines() == table
    assert json.loads(json.dumps({**summary, "recorded": found["recorded"]})) == found


@pytest.mark.parametrize("probe", ["ridge", "logistic", "linear", "attentive"])
def test_every_probe_reports_everything(
    probe: str,
    trained: Trained,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probes, "EPOCHS", 30)
    table, found = evaluate(
        trained, probe, "--layer", "all", "--weights", "both", "--compare", capsys=capsys
    )
    rows = ["trained student", "trained teacher", "untrained encoder"]
    rows += ["bag of words"] * (probe != "attentive")
    assert list(found["accuracy"]) == [*rows, "chance"]
    assert list(found["top5"]) == list(found["interval"]) == list(found["chosen"]) == rows
    assert found["test"] == {"text_test": 24} and found["gallery"] == 40
    assert found["layer"] == "all" and found["step"] == 2
    for row in rows[:3]:
        accuracy = found["accuracy"][row]["text_test"]
        low, high = found["interval"][row]["text_test"]
        assert low <= accuracy <= high
        # The ids of the two classes do not overlap, so even random embeddings separate them.
        assert accuracy > 0.9, row
        chosen = found["chosen"][row]
        assert set(chosen["held_out"]) == {"1", "2"}
        best = max(chosen["held_out"].values())
        assert chosen["held_out"][str(chosen["block"])] == best
        assert chosen[PROBES[probe].strength] in PROBES[probe].strengths
    assert table[0].startswith(f"{PROBES[probe].title} accuracy at step 2, the best of 2 blocks")
    at = table.index("held-out accuracy by block, 8 of 40 training samples")
    assert [line.count("*") for line in table[at + 1 : at + 4]] == [1, 1, 1]
    assert "95 % intervals" in table and "top-5 accuracy" not in table  # of two classes


def test_images_have_four_classes_and_any_weights(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    _, student = evaluate(trained, "ridge", "--layer", "2", capsys=capsys, modality="vision")
    _, teacher = evaluate(
        *(trained, "ridge", "--layer", "2", "--weights", "teacher"),
        capsys=capsys,
        modality="vision",
    )
    assert student["accuracy"]["chance"] == {"vision_test": 0.25}
    assert list(teacher["accuracy"]) == ["trained teacher", "chance"]
    assert student["layer"] == 2 and student["weights"] == "student"


# ------------------------------------------------------------------------- blocks and held-out data


def test_blocks_are_chosen_without_the_test_set(trained: Trained) -> None:
    """Block 2 is best on the training set and useless on the test set; it must still be chosen."""
    rng = np.random.default_rng(0)
    labels = ["a", "b"] * 30
    shards = open_set(trained.sets["text"])
    encoder = load_encoder(trained.root, modality="text")
    known, query = (Labelled(name, shards, encoder.modality, labels) for name in ("train", "test"))
    good = np.array([[float(label == "a"), 1.0] for label in labels], dtype=np.float32)
    noise = rng.standard_normal((60, 2)).astype(np.float32)

    def features(labelled: Labelled, block: int) -> np.ndarray:
        return good if (block == 2) == (labelled.name == "train") else noise

    for name in ("knn", "ridge", "logistic"):
        result = Scorer(PROBES[name], known, [query]).score(features, [1, 2])
        assert result.block == 2 and result.held_out[2] == 1.0 > result.held_out[1], name
        assert result.accuracy["test"] < 0.8


def test_features_of_blocks_and_tokens(trained: Trained) -> None:
    encoder = load_encoder(trained.root, modality="text")
    known = read_labelled(open_set(trained.sets["text"]), encoder.modality, "label", "known")
    examples = list(known.decoded())
    both = embed_blocks(encoder, examples, [1, 2])
    assert both.shape == (40, 2, 32)
    for block in (1, 2):
        assert np.array_equal(both[:, block - 1], embed(encoder, examples, block))
        tokens = embed_tokens(encoder, examples, block)
        assert [len(t) for t in tokens] == [len(e) for e in examples]
        means = torch.stack([t.mean(0) for t in tokens]).numpy()
        np.testing.assert_allclose(means, both[:, block - 1], atol=1e-5)
        given = of_encoder(encoder, [1, 2], PROBES["knn"])(known, block)
        assert np.array_equal(given, both[:, block - 1])


def test_top_5_counts_in_the_table_of_many_classes(trained: Trained) -> None:
    shards = open_set(trained.sets["text"])
    encoder = load_encoder(trained.root, modality="text")
    labels = [str(i % 10) for i in range(40)]
    known = Labelled("x", shards, encoder.modality, labels)
    table = np.random.default_rng(0).random((40, 4)).astype(np.float32)
    result = Scorer(PROBES["ridge"], known, [known]).score(lambda labelled, block: table, [1])
    assert result.accuracy["x"] < result.top["x"] < 1.0


def test_sets_with_the_same_name_stay_apart(trained: Trained, tmp_path: Path) -> None:
    other = joint_sets.write_texts(tmp_path / "text", 12, seed=2)
    tests = [str(trained.sets["text"]), str(other)]
    _, found = run_probe(trained.root, train=tests[0], tests=tests, modality="text")
    assert found["test"] == {tests[0]: 40, tests[1]: 12}


# ------------------------------------------------------------------------------------------ records


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(folder))
    found.Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


@pytest.fixture
def copied(trained: Trained, tmp_path: Path) -> Trained:
    """A copy of the run, without results of other tests."""
    run = type(trained.run)(tmp_path / "run", trained.run.recipe)
    ignored = shutil.ignore_patterns("evaluations.jsonl", "eval")
    shutil.copytree(trained.root, run.folder.root, ignore=ignored)
    rows = [row for row in run.rows() if "evaluation" not in row]
    run.folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Trained(run, trained.sets)


def test_results_are_recorded_in_a_run_that_has_ended(
    copied: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    run, before = copied.run.folder, describe(copied.root)
    rows = copied.run.rows()
    _, found = evaluate(copied, "knn", "--weights", "both", capsys=capsys)
    checkpoint = Trained(type(copied.run)(run.checkpoint(1), copied.run.recipe), copied.sets)
    _, older = evaluate(checkpoint, "knn", capsys=capsys)
    assert found["recorded"] == [
        *("evaluations.jsonl", "tb/eval/student", "tb/eval/teacher", "metrics.jsonl")
    ]
    first, second = map(json.loads, run.evaluations.read_text().splitlines())
    assert first["accuracy"] == found["accuracy"] and second["step"] == older["step"] == 1
    assert first["arguments"]["train"] == str(copied.sets["text"])
    assert abs(first["time"] - time.time()) < 600
    [values] = events(run.tensorboard / "eval/student").values()
    assert [step for step, _ in values] == [2, 1]
    assert values[0][1] == pytest.approx(found["accuracy"]["trained student"]["text_test"])
    assert list(events(run.tensorboard / "eval/teacher")) == ["eval/knn/text_test"]
    added = copied.run.rows()[len(rows) :]
    assert [row["step"] for row in added] == [2, 1]
    assert added[0]["evaluation"] == "knn"
    assert added[0]["eval/knn/text_test"] == found["accuracy"]["trained student"]["text_test"]
    assert (
        added[0]["eval/knn/text_test/teacher"]
        == (found["accuracy"]["trained teacher"]["text_test"])
    )
    assert describe(copied.root) == before, "the status shows an evaluation"


def test_a_run_that_trains_keeps_its_metrics_to_itself(
    copied: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    now = time.time()
    beat(copied.run.folder, Heartbeat(0, "node", 2, "training", now + 1, now + 1))
    rows = copied.run.rows()
    _, found = evaluate(copied, "knn", capsys=capsys)
    assert found["recorded"] == ["evaluations.jsonl", "tb/eval/student"]
    assert copied.run.rows() == rows


def test_a_run_resumes_after_an_evaluation(
    copied: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    before = copied.run.rows()
    evaluate(copied, "knn", capsys=capsys)
    sets = {name: copied.sets[name] for name in ("speech", "text", "vision")}
    settings = [*joint_sets.SMALL, joint_sets.shards_setting(sets), "run.steps=4", "save.every=2"]
    done = copied.run.train(*settings, "optim.warmup_steps=1", "engine.config=local", nproc=1)
    assert done.returncode == 0, done.stderr
    rows = copied.run.rows()
    assert rows[: len(before)] == before and rows[len(before)]["evaluation"] == "knn"
    assert rows[-1]["step"] == 4 and len(rows) > len(before) + 1
    assert events(copied.run.folder.tensorboard / "eval/student")


def test_whether_a_run_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2v_ds.run.status.OBSERVED", 0.05)
    run, now = RunFolder(tmp_path), time.time()
    assert not training(run)
    beat(run, Heartbeat(0, "node", 2, "data", since=now - 105, time=now - 100))
    assert not training(run)
    beat(run, Heartbeat(0, "node", 2, "data", since=now - 10, time=now - 5))
    assert training(run)
    run.done.write_text(json.dumps({"step": 2, "reason": "", "time": now - 7}))
    assert not training(run)
    beat(run, Heartbeat(0, "node", 2, "starting", since=now - 2, time=now - 1))
    assert training(run), "a new start has not removed DONE yet"
    run.done.write_text(json.dumps({"step": 2, "reason": "", "time": now - 7, "generation": 3}))
    for number, trains in ((3, False), (4, True)):  # whatever the clocks say
        fields = {"since": now - 50, "time": now, "generation": number}
        beat(run, Heartbeat(0, "node", 2, "training", **fields))
        assert training(run) == trains
    run.done.write_text("\0\0")
    assert training(run)


def test_weights_outside_a_run_are_not_recorded(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained.run.folder.checkpoint(2), tmp_path / "weights")
    outside = Trained(type(trained.run)(tmp_path / "weights", "joint_tiny"), trained.sets)
    _, found = evaluate(outside, "knn", capsys=capsys)
    assert found["recorded"] == [] and found["step"] == 2


def test_a_run_that_cannot_be_written_is_reported(
    copied: Trained, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    copied.run.folder.evaluations.mkdir()  # cannot be opened as a file
    with caplog.at_level(logging.WARNING, "d2v_ds"):
        logging.getLogger("d2v_ds").propagate = True
        _, found = evaluate(copied, "knn", capsys=capsys)
    assert found["recorded"] == [] and "the result is not recorded there" in caplog.text


# ------------------------------------------------------------------------------------------- errors


def test_bad_input_is_one_line(trained: Trained, tmp_path: Path) -> None:
    sets = {"train": str(trained.sets["text"]), "tests": [str(trained.sets["text test"])]}
    with pytest.raises(UserError, match="--layer: the encoder has 2 blocks, got 3"):
        run_probe(trained.root, **sets, modality="text", layer=3)
    with pytest.raises(UserError, match="this run has several; name one"):
        run_probe(trained.root, **sets)
    with pytest.raises(UserError, match="holds text, but vision is required"):
        run_probe(trained.root, **sets, modality="vision")
    with pytest.raises(UserError, match=r"has no 'topic' \(it has: label\)"):
        run_probe(trained.root, **sets, modality="text", label="topic")
    single = joint_sets.write_texts(tmp_path / "single", 1)
    with pytest.raises(UserError, match="all labels are 'low'; a probe needs at least two"):
        run_probe(trained.root, train=str(single), tests=sets["tests"], modality="text")
    pair = joint_sets.write_texts(tmp_path / "pair", 2)
    with pytest.raises(UserError, match="has one sample of each class, so nothing can be held"):
        run_probe(
            *(trained.root,),
            probe="ridge",
            train=str(pair),
            tests=sets["tests"],
            modality="text",
        )


def test_a_sample_that_cannot_be_used_is_named(trained: Trained) -> None:
    encoder = load_encoder(trained.root, modality="text")
    known = read_labelled(open_set(trained.sets["text"]), encoder.modality, "label")
    known.modality.config.__dict__["vocab_size"] = 20  # a frozen dataclass, of this encoder only
    with pytest.raises(UserError, match=r"text, sample 'text0000': has token id \d+, expected"):
        list(known.decoded())


def test_labels_that_training_lacks_count_as_errors_and_are_named(
    trained: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    shards = open_set(trained.sets["text"])
    modality = load_encoder(trained.root, modality="text").modality
    known = Labelled("train", shards, modality, ["a", "b"] * 20)
    query = Labelled("test", shards, modality, ["a", "new", "b", "newer"] * 10)
    table = np.array([[float(i % 2), 1.0] for i in range(40)], dtype=np.float32)
    logging.getLogger("d2v_ds").propagate = True
    with caplog.at_level(logging.WARNING, "d2v_ds"):
        result = Scorer(PROBES["ridge"], known, [query]).score(lambda *_: table, [1])
    assert "test: 20 of 40 samples have labels that the training set does not" in caplog.text
    assert "(new, newer)" in caplog.text and result.accuracy["test"] <= 0.5
    assert result.interval["test"] == scores.interval(
        np.mean,
        np.array([label in "ab" for label in query.labels])
        & (np.array(["ab"[i % 2] for i in range(40)]) == np.array(query.labels)),
    )
