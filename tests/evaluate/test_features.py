"""`d2v-ds features`: what the files contain, resume, ranks, bad samples, refused settings."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from d2v_ds import cli, features
from d2v_ds.data.shard_format import INDEX_FILE, ShardSet, open_set, set_json
from d2v_ds.distributed.world import World
from d2v_ds.encoder import load_encoder
from d2v_ds.features import Request
from d2v_ds.features.formats import Columns, NpyTarget
from d2v_ds.loader.reading import read_samples
from shards import samples
from shards.cli import main as shards_main
from shards.writer import ShardWriter
from tests.evaluate.conftest import Trained
from tests.helpers.runs import environment


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty recordings in several shards."""
    root = tmp_path_factory.mktemp("several") / "set"
    source = samples.path("speech") / "seen.tsv"
    words = ["speech", str(source), str(root), "--shard-size", "100KB", "-j", "1"]
    assert shards_main(words) == 0 and len(open_set(root).shards) >= 3
    return root


def write(trained: Trained, shards: Path, out: Path, *words: str) -> int:
    """The command, for block 1 of the speech encoder."""
    options = ["--modality", "speech", "--layer", "1", *words]
    return cli.main(["features", str(trained.root), str(shards), str(out), *options])


def expected(trained: Trained, shards: Path) -> dict[str, np.ndarray]:
    """{key: features [T, D]} of single examples."""
    encoder = load_encoder(trained.root, modality="speech").requires_grad_(False)
    found = {}
    for key, members in read_samples(open_set(shards), encoder.modality.extensions):
        blocks, _ = encoder([encoder.modality.decode(members, None)])
        found[key] = blocks[0][0].numpy()
    return found


def content(out: Path) -> dict[str, bytes]:
    names = (".npy", ".txt", ".parquet", ".jsonl")
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name.endswith(names)}


# ---------------------------------------------------------------------------------------- content


def test_means_and_keys_of_every_shard(
    trained: Trained, several: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert write(trained, several, tmp_path / "out", "--batch", "3") == 0
    assert capsys.readouterr().out.endswith(
        f"out: {len(open_set(several).shards)} shards, 50 of 50 samples\n"
    )
    wanted = expected(trained, several)
    found = {}
    for shard in open_set(several).shards:
        rows = np.load(tmp_path / "out" / f"{shard.name}.npy")
        keys = (tmp_path / "out" / f"{shard.name}.keys.txt").read_text().splitlines()
        assert rows.dtype == np.float32 and len(rows) == len(keys) == shard.samples
        found.update(zip(keys, rows, strict=True))
    assert list(found) == list(wanted), "other samples, or another order"
    for key, row in found.items():
        np.testing.assert_allclose(row, wanted[key].mean(0), atol=1e-5)


def test_tokens_and_their_numbers(trained: Trained, several: Path, tmp_path: Path) -> None:
    assert write(trained, several, tmp_path, "--pool", "none", "--batch", "3") == 0
    wanted = iter(expected(trained, several).values())
    for shard in open_set(several).shards:
        tokens = np.load(tmp_path / f"{shard.name}.npy", mmap_mode="r")
        lengths = np.load(tmp_path / f"{shard.name}.lengths.npy")
        assert tokens.shape == (lengths.sum(), 32) and len(lengths) == shard.samples
        for each in np.split(tokens, np.cumsum(lengths)[:-1]):
            np.testing.assert_allclose(each, next(wanted), atol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "none"])
def test_parquet_has_the_metadata(
    pool: str, trained: Trained, several: Path, tmp_path: Path
) -> None:
    assert write(trained, several, tmp_path, "--format", "parquet", "--pool", pool) == 0
    table = pyarrow.parquet.read_table(tmp_path)  # the whole folder
    wanted = expected(trained, several)
    assert table["key"].to_pylist() == list(wanted)
    for row, features_of in zip(table["feature"].to_pylist(), wanted.values(), strict=True):
        value = features_of if pool == "none" else features_of.mean(0)
        np.testing.assert_allclose(np.array(row), value, atol=1e-5)
    metas = [
        json.loads(members["json"]) for _, members in read_samples(open_set(several), ["json"])
    ]
    assert table["label"].to_pylist() == [meta["label"] for meta in metas]
    assert set(table.column_names) == {"key", "feature", *metas[0]}


