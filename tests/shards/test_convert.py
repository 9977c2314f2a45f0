"""d2v-shards speech on real recordings: sets, repeated commands, bad inputs, array jobs."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import webdataset as wds

from d2v_ds.data import audio
from d2v_ds.data.shard_format import INDEX_FILE, PLAN_FILE, ShardSet, open_set
from d2v_ds.data.shard_index import read_index
from shards import samples
from shards.cli import main
from shards.keys import make_key
from shards.verify import read_members

SPEECH = samples.path("speech")


def convert(*arguments: object) -> int:
    return main(["speech", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    """The one line that is printed to stderr."""
    assert convert(*arguments) == code
    line = capsys.readouterr().err
    assert line.startswith("d2v-shards: ") and line.count("\n") == 1 and "Traceback" not in line
    return line


def hashes(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def contents(folder: Path) -> dict[str, tuple[dict[str, Any], bytes]]:
    """{key: (json, flac)} read through the index."""
    shards, result = open_set(folder), {}
    for shard in shards.shards:
        index = read_index(shards.index(shard))
        with shards.tar(shard).open("rb") as file:
            for i in range(index.count):
                members, _ = read_members(file, index, i)
                result[index.key(i)] = (json.loads(members["json"]), members["flac"])
    return result


def read_by_webdataset(urls: list[str]) -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset does not close its files
        result = list(wds.WebDataset(urls, shardshuffle=False))
        gc.collect()
    return result


def write_wav(path: Path, seconds: float = 0.3, rate: int = 16_000, channels: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(len(str(path)))
    x = generator.integers(-9000, 9000, (int(seconds * rate), channels)).astype(np.int16)
    soundfile.write(path, x, rate, format="FLAC" if path.suffix == ".flac" else "WAV")
    return path


@pytest.fixture(scope="module")
def unseen(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """The 100 recordings of unseen.tsv in several shards."""
    out = tmp_path_factory.mktemp("sets") / "unseen"
    assert convert(SPEECH / "unseen.tsv", out, "--shard-size", "100KB", "-j1") == 0
    return open_set(out, "speech")


# ------------------------------------------------------------------------------------------ the set


def test_set(unseen: ShardSet) -> None:
    assert (unseen.modality, unseen.length_unit, unseen.sample_rate) == ("speech", "frames", 16_000)
    assert unseen.samples == 100 and len(unseen.shards) > 2
    names = {"index.json", "quarantine.jsonl", "notes.jsonl"}
    names |= {f"{s.name}.{end}" for s in unseen.shards for end in ("tar", "idx")}
    assert {f.name for f in unseen.root.iterdir()} == names
    found = contents(unseen.root)
    about, flac = found["recordings/7_theo_3"]
    assert about == {
        "label": "7",
        "speaker": "theo",
        "paths": ["recordings/7_theo_3.flac"],
        "duration": round(audio.info(flac).frames / 16_000, 4),
    }
    source = audio.decode(SPEECH / "recordings/7_theo_3.flac")
    expected = audio.to_int16(audio.resample(source, 8000, 16_000))
    assert (audio.to_int16(audio.decode(flac)) == expected).all()
    assert unseen.length == sum(audio.info(flac).frames for _, flac in found.values())


def test_read_by_plain_webdataset(unseen: ShardSet) -> None:
    urls = [str(unseen.tar(shard)) for shard in unseen.shards]
    ours = contents(unseen.root)
    theirs = {s["__key__"]: s for s in read_by_webdataset(urls)}
    assert list(theirs) == list(ours)
    for key, (about, flac) in ours.items():
        assert theirs[key]["flac"] == flac and json.loads(theirs[key]["json"]) == about


def test_tar_equals_one_written_by_webdataset(unseen: ShardSet) -> None:
    index, at = read_index(unseen.index(unseen.shards[0])), unseen.tar(unseen.shards[0])
    theirs = io.BytesIO()
    with wds.TarWriter(theirs, mtime=0, encoder=False) as writer, at.open("rb") as file:
        for i in range(index.count):
            writer.write({"__key__": index.key(i), **read_members(file, index, i)[0]})
    assert at.read_bytes() == theirs.getvalue()


def test_samples_are_scattered(unseen: ShardSet) -> None:
    labels = [about["label"] for about, _ in contents(unseen.root).values()]
    assert labels != sorted(labels) and len(set(labels[:20])) > 4


def test_seed_changes_the_order_only(unseen: ShardSet, tmp_path: Path) -> None:
    assert convert(SPEECH / "unseen.tsv", tmp_path / "b", "--seed", "1") == 0
    one, other = contents(unseen.root), contents(tmp_path / "b")
    assert one == other and list(one) != list(other)


def test_same_bytes_with_any_number_of_processes(unseen: ShardSet, tmp_path: Path) -> None:
    two = tmp_path / "two"
    assert convert(SPEECH / "unseen.tsv", two, "--shard-size", "100KB", "-j2") == 0
    assert hashes(two) == hashes(unseen.root)


def test_matching_flac_is_copied_unchanged(tmp_path: Path) -> None:
    same = write_wav(tmp_path / "in/same.flac")
    again = audio.encode_flac(audio.to_int16(audio.decode(same)), 16_000, level=0)
    assert again != audio.encode_flac(audio.to_int16(audio.decode(same)), 16_000)
    same.write_bytes(again)
    write_wav(tmp_path / "in/stereo.flac", channels=2)
    write_wav(tmp_path / "in/wave.wav")
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    found = contents(tmp_path / "out")
    assert found["same"][1] == same.read_bytes()
    assert found["stereo"][1] != (tmp_path / "in/stereo.flac").read_bytes()
    for key, name in [("stereo", "stereo.flac"), ("wave", "wave.wav")]:
        expected = audio.to_int16(audio.decode(tmp_path / "in" / name))
        assert (audio.to_int16(audio.decode(found[key][1])) == expected).all()


def test_join(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--join", "speaker", "--join-seconds", "4", "--rate", "8000"]
    assert convert(SPEECH / "train.tsv", out, *arguments) == 0
    rows = (SPEECH / "train.tsv").read_text().splitlines()[1:]
    speaker = {row.split("\t")[0]: row.split("\t")[2] for row in rows}
    used = []
    for about, flac in contents(out).values():
        assert set(about) == {"speaker", "paths", "duration"}
        assert {speaker[path] for path in about["paths"]} == {about["speaker"]}
        whole = np.concatenate([audio.decode(SPEECH / p) for p in about["paths"]])
        assert (audio.decode(flac) == whole).all()
        assert 3 < len(whole) / 8000 < 5
        used += about["paths"]
    assert sorted(used) == sorted(speaker)


# ----------------------------------------------------------------------------------------- repeated


def test_repeating_a_finished_conversion_does_nothing(unseen: ShardSet, tmp_path: Path) -> None:
    out = shutil.copytree(unseen.root, tmp_path / "out")
    before = {f: f.stat().st_mtime_ns for f in out.iterdir()}
    assert convert(SPEECH / "unseen.tsv", out, "--shard-size", "100KB") == 0
    assert {f: f.stat().st_mtime_ns for f in out.iterdir()} == before


def test_another_plan_is_refused(
    unseen: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, SPEECH / "unseen.tsv", unseen.root, "--rate", "8000")
    assert "contains a finished shard set with other inputs or options" in line
    assert "--rate was 16000, now 8000" in line and "use another folder" in line
    line = refused(capsys, SPEECH / "seen.tsv", unseen.root, "--shard-size", "100KB")
    assert "the inputs differ" in line
    out = tmp_path / "out"
    out.mkdir()
    (out / PLAN_FILE).write_text(json.dumps({"plan": "another", "options": {}}))
    line = refused(capsys, SPEECH / "seen.tsv", out)
    assert "contains an unfinished conversion with other inputs or options" in line


def test_changed_input_is_another_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_wav(tmp_path / "in/a.wav", seconds=0.2)
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    write_wav(tmp_path / "in/a.wav", seconds=0.3)
    assert "the inputs differ" in refused(capsys, tmp_path / "in", tmp_path / "out")


def test_an_unsuitable_out_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("")
    line = refused(capsys, SPEECH / "seen.tsv", tmp_path)
    assert "is not empty (it contains thesis.tex)" in line and "new or empty folder" in line
    assert "is a file" in refused(capsys, SPEECH / "seen.tsv", tmp_path / "thesis.tex")
    assert "both SOURCE and OUT" in refused(capsys, SPEECH, SPEECH)


# ----------------------------------------------------------------------------- inputs, good and bad


def test_folder_tree(tmp_path: Path) -> None:
    for name in ("b/2.wav", "b/1.FLAC", "a/x.wav", ".hidden.wav"):
        write_wav(tmp_path / "in" / name)
    (tmp_path / "in/a/notes.txt").write_text("not audio")
    (tmp_path / "in/again").symlink_to(tmp_path / "in")
    (tmp_path / "elsewhere").mkdir()
    write_wav(tmp_path / "elsewhere/c.wav")
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert sorted(contents(tmp_path / "out")) == ["a/x", "b/1", "b/2", "linked/c"]


def test_keys_stay_apart(tmp_path: Path) -> None:
    for name in ("a.b.wav", "a_b.wav", "c.wav", "c.flac", "Dr. No.wav", "__x__/y.wav", "ä/ö.wav"):
        write_wav(tmp_path / "in" / name)
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    found = contents(tmp_path / "out")
    by_path = {about["paths"][0]: key for key, (about, _) in found.items()}
    assert len(by_path) == 7
    assert by_path["Dr. No.wav"] == "Dr__No" and by_path["ä/ö.wav"] == "ä/ö"
    assert by_path["a.b.wav"].startswith("a_b_") and by_path["a_b.wav"].startswith("a_b_")
    shards = open_set(tmp_path / "out")
    theirs = read_by_webdataset([str(shards.tar(s)) for s in shards.shards])
    assert [s["__key__"] for s in theirs] == list(found)
    assert all(set(s) >= {"flac", "json"} for s in theirs)


@pytest.mark.parametrize(
    "text, key",
    [
        ("train/103/103-1240-0000", "train/103/103-1240-0000"),
        ("./a//b", "a/b"),
        ("/data/a", "data/a"),
        ("../x", "_/x"),
        ("v1.2/a b", "v1_2/a_b"),
        ("__meta__/a", "_meta__/a"),
        ("a__b/__c", "a__b/__c"),
    ],
)
def test_make_key(text: str, key: str) -> None:
    assert make_key(text) == key


def test_long_keys_fit_a_tar_header() -> None:
    keys = [make_key("ordner/" * 20 + "größe" * 20 + str(i)) for i in range(2)]
    assert keys[0] != keys[1]
    for key in keys:
        member = tarfile.TarInfo(f"{key}.flac")
        assert member.tobuf(tarfile.USTAR_FORMAT, "utf-8")[:100].rstrip(b"\0").decode()[:-5] == key


def spoiled(folder: Path) -> dict[str, str]:
    """Writes 8 good files and some bad ones; returns {bad file: reason}."""
    for i in range(8):
        write_wav(folder / f"good{i}.wav")
    whole = write_wav(folder / "cut.wav").read_bytes()
    (folder / "cut.wav").write_bytes(whole[:3000])
    (folder / "empty.flac").write_bytes(b"")
    (folder / "text.wav").write_text("not audio, despite its name")
    soundfile.write(folder / "nan.wav", np.full(900, np.nan), 16_000, subtype="FLOAT")
    flac = bytearray(write_wav(folder / "flipped.flac").read_bytes())
    flac[len(flac) // 2] ^= 16
    (folder / "flipped.flac").write_bytes(flac)
    (folder / "gone.wav").symlink_to(folder / "nowhere")
    return {
        "cut.wav": "is truncated",
        "empty.flac": "is empty",
        "text.wav": "is not audio",
        "nan.wav": "NaN",
        "flipped.flac": "",
        "gone.wav": "No such file",
    }


@pytest.mark.parametrize("jobs", ["-j1", "-j2"])
def test_bad_inputs_are_left_out_with_the_reason(
    tmp_path: Path, jobs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reasons = spoiled(tmp_path / "in")
    out = tmp_path / "out"
    arguments = [tmp_path / "in", out, "--max-bad", "50%", "--shard-size", "20KB", jobs]
    assert convert(*arguments) == 0
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert {line["path"] for line in lines} == set(reasons)
    for line in lines:
        assert reasons[line["path"]] in line["reason"]
    assert sorted(contents(out)) == [f"good{i}" for i in range(8)]
    assert json.loads((out / INDEX_FILE).read_text())["quarantined"] == 6
    assert "6 of 14 inputs were left out" in capsys.readouterr().out
    assert main(["verify", str(out)]) == 0


def test_too_many_bad_inputs_stop_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoiled(tmp_path / "in")
    out = tmp_path / "out"
    line = refused(capsys, tmp_path / "in", out)
    assert "6 of 14 inputs cannot be used, more than --max-bad 1.000%" in line
    assert "quarantine.jsonl" in line and not (out / INDEX_FILE).exists()
    assert len((out / "quarantine.jsonl").read_text().splitlines()) == 6
    assert convert(tmp_path / "in", out, "--max-bad", "0.5") == 0, "the conversion resumes"


def test_a_joined_sample_lacks_only_its_bad_recordings(tmp_path: Path) -> None:
    spoiled(tmp_path / "in")
    names = sorted(f.name for f in (tmp_path / "in").iterdir())
    rows = "".join(f"in/{name}\tone\n" for name in names)
    (tmp_path / "list.tsv").write_text("path\twho\n" + rows)
    arguments = ["--join", "who", "--join-seconds", "60", "--max-bad", "50%"]
    assert convert(tmp_path / "list.tsv", tmp_path / "out", *arguments) == 0
    ((about, flac),) = contents(tmp_path / "out").values()
    assert sorted(about["paths"]) == [f"in/good{i}.wav" for i in range(8)]
    assert audio.info(flac).frames == 8 * 4800


def test_nothing_usable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.wav").write_bytes(b"")
    line = refused(capsys, tmp_path / "in", tmp_path / "out", "--max-bad", "100%")
    assert "none of the inputs can be used" in line


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "the first line must name the columns"),
        ("name\tlabel\na.wav\t1\n", "including `path`, without duplicates; found name, label"),
        ("path\tpath\na\tb\n", "without duplicates"),
        ("path\tlabel\n", "lists no recordings"),
        ("path\tlabel\na.wav\n", "line 2: 1 columns, but the header has 2"),
        ("path\n\xff.wav\n", "is not UTF-8"),
    ],
)
def test_bad_manifests(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.tsv").write_bytes(text.encode("latin-1"))
    line = refused(capsys, tmp_path / "list.tsv", tmp_path / "out")
    assert "list.tsv" in line and message in line
    assert not (tmp_path / "out").exists()


def test_manifest_with_windows_line_ends(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav")
    (tmp_path / "list.tsv").write_bytes(b"\xef\xbb\xbfpath\ttext\r\na.wav\thello you\r\n")
    assert convert(tmp_path / "list.tsv", tmp_path / "out") == 0
    assert contents(tmp_path / "out")["a"][0]["text"] == "hello you"


def test_invalid_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert "no such file or folder" in refused(capsys, tmp_path / "nowhere", out)
    (tmp_path / "list.csv").write_text("")
    assert "its layout is not recognised; set" in refused(capsys, tmp_path / "list.csv", out)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.m4a").write_text("")
    line = refused(capsys, tmp_path / "in", out)
    assert ".ogg or .opus file (found: 1 .m4a)" in line
    line = refused(capsys, SPEECH / "seen.tsv", out, "--join", "speker")
    assert "--join speker" in line and "did you mean 'speaker'?" in line


def test_a_folder_that_cannot_be_made_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    write_wav(tmp_path / "in/a.wav")
    (tmp_path / "full").write_text("")
    assert "full" in refused(capsys, tmp_path / "in", tmp_path / "full/out")


# ------------------------------------------------------------------------------------ array jobs


def test_tasks_of_an_array_and_their_merge_give_the_same_set(
    unseen: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, words = tmp_path / "out", [SPEECH / "unseen.tsv", tmp_path / "out", "--shard-size=100KB"]
    for task in ("2/3", "0/3"):
        assert convert(*words, "--task", task, "-j1") == 0
    assert "task 0 of 3 has finished" in capsys.readouterr().out
    assert main(["merge", str(out)]) == 2
    line = capsys.readouterr().err
    assert "shards are missing, the first speech-000001; run the unfinished tasks again" in line
    assert not (out / INDEX_FILE).exists()
    assert convert(*words, "--task", "1/3", "-j1") == 0
    assert main(["merge", str(out)]) == 0
    assert hashes(out) == hashes(unseen.root)
    assert main(["merge", str(out)]) == 0, "merging twice changes nothing"
    assert convert(*words, "--task", "1/3", "-j1") == 0, "a repeated task changes nothing"


def test_tasks_that_start_at_once_share_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [SPEECH / "unseen.tsv", out, "--shard-size=100KB", "-j1"]
    command = [sys.executable, "-m", "shards.cli", "speech", *map(str, words)]
    tasks = [subprocess.Popen([*command, "--task", f"{i}/4"]) for i in range(4)]
    assert [task.wait(60) for task in tasks] == [0] * 4
    assert main(["merge", str(out)]) == 0 and main(["verify", str(out)]) == 0


def test_too_many_bad_inputs_stop_the_merge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoiled(tmp_path / "in")
    out = tmp_path / "out"
    for task in ("0/2", "1/2"):
        words = ["--task", task, "--max-bad", "1", "--shard-size", "20KB", "-j1"]
        assert convert(tmp_path / "in", out, *words) == 0
    assert main(["merge", str(out)]) == 2
    assert "6 of 14 inputs cannot be used" in capsys.readouterr().err
    assert main(["merge", str(out), "--max-bad", "50%"]) == 0
    assert "6 of 14 inputs were left out" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["3/3", "1", "a/b", "-1/2"])
def test_invalid_tasks(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        convert("in", "out", f"--task={task}")
    assert exit.value.code == 2 and "expected I/N" in capsys.readouterr().err


def test_merge_of_no_conversion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(tmp_path)]) == 2
    assert "contains no conversion to merge" in capsys.readouterr().err
