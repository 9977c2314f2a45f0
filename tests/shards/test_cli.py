"""The command line of d2v-shards: help, exit codes, bad options, imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from d2v_ds import exit_codes
from shards import samples
from shards.cli import COMMANDS, FAMILIES, main, parser

SPEECH = samples.path("speech")


def convert(*arguments: object) -> int:
    return main(["speech", *map(str, arguments)])


def help_of(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--help"])
    assert stopped.value.code == exit_codes.FINISHED
    return capsys.readouterr().out


def test_help_begins_with_what_the_tool_does(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys=capsys)
    assert text.split("\n\n")[1].startswith("Converts corpora (speech, images, text) to shard sets")
    assert text.rstrip().endswith(exit_codes.table(exit_codes.OF_D2V_SHARDS))
    for name in (*FAMILIES, *COMMANDS, "merge", "index", "verify", "stats"):
        assert f"\n    {name}" in text


@pytest.mark.parametrize("family", FAMILIES)
def test_help_of_a_family(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(family, capsys=capsys)
    assert text.split("\n\n")[1].startswith("Converts ")
    assert "\nlayouts:\n" in text and text.rstrip().endswith(
        exit_codes.table(exit_codes.OF_D2V_SHARDS)
    )
    assert max(map(len, text.splitlines())) <= 100


def test_every_option_has_a_help_text() -> None:
    (commands,) = (a for a in parser()._actions if a.choices)
    assert commands.choices
    for name, command in dict(commands.choices).items():  # type: ignore[call-overload]
        for action in command._actions:
            assert action.help, f"{name}: {action.dest}"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rate", "16k"], "16k: expected an integer from 1000 to 192000"),
        (["--jobs", "0"], "0: expected an integer from 1"),
        (["--shard-size", "big"], "'big' is not a size; give one such as 256MB"),
        (["--max-bad", "200%"], "200%: expected a fraction, for example 1% or 0.01"),
        (["--join-seconds", "0"], "0: expected a number from 0.1"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        convert("in", "out", *arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom shards.cli import main\n"
        "try: main(['speech', '--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'soundfile', 'webdataset') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "SOURCE" in done.stdout and done.stdout.splitlines()[-1] == "[]"


def test_converting_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom shards.cli import main\n"
        f"main(['speech', {str(SPEECH / 'seen.tsv')!r}, {str(tmp_path / 'o')!r}, '-j1'])\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
