"""Rows of manifests (JSON lines, JSON arrays, TSV): paths, parts, channels, stated durations."""

from __future__ import annotations

import io
import json
import random
import tracemalloc
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import soundfile

from d2v_ds.data import audio
from d2v_ds.data.checks import Finding
from d2v_ds.errors import UserError
from shards import json_array, samples
from shards.cli import main
from shards.family import Input, Sample
from shards.speech import jsonl
from shards.speech.jsonl import JsonLines
from shards.speech.manifest import Manifest
from tests.helpers.corpora import contents, found, notes, put, recording
from tests.shards.pictures import picture

Row = dict[str, Any]


def read(source: Path) -> tuple[list[Sample], list[Finding]]:
    findings: list[Finding] = []
    layout = (Manifest if source.suffix == ".tsv" else JsonLines).open(source, None)
    return list(layout.samples(findings)), findings


def as_jsonl(folder: Path, rows: list[Row]) -> Path:
    return put(folder / "m.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def as_array(folder: Path, rows: list[Row]) -> Path:
    return put(folder / "m.json", "\ufeff" + json.dumps(rows, indent=1, ensure_ascii=False))


def as_tsv(folder: Path, rows: list[Row]) -> Path:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, *([str(row.get(name) or "") for name in columns] for row in rows)]
    return put(folder / "m.tsv", "".join("\t".join(line) + "\n" for line in lines))


forms = pytest.mark.parametrize("write", [as_jsonl, as_array, as_tsv])


@forms
def test_parts_channels_and_durations(write: Any, tmp_path: Path) -> None:
    put(tmp_path / "a.wav", recording(seconds=4, channels=2))
    rows: list[tuple[Row, Input]] = [
        ({"path": "a.wav", "duration": 3.5}, Input("a.wav", seconds=3.5)),
        ({"path": "a.wav", "offset": "0.5", "duration": "1.0"}, Input("a.wav", None, (0.5, 1.5))),
        ({"path": "a.wav", "start": 1, "end": 2.5}, Input("a.wav", None, (1.0, 2.5))),
        ({"path": "a.wav", "end": "0.25"}, Input("a.wav", None, (0.0, 0.25))),
        ({"path": "a.wav", "offset": 3.0, "duration": None}, Input("a.wav", None, (3.0, 4.0))),
        ({"path": "a.wav", "channel": 1}, Input("a.wav", channel=1)),
        ({"path": "b.wav", "channel": "left"}, Input("b.wav", channel=0)),
        ({"path": "c.wav", "channel": "Radio Four"}, Input("c.wav")),
        ({"path": "d.wav", "channel_selector": "1"}, Input("d.wav", channel=1)),
    ]
    samples, findings = read(write(tmp_path, [row for row, _ in rows]))
    assert [sample.inputs for sample in samples] == [(item,) for _, item in rows]
    assert not findings and len({sample.key for sample in samples}) == len(rows)
    assert samples[1].key == "a-00000500-00001500" and samples[5].key == "a-1"
    size = (tmp_path / "a.wav").stat().st_size
    assert [s.size for s in samples[:6]] == [
        size,
        *(round(size * n / 16) for n in (4, 6, 1, 4)),
        size,
    ]
    assert samples[7].columns["channel"] == "Radio Four"


def test_offset_0_without_a_duration_is_the_whole_file(tmp_path: Path) -> None:
    rows = [{"audio_filepath": "a.wav", "offset": 0.0, "duration": None}]
    samples, findings = read(as_jsonl(tmp_path, rows))
    assert samples[0].inputs == (Input("a.wav"),) and not findings


@forms
def test_rows_that_describe_no_sample(write: Any, tmp_path: Path) -> None:
    put(tmp_path / "a.wav", recording())
    rows: list[Row] = [
        {"path": "a.wav", "start": 2.0, "end": 1.0},
        {"path": "a.wav", "start": "two", "end": 1.0},
        {"path": "missing.wav", "start": 2.0},
        {"path": "a.wav", "channel": -1.5},
        {"path": "", "start": "", "channel": 1.0},
        {"path": "a.wav"},
        {"path": "a.wav"},
        {"path": "x/tarred.wav", "shard_id": 3},
    ]
    samples, findings = read(write(tmp_path, rows))
    assert samples[0].inputs == (Input("a.wav"),)
    reasons = [(one.kind, one.reason) for one in findings]
    assert reasons[:3] == [
        ("row", "its part ends at 1 s, before it starts at 2 s"),
        ("row", "offset, duration, start, end must be in seconds, 0 or more; found 'two'"),
        ("row", "has a start, but neither a duration nor an end"),
    ]
    assert ("duplicate", "lists a.wav again") in reasons
    assert any("its path is not a path but ''" in reason for _, reason in reasons)


SAME = ["a.wav", "./a.wav", "x/../a.wav", ".//a.wav", "{folder}/a.wav", "{folder}/x/../a.wav"]


