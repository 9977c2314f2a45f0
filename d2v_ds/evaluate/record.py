"""The results of evaluations, written into the run that they evaluate.

summary --record--> RUN/evaluations.jsonl     always
                    RUN/tb/eval/WEIGHTS/      scalars eval/PROBE/SET at the checkpoint's step
                    RUN/metrics.jsonl         only while the run does not train
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2v_ds.records import append_line
from d2v_ds.run.run_folder import RunFolder
from d2v_ds.run.status import training
from d2v_ds.secrets import mask_values
from d2v_ds.telemetry.metrics import write_evaluation

log = logging.getLogger("d2v_ds")

TRAINED = "trained "  # before the weights, in the names of rows


def run_of(source: Path) -> RunFolder | None:
    """The run that a run folder is, or that a checkpoint's folder is in; None for anything else."""
    source = source.resolve()
    for root in (source, source.parents[1] if source.parent.name == "checkpoints" else source):
        if RunFolder(root).config.is_file() and RunFolder(root).checkpoints.is_dir():
            return RunFolder(root)
    return None


def record(source: Path, summary: Mapping[str, Any], arguments: Mapping[str, Any]) -> list[str]:
    """Writes the summary of an evaluation into the run of `source`; returns the names of the files
    in the run that it was written to, none if there is no run or it cannot be written.

    summary: as from `run_probe`, whose `accuracy` has a row `trained WEIGHTS` for each of the
    weights, or from `run_finetuned`, whose `scores` have the metrics of each set.
    arguments: of the command.
    """
    run = run_of(source)
    if run is None:
        return []
    given = {name: str(x) if isinstance(x, Path) else x for name, x in arguments.items()}
    line = {"time": round(time.time(), 3), "arguments": mask_values(given), **summary}
    values = curves(summary)
    written = []
    try:
        append_line(run.evaluations, line)
        written.append(run.evaluations.name)
        for weights, scalars in values.items():
            folder = write_evaluation(run, weights, summary["step"], scalars)
            written.append(str(folder.relative_to(run.root)))
        if not training(run):
            append_line(run.metrics, metrics_row(line, values))
            written.append(run.metrics.name)
    except OSError as error:
        log.warning(
            "%s: the result is not recorded there completely (%s)", run.root, error.strerror
        )
    return written


def curves(summary: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """{weights: {tag: value}}: eval/PROBE/SET, or eval/METRIC/SET of a fine-tuned model."""
    if "scores" in summary:
        of_sets = summary["scores"].items()
        tags = {f"eval/{name}/{test}": x for test, row in of_sets for name, x in row.items()}
        return {summary["weights"]: tags}
    return {
        name.removeprefix(TRAINED): {
            f"eval/{summary['probe']}/{test}": value for test, value in row.items()
        }
        for name, row in summary["accuracy"].items()
        if name.startswith(TRAINED)
    }


def metrics_row(line: Mapping[str, Any], values: Mapping[str, Mapping[str, float]]) -> Any:
    """A row for metrics.jsonl. Values of other weights than the student's have them in their
    name."""
    named = {
        name if weights == "student" else f"{name}/{weights}": value
        for weights, scalars in values.items()
        for name, value in scalars.items()
    }
    return {"step": line["step"], "time": line["time"], "evaluation": line["probe"], **named}


def as_json(summary: Mapping[str, Any], recorded: list[str]) -> str:
    """The last line of the command."""
    return json.dumps({**summary, "recorded": recorded})
