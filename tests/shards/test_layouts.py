"""The contract of corpus layouts, for all layouts of all families and for layouts outside the
package."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from d2v_ds import exit_codes
from d2v_ds.data.checks import Finding
from d2v_ds.errors import UserError
from shards import images, samples, speech, text
from shards.cli import main
from shards.family import Input, Sample
from shards.images.layout import ImageOptions
from shards.layout import AUTO, Layout, detect, find
from shards.speech.folder import Folder
from shards.speech.layout import SpeechLayout
from shards.text.layout import TextFormat, TextLayout, TextOptions
from tests.helpers.corpora import contents, put, quarantine, recording
from tests.helpers.runs import Run
from tests.shards.layout_corpora import CORPORA
from tests.shards.outside import Kaldi, Markdown, Records

AnyLayout = type[Layout[Any, Any]]
FAMILIES: dict[str, ModuleType] = {"speech": speech, "images": images, "text": text}
OPTIONS = {"speech": None, "images": ImageOptions(), "text": TextOptions()}
MODEL = samples.path("text") / "tokenizer.model"
WORDS: dict[str, list[object]] = {"speech": [], "images": [], "text": ["--tokenizer", MODEL]}
# Layouts that also recognise corpora of more specific ones, which precede them in the table.
GENERAL = {"folder", "manifest"}


corpora = pytest.mark.parametrize(
    ("family", "name", "build"), CORPORA, ids=[f"{f}-{b.__name__}" for f, _, b in CORPORA]
)
LAYOUTS = [(family, layout) for family in FAMILIES for layout in FAMILIES[family].LAYOUTS]
layouts = pytest.mark.parametrize(
    ("family", "layout"), LAYOUTS, ids=[f"{f}-{layout.name}" for f, layout in LAYOUTS]
)


def convert(family: str, source: Path, out: Path, *more: object) -> int:
    words = [source, out, *WORDS[family], "-j1", *more]
    return main([family, *map(str, words)])


def hashes(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


# ---------------------------------------------------------------------------- the table of a family


def test_every_layout_has_a_corpus() -> None:
    assert {(family, layout.name) for family, layout in LAYOUTS} == {(f, n) for f, n, _ in CORPORA}


@corpora
def test_each_recognises_its_own_corpus(
    family: str, name: str, build: Callable[[Path], Path], tmp_path: Path
) -> None:
    source = build(tmp_path)
    table: list[AnyLayout] = FAMILIES[family].LAYOUTS
    found = [layout.name for layout in table if layout.recognises(source)]
    assert found[0] == name and GENERAL.issuperset(found[1:])
    assert find(table, AUTO, source).name == name


@layouts
def test_each_is_documented(
    family: str, layout: AnyLayout, capsys: pytest.CaptureFixture[str]
) -> None:
    assert 10 < len(layout.help) < 90
    assert "\n" not in layout.help and not layout.help.endswith(".")
    names = [other.name for other in FAMILIES[family].LAYOUTS]
    assert names.count(layout.name) == 1
    with pytest.raises(SystemExit) as stopped:
        main([family, "--help"])
    assert stopped.value.code == 0
    rows = capsys.readouterr().out.split("layouts:\n")[1].splitlines()
    assert rows[names.index(layout.name)].split(maxsplit=1) == [layout.name, layout.help]


@corpora
def test_each_converts_its_corpus(
    family: str,
    name: str,
    build: Callable[[Path], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The set is the same for the detected layout, which is reported, and the named one."""
    source = build(tmp_path / "in")
    assert convert(family, source, tmp_path / "auto") == 0
    assert capsys.readouterr().out.startswith(f"{source}: layout {name}\n")
    assert convert(family, source, tmp_path / "named", "--layout", name) == 0
    assert not capsys.readouterr().out.startswith(f"{source}: layout")
    assert hashes(tmp_path / "auto") == hashes(tmp_path / "named")
    assert quarantine(tmp_path / "auto") == {}
    assert main(["verify", str(tmp_path / "auto"), "-j1"]) == exit_codes.FINISHED


@corpora
def test_an_opened_layout_holds_settings_only(
    family: str, name: str, build: Callable[[Path], Path], tmp_path: Path
) -> None:
    source = build(tmp_path)
    layout = find(FAMILIES[family].LAYOUTS, name, source).open(source, OPTIONS[family])
    sent = pickle.dumps(layout)
    received = pickle.loads(sent)
    assert received == layout and len(sent) < 2000
    findings: list[Finding] = []
    found = list(layout.samples(findings))
    assert found and not findings and found == list(received.samples([]))
    items = [item for sample in found for item in received.read(sample, findings)]
    assert items and not findings
    assert {type(item.content) for item in items} == {str if family == "text" else bytes}
    assert all((layout.root / one.path).is_file() for sample in found for one in sample.inputs)


