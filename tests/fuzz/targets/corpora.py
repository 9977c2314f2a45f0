"""Manifests and text files of corpora, from the command line to the samples of a shard: every input
becomes a sample or is listed."""

from __future__ import annotations

import bz2
import functools
import gzip
import json
import lzma
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

from d2v_ds.data.checks import KINDS
from d2v_ds.errors import UserError
from shards.cli import parser
from shards.family import Converted, PackedMember
from shards.findings import left_out
from shards.plan import Choice, make_plans
from shards.text.tokenizer import train
from tests.fuzz.harness import Target
from tests.fuzz.mutations import Mutate, any_bytes, head_bytes, json_values, text_lines
from tests.helpers.corpora import put, recording
from tests.shards.pictures import picture

MODEL = "t.model"
END = b"\0"  # of the name, with which a seed begins
build_parser = functools.cache(parser)


def _convert(family: str, source: Path, *options: str) -> Any:
    """What a conversion finds, without the shards that it writes. Every input must be counted."""
    given = [family, str(source), str(source.parent / "out"), "--max-bad", "100%", *options]
    corpus = import_module(f"shards.{family}").read(build_parser().parse_args(given))
    [plan] = make_plans(corpus, Choice()).values()
    made = list(corpus.converter.convert(plan.samples))
    findings = [*plan.findings, *(found for one in made for found in one.findings)]
    inputs = plan.inputs + len(left_out(plan.findings)) + sum(one.found for one in made)
    keys = [one.key for one in made if isinstance(one, Converted) and one.members]
    kinds = sorted(found.kind for found in findings)
    assert KINDS.keys() >= set(kinds)
    if family != "text":  # whose samples are blocks of many documents
        assert len(keys) + len(left_out(findings)) == inputs, (keys, findings, inputs)
    if not any(isinstance(one, PackedMember) or one.members for one in made):
        raise UserError("none of the inputs can be used")  # as the command says at the end
    lengths = [one.length for one in made if isinstance(one, Converted)]
    return sorted(keys), inputs, lengths, kinds


class Corpora:
    """Seeds of one family: {name of a file: (its contents, options)}, and the files that they
    name."""

    def __init__(
        self,
        family: str,
        seeds: Mapping[str, tuple[Sequence[bytes], tuple[str, ...]]],
        files: Callable[[], Mapping[str, bytes]],
    ) -> None:
        self.family, self.given, self.files = family, seeds, files

    def seeds(self, folder: Path) -> Sequence[bytes]:
        return [
            name.encode() + END + one for name, (found, _) in self.given.items() for one in found
        ]

    def parse(self, data: bytes, folder: Path) -> Any:
        root = folder / self.family
        if not root.exists():
            for name, content in self.files().items():
                put(root / name, content)
        name, _, content = data.partition(END)
        path = root / name.decode()
        path.write_bytes(content)
        try:
            options = self.given[name.decode()][1]
            whole = path.name.endswith(".trans.txt")  # the layout is a folder
            source = path.parent if whole else path
            return _convert(self.family, source, *(one.format(root) for one in options))
        finally:
            path.unlink()


def _content(change: Mutate) -> Mutate:
    """`change` of what follows the name."""

    def mutate(data: bytes, rng: Random) -> bytes:
        name, end, content = data.partition(END)
        packed = name.endswith((b".gz", b".bz2", b".xz", b".model"))
        return name + end + (any_bytes if packed else change)(content, rng)

    return mutate