def test_types_of_metadata() -> None:
    metas = [{"a": 1, "b": "x", "c": 1, "d": None, "key": True}, {"a": 2, "c": 0.5, "e": [1, "ö"]}]
    columns = Columns.of(metas)
    assert columns.types == {"a": int, "b": str, "c": float, "e": object, "key": bool}
    values = {name: columns.values(name, metas) for name in columns.types}
    assert values == {
        "a": [1, 2],
        "b": ["x", None],
        "c": [1.0, 0.5],
        "e": [None, '[1, "ö"]'],
        "key": [True, None],
    }
    assert Columns.of([{"a": 1}, {"a": "1"}]).values("a", [{"a": "1"}]) == ['"1"']


def test_the_header_of_an_array_has_room_for_any_number(tmp_path: Path) -> None:
    with NpyTarget(tmp_path / "a.npy", "none") as target:
        for i in range(3):
            rows = [np.full((i * 40, 2), i, dtype=np.float32), np.ones((1, 2), dtype=np.float32)]
            target.add(["x", "y"], rows, [{}, {}])
        assert not (tmp_path / "a.npy").exists()
        target.finish()
    assert np.load(tmp_path / "a.npy").shape == (123, 2)
    with NpyTarget(tmp_path / "b.npy", "mean") as target:
        target.finish()
    assert np.load(tmp_path / "b.npy").shape == (0, 0)
    assert not list(tmp_path.glob("*.tmp"))


# ------------------------------------------------------------------------------- resume and ranks


