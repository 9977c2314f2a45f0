"""A pipeline of real commands, from a corpus to the evaluation of a fine-tuned encoder."""

from __future__ import annotations

import json
import re

import pytest

from d2v_ds.run.run_folder import RunFolder
from shards import samples
from tests.slurm.cluster import SCRIPTS, Job, Workplace
from tests.slurm.test_slurm_training import TINY

pytestmark = pytest.mark.usefixtures("whole_cluster")

SOURCE = samples.path("speech") / "seen.tsv"
ONE = ("--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
PRETRAIN = ("speech_tiny", *TINY, "run.steps=3", "batch.size=8", "modality.speech.min_seconds=0.2")
FINETUNE = (
    "finetune_speech_tiny",
    "finetune.label=label",
    "finetune.freeze_steps=1",
    "finetune.channel_mask_length=8",
    "batch.size=6",
    "run.steps=4",
    "run.threads=1",
    "optim.warmup_steps=1",
    "optim.decay_steps=2",
    "data.workers=0",
    "valid.every=2",
    "save.every=2",
    "engine.config=zero1",
)


def test_a_signalled_job_requeues_itself_and_resumes(standin: Workplace) -> None:
    job = standin.submit("finetune.sbatch", "run.dir=run", "run.steps=40", options=ONE)
    job.until(lambda: len(standin.rows("run")) >= 3, "three steps")
    job.signal()
    job.says("requeue: stopped and saved").ends(seconds=90)
    assert job.field("Restarts") == "1"
    assert [row["step"] for row in standin.rows("run")] == list(range(1, 41))


def test_a_pipeline_from_a_corpus_to_a_fine_tuned_encoder(trainer: Workplace) -> None:
    stages = [
        ["--cpus-per-task=1", "convert", "speech", str(SOURCE), "set"],
        ["--nodes=1", *ONE, "pretrain", *PRETRAIN, "run.dir=runs/pre"],
        ["--nodes=2", *ONE, "finetune", *FINETUNE, "run.dir=runs/tuned"],
        ["--cpus-per-task=1", "evaluate", "wer", "runs/tuned", "--test", "set"],
    ]
    stages[1] += ["data.shards=set"]
    stages[2] += ["data.shards=set", "init=runs/pre", "data.valid=set"]
    words = [word for stage in stages for word in ("then", *stage)][1:]
    done = trainer.cluster.command(
        str(SCRIPTS / "pipeline.sh"),
        *words,
        cwd=trainer.folder,
        environment={"D2V_CLUSTER_ENV": str(trainer.settings)},
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(\d+): ", done.stdout, re.MULTILINE)
    jobs = [Job(trainer.cluster, number, trainer.folder) for number in found]
    assert len(jobs) == 4
    for job in jobs:
        job.ends(seconds=200)
    tuned = jobs[2].log()
    assert re.search(r"init: \d+ parameters from runs/pre", tuned) and "finished at step 4" in tuned
    run = RunFolder(trainer.folder / "runs/tuned")
    *_, last, evaluated = trainer.rows("runs/tuned")
    assert run.steps()[-1] == last["step"] == 4 and evaluated["eval/wer/set"] == last["valid_wer"]
    summary = json.loads(jobs[3].log().strip().splitlines()[-1])
    assert summary == {**summary, "probe": "wer", "step": 4}
