"""Folders of Hugging Face transformers, and those that d2v_ds exports.

    config.json, model.safetensors or pytorch_model.bin --open_folder--> Weights

data2vec 1.0 has classes in transformers: the encoder alone, or below a prefix with a head beside
it. An exported folder is the same with one more entry in config.json, `d2v_ds`, from which all
settings are taken; data2vec 2.0 and joint models have our names in it. predictors.safetensors
holds, with our names, what the classes of transformers lack.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from d2v_ds.config.documents import load_json, shown
from d2v_ds.errors import UserError
from d2v_ds.key_maps import (
    HUGGING_FACE,
    HUGGING_FACE_HEADS,
    is_known,
    left_out,
    named_error,
    to_ours,
)
from d2v_ds.weights.assemble import Foreign, add_last_norm, assemble, exact, trunk_of
from d2v_ds.weights.model import Settings, Weights
from d2v_ds.weights.tables import Table, take
from d2v_ds.weights.unpickle import Refused, load_pickled

TYPES = {"data2vec-audio": "speech", "data2vec-vision": "vision", "data2vec-text": "text"}
PREFIXES = {"speech": "data2vec_audio.", "vision": "data2vec_vision.", "text": "data2vec_text."}
OURS = "d2v_ds"  # model_type of an exported folder without a class in transformers; also the entry
VERSION = 1  # of that entry
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
VOCABULARY = ("vocab.json", "added_tokens.json")
EXTRA = "predictors.safetensors"
MAX_JSON = 200_000_000  # bytes; a tokenizer.json with 250,000 tokens has 20 MB

SPEECH: Table = {
    "model.heads": "num_attention_heads",
    "model.norm_eps": "layer_norm_eps",
    "model.dropout": "hidden_dropout",
    "model.attention_dropout": "attention_dropout",
    "model.activation_dropout": "activation_dropout",
    "model.layer_drop": "layerdrop",
    "modality.speech.prenet_dropout": "hidden_dropout",
}
BERT: Table = {
    "model.heads": "num_attention_heads",
    "model.norm_eps": "layer_norm_eps",
    "model.dropout": "hidden_dropout_prob",
    "model.attention_dropout": "attention_probs_dropout_prob",
}
TABLES: dict[str, Table] = {
    "speech": SPEECH,
    "vision": {
        **BERT,
        "model.drop_path": "drop_path_rate",
        "model.layer_scale": "layer_scale_init_value",
    },
    "text": {
        **BERT,
        "modality.text.dropout": "hidden_dropout_prob",
        "modality.text.pad_id": "pad_token_id",
    },
}
REQUIRED: dict[str, Settings] = {
    "speech": {
        "hidden_act": "gelu",
        "feat_extract_activation": "gelu",
        "conv_bias": False,
        "layer_norm_eps": 1e-5,  # of the front end, where ours is fixed
        "add_adapter": False,
    },
    "vision": {"hidden_act": "gelu", "use_absolute_position_embeddings": False, "num_channels": 3},
    "text": {"hidden_act": "gelu", "is_decoder": False, "position_embedding_type": "absolute"},
}
# The defaults of their classes, which hold where config.json lacks an entry.
DEFAULTS: dict[str, Settings] = {
    "speech": {"num_attention_heads": 12, "layer_norm_eps": 1e-5},
    "vision": {"num_attention_heads": 12, "layer_norm_eps": 1e-12},
    "text": {"num_attention_heads": 12, "layer_norm_eps": 1e-12},
}
KINDS = {  # types of entries that are read here, not converted by a table
    **dict.fromkeys(("architectures", "conv_dim", "conv_kernel", "conv_stride"), list),
    "id2label": dict,
    **dict.fromkeys(("pad_token_id", "bos_token_id"), int),
}
TYPE_NAMES = {int: "an integer", list: "a list", dict: "an object"}
# Parts beside the encoder that do not belong to it.
DROPPED = [left_out("pooler.{rest}"), left_out("embeddings.position_ids")]


def open_folder(path: Path) -> Weights:
    """The weights in a folder with config.json. Raises UserError."""
    config = read_json(path / "config.json")
    kind, own = config.get("model_type"), config.get(OURS)
    ours = kind == OURS and isinstance(own, dict)
    if not isinstance(kind, str) or not (kind in TYPES or ours):
        raise UserError(
            f"{path}: has model_type {kind!r}; supported are {', '.join(TYPES)} (data2vec 1.0) and "
            "folders that d2v_ds exported"
        )
    try:
        state = read_state(path)
        if isinstance(own, dict):
            return exported(path, config, own, state)
        return assemble(stock(path, TYPES[kind], config, state))
    except Refused as error:
        raise UserError(f"{path}: {error}") from None


# ---------------------------------------------------------------------------------- reading files


def read_json(path: Path) -> Settings:
    """Raises UserError."""
    return load_json(path, "a file of a model in JSON", most=MAX_JSON)


def read_state(path: Path) -> dict[str, Tensor]:
    """The floating-point tensors of a folder, in fp32, whether in one file or in several. Raises
    Refused."""
    for name in WEIGHTS:
        if (path / name).is_file():
            return read_tensors(path / name)
        index = path / f"{name}.index.json"
        if index.is_file():
            files = read_json(index).get("weight_map")
            if not isinstance(files, dict) or not files:
                raise Refused(f"{index.name} has no weight_map")
            state: dict[str, Tensor] = {}
            for file in sorted(set(map(str, files.values()))):
                if Path(file).name != file:
                    raise Refused(f"{index.name} names {file!r}, which is outside the folder")
                state |= read_tensors(path / file)
            if missing := sorted(files.keys() - state.keys()):
                raise Refused(f"{missing[0]} is in none of the files of {index.name}")
            return state
    raise Refused(f"has no weights ({' or '.join(WEIGHTS)}, or their .index.json)")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Raises Refused."""
    if not path.is_file():
        raise Refused(f"lacks {path.name}")
    try:
        found = load_file(path) if path.suffix == ".safetensors" else load_pickled(path)
    except Refused as error:
        raise Refused(f"{path.name} {error}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise Refused(f"{path.name} is damaged or not a safetensors file ({error})") from None
    if not isinstance(found, dict):
        raise Refused(f"{path.name} has no tensors")
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    return {name: value.float() for name, value in tensors.items() if value.is_floating_point()}


def other_files(path: Path) -> dict[str, Path]:
    """Files of a tokenizer or of the preparation of inputs, by name."""
    known = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "preprocessor")
    names = (*known, "processor_config", "sentencepiece", "labels")
    return {f.name: f for f in sorted(path.iterdir()) if f.name.startswith(names) and f.is_file()}


