"""Pre-training of data2vec for speech, images and text with DeepSpeed ZeRO.

    import d2v_ds

    config = d2v_ds.load_config("speech_base", ["optim.lr=3e-4"])     # a recipe, or a YAML file
    shards = d2v_ds.open_shards("/data/librispeech", "speech")        # written by d2v-shards
    for item in d2v_ds.webdataset("/data/librispeech", "speech"):     # its decoded samples
        ...
    encoder = d2v_ds.load_encoder("runs/speech_base")                 # a plain torch module
    model = d2v_ds.load_finetuned("runs/finetuned")                   # the same, with its head

Importing d2v_ds imports neither torch nor DeepSpeed; functions import what they need when they are
called. Bad input raises UserError, whose message says what to change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from d2v_ds import recipes
from d2v_ds.config import Config
from d2v_ds.data.shard_format import ShardSet
from d2v_ds.errors import UserError

if TYPE_CHECKING:
    from webdataset import DataPipeline

    from d2v_ds.encoder import PretrainedEncoder
    from d2v_ds.finetune.model import FinetunedModel
    from d2v_ds.modalities.base import Modality

__version__ = "0.1.0"

__all__ = [
    "Config",
    "ShardSet",
    "UserError",
    "__version__",
    "load_config",
    "load_encoder",
    "load_finetuned",
    "open_shards",
    "recipes",
    "webdataset",
]


def load_config(source: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a recipe (`d2v-ds recipes` lists them) or a YAML file, with overrides
    `key.path=value`. Raises UserError."""
    return recipes.load(source, list(overrides))


def open_shards(where: str | Path, modality: str = "") -> ShardSet:
    """A shard set: a folder, a URL prefix, or a folder of third-party tars, which is indexed when
    it is first opened. modality: the required modality; "": any. Raises UserError."""
    from d2v_ds.loader.find_set import find_set

    return find_set(where, modality)


def webdataset(
    shards: str | Path | ShardSet,
    modality: str | Modality,
    *,
    decode: bool = True,
    shuffle: int = 0,
    seed: int = 0,
    handler: Callable[[Exception], bool] | None = None,
) -> DataPipeline:
    """The samples of a shard set or of tars, as a webdataset pipeline that can be extended
    (`.map`, `.batched` ...) and given to a DataLoader.

    Each item has `__key__`, `__url__` and the decoded sample, `example`. d2v_ds.loader.webdataset
    describes the arguments. Raises UserError.
    """
    from d2v_ds.loader import webdataset as module

    return module.webdataset(
        shards, modality, decode=decode, shuffle=shuffle, seed=seed, handler=handler
    )


def load_encoder(
    path: str | Path, *, weights: Literal["student", "teacher"] = "student", modality: str = ""
) -> PretrainedEncoder:
    """A trained encoder as a plain torch module. path: a run folder, a checkpoint, an exported
    folder, a folder of Hugging Face transformers (data2vec 1.0), or a checkpoint of fairseq or
    data2vec_vision.

    Called with a list of examples it returns the features of every block, [B, T, D] each, and
    which tokens exist. Its method `prepare` makes an example of a waveform, an image or token ids.
    weights: the student's or the teacher's. modality: required for a model with
    several. Raises UserError.
    """
    from d2v_ds import encoder

    return encoder.load_encoder(path, weights=weights, modality=modality)


def load_finetuned(path: str | Path) -> FinetunedModel:
    """A fine-tuned model, encoder and head, as a plain torch module. path: a run folder, a
    checkpoint, an exported folder, or a folder of Hugging Face transformers with a head.

    Its methods: `prepare` makes an example of a waveform, an image or token ids; a call with a list
    of examples returns logits; `predict` returns transcripts, class names or numbers. Raises
    UserError.
    """
    from d2v_ds.finetune import model

    return model.load_finetuned(path)
