"""Conversion plans: order and shards, splits, lists of keys, tasks, dry run."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from d2v_ds.data import audio
from d2v_ds.data.checks import Finding
from d2v_ds.data.shard_format import INDEX_FILE
from d2v_ds.errors import UserError
from shards import samples as samples_of_package
from shards.arguments import splits, task_of_slurm
from shards.cli import main
from shards.family import Corpus, Input, Sample
from shards.plan import Choice, ConversionPlan, Samples, make_plan, make_plans, split_of
from tests.helpers.corpora import contents, put, recording


def plan_of(samples: list[Sample], shard_size: int = 256_000_000, seed: int = 0) -> ConversionPlan:
    return make_plan(Samples(samples), {}, shard_size, seed)


def sample(key: str, *inputs: Input, size: int = 1_000_000, **columns: Any) -> Sample:
    return Sample(key, inputs or (Input(f"{key}.wav"),), columns, size)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """60 recordings of 12 speakers, as a manifest."""
    rows = []
    for i in range(60):
        put(tmp_path / f"in/{i:02d}.wav", recording(seconds=0.05, seed=i))
        rows.append(f"{i:02d}.wav\ts{i % 12}\n")
    return put(tmp_path / "in/list.tsv", "path\tspeaker\n" + "".join(rows))


def convert(*arguments: object) -> int:
    return main(["speech", *map(str, arguments), "-j1"])


# ---------------------------------------------------------------------------------- samples, shards


def test_samples_survive_a_round_trip() -> None:
    many = [
        sample("a"),
        sample("ä/ö", Input("ä/ö.wav"), text="größe ✓", n=1, tags=["x", None]),
        sample("b", Input("t.tar", (512, 9000)), Input("b.wav", None, (0.5, 1.25)), size=0),
        sample("c", Input("undecodable-\udcff.wav")),
        sample("", Input(""), **{"": ""}),
    ]
    kept = Samples(many)
    assert [kept[i] for i in range(len(kept))] == many
    assert list(kept.sizes) == [s.size for s in many] and list(kept.inputs) == [1, 1, 2, 1, 1]


def test_names_of_inputs() -> None:
    assert str(Input("a.wav")) == "a.wav"
    assert str(Input("t.tar", (512, 88))) == "t.tar, bytes 512 to 600"
    assert str(Input("a.wav", None, (0.5, 2.0))) == "a.wav, 0.5 to 2"


def test_plan_cuts_by_size_and_keeps_small_corpora_whole() -> None:
    many = [sample(f"k{i}") for i in range(200)]
    plan = plan_of(many, 5_000_000)
    sizes = [len(plan.shard(i)) for i in range(plan.shards)]
    assert sum(sizes) == 200 and set(sizes[:-1]) == {5}
    assert sorted(s.key for i in range(plan.shards) for s in plan.shard(i)) == sorted(
        s.key for s in many
    )
    assert plan_of(many).shards == 16, "SHARDS_AT_LEAST if the corpus is large enough"
    assert plan_of(many[:4]).shards == 1


def test_order_depends_only_on_seed_and_keys() -> None:
    many = [sample(f"k{i}") for i in range(50)]
    keys = [s.key for s in plan_of(many).shard(0)]
    assert keys == [s.key for s in plan_of(many[::-1]).shard(0)] != [s.key for s in many]
    assert keys != [s.key for s in plan_of(many, seed=1).shard(0)]
    assert keys[:3] == ["k23", "k47", "k9"], "the same on every machine and in every version"


def test_sets_of_sound_corpora_stay_the_same(tmp_path: Path) -> None:
    """The bytes of version 3 of the converter; `keep` does not depend on the encoder."""
    source = samples_of_package.path("speech") / "train.tsv"
    words = ("--rate", 8000, "--encode", "keep", "--shard-size", "200KB")
    assert convert(source, tmp_path / "out", *words) == 0
    digests = [
        hashlib.sha256(tar.read_bytes()).hexdigest()[:12]
        for tar in sorted((tmp_path / "out").glob("*.tar"))
    ]
    assert digests == [
        *("20421e044559", "130eab772313", "41913f713c89", "f54ee1a5fe7e"),
        *("57e73f1e2570", "b005f66bb4e0", "cecb58a2c6e0", "e0f69532acd1"),
    ]


def test_segments_of_a_recording_stay_together() -> None:
    """Unless the shard is full; recordings and other samples are shuffled."""
    segments = [
        sample(f"{name}-{i}", Input(f"{name}.wav", None, (float(i), i + 1.5)), size=500_000)
        for i in (3, 1, 0, 2)
        for name in "abcdefghij"
    ]
    sides = [sample(f"call-{i}", Input("call.wav", channel=i)) for i in (1, 0)]
    plan = plan_of([*segments, *sides, *(sample(f"k{i}") for i in range(20))], 5_000_000)
    shards = [[s.key for s in plan.shard(i)] for i in range(plan.shards)]
    where = {key: (i, at) for i, shard in enumerate(shards) for at, key in enumerate(shard)}
    assert len(where) == 62
    for name in "abcdefghij":
        places = [where[f"{name}-{i}"] for i in range(4)]
        assert places == [(places[0][0], places[0][1] + i) for i in range(4)]
    first, second = where["call-0"], where["call-1"]
    assert second in ((first[0], first[1] + 1), (first[0] + 1, 0))
    order = [key for shard in shards for key in shard]
    plain = [sample(key) for key in order if key.startswith("k")]
    alone = plan_of(plain[::-1], 5_000_000)
    assert plain == [s for i in range(alone.shards) for s in alone.shard(i)]


def test_a_long_recording_is_divided_by_size_only() -> None:
    """Not to reach SHARDS_AT_LEAST, so that it is read once."""
    segments = [
        sample(f"k{i}", Input("long.wav", None, (i * 1.0, i + 5.0)), size=160_000)
        for i in range(2000)
    ]
    plan = plan_of(segments)
    assert [len(plan.shard(i)) for i in range(plan.shards)] == [1600, 400]
    starts = [s.inputs[0].part for i in range(plan.shards) for s in plan.shard(i)]
    assert starts == sorted(starts, key=lambda part: part or (0.0, 0.0))


def test_segments_with_equal_keys_are_made_unique() -> None:
    parts = [(1.0, 2.0), (1.0, 3.0), (1.0001, 2.0), (1.0, 2.0)]
    keys = ["a-1-2", "a-1-3", "a-1-2", "a-1-2"]
    paths = ["a.wav", "a.wav", "a.wav", "a.flac"]
    many = [sample(k, Input(p, None, part)) for k, p, part in zip(keys, paths, parts, strict=True)]
    plan = plan_of([*many, sample("b")])
    found = [s.key for i in range(plan.shards) for s in plan.shard(i)]
    assert len(set(found)) == 5 and {"a-1-3", "b"} < set(found) and "a-1-2" not in found


def test_rows_of_a_table_are_shuffled_as_before() -> None:
    many = [sample(f"k{i}", Input("t.parquet", None, (i, i + 1))) for i in range(50)]
    whole = [sample(f"k{i}") for i in range(50)]
    assert [s.key for s in plan_of(many).shard(0)] == [s.key for s in plan_of(whole).shard(0)]


def test_shared_keys_are_made_unique() -> None:
    same = [sample("a", Input(path)) for path in ("a.wav", "a.flac", "a.ogg", "a.ogg")]
    plan = plan_of([sample("b"), *same, sample("c")])
    keys = [s.key for i in range(plan.shards) for s in plan.shard(i)]
    assert len(set(keys)) == 6 and {"b", "c"} < set(keys) and "a" not in keys
    assert all(key in ("b", "c") or key.startswith("a_") for key in keys)


def test_the_hash_sees_every_change() -> None:
    base = [sample(f"k{i}", size=10) for i in range(5)]
    variants = [
        base,
        base[1:],
        [*base, sample("new")],
        [*base[:-1], sample("k4", size=11)],
        [*base[:-1], sample("k4", Input("k4.wav", (0, 5)), size=10)],
        [*base[:-1], sample("k4", size=10, label="1")],
    ]
    hashes = {plan_of(samples).hash() for samples in variants}
    hashes.add(plan_of(base, seed=1).hash())
    hashes.add(make_plan(Samples(base), {"rate": 1}, 256_000_000, 0).hash())
    assert len(hashes) == len(variants) + 2
    assert plan_of(base).hash() == plan_of(base).hash()


@pytest.mark.slow
def test_a_million_inputs_take_little_memory() -> None:
    code = """
