"""The contract of a modality. Each has one file and is accessed only through the registry.

    tar members --decode--> example --collate--> Batch --front_end, trunk, predictor--> predictions
    headers of tar members --header_readers--> lengths in the index of third-party tars
    tar members --check_sample--> the report of `d2v-shards verify`

B samples, M masked views per sample, T tokens, K visible tokens, N masked tokens, D width.
"""

from __future__ import annotations

import json
import os
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from d2v_ds.batch import Batch
from d2v_ds.config.bounds import Amount, BelowOne, Factor, Layers, MoreLayers, Positive, Views
from d2v_ds.data.checks import Unusable
from d2v_ds.data.headers import HeaderReader
from d2v_ds.errors import UserError
from d2v_ds.student import DecoderConfig, ExtraTokens, FrontEnd
from d2v_ds.transformer import TransformerConfig

SHAREABLE = ("features", "positions", "context")


@dataclass(frozen=True)
class HeadConfig:
    """The predictor of data2vec 1.0."""

    layers: Layers = 1
    """The number of linear layers."""

    zero_last: bool = False
    """Initialise the last layer with zeros, so that training starts from predictions of zero. This
    keeps small, short runs from collapsing."""


@dataclass(frozen=True)
class ModalityConfig:
    """Settings that every modality has."""

    views: Views = 8
    """Masked views per sample. The teacher runs once for all of them."""

    masked: Literal["removed", "replaced"] = "removed"
    """removed: the encoder's input omits masked tokens (data2vec 2.0); replaced: a mask token
    replaces them (1.0)."""

    shared: tuple[str, ...] = ()
    """Parts of the front end that the teacher shares with the student instead of averaging them:
    features, positions, context."""

    extra_tokens: MoreLayers = 0
    """Learned tokens prepended to the sequence, without positions. The last is the class token."""

    cls_weight: Amount = 0.0
    """Weight of the class loss relative to the loss of one view's masked tokens. In the class loss
    the output of the class token regresses the mean of its sample's targets (data2vec 2.0 for
    vision; the utterance-level loss of EAT for audio, Chen et al. 2024). It needs
    target.final_norm=layer, as in both: the mean of targets that are normalised over tokens last is
    zero. 0: no class loss."""

    cls_views: Positive | None = 1
    """Factor of the class loss, a number of views. fairseq multiplies by the views of a GPU's
    micro-batch; the recipes use the number of the published run. null: the views of the
    micro-batch, as in fairseq, so that the micro-batch changes the objective."""

    prenet_depth: MoreLayers = 0
    """The number of modality-specific blocks before the shared trunk (the prenet)."""

    prenet_dropout: BelowOne = 0.0
    """Dropout before the prenet, after the norm."""

    prenet_layer_drop: BelowOne = 0.0
    """LayerDrop of the prenet."""

    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    head: HeadConfig = field(default_factory=HeadConfig)

    loss_beta: Amount = 0.0
    """0: squared error; above 0: smooth L1 loss with this beta."""

    loss_scale: Factor | None = None
    """Factor of the error, which is summed over channels; null: 1 / sqrt(model.dim)."""

    loss_weight: Factor = 1.0
    """Weight of this modality's gradients relative to other modalities. Losses are reported without
    it."""

    padded_statistics: bool = False
    """As in fairseq: only attention ignores padding; target statistics and convolutions include
    it."""

    def __post_init__(self) -> None:
        for name in self.shared:
            if name not in SHAREABLE:
                raise ValueError(f"shared: no part {name!r} (allowed: {', '.join(SHAREABLE)})")
        if self.cls_weight > 0 and not self.extra_tokens:
            raise ValueError(f"cls_weight={self.cls_weight} needs extra_tokens of at least 1")


