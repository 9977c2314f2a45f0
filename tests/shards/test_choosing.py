"""--only and --except with patterns, and several SOURCEs as one corpus."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_ds.data.checks import Finding
from d2v_ds.errors import UserError
from shards import samples
from shards.choosing import Chooser
from shards.cli import main
from shards.family import Input, Sample
from shards.splits import split_of_path
from tests.helpers.corpora import contents, notes, put, put_tar, quarantine, recording
from tests.shards.pictures import picture

TOKENIZER = samples.path("text") / "tokenizer.model"


def run(*words: object) -> int:
    return main([*map(str, words), "-j1"])


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert run(*words) == 2
    line = capsys.readouterr().err
    assert line.startswith("d2v-shards: ") and line.count("\n") == 1
    return line


# ----------------------------------------------------------------------------------------- patterns


@pytest.mark.parametrize(
    ("pattern", "paths", "others"),
    [
        ("train-*/**", ["train-clean/1/a.flac", "train-x/a"], ["dev/train-1", "train-clean"]),
        ("train-*", ["train-clean/1/a.flac", "train-1"], ["dev/train-1"]),
        ("./train/", ["train/a/b"], ["training/a"]),
        ("*/b?.wav", ["a/b1.wav"], ["b1.wav", "x/a/b1.wav", "a/b12.wav", "a/b1xwav"]),
        ("**/*.wav", ["a.wav", "x/y/a.wav"], ["a.flac", "a.wave"]),
        ("a/**/z", ["a/z", "a/b/c/z", "a/z/file"], ["a/bz", "b/a/z"]),
        ("[ab]-[!0-4].x", ["a-5.x", "b-x.x"], ["c-5.x", "a-3.x"]),
        ("data [1]+(x)", ["data 1+(x)/y", "data [1]+(x)/y"], ["data +(x)"]),
        ("[[]b]/*", ["[b]/c"], ["b/c"]),
        ("[a&&b^~]", ["&", "^", "~"], ["c"]),
        ("a\\b {x,y}!#, $", ["a\\b {x,y}!#, $"], ["b x"]),
        ("/abs/*.wav", ["/abs/a.wav"], ["abs/a.wav"]),
    ],
)
def test_patterns(pattern: str, paths: list[str], others: list[str]) -> None:
    chooser = Chooser([pattern], [])
    assert [path for path in [*paths, *others] if chooser.takes([path])] == paths
    chooser = Chooser([], [pattern])
    assert [path for path in [*paths, *others] if chooser.takes([path])] == others


def test_an_impossible_pattern_is_an_error() -> None:
    with pytest.raises(UserError, match=r"^--except \[z-a\]: is not a pattern \(bad "):
        Chooser([], ["[z-a]"])


def test_findings_follow_the_choice() -> None:
    findings = [
        Finding("train/a.trans.txt, line 2", "", "no metadata"),
        Finding("dev/b.flac", "", "unreadable"),
        Finding("dev/b.txt", "", "type"),
        Finding("list.jsonl, line 3", "", "row"),
        Finding("train/x, y.flac", "", "damaged"),
    ]
    inputs = (Input("train/a.flac"),), (Input("dev/c.flac"),)
    found = [Sample(item[0].path, item, {}, 1) for item in inputs]
    chooser = Chooser(["train/*"], [])
    assert list(chooser.chosen(found)) == found[:1]
    kept = [findings[i] for i in (0, 3, 4)]
    assert chooser.findings(findings) == kept, "a row that cannot be read may be of any recording"
    assert chooser.not_chosen == 2, "dev/c.flac and dev/b.flac; a .txt is no input"
    chooser = Chooser([], ["dev"])
    assert list(chooser.chosen(found)) == found[:1] and chooser.findings(findings) == kept


def test_what_matches_nothing_is_an_error() -> None:
    found = [Sample(path, (Input(path),), {}, 1) for path in ("a/1.wav", "a/2.wav", "b.wav")]
    chooser = Chooser(["a/*", "train/**"], [])
    assert len(list(chooser.chosen(found))) == 2
    with pytest.raises(UserError, match=r"^--only train/\*\*: .*It contains \(2 a/, 1 b.wav\)$"):
        chooser.findings([])
    chooser = Chooser([], ["*.aiff"])
    list(chooser.chosen(found))
    assert chooser.findings([Finding("c.aiff", "", "type")]) == []


@pytest.fixture
def librispeech(tmp_path: Path) -> Path:
    """Seven folders as on https://www.openslr.org/12, each with 2 recordings per chapter."""
    root = tmp_path / "LibriSpeech"
    folders = {"train-clean-100": 3, "train-clean-360": 2, "train-other-500": 4}
    folders |= {"dev-clean": 1, "dev-other": 1, "test-clean": 1, "test-other": 2}
    for speaker, (folder, chapters) in enumerate(folders.items()):
        for chapter in range(chapters):
            place = root / f"{folder}/{speaker}/{chapter}"
            names = [f"{speaker}-{chapter}-{i:04d}" for i in range(2)]
            for name in names:
                put(place / f"{name}.flac", recording("flac", 0.05))
            lines = "".join(f"{name} TEXT OF {name}\n" for name in names)
            put(place / f"{speaker}-{chapter}.trans.txt", lines)
    put(root / "test-other/6/0/6-0.trans.txt", "6-0-0000 HERE\n6-0-0001 HERE\n6-0-0002 LOST\n")
    for name in ("README.TXT", "SPEAKERS.TXT"):
        put(root / name, "about")
    return root