import resource, sys
from shards.family import Corpus, Input, Sample
from shards.plan import Choice, make_plans
from shards.speech.converter import SpeechConverter
from shards.speech.folder import Folder
from pathlib import Path
def samples():
    for i in range(int(sys.argv[1])):
        path = f"train-clean-360/{i % 1000}/{i % 77777}/{i % 1000}-{i % 77777}-{i:07d}"
        yield Sample(path, (Input(path + ".flac"),), {"speaker": str(i % 1000)}, 200_000)
corpus = Corpus(samples(), SpeechConverter(Folder(Path("."), Path("."), None), 16000), {})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
plan = make_plans(corpus, Choice())[""]
plan.hash()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / int(sys.argv[1]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "1000000"], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 400, f"{done.stdout} bytes each"


# ------------------------------------------------------------------------------------------- splits


def test_splits_have_their_shares_and_are_stable() -> None:
    shares = splits("train=98,valid=1,test=1")
    names = [split_of(f"speaker/{i}", shares) for i in range(20_000)]
    assert abs(names.count("valid") - 200) < 60 and abs(names.count("test") - 200) < 60
    assert [split_of(f"k{i}", splits("a=1,b=1")) for i in range(8)] == list("babababb")


def test_splits_by_key_and_by_speaker(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert convert(corpus, out, "--split", "train=60,valid=20,test=20") == 0
    sets = {name: contents(out / name) for name in ("train", "valid", "test")}
    assert sorted(key for found in sets.values() for key in found) == [
        f"{i:02d}" for i in range(60)
    ]
    assert all(0 < len(found) < 60 for found in sets.values())
    printed = capsys.readouterr().out
    assert all(f"{out / name}: {len(found)} samples" in printed for name, found in sets.items())
    speakers = tmp_path / "speakers"
    words = ["--split", "train=60,valid=20,test=20", "--split-by", "speaker"]
    assert convert(corpus, speakers, *words) == 0
    seen = [
        {members["json"]["speaker"] for members in contents(speakers / name).values()}
        for name in ("train", "valid", "test")
    ]
    assert sum(map(len, seen)) == 12 == len(set.union(*seen)), "no speaker is in two sets"
    assert convert(corpus, speakers, *words) == 0, "a repeated command changes nothing"
    assert convert(corpus, speakers, "--split", "train=60,valid=20,test=20") == 2
    assert "--split-by was speaker, now " in capsys.readouterr().err


def test_splits_are_made_before_recordings_are_joined(corpus: Path, tmp_path: Path) -> None:
    words = ["--split", "a=50,b=50", "--join", "speaker", "--join-seconds", "1"]
    assert convert(corpus, tmp_path / "out", *words) == 0
    paths = [
        {
            path
            for members in contents(tmp_path / "out" / name).values()
            for path in members["json"]["paths"]
        }
        for name in "ab"
    ]
    assert not paths[0] & paths[1] and len(paths[0] | paths[1]) == 60


def test_tasks_of_a_split_conversion_are_merged(corpus: Path, tmp_path: Path) -> None:
    words = ["--split", "a=50,b=50", "--shard-size", "10KB"]
    for i in (1, 0):
        assert convert(corpus, tmp_path / "parts", *words, "--task", f"{i}/2") == 0
    assert main(["merge", str(tmp_path / "parts")]) == 0
    assert convert(corpus, tmp_path / "whole", *words) == 0
    for name in "ab":
        files = sorted(file.name for file in (tmp_path / "whole" / name).iterdir())
        assert files == sorted(file.name for file in (tmp_path / "parts" / name).iterdir())
        for file in files:
            part, whole = (tmp_path / which / name / file for which in ("parts", "whole"))
            assert part.read_bytes() == whole.read_bytes()


def test_a_split_that_no_task_has_begun_is_missing(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--split", "a=50,b=50", "--task", "0/1"]
    assert convert(corpus, tmp_path / "out", *words) == 0
    shutil.rmtree(tmp_path / "out" / "b")
    assert main(["merge", str(tmp_path / "out")]) == 2
    assert "out/b: no task has begun this split; run the" in capsys.readouterr().err
    assert convert(corpus, tmp_path / "out", *words) == 0
    assert main(["merge", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("text", ["", "train", "train=0", "a=1,a=2", "a=1,b", "a=1;b=2", "../x=1"])
def test_invalid_shares(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        convert("in", "out", f"--split={text}")
    assert stopped.value.code == 2
    assert "expected NAME=SHARE,..." in capsys.readouterr().err


def test_impossible_splits(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(corpus, tmp_path / "out", "--split", "a=1,b=1", "--split-by", "speker") == 2
    assert "no such column; did you mean 'speaker'?" in capsys.readouterr().err
    assert convert(corpus, tmp_path / "out", "--split-by", "speaker") == 2
    assert "--split-by needs --split" in capsys.readouterr().err
    assert convert(corpus, tmp_path / "out", "--split", "a=1000000,b=1") == 2
    assert "no input falls into 'b'" in capsys.readouterr().err
    assert convert(corpus, tmp_path / "set") == 0
    assert convert(corpus, tmp_path / "set", "--split", "a=1,b=1") == 2
    assert "is a shard set; use a new folder for the splits" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- lists


def test_only_and_except(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    valid = put(tmp_path / "valid.txt", "03.wav\n07\n\n 11.wav \n")
    assert convert(corpus, tmp_path / "valid", "--only", valid) == 0
    assert sorted(contents(tmp_path / "valid")) == ["03", "07", "11"]
    assert convert(corpus, tmp_path / "train", "--except", valid) == 0
    train = contents(tmp_path / "train")
    assert len(train) == 57 and not {"03", "07", "11"} & train.keys()
    assert convert(corpus, tmp_path / "no", "--only", valid, "--except", valid) == 2
    assert "--only and --except leave none of 60 inputs" in capsys.readouterr().err
    put(valid, "03.wav\nnowhere.wav\n")
    assert convert(corpus, tmp_path / "no", "--only", valid) == 2
    assert "1 of its names are neither a key nor a path of the corpus" in capsys.readouterr().err
    assert convert(corpus, tmp_path / "valid", "--only", put(valid, "03\n07\n")) == 2
    assert "--only was" in capsys.readouterr().err
    assert convert(corpus, tmp_path / "no", "--only", tmp_path / "missing") == 2
    assert "missing: is neither a file nor a pattern that matches" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- dry run, tasks


def test_dry_run_writes_nothing_and_is_about_right(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    put(corpus.parent / "13.wav", b"")
    assert convert(corpus, out, "--dry-run", "--shard-size", "10KB") == 0
    line, times, stops = capsys.readouterr().out.splitlines()[1:]
    assert not out.exists()
    assert stops.endswith("more than --max-bad 1.000% allows: the conversion may stop")
    assert convert(corpus, out, "--shard-size", "10KB", "--max-bad", "5%") == 0
    about = json.loads((out / INDEX_FILE).read_text())
    shards = len(about["shards"])
    assert line.startswith(f"set: 60 inputs, 97 KB -> {shards} shards, about ")
    estimate = float(line.split("about ")[1].split(" KB")[0]) * 1000
    padding = 10_240 * shards
    assert 0.8 * (about["bytes"] - padding) < estimate < 1.2 * about["bytes"], line
    assert "on one core" in times and "measured on" in times


def test_dry_run_reports_each_split(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(corpus, tmp_path / "out", "--dry-run", "--split", "a=50,b=50") == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines[0].startswith("a: ") and lines[1].startswith("b: ")


def test_dry_run_opens_a_recording_once_for_its_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ["path\tstart\tend"]
    for name in ("a", "b", "c"):
        put(tmp_path / f"{name}.wav", recording(seconds=4))
        rows += [f"{name}.wav\t{i / 10}\t{(i + 1) / 10}" for i in range(40)]
    manifest = put(tmp_path / "list.tsv", "\n".join(rows) + "\n")
    opened: list[object] = []
    original = audio.Recording.__init__

    def counted(self: audio.Recording, source: bytes | Path, **options: bool) -> None:
        if options.get("clipping"):  # only the conversion looks for it
            opened.append(source)
        original(self, source, **options)

    monkeypatch.setattr(audio.Recording, "__init__", counted)
    assert convert(manifest, tmp_path / "out", "--dry-run") == 0
    assert len(opened) == 2, "one before the time is taken"


SLURM = {
    "SLURM_ARRAY_TASK_ID": "5",
    "SLURM_ARRAY_TASK_MIN": "4",
    "SLURM_ARRAY_TASK_MAX": "7",
    "SLURM_ARRAY_TASK_COUNT": "4",
}


def test_task_of_an_array_job() -> None:
    assert task_of_slurm({}) == (0, 1)
    assert task_of_slurm(SLURM) == (1, 4)
    with pytest.raises(UserError, match="the task ids of the array must have no gaps"):
        task_of_slurm({**SLURM, "SLURM_ARRAY_TASK_MAX": "10"})


def test_task_is_taken_from_slurm(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert convert(corpus, tmp_path / "out", "--shard-size", "10KB") == 0
    assert "task 1 of 4 has finished" in capsys.readouterr().out
    assert convert(corpus, tmp_path / "all", "--task", "0/1") == 0
    assert (tmp_path / "all" / INDEX_FILE).exists()


@pytest.mark.parametrize(
    ("findings", "choice", "message"),
    [
        ([], Choice(), "SOURCE contains no inputs"),
        ([("x", "why")], Choice(), r"none of the inputs can be used: 1 x why \(x\)"),
        ([("x", "why")], Choice(splits={"a": 1.0}), "no input falls into 'a'.*left out: 1 x why"),
        ([Finding("x", "why", "type")], Choice(), "SOURCE contains no inputs"),
    ],
)
def test_a_corpus_without_samples(findings: list[Finding], choice: Choice, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_plans(Corpus([], None, {}, None, findings), choice)  # type: ignore[arg-type]


def test_inputs_that_no_sample_can_be_made_of_are_counted() -> None:
    findings = [Finding("x", "why")]
    corpus = Corpus([sample("a")], None, {}, None, findings)  # type: ignore[arg-type]
    plan = make_plans(corpus, Choice())[""]
    assert plan.findings == (Finding("x", "why", "other"),)
    assert plan.hash() != make_plans(Corpus([sample("a")], None, {}), Choice())[""].hash()  # type: ignore[arg-type]
