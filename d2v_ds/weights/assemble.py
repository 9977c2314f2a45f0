"""Makes `Weights` of the tensors and the settings of another implementation.

    tensors with our names --shapes.py--.
    their configuration ----------------+--> settings, complete --blueprint--> names and shapes
    the published recipe ---------------'                                      are verified

Settings come from the shapes, then from the configuration, then from the published recipe. What
comes from the recipe is listed in about["assumed"].
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2v_ds.config.decoding import decode, to_dict, value_at
from d2v_ds.errors import UserError
from d2v_ds.modalities import create_modalities
from d2v_ds.modalities.base import SHAREABLE, Modality
from d2v_ds.recipes import RECIPES
from d2v_ds.student import Encoder
from d2v_ds.teacher import Teacher
from d2v_ds.transformer import TransformerConfig
from d2v_ds.weights import shapes
from d2v_ds.weights.model import Part, Settings, Weights

PUBLISHED = {  # (modality, version): the published models, by recipe
    ("speech", "1.0"): ("speech_base_v1",),
    ("speech", "2.0"): ("speech_base", "speech_large"),
    ("vision", "1.0"): ("vision_base_v1", "vision_large_v1"),
    ("vision", "2.0"): ("vision_base", "vision_large", "vision_huge16"),
    ("text", "1.0"): ("text_base_v1",),
    ("text", "2.0"): ("text_base", "text_large"),
}
PATCHES = 196  # of an image in the published models with BEiT's masks
# Never stored, or the same in every published model.
NOT_REPORTED = ("positions", "extra_tokens", "specials", "masked", "kind", "init", "norm")


@dataclass
class Foreign:
    """A model of another implementation, with our names."""

    path: Path
    modality: str
    version: str  # of data2vec, 1.0 or 2.0
    student: dict[str, Tensor]
    teacher: dict[str, Tensor] = field(default_factory=dict)
    head: dict[str, Tensor] = field(default_factory=dict)
    given: Settings = field(default_factory=dict)
    """{"model": ..., "modality": {name: ...}}: what its configuration says, in our terms."""
    copied: tuple[str, ...] = ()
    """Parts of the front end that the teacher copies from the student instead of averaging."""
    finetune: Settings = field(default_factory=dict)
    step: int = 0
    about: Settings = field(default_factory=dict)
    """With the lists of sentences `assumed` and `left_out`."""
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def front_end(self) -> str:
        return f"encoder.front_ends.{self.modality}"

    def assume(self, sentence: str) -> None:
        self.about.setdefault("assumed", []).append(sentence)

    def left_out(self, names: list[str]) -> None:
        if names:
            self.about.setdefault("left_out", []).extend(sorted(names))


def assemble(found: Foreign) -> Weights:
    """Raises UserError if a parameter is missing, unknown or of the wrong shape, or if a setting
    can be found nowhere."""
    try:
        settings = settings_of(found)
    except shapes.Missing as error:
        raise UserError(f"{found.path}: {error}") from None
    complete(found, trunk_of(found, settings))
    return exact(found, settings)


def trunk_of(found: Foreign, settings: Settings) -> TransformerConfig:
    """The settings of the trunk. Raises UserError that names the source."""
    with naming(found.path):
        return decode(TransformerConfig, settings["model"], "model")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of settings that come from this file or folder begin with its name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: its settings are not possible: {error}") from None


def exact(found: Foreign, settings: Settings) -> Weights:
    """As `assemble`, for complete settings and complete tensors."""
    model = trunk_of(found, settings)
    with naming(found.path):
        modalities = create_modalities(settings["modality"])
    check(found, blueprint(found, model, modalities))
    parts = {"student": found.student, "teacher": found.teacher, "head": found.head}

    def tensors(part: Part) -> Mapping[str, Tensor]:
        return parts[part]

    return Weights(
        path=found.path,
        model=to_dict(model),
        modality={name: to_dict(kind.config) for name, kind in modalities.items()},
        tensors=tensors,
        step=found.step,
        finetune=found.finetune,
        about=found.about,
        files=found.files,
    )


# ------------------------------------------------------------------------------------- settings


def settings_of(found: Foreign) -> Settings:
    """{"model": ..., "modality": {name: ...}}, complete but for settings that have the same default
    everywhere. Notes in `found` what was assumed."""
    name, tensors = found.modality, found.student
    given = found.given
    own = given.setdefault("modality", {}).setdefault(name, {})
    known = merged(
        given,
        {
            "model": shapes.model_settings(tensors, name),
            "modality": {name: shapes.modality_settings(tensors, name, own.get("pad_id", 1))},
        },
    )
    settings = known["modality"][name]
    recipe, published = published_like(found, known["model"]["dim"])
    dim = known["model"]["dim"]
    if "heads" not in known["model"] and dim != published["model"]["dim"]:
        raise UserError(
            f"{found.path}: says nowhere how many attention heads the model has, and no published "
            f"model has its width of {dim}"
        )
    if name == "speech":
        settings["convs"] = convolutions(found, settings.get("convs"))
    if name == "text" and "mask_id" not in settings:
        settings["mask_id"] = settings["vocab_size"] - 1
        found.assume("The last id of the vocabulary is the mask token: the source does not say.")
    if name == "vision" and found.version == "1.0":  # a mean over channels, as published
        settings.setdefault("loss_scale", 1 / dim)
    shared = shared_parts(found)
    if shared is not None:
        settings["shared"] = shared
    base = {
        "model": published["model"],
        "modality": {name: with_masks(published["modality"][name], settings)},
    }
    for path, value in leaves(base):
        if value_at(known, path) is None and path.rpartition(".")[2] not in NOT_REPORTED:
            found.assume(f"{path}={value}, as in the recipe {recipe}: the source does not say.")
    return merged(base, known)


def with_masks(published: Settings, known: Settings) -> Settings:
    """The settings of a recipe. BEiT's masks, which are numbers of patches, cover the same share of
    an image of another size."""
    mask = published["mask"]
    if mask.get("kind") != "beit":
        return published
    share = (known["image_size"] // known["patch_size"]) ** 2 / PATCHES
    areas = {key: max(1, int(n * share)) for key, n in mask.items() if key != "kind"}
    return published | {"mask": mask | areas}


def published_like(found: Foreign, dim: int) -> tuple[str, Settings]:
    """The published recipe of the same width, or the first: (its name, its settings)."""
    recipes = {name: RECIPES[name]() for name in PUBLISHED[found.modality, found.version]}
    first = next(iter(recipes))
    name = next((n for n, raw in recipes.items() if raw["model"]["dim"] == dim), first)
    return name, recipes[name]


def convolutions(found: Foreign, given: Any) -> list[list[int]]:
    """(channels, kernel, stride) of the convolutions of speech; given: the same, or None."""
    from d2v_ds.modalities.speech import PUBLISHED_CONVS  # a modality is imported when needed

    stored = shapes.convolutions(found.student)
    if given is None:
        kernels = [kernel for _, kernel, _ in PUBLISHED_CONVS]
        if [kernel for _, kernel in stored] != kernels:
            raise UserError(
                f"{found.path}: says nowhere which strides its convolutions have, and their "
                f"kernels {[kernel for _, kernel in stored]} are not the published {kernels}"
            )
        given = PUBLISHED_CONVS
        found.assume("The strides of the convolutions are the published ones: not stored.")
    strides = [stride for _, _, stride in given]
    if len(strides) != len(stored):
        raise UserError(
            f"{found.path}: has {len(stored)} convolutions, but its configuration {len(strides)}"
        )
    return [[*pair, stride] for pair, stride in zip(stored, strides, strict=True)]


def shared_parts(found: Foreign) -> list[str] | None:
    """The parts of the front end that the teacher shares: those that it lacks or copies. None if
    there is no teacher."""
    if not found.teacher:
        return None

    def has(tensors: Mapping[str, Tensor], part: str) -> bool:
        return any(name.startswith(f"{found.front_end}.{part}.") for name in tensors)

    return [
        part
        for part in SHAREABLE
        if has(found.student, part) and (part in found.copied or not has(found.teacher, part))
    ]


def merged(below: Settings, above: Settings) -> Settings:
    """`above` over `below`, section by section."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = (
            merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return result


