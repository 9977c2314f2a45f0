"""The fresh process of verify.py: loads an exported folder with transformers, without d2v_ds, and
compares its results with the expected ones.

    python -m d2v_ds.export.load_export FOLDER SCRATCH

SCRATCH has plan.json and tensors.safetensors; found.json is written there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from d2v_ds.data.audio import import_torchaudio

INPUTS = {"speech": "input_values", "vision": "pixel_values", "text": "input_ids"}
SPACE = "▁"  # a space in a piece of sentencepiece
STOCK = "data2vec-"  # the model types of transformers


def main(folder: str, scratch: Path) -> None:
    import_torchaudio()  # transformers imports it too, and a mismatched wheel needs help
    for name in [name for name in sys.modules if name.partition(".")[0] == "d2v_ds"]:
        del sys.modules[name]
    sys.modules["d2v_ds"] = None  # type: ignore[assignment]  # importing it is an error

    import transformers

    plan = json.loads((scratch / "plan.json").read_text())
    tensors = load_file(scratch / "tensors.safetensors")
    problems: list[str] = []
    model = load_model(folder, plan, problems)
    found = {
        "model": {name: compare_model(model, name, plan, tensors) for name in plan["model"]},
        "inputs": {name: compare_inputs(folder, name, tensors) for name in plan["inputs"]},
        "problems": problems,
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
    }
    if plan.get("texts"):
        problems += compare_texts(folder, plan["texts"], plan["ids"])
    if plan["class"] == "AutoModelForCTC":
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        symbols = tokenizer.convert_ids_to_tokens(list(range(len(plan["labels"]))))
        if [symbol.replace(" ", SPACE) for symbol in symbols] != plan["labels"]:
            problems.append("the tokenizer has other symbols than the model")
        problems += compare_transcripts(tokenizer, plan["transcripts"])[:1]
    (scratch / "found.json").write_text(json.dumps(found))


def load_model(folder: str, plan: Mapping[str, Any], problems: list[str]) -> Any:
    import transformers

    stock = STOCK in json.loads((Path(folder) / "config.json").read_text())["model_type"]
    # Data2VecTextModel would add a pooling layer, which is in no pre-trained model.
    pooled = stock and plan["model"] == ["text"] and plan["class"] == "AutoModel"
    more = {"add_pooling_layer": False} if pooled else {}
    model, info = getattr(transformers, plan["class"]).from_pretrained(
        folder,
        trust_remote_code=not stock,
        dtype=torch.float32,
        output_loading_info=True,
        **more,
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, info[what])):
            problems.append(f"{what.replace('_', ' ')}: {', '.join(keys)}")
    return model.eval()


@torch.no_grad()
def compare_model(
    model: Any, name: str, plan: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> float:
    """The largest relative difference of one modality."""
    settings = plan["settings"][name]
    inputs = series(tensors, f"{name}.input")
    # Convolutions of Data2VecAudioModel see padding, so that it is given one example at a time.
    alone = name == "speech" and model.config.model_type.startswith(STOCK)
    groups = [[i] for i in range(len(inputs))] if alone else [list(range(len(inputs)))]
    largest = 0.0
    for group in groups:
        batch = pad([inputs[i] for i in group], name, settings)
        found = model(**batch, output_hidden_states=True)
        for row, i in enumerate(group):
            T, E = len(tensors[f"{name}.last.{i}"]), settings["extra_tokens"]
            for key, value in results(found).items():
                ours = tensors[f"{name}.{key}.{i}"]
                theirs = value[row]
                if key != "logits":
                    theirs = theirs[E : E + T]
                elif ours.dim() == 2:  # of every token
                    theirs = theirs[:T]
                largest = max(largest, difference(ours, theirs))
    return largest


def results(found: Any) -> dict[str, Tensor]:
    """The output of a model by our names."""
    states = found.hidden_states[1:]
    named = {f"block.{n}": state for n, state in enumerate(states)}
    for ours, theirs in (("last", "last_hidden_state"), ("logits", "logits")):
        if found.get(theirs) is not None:
            named[ours] = found[theirs]
    return named


def pad(inputs: Sequence[Tensor], name: str, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """One batch, with an attention mask if its examples may differ in length."""
    if name == "vision":
        return {INPUTS[name]: torch.stack(list(inputs))}
    value = settings["pad_id"] if name == "text" else 0.0
    padded = torch.nn.utils.rnn.pad_sequence(list(inputs), True, value)
    if len(inputs) == 1:
        return {INPUTS[name]: padded}
    lengths = torch.tensor([len(each) for each in inputs])
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    return {INPUTS[name]: padded, "attention_mask": mask.long()}


def compare_inputs(folder: str, name: str, tensors: Mapping[str, Tensor]) -> float:
    """The largest relative difference of preprocessed inputs of speech or vision."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    raw = [tensor.numpy() for tensor in series(tensors, f"{name}.raw")]
    expected = series(tensors, f"{name}.ready")
    if name == "vision":
        process = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
        ready = process(raw, return_tensors="pt")
    else:
        process = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
        ready = process(raw, sampling_rate=process.sampling_rate, padding=True, return_tensors="pt")
    return max(
        difference(ours, theirs[: len(ours)])
        for ours, theirs in zip(expected, ready[INPUTS[name]], strict=True)
    )


def compare_transcripts(tokenizer: Any, transcripts: list[tuple[list[int], str]]) -> list[str]:
    return [
        f"the tokenizer decodes {theirs!r}, expected {ours!r}"
        for path, ours in transcripts
        # A path of random symbols can repeat and begin with spaces; a decoded text has none.
        if (theirs := " ".join(tokenizer.decode(path).split())) != ours
    ]


def compare_texts(folder: str, texts: list[str], ids: list[list[int]]) -> list[str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    found = tokenizer(texts)["input_ids"]
    return [
        f"the tokenizer gives {theirs} for {text!r}, expected {ours}"
        for text, ours, theirs in zip(texts, ids, found, strict=True)
        if ours != theirs
    ]


def series(tensors: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """NAME.0, NAME.1 ..."""
    count = sum(key.rpartition(".")[0] == name for key in tensors)
    return [tensors[f"{name}.{i}"] for i in range(count)]


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference, relative to the largest absolute value; infinite for another
    shape or NaN."""
    if ours.shape != theirs.shape:
        return float("inf")
    value = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-20))
    return value if value == value else float("inf")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