class Modality(ABC):
    """Reads samples of one kind and provides the parts of the model that are specific to it. An
    instance is built from its settings: `Speech(SpeechConfig(...))`.

    A subclass that lacks a method, or an attribute without a default, raises TypeError when the
    class is defined. The message names everything that is missing. An intermediate class is
    declared with `abstract=True`.
    """

    name: ClassVar[str]
    """The name in settings, shard sets and the registry."""

    batch_unit: ClassVar[str]
    """The unit of batch.size: "s", "images", "tokens", or "samples"."""

    length_unit: ClassVar[str]
    """The unit of lengths in a shard set's index: "frames", "pixels", "tokens"."""

    extensions: ClassVar[tuple[str, ...]]
    """Extensions of the tar members that hold a sample, without the dot. A sample has one of
    them."""

    Config: ClassVar[type[ModalityConfig]]
    """The type of `modality.NAME.*`."""

    header_readers: ClassVar[Mapping[str, HeaderReader]] = {}
    """{extension: reader of a sample's length from the member's header}, in order of preference.
    They are used to index third-party tars."""

    packed_extensions: ClassVar[Mapping[str, str]] = {}
    """{key: extension of the member that holds many samples of it, one per row}."""

    converter: ClassVar[str] = ""
    """The d2v-shards command that converts corpora of this modality; "": none."""

    baseline_name: ClassVar[str] = ""
    """The name of the `baseline` features, for tables."""

    config: Any

    def __init_subclass__(cls, *, abstract: bool = False, **more: Any) -> None:
        super().__init_subclass__(**more)
        if abstract:
            return
        missing = [name for name in REQUIRED if not hasattr(cls, name)]
        missing += [
            name
            for name in dir(cls)
            if getattr(getattr(cls, name, None), "__isabstractmethod__", False)
        ]
        if missing:
            raise TypeError(f"modality {cls.__name__} lacks {', '.join(missing)}")

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def views(self) -> int:
        """M."""
        views: int = self.config.views
        return views

    def check_model(self, model: TransformerConfig, *, predicts: bool = True) -> None:
        """Raises UserError if the settings do not fit the trunk's. predicts: the model has a
        predictor, as in pre-training."""
        return None

    # ------------------------------------------------------------------------------- shard sets

    def check_set(self, about: Mapping[str, Any]) -> None:
        """Raises UserError if a shard set with this index.json does not fit the settings."""
        return None

    @classmethod
    @abstractmethod
    def check_sample(cls, members: Mapping[str, bytes], about: Mapping[str, Any]) -> int:
        """Decodes a sample of a shard set completely and returns its length. about: the set's
        index.json. Raises ValueError with the reason if the sample is unusable."""

    # ---------------------------------------------------------------------------- planning a step

    @abstractmethod
    def crop(self, length: int) -> int:
        """The length after cropping; 0 if the sample is too short to be used."""

    @abstractmethod
    def cost(self, length: int) -> float:
        """The amount, in `batch_unit`, that a sample of this length counts towards batch.size after
        cropping."""

    @abstractmethod
    def masked_tokens(self, length: int) -> int | None:
        """The number of masked tokens over all M views of a sample of this length (before
        cropping), or 1 if samples have labels (Batch.terms). None, for every length, if the number
        does not follow from the length."""

    def remarks(self, counts: Mapping[int, int]) -> list[str]:
        """What happens to samples that are not used, or not as they are, for the log. counts:
        {length in the index: number of samples}, of a whole set."""
        short = sum(number for length, number in counts.items() if not self.crop(length))
        return [f"{short} samples are too short"] if short else []

    # ------------------------------------------------------------------------------ making a batch

    @abstractmethod
    def decode(self, sample: Mapping[str, bytes], rng: np.random.Generator | None) -> Any:
        """One example from a sample's members: decoded, cropped and augmented. Without a generator,
        the whole example without augmentation. Raises ValueError if it cannot be decoded."""

    def decoded(self, sample: Mapping[str, bytes], rng: np.random.Generator | None) -> Any:
        """As `decode`, for members that may be damaged or hostile: everything that decodes a sample
        calls this. Raises ValueError, whatever `decode` raises."""
        try:
            return self.decode(sample, rng)
        except (ValueError, MemoryError):
            raise
        except Exception as error:  # libraries raise many types for damage they do not expect
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{place.name} in {os.path.basename(place.filename)}:{place.lineno}"
            reason = f"cannot be decoded ({type(error).__name__}: {error}; {where})"
            raise Unusable("damaged", reason) from error

    @abstractmethod
    def fit(self, example: Any, length: int) -> Any:
        """The example, cut or repeated to the size that `decode` gives for a sample of this length;
        the same object if it already has that size."""

    @abstractmethod
    def collate(
        self, examples: Sequence[Any], rngs: Sequence[np.random.Generator], index: int
    ) -> Batch:
        """Pads the examples into micro-batch number `index`. Each example has its own generator,
        which draws its masks."""

    @abstractmethod
    def unmasked(self, examples: Sequence[Any]) -> Batch:
        """The examples as one batch without masks (M = 1, N = 0)."""

    def check_example(self, example: Any) -> None:
        """Raises ValueError with the reason if `unmasked` cannot take the example, as far as this
        can be told from it."""
        return None

    def prepare(self, raw: Any, *, rate: int | None = None) -> Any:
        """The example that `decode` gives, without a generator, for the same content outside a
        shard. rate: the sample rate of a waveform. Raises ValueError with the reason."""
        raise ValueError(
            f"{self.name}: takes no raw input; give what modality.decode(members, None) returns"
        )

    @abstractmethod
    def largest(self) -> Any:
        """An example of the largest size that `decode` gives, without content, for memory
        estimates."""

    # ------------------------------------------------------------------------------------ the model

    @abstractmethod
    def front_end(self, model: TransformerConfig) -> FrontEnd:
        """The modules before the shared trunk."""

    @abstractmethod
    def predictor(self, model: TransformerConfig) -> nn.Module:
        """forward(batch, encoder output [B * M, K, D]) -> predictions [N, D]."""

    def class_weight(self, views: int) -> float:
        """The weight of the class loss in a micro-batch with this number of views; 0 if there is no
        class loss."""
        weight: float = self.config.cls_weight * (self.config.cls_views or views)
        return weight

    def warnings(self) -> list[str]:
        """Messages about settings that are allowed but are known to fail; printed before
        training."""
        return []

    # ------------------------------------------------------------------------------- for inspection

    @abstractmethod
    def baseline(self, example: Any) -> npt.NDArray[np.float32]:
        """Plain features of one example, as a baseline for the accuracy of probes."""

    @abstractmethod
    def picture(self, batch: Batch) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """The first view of a batch as an image [across, up], and its mask: [T] along the width or
        [t, u] along both axes."""


