"""Small corpora with the structure of published ones, converted by the commands of the docs: every
number that is printed is right. LibriSpeech is in test_choosing.py, Hugging Face's Parquet in
test_speech_parquet.py."""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

from d2v_ds.arguments import size as parse_size
from shards.cli import main
from tests.helpers.corpora import contents, notes, put, put_tar, quarantine, recording
from tests.shards.pictures import picture


def run(*words: object) -> int:
    return main([*map(str, words), "-j1"])


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_common_voice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder of a language has one TSV per purpose; only the named one is read."""
    corpus = tmp_path / "cv-corpus/cy"
    header = "client_id\tpath\tsentence_id\tsentence\tage\tgender\taccents\tlocale\n"
    names = [f"common_voice_cy_{i}.mp3" for i in range(8)]
    row = {name: f"s{i % 2}\t{name}\t{i}\t“text” {i}\t\t\t\tcy\n" for i, name in enumerate(names)}
    tables = {"validated": names[:6] + names[:1], "train": names[:3], "dev": names[3:4]}
    tables |= {"test": names[4:6], "other": names[6:7], "invalidated": names[7:]}
    for table, listed in tables.items():
        put(corpus / f"{table}.tsv", header + "".join(row[name] for name in listed))
    for i, name in enumerate(names):
        put(corpus / "clips" / name, recording("mp3", 0.2, seed=i))
    more = {"clip_durations.tsv": "unused", "more/reported.tsv": "unused", "README": "type"}
    for name in (*more, ".cache/x"):
        put(corpus / name, "clip\n")
    out = tmp_path / "out"
    assert run("speech", corpus, out, "--max-bad", "20%") == 0
    assert lines(capsys) == [
        f"{corpus}: layout commonvoice",
        f"{out}: 6 samples, 0.000 hours, 1 shard",
        f"1 of 7 inputs were left out (1 duplicate); the reasons are in {out / 'quarantine.jsonl'}",
        "11 files were passed over (9 unused, 1 without extension, 1 hidden); the list is in "
        f"{out / 'notes.jsonl'}",
    ]
    assert quarantine(out) == {"validated.tsv, line 8": f"lists {names[0]} again"}
    unused = [*(f"clips/{name}" for name in names[6:]), *(f"{name}.tsv" for name in tables)]
    unused.remove("validated.tsv")
    assert notes(out) == {**dict.fromkeys(unused, "unused"), **more, ".cache": "hidden"}
    tsvs = [corpus / f"{name}.tsv" for name in ("train", "dev")]
    assert run("speech", *tsvs, tmp_path / "two") == 0
    assert lines(capsys) == [
        *(f"{tsv}: layout commonvoice" for tsv in tsvs),
        "the inputs belong to several splits (3 train, 1 validation), which are not kept apart; to "
        "convert only one, choose its files, for example with --only '*train*/**'",
        f"{tmp_path / 'two'}: 4 samples, 0.000 hours, 1 shard",
    ]
    found = contents(tmp_path / "two")
    assert found["dev/common_voice_cy_3"]["json"]["text"] == "“text” 3"


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "opus", "mp3"])
def test_a_nemo_manifest_of_long_recordings(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Segments as NeMo, GigaSpeech and YODAS have them. Their sizes are shares of the files."""
    rows: list[dict[str, Any]] = []
    for n in range(3):
        put(tmp_path / f"audio/talk{n}.{kind}", recording(kind, 30, seed=n))
        path = f"audio/talk{n}.{kind}"
        rows += [
            {"audio_filepath": path, "offset": 2.5 * i, "duration": 2.0, "text": f"{n} {i}"}
            for i in range(11)
        ]
    rows += [{"audio_filepath": f"audio/talk0.{kind}", "offset": 35.0, "duration": 2.0}]
    rows += [{"audio_filepath": "audio/gone.wav", "offset": 1.0, "duration": 2.0}]
    source = put(tmp_path / "manifest.json", "".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    words = ("speech", source, out, "--max-bad", "10%")
    assert run(*words, "--dry-run") == 0
    size = sum(file.stat().st_size for file in (tmp_path / "audio").iterdir())
    [planned] = re.findall(r"set: 35 inputs, ([\d.]+ \wB) -> 1 shard", "\n".join(lines(capsys)))
    # 33 segments of 2 s, and one that lies outside, of 3 recordings of 30 s
    assert parse_size(planned) == pytest.approx(size * 34 * 2 / 90, rel=0.06)
    assert run(*words) == 0
    text = "\n".join(lines(capsys))
    assert f"{out}: 33 samples, 0.018 hours, 1 shard" in text
    assert "2 of 35 inputs were left out" in text
    assert quarantine(out).keys() == {f"audio/talk0.{kind}, 35 to 37", "audio/gone.wav, 1 to 3"}
    found = contents(out)
    assert found["audio/talk2-00002500-00004500"]["json"]["text"] == "2 1"


def test_a_folder_of_mixed_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, kind in enumerate(("wav", "flac", "mp3", "ogg", "opus")):
        put(tmp_path / f"in/{kind}/{i}.{kind}", recording(kind, 0.2, seed=i))
        put(tmp_path / f"in/{kind}/{i}.txt", "about")
    put(tmp_path / "in/CAPITALS.WAV", recording(seconds=0.2, seed=9))
    put(tmp_path / "in/talk.m4a", b"....ftypM4A ")
    put_tar(tmp_path / "in/old.tar", [("a.wav", recording())])
    put(tmp_path / "in/more.tar.gz", b"\x1f\x8b....")
    put(tmp_path / "in/broken.wav", b"RIFF")
    put(tmp_path / "in/.hidden.wav", recording())
    out = tmp_path / "out"
    assert run("speech", tmp_path / "in", out, "--max-bad", "20%") == 0
    printed = lines(capsys)
    assert printed[:2] == [
        f"{tmp_path / 'in'}: layout folder",
        f"{out}: 6 samples, 0.000 hours, 1 shard",
    ]
    assert printed[2].startswith("1 of 7 inputs were left out (1 ")
    assert printed[3].startswith("9 files were passed over (5 .txt, ")
    files = [path for path in (tmp_path / "in").rglob("*") if path.is_file()]
    found = contents(out)
    assert len(found) + len(quarantine(out)) + len(notes(out)) == len(files)
    reasons = [json.loads(line) for line in (out / "notes.jsonl").read_text().splitlines()]
    reason = next(row["reason"] for row in reasons if row["path"] == "more.tar.gz")
    assert reason == "is a compressed tar; unpack it with `gunzip more.tar.gz`"


def test_webdataset_tars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With members that no sample uses, names with several dots, and capitals."""
    first = [(f"a/{i}.flac", recording("flac", 0.2, seed=i)) for i in range(3)]
    first += [
        ("a/2.json", b"{}"),
        ("a/2.emb.npy", b"x"),
        ("README", b"x"),
        ("__meta__/x.txt", b"x"),
    ]
    put_tar(tmp_path / "in/0.tar", first)
    put_tar(
        tmp_path / "in/deep/1.TAR", [("v1.5/talk 1.2.wav", recording()), ("b.wav", recording())]
    )
    put(tmp_path / "in/2.tar.xz", b"\xfd7zXZ\0")
    out = tmp_path / "out"
    assert run("speech", tmp_path / "in", out, "--max-bad", "50%") == 0
    assert lines(capsys) == [
        f"{tmp_path / 'in'}: layout webdataset",
        f"{out}: 4 samples, 0.000 hours, 1 shard",
        f"1 of 5 inputs were left out (1 row); the reasons are in {out / 'quarantine.jsonl'}",
        f"4 files were passed over (3 unused, 1 .xz); the list is in {out / 'notes.jsonl'}",
    ]
    [(name, reason)] = quarantine(out).items()
    assert name == "deep/1.TAR, v1.5/talk 1.2.wav" and "at its first dot" in reason
    assert notes(out).keys() == {
        "0.tar, a/2.emb.npy",
        "0.tar, README",
        "0.tar, __meta__/x.txt",
        "2.tar.xz",
    }


# ---------------------------------------------------------------------------------------- messages


def test_a_set_of_another_version_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "in/a.wav", recording())
    words = ("speech", tmp_path / "in", tmp_path / "out")
    assert run(*words) == 0
    file = tmp_path / "out/index.json"
    about = json.loads(file.read_bytes())
    file.write_text(json.dumps({**about, "converter": 2, "plan": "other"}))
    assert run(*words) == 2
    line = capsys.readouterr().err
    assert "contains a finished shard set that was made by another version of d2v-shards" in line
    assert run(*words, "--rate", 8000) == 2
    assert "--rate was 16000, now 8000" in capsys.readouterr().err
    put(tmp_path / "in/b.wav", recording())
    file.write_text(json.dumps(about))
    assert run(*words) == 2
    assert "the inputs differ" in capsys.readouterr().err


@pytest.mark.parametrize("words", [(), ("--split", "a=50,b=50"), ("--task", "0/2"), ("--dry-run",)])
def test_the_reasons_are_printed_if_the_layout_rejects_everything(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = put(tmp_path / "a.jsonl", '{"path": ""}\n' * 3 + "oops\n")
    assert run("speech", source, tmp_path / "out", *words) == 2
    line = capsys.readouterr().err
    assert "3 x its path is not a path but '' (the first: a.jsonl, line 1); 1 x is not JSON" in line
    assert "--only" not in line


def test_a_dry_run_says_what_would_not_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):
        put(tmp_path / f"in/1-2-{i:04d}.flac", recording("flac", 0.2, seed=i))
    put(tmp_path / "in/1-2.trans.txt", "1-2-0000 ONE\n1-2-0009 LOST\n1-2-0001\n")
    put(tmp_path / "in/notes.md", "about")
    words = ("speech", tmp_path / "in", tmp_path / "out", "--dry-run", "--except", "1-2-0002*")
    assert run(*words) == 0
    assert lines(capsys)[1:5] == [
        "1 input was not chosen (--only, --except)",
        "1 input would be left out: 1 x has a transcript but no recording (1-2-0009)",
        "1 file would be passed over (1 .md)",
        "1 input would be altered (1 no metadata)",
    ]
    assert not (tmp_path / "out").exists()


def test_links_in_tars_of_images(tmp_path: Path) -> None:
    tar = put_tar(tmp_path / "a.tar", [("a.png", picture()), ("a.cls", b"cat")])
    with tarfile.open(tar, "a") as file:
        for name, target in (
            *(("b.png", "a.png"), ("b.cls", "a.cls"), ("c.png", "a.png"), ("c.cls", "no.cls")),
            *(("d.png", "no.png"), ("d.cls", "a.cls")),
        ):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            file.addfile(link)
    assert run("images", tar, tmp_path / "out", "--max-bad", "50%") == 0
    labels = {key: row["json"].get("label") for key, row in contents(tmp_path / "out").items()}
    assert labels == {"a": "cat", "b": "cat", "c": None}
    reason = "is a link to no.png, which the tar does not contain"
    assert quarantine(tmp_path / "out") == {"a.tar, d.png": reason}
    assert notes(tmp_path / "out") == {"a.tar, c.cls": "no metadata"}