# --------------------------------------------------------------------------------- both kinds


def exported(path: Path, config: Settings, own: Settings, state: dict[str, Tensor]) -> Weights:
    """A folder that d2v_ds exported."""
    check_types(config)
    if own.get("version") != VERSION:
        raise Refused(
            f"was exported in format {own.get('version')!r}, but this d2v_ds reads {VERSION}"
        )
    settings = {key: own.get(key) for key in ("model", "modality")}
    if not all(isinstance(value, dict) and value for value in settings.values()):
        raise Refused("its entry d2v_ds in config.json lacks model or modality")
    step = of_type("d2v_ds.step", own.get("step") or 0, int)
    finetune = of_type("d2v_ds.finetune", own.get("finetune") or {}, dict)
    about = of_type("d2v_ds.about", own.get("about") or {}, dict)
    for key in ("data", "seen", "metrics"):
        of_type(f"d2v_ds.about.{key}", about.get(key) or {}, dict)
    for source, entry in (about.get("data") or {}).items():
        of_type(f"d2v_ds.about.data.{source}", entry, dict)
    if finetune and "task" not in finetune:
        raise Refused("its entry d2v_ds.finetune in config.json has no task")
    tensors = dict(state)
    if config["model_type"] != OURS:
        tensors = renamed(TYPES[config["model_type"]], state)[0]
    if (path / EXTRA).is_file():
        tensors |= read_tensors(path / EXTRA)
    student, head = parted(tensors)
    found = Foreign(
        path=path,
        modality=next(iter(own["modality"])),  # of joint models, which have no head, any
        version="",
        student=student,
        head=head,
        finetune=finetune,
        step=step,
        about=about,
        files=other_files(path),
    )
    # transformers may have trained the model and saved it again, without our other files.
    fold_token_types(found, state)
    add_last_norm(found, trunk_of(found, settings))
    if head and finetune:
        relabel(found, config)
    elif head:
        found.finetune = finetune_of(found, config)
        if found.modality == "text":  # the tokenizer of a pre-trained export prepends nothing
            found.finetune["bos_id"] = None
    if own.get("weights") == "teacher":  # which can also be a student to start from
        found.teacher = dict(student)
    return exact(found, settings)


