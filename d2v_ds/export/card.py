"""The model card of an export: README.md, and the facts that it states."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from d2v_ds import __version__
from d2v_ds.data.shard_format import open_set
from d2v_ds.errors import UserError
from d2v_ds.export.heads import classes_of
from d2v_ds.export.model import Exported
from d2v_ds.records import metrics_rows
from d2v_ds.run.run_folder import RunFolder
from d2v_ds.secrets import mask
from d2v_ds.weights import Weights

Settings = dict[str, Any]

RESULTS = re.compile(r"step$|loss|valid_|.*spread")  # names in metrics.jsonl
FILL_IN = "FILL IN: the licence of the weights, which depends on the training data"
TAGS = {
    "speech": "feature-extraction",
    "vision": "image-feature-extraction",
    "text": "feature-extraction",
}
TASK_TAGS = {
    "ctc": "automatic-speech-recognition",
    "speech": "audio-classification",
    "vision": "image-classification",
    "text": "text-classification",
}
EXAMPLES = {  # modality -> (what is processed, the lines that process it)
    "speech": (
        "waveform = np.zeros(16_000, dtype=np.float32)  # mono, in [-1, 1]",
        [
            "extract = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)",
            'inputs = extract([waveform], sampling_rate={rate}, padding=True, return_tensors="pt")',
        ],
    ),
    "vision": (
        'image = Image.new("RGB", (320, 240))',
        [
            "process = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)",
            'inputs = process(image, return_tensors="pt")',
        ],
    ),
    "text": (
        'texts = ["A text.", "A second, longer text."]',
        [
            "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
            'inputs = tokenizer(texts, padding=True, return_tensors="pt")',
        ],
    ),
}
PREPROCESSORS = {
    "speech": "AutoFeatureExtractor",
    "vision": "AutoImageProcessor",
    "text": "AutoTokenizer",
}


# ------------------------------------------------------------------------------------------- facts


def origin(found: Weights) -> Settings:
    """What is known of the weights: recipe, data, samples seen, the last metrics. Paths are
    shortened to their last name."""
    about = {key: value for key, value in found.about.items() if key != "run"}
    run = found.about.get("run", {})
    if units := run.get("units"):
        about["seen"] = {"samples": run.get("samples", 0), "units": dict(units)}
    if found.config:
        about["data"] = dict(data_sets(found.config.sources))
    if metrics := last_metrics(found.path, found.step):
        about["metrics"] = metrics
    return about


def data_sets(sources: Mapping[str, str]) -> Iterator[tuple[str, Settings]]:
    """{source: name of its set, and its size if the set is a local folder}. A checkpoint may come
    from somebody else, so nothing else that it names is opened: `pipe:` would run a command."""
    for source, where in sources.items():
        entry: Settings = {"set": mask(where).rstrip("/").rpartition("/")[2]}
        with contextlib.suppress(UserError, OSError):
            if Path(where).is_dir():
                shards = open_set(where, check_tars=False)
                entry |= {"samples": shards.samples, "length": shards.length}
                entry["unit"] = shards.length_unit
        yield source, entry


def last_metrics(path: Path, step: int) -> Settings:
    """The last value up to the step of each metric that describes the model: losses, results of
    validations and spreads. path: a run folder or one of its checkpoints."""
    for root in (path, path.parent.parent):
        file = RunFolder(root).metrics
        if file.is_file():
            rows = metrics_rows(file)
            found: Settings = {}
            # An evaluation of an older checkpoint is written after the rows of later steps.
            for row in sorted(rows, key=lambda row: int(row["step"])):
                if row["step"] <= step:
                    found |= {
                        key: value
                        for key, value in row.items()
                        if RESULTS.match(key) and isinstance(value, int | float)
                    }
            return found
    return {}


# -------------------------------------------------------------------------------------------- card


def model_card(
    exported: Exported,
    config: Settings,
    files: Mapping[str, Any],
    problems: list[str],
    license: str,
) -> str:
    """README.md. files: the other files of the export; problems: why the classes of transformers do
    not fit, or empty."""
    title = f"# {exported.about.get('recipe') or 'data2vec encoder'}"
    parts = [
        front_matter(exported, license),
        title,
        summary(exported),
        "## Use",
        *(usage(exported, config, name, files, bool(problems)) for name in exported.names),
        "With d2v_ds:",
        python(["import d2v_ds", "", f'encoder = d2v_ds.load_encoder("."{named(exported)})']),
        *format_notes(exported, files, problems),
        "## Training",
        table(facts(exported)),
        *metrics_part(exported),
        "## Limits",
        limits(exported, problems),
        "## Licence",
        license or FILL_IN,
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(exported: Exported, license: str) -> str:
    task = exported.finetune.get("task", "")
    name = exported.names[0]
    tag = (TASK_TAGS.get(task) or TASK_TAGS[name]) if task else TAGS[name]
    lines = [
        f"license: {license or 'other'}",
        "library_name: transformers",
        f"pipeline_tag: {tag}",
        f"tags: [data2vec, {', '.join(exported.names)}]",
    ]
    return "\n".join(["---", *lines, "---"])


def summary(exported: Exported) -> str:
    model = exported.model
    kind = "fine-tuned" if exported.finetune else "pre-trained"
    inputs = ", ".join(exported.names[:-1]) + " and " * (len(exported.names) > 1)
    return (
        f"A {kind} data2vec encoder for {inputs}{exported.names[-1]}: {model['depth']} blocks, "
        f"width {model['dim']}, {model['heads']} heads, the {exported.which}'s weights in fp32. "
        f"Exported by d2v_ds {__version__}."
    )


def usage(
    exported: Exported, config: Settings, name: str, files: Mapping[str, Any], own: bool
) -> str:
    """A program that encodes one batch of a modality."""
    if name == "text" and "tokenizer_config.json" not in files:
        return "The folder has no tokenizer; give the model ids of the training text's tokenizer."
    sample, lines = EXAMPLES[name]
    auto = classes_of(name, exported.head)[0] if exported.head else "AutoModel"
    trust = ", trust_remote_code=True" if own else ""
    libraries = {"speech": ["import numpy as np"], "vision": ["from PIL import Image"]}
    rate = exported.modality[name].get("sample_rate")
    program = [
        *libraries.get(name, []),
        f"from transformers import {', '.join(sorted((PREPROCESSORS[name], auto)))}",
        "",
        'folder = "."  # of this file',
        sample,
        *(line.replace("{rate}", str(rate)) for line in lines),
        f"model = {auto}.from_pretrained(folder{trust})",
        "outputs = model(**inputs, output_hidden_states=True)",
        f"print({'outputs.logits' if exported.head else 'outputs.last_hidden_state'}.shape)",
    ]
    return python(program)


def named(exported: Exported) -> str:
    return f', modality="{exported.names[0]}"' if len(exported.names) > 1 else ""


def python(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def format_notes(exported: Exported, files: Mapping[str, Any], problems: list[str]) -> list[str]:
    """What a reader must know about the files."""
    notes = []
    if problems:
        notes.append(
            "transformers has no class for this model, so the folder contains its own "
            "(`modeling_d2v.py`), which needs `trust_remote_code=True`."
        )
    if "preprocessor_config.json" in files:
        notes.append(
            "With `trust_remote_code=True` the preprocessor gives exactly the inputs of the "
            "training; without, a class of transformers comes close to it."
        )
    return notes


def facts(exported: Exported) -> list[tuple[str, str]]:
    """Rows of the table of the training."""
    about = exported.about
    rows = [("recipe", str(about.get("recipe") or "unknown"))]
    rows.append(("steps", str(exported.step or "unknown")))
    for source, entry in about.get("data", {}).items():
        size = ""
        if "samples" in entry:
            size = f": {entry['samples']:,} samples, {entry['length']:,} {entry['unit']}"
        rows.append((f"data, {source}", f"{entry.get('set', 'unknown')}{size}"))
    if seen := about.get("seen"):
        rows.append(("samples seen", f"{seen['samples']:,}"))
    if exported.finetune:
        labels = exported.finetune.get("labels", ())
        rows.append(("task", str(exported.finetune["task"])))
        rows.append(("outputs", f"{len(labels) or 1}"))
    rows.append(("versions", f"d2v_ds {__version__}, torch {torch.__version__}"))
    return rows


def metrics_part(exported: Exported) -> list[str]:
    """The last metrics of the run, if known."""
    metrics = exported.about.get("metrics", {})
    rows = [(key, f"{value:.4g}") for key, value in metrics.items() if isinstance(value, float)]
    if not rows:
        return []
    return [f"The last metrics of the run, up to step {metrics.get('step')}:", table(rows)]


def table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])


def limits(exported: Exported, problems: list[str]) -> str:
    """Known limits of the model in this form."""
    notes = []
    for name, settings in exported.modality.items():
        if name == "speech":
            notes.append(f"- Speech: mono, {settings['sample_rate']} Hz.")
            if not problems:
                notes.append(
                    "- The convolutional positions of `Data2VecAudioModel` read padding: near the "
                    "end of shorter recordings, a padded batch differs from single recordings."
                )
        if name == "vision":
            notes.append(f"- Images: {settings['image_size']} x {settings['image_size']} pixels.")
        if name == "text":
            notes.append(f"- Text: at most {settings['max_tokens']} tokens.")
    if not exported.finetune:
        notes.append("- Pre-trained without labels: fine-tune it, or use its features.")
    return "\n".join(notes)