def test_librispeech_960_by_a_pattern(
    librispeech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("speech", librispeech, out, "--only", "train-*/**") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{librispeech}: layout librispeech",
        "11 inputs were not chosen (--only, --except)",  # 10 recordings, and 1 that is missing
        f"{out}: 18 samples, 0.000 hours, 1 shard",
    ]
    found = contents(out)
    assert len(found) == 18 and all(key.startswith("train-") for key in found)
    assert found["train-other-500/2/3/2-3-0001"]["json"]["text"] == "TEXT OF 2-3-0001"
    assert quarantine(out) == {} and notes(out) == {}
    assert json.loads((out / "index.json").read_bytes())["options"]["only"] == "train-*/**"
    more = ("--only", "train-clean-*", "--only", "dev-*", "--except", "train-clean-100/0/1")
    assert run("speech", librispeech, tmp_path / "more", *more) == 0
    assert "17 inputs were not chosen" in (text := capsys.readouterr().out)
    assert "more: 12 samples" in text
    line = refused(capsys, "speech", librispeech, tmp_path / "no", "--only", "train-clean-460/**")
    assert "--only train-clean-460/**: is neither a file nor a pattern that matches" in line
    assert "It contains (8 train-other-500/, 6 train-clean-100/, 4 test-other/" in line
    line = refused(capsys, "speech", librispeech, tmp_path / "no", "--except", "**")
    assert "--only and --except leave none of 29 inputs" in line