def parted(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(encoder.* and predictors.*, head.*)."""
    head = {name: value for name, value in tensors.items() if name.startswith("head.")}
    return {name: value for name, value in tensors.items() if name not in head}, head


def check_types(config: Settings) -> None:
    for key, kind in KINDS.items():
        if config.get(key) is not None:
            of_type(key, config[key], kind)


def of_type(key: str, value: Any, kind: type) -> Any:
    """An entry of config.json. Raises Refused if it has another type."""
    if isinstance(value, kind) and not isinstance(value, bool):
        return value
    raise Refused(f"config.json has {key}={shown(value)}, expected {TYPE_NAMES[kind]}")


def stock(path: Path, modality: str, config: Settings, state: dict[str, Tensor]) -> Foreign:
    """A folder of a class of transformers."""
    check_types(config)
    for key, required in REQUIRED[modality].items():
        if config.get(key, required) != required:
            raise Refused(f"{key}={config[key]!r} is not supported, only {required!r}")
    tensors, unused = renamed(modality, state)
    student, head = parted(tensors)
    classes = ", ".join(map(str, config.get("architectures") or "?"))
    given = take(TABLES[modality], DEFAULTS[modality] | config)
    given.setdefault("modality", {}).setdefault(modality, {})
    found = Foreign(
        path=path,
        modality=modality,
        version="1.0",
        student=student,
        head=head,
        given=given,
        about={"source": f"transformers folder, {classes}"},
        files=other_files(path),
    )
    found.left_out(unused)
    if modality == "speech":
        convs = [config.get(f"conv_{key}") or [] for key in ("dim", "kernel", "stride")]
        given["modality"]["speech"]["convs"] = [list(conv) for conv in zip(*convs, strict=False)]
    if modality == "text":
        fold_token_types(found, state)
        mask = token_id(path, "<mask>")
        if mask is not None:
            given["modality"]["text"]["mask_id"] = mask
    if head:
        found.finetune = finetune_of(found, config)
    return found


def renamed(modality: str, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a stock class with our names, encoder.* and head.*, and the names of those
    that belong to neither. Raises Refused."""
    prefix, rules = PREFIXES[modality], HUGGING_FACE[modality, "1.0"]
    heads = HUGGING_FACE_HEADS[modality]
    whole = any(name.startswith(prefix) for name in state)
    encoder: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    unused: list[str] = []
    for name, value in (shared_table(state) if modality == "vision" else state).items():
        inner = name.removeprefix(prefix)
        if is_known(name, heads):
            head[name] = value
        elif (whole and inner == name) or is_known(inner, DROPPED):
            unused.append(name)
        else:
            encoder[inner] = value
    ours = to_ours(head, heads)
    if "head.proj.weight" not in ours:  # a pooler, or a head of another kind
        ours, unused = {}, [*unused, *head]
    try:
        return to_ours(encoder, rules) | ours, unused
    except KeyError as error:
        raise Refused(named_error(error, f"transformers' data2vec for {modality}")) from None


TABLE = "relative_position_bias_table"


def shared_table(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with one table of relative positions instead of equal ones in every layer.
    Raises Refused if they differ: our layers share one table."""
    own = {k: v for k, v in state.items() if k.endswith(TABLE) and ".layer." in k}
    if not own:
        return state
    (name, first), *others = own.items()
    shared = f"{name.partition('encoder.')[0]}encoder.relative_position_bias.{TABLE}"
    if shared in state or not all(torch.equal(first, value) for _, value in others):
        raise Refused(
            "has a table of relative positions in every layer (use_relative_position_bias), which "
            "is not supported: the layers of this project share one"
        )
    return {key: value for key, value in state.items() if key not in own} | {shared: first}


def fold_token_types(found: Foreign, state: Mapping[str, Tensor]) -> None:
    """Adds the embedding of token type 0, which every token has, to the positions."""
    name = next((n for n in state if n.endswith("embeddings.token_type_embeddings.weight")), "")
    positions = f"{found.front_end}.features.positions.weight"
    if not name or positions not in found.student or not state[name][0].any():
        return
    found.student[positions] = found.student[positions] + state[name][0]
    found.assume("The embedding of token type 0 was added to the positions.")


# ------------------------------------------------------------------------------------------- heads


def finetune_of(found: Foreign, config: Settings) -> Settings:
    """finetune.* of a model with a head. Raises Refused."""
    rows = len(found.head["head.proj.weight"])
    if found.modality == "speech":
        return {"task": "ctc", "labels": ctc_labels(found, config, rows)}
    if found.modality == "vision" and config.get("use_mean_pooling") is False:
        raise Refused("classifies the class token (use_mean_pooling=false), which is not supported")
    labels = class_names(config, rows)
    regression = config.get("problem_type") == "regression" or rows == 1
    task = "regression" if found.modality == "text" and regression else "classification"
    finetune: Settings = {"task": task, "labels": labels}
    if found.modality == "text" and config.get("bos_token_id", 0) != 0:  # 0 is the usual one
        finetune["bos_id"] = config["bos_token_id"]
    return finetune


def class_names(config: Settings, rows: int) -> list[str]:
    names = config.get("id2label") or {}
    return [str(names.get(str(i), f"LABEL_{i}")) for i in range(rows)]


def relabel(found: Foreign, config: Settings) -> None:
    """Replaces the labels of an export by those of transformers if they differ: its head was
    trained for other labels since, and saved with them."""
    rows = len(found.head.get("head.proj.weight", ()))
    finetune, task = found.finetune, found.finetune["task"]
    if task == "classification" and config.get("id2label"):
        labels, source = class_names(config, rows), "id2label in config.json"
    elif task == "ctc" and "vocab.json" in found.files and not finetune.get("tokenizer"):
        labels, source = ctc_labels(found, config, rows), "vocab.json"
    else:
        return
    if labels != list(finetune.get("labels") or ()):
        found.finetune = finetune | {"labels": labels}
        found.assume(f"The labels are those of {source}, which differ from the export's.")


def ctc_labels(found: Foreign, config: Settings, rows: int) -> list[str]:
    """The labels of a CTC head by row, from vocab.json and added_tokens.json. The blank, which is
    the padding token in transformers, is moved to the first row. Raises Refused."""
    if "vocab.json" not in found.files:
        raise Refused("is fine-tuned, but lacks vocab.json with its labels")
    files = [found.files[name] for name in VOCABULARY if name in found.files]
    ids = {label: i for file in files for label, i in read_json(file).items()}
    labels = {i: str(label) for label, i in ids.items() if isinstance(i, int)}
    missing = [i for i in range(rows) if i not in labels]
    blank = config.get("pad_token_id") or 0
    if missing or not 0 <= blank < rows:
        raise Refused(f"vocab.json has no label for row {(missing or [blank])[0]} of its head")
    order = [blank, *(i for i in range(rows) if i != blank)]
    if blank:
        for name, value in found.head.items():
            found.head[name] = value[order]
    about = found.files.get("tokenizer_config.json")
    boundary = read_json(about).get("word_delimiter_token", "|") if about else "|"
    names = ["|" if labels[i] == boundary else labels[i] for i in order]
    return ["<blank>", *names[1:]]


def token_id(path: Path, token: str) -> int | None:
    """The id of a special token in tokenizer.json; None if it is not there."""
    if not (path / "tokenizer.json").is_file():
        return None
    added = read_json(path / "tokenizer.json").get("added_tokens")
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, dict) and entry.get("content") == token:
            number = entry.get("id")
            return number if isinstance(number, int) else None
    return None