@forms
def test_a_file_spelled_differently_is_the_same(write: Any, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    put(folder / "a.wav", recording(seconds=1))
    paths = [path.format(folder=folder) for path in SAME]
    for first in (0, 1, 4):
        order = [*paths[first:], *paths[:first]]
        samples, findings = read(write(folder, [{"path": path} for path in order]))
        assert [sample.inputs[0].path for sample in samples] == order[:1]
        assert [one.kind for one in findings] == ["duplicate"] * 5
        parts = [{"path": path, "start": 0.0, "end": 0.5} for path in order]
        assert len(read(write(folder, parts))[0]) == 1


def test_keys_that_are_named_twice(tmp_path: Path) -> None:
    rows = [
        '{"path": "a.wav", "text": "one", "text": "two"}',
        '{"path": "a.wav", "more": {"x": 1, "x": 2}}',
        '{"path": "b.wav", "path": "c.wav"}',
    ]
    for name, text in (("m.jsonl", "\n".join(rows)), ("m.json", f"[{', '.join(rows)}]")):
        samples, findings = read(put(tmp_path / name, text))
        assert [sample.inputs[0].path for sample in samples] == ["a.wav"]
        assert samples[0].columns == {"more": {"x": 2}}, "only keys of the row itself count"
        assert [(one.kind, one.reason) for one in findings] == [
            ("row", "names 'text' twice"),
            ("row", "names 'path' twice"),
        ]


@pytest.mark.parametrize("form", ["lines", "array"])
@pytest.mark.parametrize("family", ["speech", "images", "text"])
def test_every_family_leaves_out_rows_that_name_a_key_twice(
    family: str, form: str, tmp_path: Path
) -> None:
    """Python would keep the last value. A key of an object within the row may repeat."""
    put(tmp_path / "a", picture() if family == "images" else recording())
    row = '{"path": "a", "text": "one text", "label": "x", "more": {"y": 1, "y": 2}}'
    rows = [row, row.replace("label", "text")]
    if family == "text":  # only the keys that are read matter
        rows.append(row.replace("label", "path"))
    content = "\n".join(rows) if form == "lines" else f"[{', '.join(rows)}]"
    source = put(tmp_path / ("m.jsonl" if form == "lines" else "m.json"), content)
    more = (
        [] if family != "text" else ["--tokenizer", str(samples.path("text") / "tokenizer.model")]
    )
    out = tmp_path / "out"
    assert main([family, str(source), str(out), "--max-bad", "70%", "-j1", *more]) == 0
    assert list(found(out, "quarantine.jsonl").values()) == [("names 'text' twice", "row")]
    about = json.loads((out / "index.json").read_text())
    assert about["inputs"] == len(rows)


def test_a_manifest_of_images_with_only_such_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "m.jsonl", '{"path": "a", "path": "b"}')
    assert main(["images", str(tmp_path / "m.jsonl"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "lists no images that can be used; m.jsonl, line 1 names 'path' twice" in said


def test_a_tarred_manifest_says_so(tmp_path: Path) -> None:
    rows = [{"audio_filepath": "x.wav", "duration": 1.0, "shard_id": 3}]
    _, [one] = read(as_jsonl(tmp_path, rows))
    assert one.kind == "row" and "convert the tars instead, with --layout webdataset" in one.reason


def test_other_names_of_the_path(tmp_path: Path) -> None:
    rows = [
        {"audio": "a.wav", "file_name": "x"},
        {"file_name": "b.wav"},
        {"path": "c", "audio": "d"},
    ]
    samples, findings = read(as_jsonl(tmp_path, rows))
    assert [sample.inputs[0].path for sample in samples] == ["a.wav", "b.wav", "c"]
    assert samples[0].columns == {"file_name": "x"} and not findings


# ---------------------------------------------------------------------------------------- the files


def test_an_array_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_array, "CHUNK", 7)
    rows = [{"path": f"{i}.wav", "text": "ä\u2028] }, {" * (i % 3)} for i in range(30)]
    for text in (json.dumps(rows), json.dumps(rows, indent=2, ensure_ascii=False) + "\n"):
        samples, findings = read(put(tmp_path / "m.json", text))
        assert [s.inputs[0].path for s in samples] == [row["path"] for row in rows]
        assert [s.columns["text"] for s in samples] == [row["text"] for row in rows]
        assert not findings


def test_a_long_array_takes_little_memory(tmp_path: Path) -> None:
    row = json.dumps({"path": "a.wav", "text": "x" * 300, "n": 0})
    source = put(tmp_path / "m.json", "[" + ",\n".join([row] * 40_000) + "]")
    tracemalloc.start()
    with source.open("rb") as file:
        assert sum(1 for _ in jsonl.elements(file)) == 40_000
    assert tracemalloc.get_traced_memory()[1] < 8_000_000 < source.stat().st_size
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"path": "a.wav"}, {"path": ', "item 2: is not JSON"),
        ('[{"path": "a.wav"}', "item 2: ends before the end of its array"),
        ('[{"path": "a.wav"}, oops]', "item 2: is not JSON"),
        (b'[{"path": "\xff.wav"}]', "is not JSON in UTF-8"),
        ("[]", "is empty"),
        ("", "is empty"),
    ],
)
def test_damaged_arrays(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read(put(tmp_path / "m.json", text))


def test_elements_that_are_no_objects(tmp_path: Path) -> None:
    samples, findings = read(put(tmp_path / "m.json", '[1, {"path": "a.wav"}, ["b.wav"], null]'))
    assert len(samples) == 1
    assert [one.name for one in findings] == [f"m.json, item {i}" for i in (1, 3, 4)]


def test_a_long_line_takes_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "LONGEST", 1000)
    lines = ['{"path": "a.wav"}', json.dumps({"path": "b" * 5000}), '{"path": "c.wav"}']
    samples, [one] = read(put(tmp_path / "m.jsonl", "\n".join(lines)))
    assert [sample.inputs[0].path for sample in samples] == ["a.wav", "c.wav"]
    assert one == ("m.jsonl, line 2", "is longer than 1,000 bytes", "size")


