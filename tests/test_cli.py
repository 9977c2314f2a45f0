"""The command d2v-ds: help, exit codes, the order of arguments, and fast errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from d2v_ds import cli, exit_codes, recipes
from d2v_ds.errors import UserError
from tests.config.helpers import modules_after

COMMANDS = [
    *("recipes", "settings", "show", "train", "finetune"),
    *("status", "evaluate", "features", "export", "import"),
]


def help_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        cli.main([*words, "--help"])
    assert exit_.value.code == 0
    return capsys.readouterr().out


# -------------------------------------------------------------------------------------------- help


def test_help_begins_with_the_purpose_and_ends_with_the_exit_codes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    usage, purpose, *rest = help_of(capsys).split("\n\n")
    assert usage.startswith("usage: d2v-ds ")
    assert purpose.startswith("Pre-trains data2vec 1.0 and 2.0 on speech, images and text")
    assert rest[-1] == exit_codes.table(exit_codes.OF_D2V_DS) + "\n"
    for code, meaning in exit_codes.OF_D2V_DS.items():
        assert re.search(rf"^  {code} +{re.escape(meaning)}$", rest[-1], re.M)
    assert re.findall(r"^    (\w+) +\w", help_of(capsys), re.M) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_has_a_help_text(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of(capsys, command)
    description = text.split("\n\n")[1]
    assert description[0].isupper() and description.endswith(".")
    options = re.split(r"^(?:positional arguments|options):$", text, flags=re.M)[1:]
    for entry in re.findall(r"^  \S.*(?:\n {4,}.*)*", "\n".join(options), re.M):
        assert re.search(r"\S(?:  +|\n +)\S", entry.strip()), f"{entry!r} has no help text"


def test_the_list_of_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == exit_codes.FINISHED
    groups = [group.splitlines() for group in capsys.readouterr().out.split("\n\n")]
    assert [title for title, *_ in groups] == [
        "pre-training (d2v-ds train):",
        "fine-tuning (d2v-ds finetune):",
    ]
    for (_, *lines), group in zip(groups, recipes.GROUPS.values(), strict=True):
        assert [line.split()[0] for line in lines] == list(group)
        assert all(line.endswith(".") for line in lines)


# -------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "speech_tiny", "optim.lrr=1"], "optim.lrr: no such setting; did you mean 'lr'?"),
        (["show", "speech_tiny", "target.top_k=9"], "target.top_k: 9 exceeds model.depth=4"),
        (["settings", "optim.lrr"], "optim.lrr: no such setting; did you mean 'lr'?"),
        (["status", "/nowhere"], "/nowhere: "),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == exit_codes.BAD_INPUT == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith(f"d2v-ds: {message}")
    assert output.err.count("\n") == 1


def test_a_closed_output_pipe_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*arguments: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(cli, "list_recipes", closed)
    assert cli.main(["recipes"]) == exit_codes.FINISHED


# --------------------------------------------------------------------------------- command line


def test_settings_and_options_in_any_order(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "speech_tiny", "--nproc", "2", "a=1", "--new", "b.c=2"]
    arguments = cli.parse(words)
    assert arguments.overrides == ["a=1", "b.c=2"] and arguments.nproc == 2 and arguments.new
    for wrong in ([*words, "--newer"], ["status", "run", "a=1"], ["train"], []):
        with pytest.raises(SystemExit) as exit_:
            cli.parse(wrong)
        assert exit_.value.code == 2 and capsys.readouterr().err.startswith("usage: d2v-ds")


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_ranks_get_the_same_command_without_nproc(command: str) -> None:
    words = [command, "speech_tiny", "a=1", "--allow", "optim", "--allow", "run.seed", "--new"]
    arguments = cli.parse([*words, "--nproc", "2"])
    again = cli.parse(cli.train_arguments(command, arguments))
    assert vars(again) == vars(cli.parse(words)) | {"nproc": None}


def test_ranks_of_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert cli.launched_ranks() is None
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "3")
    assert cli.launched_ranks() == 3
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert cli.launched_ranks() == 4
    with pytest.raises(UserError, match=r"has already started 4 ranks\. Omit"):
        cli.train_run(cli.parse(["train", "speech_tiny", "--nproc", "2"]))


@pytest.mark.parametrize(("visible", "number"), [("", 0), ("-1", 0), ("0", 1), ("2,3", 2)])
def test_visible_gpus(visible: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cli.gpus() == number


def test_gpus_by_the_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.gpus() == 0  # no driver
    for body, number in [("echo 'GPU 0: A'; echo 'GPU 1: A'", 2), ("echo 'GPU 0: A'; exit 9", 0)]:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        assert cli.gpus() == number


# ---------------------------------------------------------------------------------------- imports


@pytest.mark.parametrize(
    "code",
    [
        "from d2v_ds import cli; cli.main(['recipes'])",
        "from d2v_ds import cli; assert cli.main(['train', 'speech_tiny', 'a.b=1']) == 2",
        "from d2v_ds import cli; assert cli.main(['train', 'speech_tiny']) == 2",
        "from d2v_ds import cli; assert cli.main(['status', '/nowhere']) == 2",
    ],
)
def test_mistakes_and_listings_import_neither_torch_nor_deepspeed(code: str) -> None:
    modules = modules_after(code)
    assert "torch" not in modules and "deepspeed" not in modules


def test_show_does_not_wait_for_deepspeed() -> None:
    modules = modules_after("from d2v_ds import cli; cli.main(['show', 'speech_tiny'])")
    assert "torch" in modules and "deepspeed" not in modules
