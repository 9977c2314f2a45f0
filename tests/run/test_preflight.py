"""Checks before training: one clear line per mistake, mostly without torch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from d2v_ds import recipes
from d2v_ds.cli import main
from d2v_ds.config import Config
from d2v_ds.errors import UserError
from d2v_ds.run.preflight import check, leave_token
from d2v_ds.run.run_folder import RunFolder
from tests.helpers import joint_sets


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return joint_sets.write_images(tmp_path_factory.mktemp("sets") / "vision", 8)


def config(shards: Path, root: Path, *settings: str) -> Config:
    return recipes.load("vision_tiny", [f"data.shards={shards}", f"run.dir={root}", *settings])


def test_a_valid_run_passes(shards: Path, tmp_path: Path) -> None:
    run = config(shards, tmp_path / "run")
    for ranks in (1, 2, run.batch.micro_batches):
        check(run, ranks)
    assert not (tmp_path / "run").exists(), "a check must not create the folder"


@pytest.mark.parametrize(
    ("settings", "ranks", "message"),
    [
        ([], 3, r"batch\.micro_batches: 4 is not divisible by 3 ranks"),
        (["engine.config=local"], 2, r"engine\.config: local runs on one rank, but this run has"),
        (["engine.config=zero7"], 1, r"engine\.config: 'zero7' is neither a JSON file"),
        (["data.shards="], 1, r"data\.shards: must name a shard set"),
        (["data.shards=/nowhere"], 1, "/nowhere: no such shard set"),
        (["data.shards=https://h/{0..1}.tar"], 4, "2 tars without an index for 4 ranks"),
        (["modality.vision=null"], 1, "modality: "),
    ],
)
def test_mistakes_are_named(
    shards: Path, tmp_path: Path, settings: list[str], ranks: int, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check(config(shards, tmp_path / "run", *settings), ranks)
    assert "\n" not in str(caught.value)


def test_a_set_of_another_modality(shards: Path, tmp_path: Path) -> None:
    text = recipes.load("text_tiny", [f"data.shards={shards}", f"run.dir={tmp_path}"])
    with pytest.raises(UserError, match="holds vision, but text is required"):
        check(text, 1)


def test_run_folders_that_cannot_be_used(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for folder, message in {
        tmp_path / "file": r"file is a file, not a folder",
        tmp_path / "file/below/run": r"file is a file, not a folder",
        tmp_path / "link": r"link is a link to nothing",
        tmp_path / ("x" * 300): r"cannot be written \(File name too long\); choose another folder",
        Path("/proc/d2v/run"): r"/proc/d2v/run cannot be written \(.*\); choose another folder",
    }.items():
        with pytest.raises(UserError, match=rf"^run\.dir: .*{message}") as caught:
            check(config(shards, folder), 1)
        assert "\n" not in str(caught.value)
        if "link" not in folder.name:
            with pytest.raises(UserError, match=r"^run\.dir: .* cannot be written"):
                leave_token(RunFolder(folder))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/STOP").touch()
    with pytest.raises(UserError, match=r"STOP: this file stops the run; remove it to resume"):
        check(config(shards, tmp_path / "run"), 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_folder_without_permission(shards: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match=r"run\.dir: .* \(Permission denied\)"):
            check(config(shards, tmp_path / "run"), 1)
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (["data.shards='pipe:curl -H \"Authorization: ***\" https://h/{}'"], "data.shards"),
        (["data.shards={vision: 'https://***@h/set'}"], "data.shards.vision"),
        (["data.valid=https://h/x?sig=***"], "data.valid"),
        (["init=https://***@h"], "init"),
    ],
)
def test_a_masked_secret_must_be_given_again(
    shards: Path, tmp_path: Path, settings: list[str], name: str
) -> None:
    with pytest.raises(UserError, match=r"has \*\*\* in place of a secret") as caught:
        check(config(shards, tmp_path / "run", *settings), 1)
    assert str(caught.value).startswith(f"{name}: ") and f"again: {name}=" in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.nosuch=1", "model.nosuch: "),
        ("model.heads=7", "model: "),
        ("modality.vision.nosuch=1", "modality.vision.nosuch: "),
        ("modality.vision.mask.prob=1.5", "modality.vision.mask.prob: must be in (0, 1), got 1.5"),
        ("modality.vision.decoder.groups=7", "modality.vision.decoder.groups: 7 does not divide"),
        ("target.top_k=99", "target.top_k: 99 exceeds model.depth"),
    ],
)
def test_the_check_command_covers_settings_that_need_torch(
    shards: Path, tmp_path: Path, setting: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "vision_tiny", f"data.shards={shards}", f"run.dir={tmp_path / 'run'}"]
    assert main([*words, "--check"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run'}\n"
    assert main([*words, setting, "--check"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"d2v-ds: {message}") and captured.out == ""