# ------------------------------------------------------------------------------------- conversion


def test_segments_of_a_long_recording(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The segments of a recording count for their share and lie in one shard, by start."""
    whole = {name: recording(seconds=20, seed=i) for i, name in enumerate("abcdef")}
    rows: list[Row] = []
    for name, data in whole.items():
        put(tmp_path / f"{name}.wav", data)
        rows += [{"path": f"{name}.wav", "offset": i, "duration": 1.0} for i in range(19)]
    random.Random(0).shuffle(rows)
    source = as_jsonl(tmp_path, rows)
    out = tmp_path / "out"
    words = ["speech", str(source), str(out), "--shard-size", "1MB", "-j1"]
    assert main([*words, "--dry-run"]) == 0
    assert "114 inputs, 3.65 MB -> 4 shards" in capsys.readouterr().out
    assert main(words) == 0
    found = contents(out)
    runs = [list(run) for _, run in groupby(found, lambda key: key[0])]
    assert len(found) == 114 and len(runs) == 6, "each recording is read once"
    assert all(run == sorted(run) for run in runs), "from its start to its end"
    for key, members in list(found.items())[:5]:
        name, start, _ = key.split("-")
        x, _ = soundfile.read(io.BytesIO(whole[name]), dtype="int16")
        at = int(start) * 16
        assert (audio.to_int16(audio.decode(members["flac"])) == x[at : at + 16_000]).all()


def test_both_sides_of_a_call(tmp_path: Path) -> None:
    put(tmp_path / "call.wav", recording(channels=2, seconds=1))
    rows = [{"path": "call.wav", "channel": i, "speaker": "AB"[i]} for i in (0, 1)]
    samples, _ = read(as_jsonl(tmp_path, rows))
    assert [str(sample.inputs[0]) for sample in samples] == [
        f"call.wav, channel {i}" for i in (0, 1)
    ]


def test_transcripts_with_odd_line_ends(tmp_path: Path) -> None:
    for i in range(4):
        put(tmp_path / f"in/1-2-{i:04d}.flac", recording("flac", 0.05, seed=i))
    text = (
        "\ufeff1-2-0000 ONE\u2028TWO\x85THREE\r\n1-2-0001 A\n1-2-0001 B\n1-2-0002 C\n1-2-0002 C\n"
    )
    put(tmp_path / "in/1-2.trans.txt", text)
    assert main(["speech", str(tmp_path / "in"), str(tmp_path / "out"), "-j1"]) == 0
    texts = {key: row["json"].get("text") for key, row in contents(tmp_path / "out").items()}
    expected = {0: "ONE\u2028TWO\x85THREE", 1: None, 2: "C", 3: None}
    assert texts == {f"1-2-{i:04d}": text for i, text in expected.items()}
    reasons = found(tmp_path / "out", "notes.jsonl")
    assert reasons == {
        "1-2.trans.txt, line 3": (
            "gives 1-2-0001 another text than an earlier line; it gets no text",
            "no metadata",
        ),
        "1-2-0003.flac": (
            "has no line in the transcripts of its folder; it gets no text",
            "no metadata",
        ),
    }


def test_damaged_descriptions_of_libri_light(tmp_path: Path) -> None:
    """One of them is the first, by which the layout is recognised."""
    texts = ["{damaged", '{"speaker": "7"}', "[]", '{"speaker": "8", "snr": 3.5}', None]
    for i, text in enumerate(texts):
        put(tmp_path / f"in/7/book/{i}.flac", recording("flac", 0.05, seed=i))
        if text:
            put(tmp_path / f"in/7/book/{i}.json", text)
    assert main(["speech", str(tmp_path / "in"), str(tmp_path / "out"), "-j1"]) == 0
    made = contents(tmp_path / "out")
    speakers = {key[-1]: row["json"].get("speaker") for key, row in made.items()}
    assert speakers == {"0": None, "1": "7", "2": None, "3": "8", "4": None}
    kinds = {name: "no metadata" for name in ("7/book/0.flac", "7/book/2.flac")}
    assert notes(tmp_path / "out") == kinds
