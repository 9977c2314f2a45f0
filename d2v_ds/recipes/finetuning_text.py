"""Fine-tuning on GLUE, as published for data2vec 2.0.

fairseq examples/data2vec/config/v2/text_finetuning/NAME.yaml, unless a comment states otherwise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from d2v_ds.config.finetuning import Metric
from d2v_ds.recipes.finetuning import Function, named


class Corpus(NamedTuple):
    title: str
    metric: Metric
    batch: int  # sentences, or pairs of them, per step
    warmup: int
    steps: int
    lr: float = 2e-5


CORPORA = {
    "cola": Corpus("CoLA", "matthews", 16, 320, 5_336),
    "mnli": Corpus("MNLI", "accuracy", 32, 7_432, 123_873),
    "mrpc": Corpus("MRPC", "accuracy_f1", 16, 137, 2_296),
    "qnli": Corpus("QNLI", "accuracy", 32, 1_986, 33_112),
    "qqp": Corpus("QQP", "accuracy_f1", 32, 28_318, 113_272),
    "rte": Corpus("RTE", "accuracy", 16, 122, 2_036),
    "sst2": Corpus("SST-2", "accuracy", 32, 1_256, 20_935),
    "stsb": Corpus("STS-B", "pearson_spearman", 16, 214, 3_598, 4e-5),
}


def glue(corpus: Corpus) -> dict[str, Any]:
    """The settings of a row."""
    every = max(100, corpus.steps // 1_000 * 100)  # about ten validations
    return {
        "run": {"steps": corpus.steps},
        "batch": {"size": float(corpus.batch), "micro_batches": 1},  # one GPU
        # The encoder keeps the dropouts of its pre-training, and the head has none.
        "modality": {"text": {}},
        "finetune": {
            "task": "regression" if corpus.metric == "pearson_spearman" else "classification",
            "metric": corpus.metric,
        },
        "optim": {
            "lr": corpus.lr,
            "betas": [0.9, 0.98],
            "eps": 1e-6,
            "weight_decay": 0.1,
            "clip": 0.0,
            "warmup_steps": corpus.warmup,
            "schedule": "linear",
        },
        "valid": {"every": every},
        "save": {"every": every, "keep": 1, "keep_best": 1},
    }


FUNCTIONS: list[Function] = [
    named(
        f"glue_{name}",
        f"GLUE, {corpus.title}: {corpus.steps:,} steps of {corpus.batch} texts.",
        glue,
        corpus,
    )
    for name, corpus in CORPORA.items()
]