REQUIRED = ("name", "batch_unit", "length_unit", "extensions", "Config")


def metadata(members: Mapping[str, bytes]) -> dict[str, Any]:
    """The .json of a sample; {} if it has none. Raises Unusable if it is not a JSON object."""
    try:
        found = json.loads(members.get("json", b"{}"))
    except (ValueError, RecursionError) as error:
        raise Unusable("row", f"json: is damaged ({error})") from None
    if not isinstance(found, dict):
        raise Unusable("row", "json: is not an object")
    return found


def described(value: Any) -> str:
    """What a value is, for messages: float64 of shape [2, 3], or its type."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        kind = "a torch tensor, " * isinstance(value, Tensor)  # where numpy is expected
        return f"{kind}{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"
    return f"of type {type(value).__name__}"


def require_groups(path: str, groups: int, widths: Mapping[str, int]) -> None:
    """Raises UserError if the groups of convolutions do not divide a width. widths: by setting."""
    for name, width in widths.items():
        if width % groups:
            raise UserError(f"{path}: {groups} does not divide {name}={width}; change one of them")


def require_decoder(path: str, decoder: DecoderConfig, model: TransformerConfig) -> None:
    """Raises UserError if the settings of a ConvDecoder, at `path`, do not fit the trunk's."""
    widths = {"model.dim": model.dim, f"{path}.dim": decoder.dim}
    require_groups(f"{path}.groups", decoder.groups, widths)


def require_some_masked(modality: Modality, masked: int | None, T: int) -> None:
    """Raises UserError if the views of the largest sample, of T tokens, have no masked or no
    visible token. masked: those of all views; None: their number is random."""
    if masked is not None and not 0 < masked < modality.views * T:
        raise UserError(
            f"modality.{modality.name}.mask.prob: {modality.config.mask.prob} masks "
            f"{masked // modality.views} of the {T} tokens of the largest sample; at least one "
            "must be masked and one visible"
        )


def extra_tokens(
    config: ModalityConfig, dim: int, init: Callable[[Tensor], object] = nn.init.normal_
) -> ExtraTokens | None:
    """The extra tokens of a front end; None if the settings have none.

    N(0, 1) by default, as in the released configurations with a class token. A token of zeros
    before a LayerNorm would have a gradient that is thousands of times larger than any other.
    """
    return ExtraTokens(config.extra_tokens, dim, init) if config.extra_tokens else None
