"""Probes of frozen encoders on labelled shards (how well their features predict the labels), and
scores of fine-tuned models.

    labelled shard sets --labelled.py--> samples, labels
    samples, encoder    --embedding.py--> features of a block: [n, D], or tokens of each sample
    features, labels    --probes.py--> class scores of the test samples
    class scores        --scoring.py--> accuracy, top-5, intervals; the best block
    one evaluation      --run.py, table.py--> a table and JSON
    fine-tuned models   --finetuned.py--> word error rate, accuracy or correlation
    results             --record.py--> RUN/evaluations.jsonl, RUN/tb/eval/

n samples of a set, T tokens, D width, C classes.
"""

from __future__ import annotations

from d2v_ds.evaluate.embedding import embed
from d2v_ds.evaluate.finetuned import KINDS, run_finetuned
from d2v_ds.evaluate.labelled import Labelled, chance, read_labelled
from d2v_ds.evaluate.probes import NEIGHBOURS, PROBES, TEMPERATURE, knn_accuracy
from d2v_ds.evaluate.record import as_json, record
from d2v_ds.evaluate.run import run_knn, run_probe

__all__ = [
    "KINDS",
    "NEIGHBOURS",
    "PROBES",
    "TEMPERATURE",
    "Labelled",
    "as_json",
    "chance",
    "embed",
    "knn_accuracy",
    "read_labelled",
    "record",
    "run_finetuned",
    "run_knn",
    "run_probe",
]
