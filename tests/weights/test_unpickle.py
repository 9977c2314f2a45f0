"""Files of torch.save are read without running anything that they contain."""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import subprocess
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2v_ds.errors import UserError
from d2v_ds.weights import open_weights
from d2v_ds.weights.unpickle import load_pickled
from tests.helpers.outside_classes import class_of


class Call:
    """Unpickles as the result of a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


class Restored:
    """Unpickles as an OrderedDict whose state is set by a call of __setstate__."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Innocent, (), {"marker": str(self.marker)}


class Innocent:
    def __setstate__(self, state: dict[str, Any]) -> None:
        Path(state["marker"]).touch()


def attacks(marker: Path) -> dict[str, Any]:
    weights = {"patch_embed.proj.weight": torch.zeros(2, 3, 4, 4)}
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    return {
        "os.system": Call(os.system, f"touch {marker}"),
        "subprocess": Call(subprocess.check_call, ["touch", str(marker)]),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "in a state": {"model": weights | {"bad": Call(os.system, f"touch {marker}")}},
        "in settings": {"model": weights, "args": argparse.Namespace(x=Call(eval, code))},
        "as a key": {"model": OrderedDict([(Call(os.system, f"touch {marker}"), 1)])},
        "__setstate__": {"model": weights, "more": Restored(marker)},
        "in a stand-in": {
            "model": weights,
            "args": Call(argparse.Namespace, Call(os.system, f"touch {marker}")),
        },
    }


def save(content: Any, path: Path, form: str) -> None:
    if form == "zip":
        torch.save(content, path)
    elif form == "legacy":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(content, protocol=int(form[-1])))


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle2", "pickle4"])
@pytest.mark.parametrize("attack", attacks(Path("unused")))
def test_nothing_in_a_file_runs(attack: str, form: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "model.pt"
    save(attacks(marker)[attack], path, form)
    with pytest.raises(UserError) as raised:
        open_weights(path)
    assert not marker.exists()
    message = str(raised.value)
    assert str(path) in message and "\n" not in message
    if form in ("zip", "legacy"):
        assert "only tensors and plain containers are read" in message
    if form in ("zip", "legacy") and attack in ("os.system", "eval", "as a key"):
        assert "contains eval" in message or "contains posix.system" in message


@pytest.mark.parametrize("attack", attacks(Path("unused")))
def test_the_attacks_work_on_an_unrestricted_reader(attack: str, tmp_path: Path) -> None:
    """Otherwise the test above would show nothing."""
    marker, path = tmp_path / "marker", tmp_path / "model.pt"
    torch.save(attacks(marker)[attack], path)
    with contextlib.suppress(TypeError):  # from Namespace, after the call
        torch.load(path, weights_only=False)
    assert marker.exists()


def truncated(path: Path) -> None:
    torch.save({"model": {"w": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])


def truncated_legacy(path: Path) -> None:
    save({"model": {"w": torch.zeros(1000)}}, path, "legacy")
    path.write_bytes(path.read_bytes()[:2000])


def script(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


UNUSABLE: dict[str, tuple[Any, str]] = {
    "empty": (lambda path: path.touch(), "is empty"),
    "truncated": (truncated, "damaged or not a PyTorch file"),
    "truncated legacy": (truncated_legacy, "damaged or not a PyTorch file"),
    "text": (lambda path: path.write_text("hello world\n" * 9), "damaged or not a PyTorch file"),
    "zeros": (lambda path: path.write_bytes(bytes(5000)), "damaged or not a PyTorch file"),
    "no model": (lambda path: torch.save([1, 2], path), "has no weights of a model"),
    "no tensors": (lambda path: torch.save({"model": {"a": 1}}, path), "has no weights of a model"),
    "another model": (
        lambda path: torch.save({"model": {"conv1.weight": torch.zeros(2)}}, path),
        "has no parameter of data2vec",
    ),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_files_are_one_line(name: str, tmp_path: Path) -> None:
    write, message = UNUSABLE[name]
    write(tmp_path / "model.pt")
    with pytest.raises(UserError, match=message) as raised:
        open_weights(tmp_path / "model.pt")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400
    assert "weights_only" not in str(raised.value) and "(10" not in str(raised.value)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_known_objects_become_plain(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dictionary: Any = class_of(monkeypatch, "fairseq.data.dictionary", "Dictionary")()
    dictionary.symbols, dictionary.indices = ["<s>", "A"], {"<s>": 0, "A": 1}
    content = {
        "args": argparse.Namespace(depth=2, name="x", inner=argparse.Namespace(y=[1.5])),
        "loss": np.float64(0.5),
        "count": np.int64(3),
        "dictionary": dictionary,
        "model": OrderedDict(w=torch.arange(3.0), half=torch.ones(2).half()),
        "tuple": (1, None, True),
    }
    save(content, tmp_path / "model.pt", form)
    found = load_pickled(tmp_path / "model.pt")
    assert found["args"] == {"depth": 2, "name": "x", "inner": {"y": [1.5]}}
    assert found["dictionary"] == {"symbols": ["<s>", "A"], "indices": {"<s>": 0, "A": 1}}
    assert found["tuple"] == [1, None, True]
    assert torch.equal(found["model"]["w"], torch.arange(3.0))
    assert found["model"]["half"].dtype == torch.float16


def test_containers_of_omegaconf_become_plain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As omegaconf pickles them: a container with `_content`, values with `_val`."""
    node: Any = class_of(monkeypatch, "omegaconf.nodes", "AnyNode")
    container: Any = class_of(monkeypatch, "omegaconf.dictconfig", "DictConfig")
    sequence: Any = class_of(monkeypatch, "omegaconf.listconfig", "ListConfig")

    def value(of: Any) -> Any:
        made = node()
        made._val, made._metadata = of, {"optional": True}
        return made

    items = sequence()
    items._content = [value(1), value("b")]
    config = container()
    config._content = {"depth": value(3), "items": items, "none": value(None)}
    items._parent = config  # a cycle, as in the original
    torch.save({"cfg": config}, tmp_path / "model.pt")
    found = load_pickled(tmp_path / "model.pt")
    assert found == {"cfg": {"depth": 3, "items": [1, "b"], "none": None}}


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [(torch.eye(3).to_sparse(), "that is sparse"), (torch.eye(3).to("meta"), "without values")],
)
def test_tensors_without_dense_values_are_refused(
    tensor: torch.Tensor, kind: str, tmp_path: Path
) -> None:
    torch.save({"model": {"patch_embed.proj.weight": tensor}}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=f"contains a tensor {kind}; only dense tensors are read"):
        open_weights(tmp_path / "model.pt")


def test_only_the_named_classes_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(torch.serialization.get_safe_globals())
    other: Any = class_of(monkeypatch, "fairseq.data.dictionary", "TruncatedDictionary")()
    torch.save({"model": {}, "x": other}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"contains fairseq\.data\.dictionary\.TruncatedDictionary"):
        open_weights(tmp_path / "model.pt")
    assert before == set(torch.serialization.get_safe_globals())