def test_finished_shards_are_skipped(
    trained: Trained,
    several: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shards = open_set(several).shards
    assert write(trained, several, tmp_path / "whole") == 0
    original, calls = features.encode, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(features, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(trained, several, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert f"{shards[0].name}.npy" in names and f"{shards[1].name}.npy" not in names
    assert not [name for name in names if name.endswith(".tmp")]
    capsys.readouterr()
    assert write(trained, several, tmp_path / "out") == 0
    assert len(calls) == len(shards) + 1, "a finished shard was encoded again"
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_ranks_divide_the_shards(trained: Trained, several: Path, tmp_path: Path) -> None:
    assert write(trained, several, tmp_path / "whole") == 0
    words = ["features", str(trained.root), str(several), str(tmp_path / "out")]
    words += ["--modality", "speech", "--layer", "1", "--nproc", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "d2v_ds", *words],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    number = len(open_set(several).shards)
    assert f"rank 0 of 2, {tmp_path / 'out'}: {-(-number // 2)} shards" in done.stdout
    assert done.stdout.endswith(f"out: {number} shards, 50 of 50 samples\n")
    one, two = content(tmp_path / "whole"), content(tmp_path / "out")
    assert one.keys() == two.keys()
    for name in one:
        if name.endswith(".npy"):  # sums depend on the number of threads
            rows = np.load(tmp_path / "out" / name)
            np.testing.assert_allclose(rows, np.load(tmp_path / "whole" / name), atol=1e-5)
        else:
            assert one[name] == two[name]


def test_ranks_of_a_launcher_write_their_own_shards(
    trained: Trained,
    several: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert write(trained, several, tmp_path) == 0
    shards = open_set(several).shards
    assert {path.stem for path in tmp_path.glob("*.npy")} == {s.name for s in shards[1::2]}
    assert "rank 1 of 2" in capsys.readouterr().out
    assert write(trained, several, tmp_path, "--nproc", "2") == 2
    assert "a launcher has already started 2 ranks. Omit" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- bad samples


@pytest.fixture
def damaged(several: Path, tmp_path: Path) -> Path:
    """The set with three bad samples: changed bytes, no audio, and a recording that is too
    short."""
    root = tmp_path / "damaged"
    shutil.copytree(several, root)
    shards = open_set(root)
    with shards.tar(shards.shards[0]).open("r+b") as tar:
        data = tar.read()
        tar.seek(data.index(b"fLaC") + 300)
        tar.write(b"\xff" * 8)
    good = {key: members for key, members in read_samples(open_set(several), ("flac", "json"))}
    first = next(iter(good.values()))["flac"]
    short = np.random.default_rng(0).integers(-9000, 9000, 200).astype(np.int16)
    from d2v_ds.data.audio import encode_flac

    with ShardWriter(root, "speech-000099", shards.fields) as writer:
        for key, data in (("fine", first), ("none", b"no"), ("short", encode_flac(short, 16_000))):
            members = {"json": b'{"label": "0"}', "flac": data}
            writer.add(key, [members[name] for name in shards.fields], 200)
        entry = writer.finish()
    both = ShardSet(
        *(root, "speech", "frames", 16_000, shards.fields, (*shards.shards, entry)),
    )
    (root / INDEX_FILE).write_text(set_json(both))
    return root


@pytest.mark.parametrize("form", ["npy", "parquet"])
def test_bad_samples_are_left_out_and_named(
    form: str,
    trained: Trained,
    damaged: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert write(trained, damaged, tmp_path / "out", "--format", form) == 0
    printed = capsys.readouterr().out
    assert "50 of 53 samples\n3 samples cannot be used" in printed
    for reason in (
        r"has changed: the index has another checksum",
        r"speech-000099.tar, sample 'none': is not audio",
        r"speech-000099.tar, sample 'short': is 200 audio samples long, but the model needs",
    ):
        assert re.search(reason, printed), reason
    assert "speech-000099." + form + ": 1 samples, 2 others cannot be used" in printed
    if form == "npy":
        assert (tmp_path / "out/speech-000099.keys.txt").read_text() == "fine\n"
        assert len(np.load(tmp_path / "out/speech-000099.npy")) == 1
    assert write(trained, damaged, tmp_path / "out", "--format", form) == 0
    assert "3 samples cannot be used" in capsys.readouterr().out, "a later start does not tell"


# ------------------------------------------------------------------------------------------- errors


def test_other_settings_are_refused(
    trained: Trained, several: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert write(trained, several, tmp_path) == 0

    def refused(*words: str, source: Path = trained.root, shards: Path = several) -> str:
        command = ["features", str(source), str(shards), str(tmp_path), "--modality", "speech"]
        assert cli.main([*command, "--layer", "1", *words]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "give another folder" in message
        return message

    assert "has features with layer=1, of" in refused("--layer", "2")
    assert "has features with weights=student, model" in refused("--weights", "teacher").replace(
        "another ", ""
    )
    assert "pool=mean" in refused("--pool", "none") and "format=npy" in refused(
        "--format", "parquet"
    )
    assert "another model" in refused(source=trained.run.folder.checkpoint(1))
    assert "another set" in refused(shards=trained.sets["speech"])
    for damaged in ("{", "[1]"):
        kept = (tmp_path / "_features.json").read_text()
        (tmp_path / "_features.json").write_text(damaged)
        assert "_features.json: is damaged" in refused()
        (tmp_path / "_features.json").write_text(kept)
    moved = shutil.copytree(several, tmp_path / "moved")
    assert write(trained, moved, tmp_path, "--batch", "2") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layer", "3"], "--layer: the encoder has 2 blocks, got 3"),
        (["--modality", "smell"], "no 'smell' in this run"),
        (["--modality", "text"], "holds speech, but text is required"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str],
    message: str,
    trained: Trained,
    several: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert write(trained, several, tmp_path / "out", *words) == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.count("\n") == 1 and not output.out
    assert not (tmp_path / "out").exists()


def test_a_missing_package_and_a_file_in_the_way(
    trained: Trained,
    several: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    assert write(trained, several, tmp_path / "file") == 2
    assert "file: cannot be written (" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert write(trained, several, tmp_path / "out", "--format", "parquet") == 2
    assert "pip install 'd2v-ds[parquet]'" in capsys.readouterr().err


def test_the_report_of_one_rank(trained: Trained, several: Path, tmp_path: Path) -> None:
    request = Request(trained.root, str(several), tmp_path, 1, modality="speech")
    number = len(open_set(several).shards)
    shown = features.report(request, World(rank=1, size=number, address="here"))
    assert shown.startswith(f"rank 1 of {number}, {tmp_path}: 1 shards, ")
    assert os.listdir(tmp_path) == []