def test_librispeech_960_by_three_sources(
    librispeech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The keys, shards and contents are those of the pattern."""
    parts = [librispeech / f"train-{name}" for name in ("clean-100", "clean-360", "other-500")]
    assert run("speech", *parts, tmp_path / "three") == 0
    assert capsys.readouterr().out.splitlines() == [
        *(f"{part}: layout librispeech" for part in parts),
        f"{tmp_path / 'three'}: 18 samples, 0.000 hours, 1 shard",
    ]
    assert run("speech", librispeech, tmp_path / "one", "--only", "train-*/**") == 0
    tars = [tmp_path / name / "speech-000000.tar" for name in ("three", "one")]
    assert tars[0].read_bytes() == tars[1].read_bytes()
    assert run("verify", tmp_path / "three") == 0


# ---------------------------------------------------------------------------------- several sources


def test_sources_of_different_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        put(tmp_path / f"x/plain/{i}.wav", recording(seed=i))
        put(tmp_path / f"x/listed/clips/{i}.wav", recording(seed=i + 3))
    put(tmp_path / "x/plain/broken.wav", b"no sound")
    rows = [{"path": f"clips/{i}.wav", "speaker": "s"} for i in range(3)]
    rows += [{"path": "clips/missing.wav", "speaker": "s"}, {}]
    listed = put(tmp_path / "x/listed/a.jsonl", "\n".join(map(json.dumps, rows)))
    put_tar(tmp_path / "tars/a.tar", [("k.wav", recording(seed=9)), ("k.json", b'{"n": 1}')])
    sources = (tmp_path / "x/plain", listed, tmp_path / "tars")
    out = tmp_path / "out"
    assert run("speech", *sources, out, "--max-bad", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        f"{source}: layout {name}"
        for source, name in zip(sources, ("folder", "jsonl", "webdataset"), strict=True)
    ]
    assert lines[3] == f"{out}: 7 samples, 0.001 hours, 1 shard"
    found = contents(out)
    assert sorted(found) == [
        *("tars/k", "x/listed/a/clips/0", "x/listed/a/clips/1", "x/listed/a/clips/2"),
        *("x/plain/0", "x/plain/1", "x/plain/2"),
    ]
    assert found["x/listed/a/clips/1"]["json"]["paths"] == ["x/listed/a.jsonl/clips/1.wav"]
    assert found["tars/k"]["json"]["n"] == 1
    assert quarantine(out).keys() == {
        "x/plain/broken.wav",
        "x/listed/a.jsonl/clips/missing.wav",
        "x/listed/a.jsonl, line 5",
    }
    assert run("verify", out) == 0
    more = (tmp_path / "tars/a.tar", listed)
    assert run("speech", *more, tmp_path / "tar", "--only", "tars/a.tar") == 0
    [(key, members)] = contents(tmp_path / "tar").items()
    assert key == "tars/a/k" and members["json"]["paths"][0].startswith("tars/a.tar, bytes ")
    assert run("speech", *sources, tmp_path / "p", "--only", "x/plain/*", "--max-bad", "1") == 0
    assert sorted(contents(tmp_path / "p")) == ["x/plain/0", "x/plain/1", "x/plain/2"]


def test_joined_samples_may_come_from_several_sources(tmp_path: Path) -> None:
    for name in "ab":
        put(tmp_path / f"{name}/0.wav", recording())
        put(tmp_path / f"{name}/l.tsv", "path\tspeaker\n0.wav\tsame\n")
    words = ("--join", "speaker", "--join-seconds", "2")
    assert run("speech", tmp_path / "a/l.tsv", tmp_path / "b/l.tsv", tmp_path / "out", *words) == 0
    [sample] = contents(tmp_path / "out").values()
    assert sorted(sample["json"]["paths"]) == ["a/l.tsv/0.wav", "b/l.tsv/0.wav"]
    assert sample["json"]["duration"] == 0.6


def test_sources_that_overlap_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = put(tmp_path / "in/a.wav", recording())
    (tmp_path / "link").symlink_to(tmp_path / "in")
    out = tmp_path / "out"
    assert "is given twice" in refused(capsys, "speech", tmp_path / "in", tmp_path / "link", out)
    line = refused(capsys, "speech", file.parent, tmp_path, out)
    assert f"in: lies within {tmp_path}; its inputs would be used twice" in line
    line = refused(capsys, "speech", file, tmp_path / "link", tmp_path / "in")
    assert "both SOURCE and OUT" in line


@pytest.mark.parametrize("second", ["b.tsv", "clips", "b.jsonl"])
def test_an_input_of_two_sources_is_used_once(second: str, tmp_path: Path) -> None:
    for i in range(4):
        put(tmp_path / f"clips/{i}.wav", recording(seed=i))
    put(tmp_path / "a.tsv", "path\nclips/0.wav\nclips/1.wav\n")
    put(tmp_path / "b.tsv", "path\nclips/../clips/1.wav\nclips/2.wav\n")
    put(tmp_path / "b.jsonl", '{"path": "clips/1.wav"}\n{"path": "clips/1.wav", "offset": 0.1}\n')
    out = tmp_path / "out"
    assert run("speech", tmp_path / "a.tsv", tmp_path / second, out, "--max-bad", "50%") == 0
    left_out = quarantine(out)
    used = {members["flac"] for members in contents(out).values()}
    assert set(left_out.values()) == {"an earlier SOURCE has the same input"}
    assert len(used) == len(contents(out)) == {"b.tsv": 3, "clips": 4, "b.jsonl": 3}[second]
    assert all(name.startswith(f"{second}/clips/") or second == "clips" for name in left_out)


def test_images_of_several_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source, name in (("a", "cat"), ("a", "dog"), ("b", "cat"), ("b", "eel")):
        put(tmp_path / f"{source}/{name}/0.png", picture())
    assert run("images", tmp_path / "a", tmp_path / "b", tmp_path / "out", "--except", "b/eel") == 0
    assert "1 input was not chosen" in capsys.readouterr().out
    found = {key: row["json"] for key, row in contents(tmp_path / "out").items()}
    assert {key: (row["label"], row["index"]) for key, row in found.items()} == {
        "a/cat/0": ("cat", 0),
        "a/dog/0": ("dog", 1),
        "b/cat/0": ("cat", 0),
    }
    assert json.loads((tmp_path / "out/index.json").read_bytes())["classes"] == [
        "cat",
        "dog",
        "eel",
    ]


def test_text_and_a_tokenizer_of_several_sources(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "a/x.txt", "one\ntwo\n")
    put(tmp_path / "a/skip.txt", "none\n")
    put(tmp_path / "b.jsonl", '{"text": "three", "n": 1}\n')
    sources, words = (tmp_path / "a", tmp_path / "b.jsonl"), ("--tokenizer", TOKENIZER)
    assert (
        run("text", *sources, tmp_path / "out", *words, "--only", "**/x.txt", "--only", "b*") == 0
    )
    assert json.loads((tmp_path / "out/index.json").read_bytes())["inputs"] == 3
    words = (*words, "--label-key", "n")
    assert run("text", tmp_path / "b.jsonl", tmp_path / "labelled", *words) == 0
    lines = (samples.path("text") / "unseen.jsonl").read_text()
    put(tmp_path / "b.jsonl", lines)
    model = tmp_path / "t.model"
    capsys.readouterr()
    command = ("--vocab-size", 400, "--model", "bpe", "--sentences", 50, "--except", "a/skip.txt")
    assert main(["tokenizer", *map(str, (*sources, model, *command))]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{model}: bpe, 400 ids",
        "1 input was not chosen (--only, --except)",
    ]


# ----------------------------------------------------------------------------------- random corpora

PLACES = ("a", "a/b", "train", "dev x", "a,b")
FILES = ("1.wav", "2.FLAC", "3.wav", "bad.wav", "4.txt", ".5.wav")


@given(
    st.sets(st.tuples(st.sampled_from(PLACES), st.sampled_from(FILES)), max_size=12),
    st.lists(st.sampled_from(("a/**", "*/*.wav", "**/1.wav", "train", "dev*/2.*")), max_size=2),
    st.lists(st.sampled_from(("a/b", "**/3.wav", "**/bad.wav")), max_size=1),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_every_file_is_accounted_for(
    files: set[tuple[str, str]], only: list[str], leave_out: list[str]
) -> None:
    """By name, whatever is chosen."""
    only, leave_out = list(dict.fromkeys(only)), leave_out[:1]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for place, name in {*files, *((place, "1.wav") for place in PLACES)}:
            kind = name.rpartition(".")[2].lower()
            sound = kind != "txt" and "bad" not in name
            put(root / "in" / place / name, recording(kind, 0.05) if sound else b"no sound")
        words = [part for pattern in only for part in ("--only", pattern)]
        words += [part for pattern in leave_out for part in ("--except", pattern)]
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
            code = run("speech", root / "in", root / "out", "--max-bad", "1", *words)
        if code:
            line = said.getvalue()
            reasons = ("is neither a file nor a pattern", "leave none", "none of the inputs")
            assert any(reason in line for reason in reasons), line
            return
        chosen = Chooser(only, leave_out)
        paths = [path.relative_to(root / "in") for path in (root / "in").rglob("*")]
        named = {str(path) for path in paths if (root / "in" / path).is_file()}
        used = {path for row in contents(root / "out").values() for path in row["json"]["paths"]}
        lists = quarantine(root / "out").keys() | notes(root / "out").keys()
        assert not used & lists and used | lists == {n for n in named if chosen.takes([n])}
        inputs = {n for n in named if n[-3:].lower() in ("wav", "lac") and "/." not in n}
        number = len(inputs - used - lists)
        told = re.findall(r"^(\d+) inputs? (?:was|were) not chosen", said.getvalue(), re.MULTILINE)
        assert told == [str(number)] * (number > 0)


def test_splits_that_names_state_are_told_for_every_family(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LibriSpeech as a whole holds its development and test sets."""
    for folder in ("train-clean-100", "dev-clean", "test-other"):
        put(tmp_path / f"Libri/{folder}/1/2/1-2-0.wav", recording())
    out = tmp_path / "out"
    assert run("speech", tmp_path / "Libri", out) == 0
    remark = (
        "the inputs belong to several splits (1 test, 1 train, 1 validation), which are not kept "
        "apart; to convert only one, choose its files, for example with --only '*train*/**'"
    )
    assert remark in capsys.readouterr().out.splitlines()
    assert json.loads((out / "index.json").read_bytes())["remarks"] == [remark]
    assert main(["stats", str(out)]) == 0
    assert remark in capsys.readouterr().out
    words = "speech", tmp_path / "Libri", tmp_path / "one"
    assert run(*words, "--dry-run") == 0
    assert remark in capsys.readouterr().out
    assert run(*words, "--only", "*train*/**") == 0
    assert "several splits" not in capsys.readouterr().out
    for name in ("wiki.train.txt", "wiki.valid.txt"):
        put(tmp_path / "wiki" / name, "One line of text.\n" * 400)
    assert run("text", tmp_path / "wiki", tmp_path / "text", "--tokenizer", TOKENIZER) == 0
    assert "several splits (1 train, 1 validation)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("default/partial-train/0000.parquet", "train"),
        ("train/test.parquet", "test"),  # the name before the folder
        ("val2017/cat/0.jpg", "validation"),
        ("LibriSpeech/dev-clean/1/2/3.flac", "validation"),
        ("Training_Set/0.jpg", "train"),
        ("trainer/contest/0.jpg", ""),
        ("evaluation/0.wav", "test"),
        ("a/b", ""),
    ],
)
def test_splits_that_paths_state(path: str, split: str) -> None:
    assert split_of_path(path) == split


@pytest.mark.parametrize("family", ["speech", "images", "text"])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_is_used_if_the_file_it_leads_to_is_not_chosen(
    family: str, link: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    """Subsets are often folders of links."""
    name = {"speech": "0.wav", "images": "0.png", "text": "0.txt"}[family]
    content = {"speech": recording(), "images": picture(), "text": "some text\n"}[family]
    put(tmp_path / "in/all" / name, content)
    (tmp_path / "in/subset").mkdir()
    link(tmp_path / "in/all" / name, tmp_path / "in/subset" / name)
    more = ["--tokenizer", TOKENIZER] if family == "text" else []
    assert run(family, tmp_path / "in", tmp_path / "out", *more) == 0
    assert notes(tmp_path / "out") == {f"subset/{name}": "linked twice"}
    assert run(family, tmp_path / "in", tmp_path / "part", *more, "--only", "subset/**") == 0
    assert json.loads((tmp_path / "part/index.json").read_bytes())["inputs"] == 1
    sources = [tmp_path / "in" / folder for folder in ("subset", "all")]
    assert run(family, *sources, tmp_path / "both", *more) == 0
    assert notes(tmp_path / "both") == {f"all/{name}": "linked twice"}
