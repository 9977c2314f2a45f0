"""The preprocessors of an export: how transformers makes the model's inputs.

    speech   D2vFeatureExtractor, or Wav2Vec2FeatureExtractor without remote code
    vision   D2vImageProcessor, or ViTImageProcessor without remote code
    text     PreTrainedTokenizerFast, or D2vTokenizer with remote code (text.py)
    ctc      Wav2Vec2CTCTokenizer for the symbols of transcripts

The classes of d2v_ds give exactly what d2v_ds gives. Those of transformers, which load without
trust_remote_code=True, come close to it.
"""

from __future__ import annotations

import json
from typing import Any

from d2v_ds.data import images
from d2v_ds.data.tokenizer_json import JSON_FILE, SENTENCEPIECE_FILE
from d2v_ds.export.model import Exported
from d2v_ds.export.text import SPACE, SentencePiece, converted
from d2v_ds.export.text_json import JsonTokenizer
from d2v_ds.export.tokenizer import TextTokenizer
from d2v_ds.finetune.labels import BOUNDARY, LABELS_FILE

Files = dict[str, str | bytes]  # name -> content
Settings = dict[str, Any]

CTC_PROCESSOR = "Wav2Vec2Processor"  # the feature extractor with the tokenizer
BICUBIC = 3  # Pillow's number


def preprocessor_files(exported: Exported) -> tuple[Files, list[str]]:
    """preprocessor_config.json, and the names of the Python files that it needs. One file serves
    speech and vision, whose classes read different entries."""
    settings: Settings = {}
    code: Settings = {}
    if "speech" in exported.modality:
        settings |= speech_settings(exported.modality["speech"])
        code["AutoFeatureExtractor"] = "feature_extraction_d2v.D2vFeatureExtractor"
        if exported.finetune.get("task") == "ctc":
            settings["processor_class"] = CTC_PROCESSOR
    if "vision" in exported.modality:
        settings |= vision_settings(exported.modality["vision"])
        code["AutoImageProcessor"] = "image_processing_d2v.D2vImageProcessor"
    if not code:
        return {}, []
    content = as_json({**settings, "auto_map": code})
    return {"preprocessor_config.json": content}, [
        f"{name.partition('.')[0]}.py" for name in code.values()
    ]


def speech_settings(settings: Settings) -> Settings:
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": settings["sample_rate"],
        "do_normalize": True,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
    }


def vision_settings(settings: Settings) -> Settings:
    side = settings["image_size"]
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(side * images.RESIZE)},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": images.MEAN,
        "image_std": images.STD,
    }


def tokenizer_files(text: TextTokenizer) -> tuple[Files, list[str]]:
    """The files of the tokenizer, and the names of the Python files that it needs."""
    if isinstance(text, JsonTokenizer):
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **text.settings()}
        return {JSON_FILE: text.exported(), "tokenizer_config.json": as_json(settings)}, []
    assert isinstance(text, SentencePiece)
    files: Files = {SENTENCEPIECE_FILE: text.model}
    if fast := converted(text):
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **text.settings()}
        return {
            **files,
            JSON_FILE: fast,
            "tokenizer_config.json": as_json(settings),
        }, []
    settings = {
        "tokenizer_class": "D2vTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_d2v.D2vTokenizer", None]},
        "prefix_id": text.prefix,
        **text.settings(),
    }
    return {**files, "tokenizer_config.json": as_json(settings)}, ["tokenization_d2v.py"]


def ctc_files(labels: list[str], pieces: bytes | None) -> Files:
    """The tokenizer of transcripts. labels[0] is the blank, which transformers calls padding.

    pieces: the sentencepiece model whose pieces the labels are; None: letters. transformers only
    replaces a symbol that is the word delimiter as a whole, so spaces within pieces are written as
    spaces.
    """
    names = [label.replace(SPACE, " ") for label in labels] if pieces else labels
    settings = {
        "tokenizer_class": "Wav2Vec2CTCTokenizer",
        "processor_class": CTC_PROCESSOR,
        "pad_token": labels[0],
        "unk_token": "<unk>" if "<unk>" in labels else None,
        "bos_token": None,
        "eos_token": None,
        "word_delimiter_token": " " if pieces else BOUNDARY,
        "replace_word_delimiter_char": " ",
        "do_lower_case": False,
        "clean_up_tokenization_spaces": False,
    }
    files: Files = {
        "vocab.json": as_json({name: i for i, name in enumerate(names)}),
        "tokenizer_config.json": as_json(settings),
    }
    return {**files, LABELS_FILE: pieces} if pieces else files


def as_json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
