"""Reads files of torch.save without running anything that they contain.

    .pt, .pth, .bin --torch.load(weights_only=True)--> tensors and plain containers

A pickle can call any function. PyTorch's restricted unpickler calls only its own and those that it
is given. It is given classes without behaviour, which take the place of the few classes in files of
fairseq and BEiT; their code is never run, and neither fairseq nor omegaconf is imported.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


class StandIn:
    """Takes the place of an object of another library and keeps what it was made of."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def fields(self) -> dict[str, Any]:
        """The attributes of the object; empty if its state is not a mapping."""
        state = vars(self).get("state")
        return dict(state) if isinstance(state, Mapping) else {}


class Node(StandIn):
    """A value of omegaconf, or a container of values."""


NODES = ("AnyNode", "StringNode", "IntegerNode", "FloatNode", "BooleanNode", "EnumNode")
NAMES: dict[type[StandIn], tuple[str, ...]] = {
    StandIn: (
        "argparse.Namespace",
        "fairseq.data.dictionary.Dictionary",
        # values of the enumerations in a fairseq configuration
        "examples.data2vec.data.modality.Modality",
        "fairseq.data.data_utils.MaskSelection",
        # numbers of numpy: losses in the history of a run, which nothing here reads
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "numpy.dtype",
        # what omegaconf notes of the types of its values
        "omegaconf.base.Metadata",
        "omegaconf.base.ContainerMetadata",
        *(f"builtins.{name}" for name in ("dict", "list", "tuple", "str", "int", "float", "bool")),
        *(f"typing.{name}" for name in ("Any", "Dict", "List")),
        "collections.defaultdict",
    ),
    Node: (
        "omegaconf.dictconfig.DictConfig",
        "omegaconf.listconfig.ListConfig",
        *(f"omegaconf.nodes.{name}" for name in NODES),
    ),
}
# One class per name, because PyTorch looks names up in a mapping from them.
ALLOWED: list[Any] = [
    (type(name.rpartition(".")[2], (kind,), {}), name)
    for kind, names in NAMES.items()
    for name in names
]


class Refused(ValueError):
    """The file cannot or must not be read; the message is the rest of a sentence about it."""


def load_pickled(path: Path) -> Any:
    """The content of a file of torch.save, with attributes of known objects as mappings. Tensors
    are on the CPU, memory-mapped if the format allows it. Raises Refused."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
        if not start:
            raise Refused("is empty")
        with warnings.catch_warnings(), torch.serialization.safe_globals(ALLOWED):
            warnings.simplefilter("ignore")  # about the protocol of a file that is then refused
            content = torch.load(
                os.fspath(path),
                map_location="cpu",
                weights_only=True,
                mmap=start == b"PK\x03\x04",  # a zip file; the older format cannot be mapped
            )
        return plain(content)
    except Refused:
        raise
    except OSError as error:
        raise Refused(f"cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise Refused(reason(error)) from None


GLOBAL = re.compile(r"nsupported (?:global: )?GLOBAL ([\w.]+)")
DETAIL = re.compile(r"WeightsUnpickler error: (.+)")


def reason(error: Exception) -> str:
    """Why a file is refused, from an error of torch.load."""
    if found := GLOBAL.search(str(error)):
        return f"contains {found[1]}; only tensors and plain containers are read"
    detail = DETAIL.search(str(error))
    first = detail[1] if detail else next(iter(str(error).splitlines()), "").partition(". ")[0]
    if first.isdecimal() or "eights only" in first or "weights_only" in first:
        first = ""  # an opcode, or advice to run what the file contains
    return "is damaged or not a PyTorch file" + f" ({first[:120]})" * bool(first)


def plain(value: Any) -> Any:
    """Mappings and lists instead of the objects of other libraries."""
    if isinstance(value, Node):
        fields = value.fields()
        return plain(fields.get("_content", fields.get("_val")))
    if isinstance(value, StandIn):
        if fields := value.fields():
            return plain(fields)
        return value.arguments[0] if len(value.arguments) == 1 else None  # of an enumeration
    if isinstance(value, torch.Tensor) and (value.is_meta or value.layout != torch.strided):
        kind = "without values" if value.is_meta else "that is sparse"
        raise Refused(f"contains a tensor {kind}; only dense tensors are read")
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value