@layouts
def test_the_wrong_kind_of_source_is_refused(
    family: str, layout: AnyLayout, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = put(tmp_path / "in/a.zip", b"no corpus")
    refused = {"file": [tmp_path / "in"], "folder": [file], "file or folder": []}[layout.takes]
    for source in (*refused, tmp_path / "missing"):
        assert convert(family, source, tmp_path / "out", "--layout", layout.name) == 2
        line = capsys.readouterr().err
        assert str(source) in line and line.count("\n") == 1
        assert source in refused or "no such file or folder" in line
        assert source not in refused or f"--layout {layout.name} takes a {layout.takes}" in line


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_layout_is_refused_with_the_names(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = put(tmp_path / "a.zip", b"no corpus")
    assert detect(FAMILIES[family].LAYOUTS, source) is None
    assert convert(family, source, tmp_path / "out") == exit_codes.BAD_INPUT
    names = ", ".join(layout.name for layout in FAMILIES[family].LAYOUTS)
    assert f"its layout is not recognised; set --layout ({names})" in capsys.readouterr().err


# ------------------------------------------------------------------------------- the class contract

GOOD = {
    "name": "x",
    "help": "something",
    "extensions": (".x",),
    "recognises": classmethod(lambda cls, source: False),
    "samples": lambda self, findings: iter(()),
    "read": lambda self, sample, findings: iter(()),
    "documents": lambda self, part, findings: iter(()),
}


@pytest.mark.parametrize(
    ("base", "needed"),
    [
        (SpeechLayout, ("name", "help", "recognises", "samples")),
        (images.ImageLayout, ("name", "help", "recognises", "samples")),
        (TextLayout, ("name", "help", "recognises", "samples", "read")),
        (TextFormat, ("name", "help", "extensions", "documents")),
    ],
    ids=["speech", "images", "text", "text format"],
)
def test_a_class_that_lacks_something_fails_when_it_is_defined(
    base: Any, needed: tuple[str, ...]
) -> None:
    base = getattr(base, "__origin__", base)
    type("Whole", (base,), {name: GOOD[name] for name in needed})
    for missing in needed:
        parts = {name: GOOD[name] for name in needed if name != missing}
        with pytest.raises(TypeError, match=f"^layout Broken lacks {missing}$"):
            type("Broken", (base,), parts)


def test_the_default_reads_files_and_byte_ranges(tmp_path: Path) -> None:
    put(tmp_path / "a.wav", b"0123456789")
    layout = Folder.open(tmp_path, None)
    inputs = (
        Input("a.wav"),
        Input("a.wav", (2, 3)),
        Input("a.wav", None, (0.5, 1.0)),
        Input("a.wav", (8, 5)),
        Input("gone.wav"),
    )
    findings: list[Finding] = []
    found = list(layout.read(Sample("key", inputs, {"n": 1}, 10), findings))
    assert [item.content for item in found] == [b"0123456789", b"234", b"0123456789"]
    assert [item.part for item in found] == [None, None, (0.5, 1.0)]
    assert {(item.key, item.columns["n"]) for item in found} == {("key", 1)}
    assert findings == [
        ("a.wav, bytes 8 to 13", "ends 3 bytes early", "truncated"),
        ("gone.wav", "No such file or directory", "unreadable"),
    ]


# ------------------------------------------------------------------------- the layout of text files


def test_a_text_format_of_a_folder_takes_only_its_files(tmp_path: Path) -> None:
    put(tmp_path / "in/a.txt", "plain\n")
    put(tmp_path / "in/b.jsonl", '{"text": "json"}\n')
    for name, expected in (("txt", "plain"), ("jsonl", "json")):
        layout = find(text.LAYOUTS, name, tmp_path / "in").open(tmp_path / "in", TextOptions())
        found = [item for sample in layout.samples([]) for item in layout.read(sample, [])]
        assert [item.content for item in found] == [expected]
    layout = find(text.LAYOUTS, "parquet", tmp_path / "in").open(tmp_path / "in", TextOptions())
    with pytest.raises(UserError, match=r"contains no \.parquet file \(found: 1 \.txt, 1 \.jsonl"):
        list(layout.samples([]))


def test_another_text_layout_of_the_same_file_is_another_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = put(tmp_path / "a.jsonl", '{"text": "hello"}\n')
    assert convert("text", source, tmp_path / "out") == 0
    assert convert("text", source, tmp_path / "out", "--layout", "jsonl") == 0, "the detected one"
    assert convert("text", source, tmp_path / "out", "--layout", "txt") == 2
    assert "--layout was None, now txt" in capsys.readouterr().err
    assert convert("text", put(tmp_path / "a.log", "x\n"), tmp_path / "log", "--layout", "txt") == 0


# -------------------------------------------------------------------------- layouts from outside


EXTRA = (("speech", Kaldi), ("images", Records), ("text", Markdown))


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Adds one layout to each table."""
    for family, layout in EXTRA:
        table = FAMILIES[family].LAYOUTS
        monkeypatch.setattr(FAMILIES[family], "LAYOUTS", [layout, *table])
    yield


def check(out: Path, modality: str, capsys: pytest.CaptureFixture[str]) -> None:
    """verify and stats work."""
    capsys.readouterr()
    assert main(["verify", str(out), "-j1"]) == 0
    assert main(["stats", str(out)]) == 0
    assert ["modality", modality] in [row.split() for row in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(("family", "layout"), EXTRA)
def test_a_layout_from_outside_is_in_the_help(
    outside: None, family: str, layout: AnyLayout, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([family, "--help"])
    assert f"{layout.name}  " in (out := capsys.readouterr().out) and layout.help in out


def test_a_speech_layout_from_outside(
    outside: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(4):
        put(tmp_path / f"in/{i}.wav", recording(seed=i))
    lines = [f"s{i % 2}-{i} {i}.wav\n" for i in range(4)]
    put(tmp_path / "in/wav.scp", "".join(lines) + "broken\n")
    more = ("--max-bad", "50%", "--shard-size", "10KB", "-j2")
    assert convert("speech", tmp_path / "in", tmp_path / "out", *more) == 0
    assert f"{tmp_path / 'in'}: layout kaldi" in capsys.readouterr().out
    found = contents(tmp_path / "out")
    assert {key: row["json"]["speaker"] for key, row in found.items()} == {
        f"s{i % 2}-{i}": f"s{i % 2}" for i in range(4)
    }
    assert quarantine(tmp_path / "out") == {"wav.scp, line 5": "is not KEY PATH"}
    check(tmp_path / "out", "speech", capsys)
    words = ["batch.size=2", "batch.micro_batches=1", "modality.speech.min_seconds=0.1"]
    words += [f"data.shards={tmp_path / 'out'}", f"run.dir={tmp_path / 'run'}", "run.steps=2"]
    done = Run(tmp_path / "run", "speech_tiny", *words, "optim.warmup_steps=1").train(nproc=1)
    assert done.returncode == 0 and "finished at step 2" in done.stdout, done.stderr
    more = ("--max-bad", "50%", "--join", "speaker", "--join-seconds", "0.6", "--layout", "kaldi")
    assert convert("speech", tmp_path / "in", tmp_path / "joined", *more) == 0
    assert len(contents(tmp_path / "joined")) == 2


def test_an_image_layout_from_outside(
    outside: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (25, Records.size), dtype=np.uint8)
    pixels[:, 0] %= 3
    source = put(tmp_path / "a.records", pixels.tobytes())
    more = ("--shard-size", "1KB", "-j2")
    assert convert("images", source, tmp_path / "out", *more) == 0
    assert f"{source}: layout records" in capsys.readouterr().out
    found = contents(tmp_path / "out")
    assert len(found) == 25 and found["records-2@0004"]["json"]["label"] == str(pixels[24, 0])
    about = json.loads((tmp_path / "out/index.json").read_bytes())
    assert about["inputs"] == 25 and about["options"]["layout"] == "records"
    check(tmp_path / "out", "vision", capsys)


def test_a_text_format_from_outside(
    outside: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a single file, and in a folder with formats of the package."""
    put(tmp_path / "in/a.md", "# one\nfirst\n# two\nsecond\n")
    put(tmp_path / "in/b.txt", "third\n")
    put(tmp_path / "in/c.jsonl", '{"text": "fourth"}\n')
    for source, number in ((tmp_path / "in/a.md", 2), (tmp_path / "in", 4)):
        out = tmp_path / f"out{number}"
        assert convert("text", source, out, "--shard-size", "1", "-j2") == 0
        about = json.loads((out / "index.json").read_bytes())
        assert about["inputs"] == number and about["quarantined"] == 0
        check(out, "text", capsys)
    assert convert("text", tmp_path / "in", tmp_path / "md", "--layout", "markdown") == 0
    assert json.loads((tmp_path / "md/index.json").read_bytes())["inputs"] == 2