def leaves(settings: Settings, path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


# --------------------------------------------------------------------------------- verification


def complete(found: Foreign, model: TransformerConfig) -> None:
    """Adds to the tensors what the source lacks, and removes what is no parameter of ours."""
    student, front_end = found.student, found.front_end
    for tensors in (student, found.teacher):
        fixed = tensors.pop(f"{front_end}.features.positions", None)
        if fixed is not None:
            check_positions(found, fixed)
    scale = f"{front_end}.bias.scale"
    for tensors in (student, found.teacher):
        if scale in tensors and tensors[scale].numel() == 1:  # one for all heads
            tensors[scale] = tensors[scale].reshape(1).repeat(model.heads)
    token = f"{front_end}.mask_token.embedding"
    if found.version == "1.0" and found.modality != "text" and token not in student:
        student[token] = torch.zeros(1, model.dim)
        found.assume("The mask token is zero: the source has none.")
    add_last_norm(found, model)


def add_last_norm(found: Foreign, model: TransformerConfig) -> None:
    """Adds the norm after pre-norm blocks, which classes with a head lack."""
    if model.norm == "pre" and "encoder.trunk.norm.weight" not in found.student:
        found.student["encoder.trunk.norm.weight"] = torch.ones(model.dim)
        found.student["encoder.trunk.norm.bias"] = torch.zeros(model.dim)
        found.assume("The norm after the last block changes nothing: the source has none.")


def check_positions(found: Foreign, stored: Tensor) -> None:
    """Raises UserError if the fixed positions [T, D] of images differ from ours."""
    from d2v_ds.modalities.vision import sincos_2d  # a modality is imported when it is needed

    side = round(len(stored) ** 0.5)
    expected = sincos_2d((side, side), stored.shape[1]) if side**2 == len(stored) else None
    # Half precision rounds values up to 1 by up to 2**-9 (bfloat16).
    if expected is None or not torch.allclose(stored, expected, rtol=0, atol=2**-8):
        raise UserError(
            f"{found.path}: has positions of shape {list(stored.shape)} that are not the fixed "
            "sine-cosine positions of a square grid; no other positions are supported"
        )


def blueprint(
    found: Foreign, model: TransformerConfig, modalities: Mapping[str, Modality]
) -> dict[str, dict[str, list[int]]]:
    """{"student" or "teacher": {name: shape}} that the settings require, without memory for values.
    The predictor is included if the source has one."""
    try:
        with torch.device("meta"):
            encoder = Encoder(model, {n: kind.front_end(model) for n, kind in modalities.items()})
            teacher = Teacher(encoder, {n: k.config.shared for n, k in modalities.items()})
            parts: dict[str, nn.Module] = {"encoder": encoder}
            if any(name.startswith("predictors.") for name in found.student):
                kinds = {n: kind.predictor(model) for n, kind in modalities.items()}
                parts["predictors"] = nn.ModuleDict(kinds)
            student = nn.ModuleDict(parts)
    except (ValueError, RuntimeError) as error:
        # torch's, for example of groups that do not divide the width, or of impossible sizes
        raise UserError(f"{found.path}: its settings describe no model ({error})") from None
    return {
        name: {key: list(value.shape) for key, value in module.named_parameters()}
        for name, module in (("student", student), ("teacher", teacher))
    }


def check(found: Foreign, expected: dict[str, dict[str, list[int]]]) -> None:
    """Compares names and shapes, and reduces the teacher to what it does not share. Raises
    UserError."""
    compare(found.path, "", found.student, expected["student"])
    if not found.teacher:
        return
    for name in expected["teacher"].keys() - found.teacher.keys():
        if name.startswith((f"{found.front_end}.bias.", f"{found.front_end}.extra.")):
            # fairseq's ema_encoder_only: its teacher uses the student's
            found.teacher[name] = found.student[name]
    for name in [name for name in found.teacher if name in found.student]:
        if name not in expected["teacher"]:
            del found.teacher[name]
    compare(found.path, "the teacher's ", found.teacher, expected["teacher"])


def compare(
    path: Path, whose: str, tensors: Mapping[str, Tensor], expected: Mapping[str, list[int]]
) -> None:
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"{path}: {whose}{name} is missing")
        if list(tensors[name].shape) != shape:
            raise UserError(
                f"{path}: {whose}{name} has shape {list(tensors[name].shape)}, expected {shape}"
            )
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise UserError(f"{path}: {whose}{unknown[0]} is no parameter of this model")