def _lines(*rows: dict[str, Any]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


# ----------------------------------------------------------------------------------------- speech


def _speech() -> Corpora:
    rows: list[dict[str, Any]] = [
        {"path": "a.wav", "text": "x"},
        {"path": "b.wav", "offset": 0.005, "duration": 0.01, "label": 1},
    ]
    nemo = {"audio_filepath": "a.wav", "duration": 0.02, "channel": 0}
    tables = [b"path\ttext\na.wav\thello\nb.wav\tyou\n", b"path\tstart\tend\na.wav\t0\t0.01\n"]
    voices = b"client_id\tpath\tsentence\tage\ns\ta.wav\thi\t\nt\tb.wav\tyou\ttwenties\n"
    return Corpora(
        "speech",
        {
            "m.jsonl": ([_lines(*rows), _lines(nemo), json.dumps(rows).encode()], ()),
            "m.tsv": (tables, ()),
            "fairseq.tsv": ([b".\na.wav\t320\nb.wav\t320\n"], ("--layout", "fairseq")),
            "validated.tsv": ([voices], ("--layout", "commonvoice")),
            "libri/1-2.trans.txt": ([b"1-2-0001 HELLO YOU\n1-2-0002 GO\n"], ()),
        },
        lambda: {
            **dict.fromkeys(
                ("a.wav", "b.wav", "clips/a.wav", "clips/b.wav"), recording(seconds=0.02)
            ),
            **{f"libri/1-2-000{i}.flac": recording("flac", seconds=0.02) for i in (1, 2)},
        },
    )


# ----------------------------------------------------------------------------------------- images


def _images() -> Corpora:
    rows: list[dict[str, Any]] = [
        {"file_name": "a.png", "label": "cat"},
        {"file_name": "b.png", "label": 2},
    ]
    return Corpora(
        "images",
        {
            "m.csv": ([b'path,label\na.png,cat\nb.png,"d,og"\n'], ()),
            "m.tsv": ([b"path\tlabel\na.png\tcat\nb.png\td\n"], ()),
            "m.jsonl": ([_lines(*rows)], ()),
            "m.json": ([json.dumps(rows).encode()], ()),
        },
        lambda: {f"{name}.png": picture("PNG", seed=i) for i, name in enumerate("ab")},
    )


# ------------------------------------------------------------------------------------------- text


@functools.cache
def _model() -> bytes:
    words = "the quick brown fox jumps over a lazy dog while it rains in spain"
    texts = [f"{words} {i}" for i in range(100)]
    return train(texts, vocab_size=300, kind="bpe", sample=1000, seed=0)


def _text() -> Corpora:
    plain = b"hello you\n\nthe quick brown\nfox\r\njumps\n"
    wide = "caf\u00e9 \u2028 x\n".encode() * 3
    rows: list[dict[str, Any]] = [
        {"text": "hello", "label": "x"},
        {"text": "you\n", "label": 1, "more": [1]},
    ]
    use = ("--tokenizer", f"{{}}/{MODEL}", "--block", "16")
    labelled = (*use, "--label-key", "label")
    return Corpora(
        "text",
        {
            "t.txt": ([plain, wide], (*use, "--document", "blank-line")),
            "t.md": ([plain, wide], (*use, "--document", "file")),
            "t.txt.gz": ([gzip.compress(plain), gzip.compress(plain) * 2], use),
            "t.txt.bz2": ([bz2.compress(plain)], use),
            "t.txt.xz": ([lzma.compress(plain)], use),
            "t.jsonl": ([_lines(*rows)], labelled),
            "t.json": ([json.dumps(rows).encode()], use),
            "t.csv": ([b'text,label\nhello,x\n"a ""b"", c",y\n'], labelled),
            "t.tsv": ([b"text\tlabel\nhello\tx\nyou\ty\n"], labelled),
        },
        lambda: {MODEL: _model()},
    )


# -------------------------------------------------------------------------------------- tokenizers


def _models(folder: Path) -> Sequence[bytes]:
    return [_model()]


def _use_model(data: bytes, folder: Path) -> Any:
    path = put(folder / "in/x.txt", b"the quick fox")
    model = put(folder / "other.model", data)
    return _convert("text", path, "--tokenizer", str(model), "--block", "16")


def _damaged_model(data: bytes, rng: Random) -> bytes:
    """Changes of the first pieces, or of the settings at the end."""
    if rng.random() < 0.5:
        return head_bytes(data, rng, 300)
    return data[:-300] + any_bytes(data[-300:], rng)


def _json_models(folder: Path) -> Sequence[bytes]:
    """Byte-level BPE, as GPT-2's, of a few letters."""
    letters = {letter: 2 + i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz\u0120")}
    added = [
        {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i, name in enumerate(("</s>", "<pad>"))
    ]  # fmt: skip
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": {**letters, "th": 30, "the": 31}, "merges": ["t h", "th e"]}
    whole = {"version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": step,
             "post_processor": None, "decoder": step, "model": model}  # fmt: skip
    return [json.dumps(whole).encode()]


def _target(name: str, corpora: Corpora) -> Target:
    return Target(
        name, corpora.seeds, corpora.parse, _content(text_lines), (UserError,), protected=False
    )


TARGETS = [
    _target("manifests of recordings", _speech()),
    _target("manifests of images", _images()),
    _target("text files", _text()),
    Target("tokenizer.model", _models, _use_model, _damaged_model, (UserError,), protected=False),
]
if find_spec("tokenizers"):
    TARGETS.append(
        Target("tokenizer.json", _json_models, _use_model, json_values, (UserError,), False)
    )
