"""A real TensorBoard on a run folder, opened in a real browser."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from d2v_ds.distributed.launcher import free_port
from d2v_ds.pretrain_report import PretrainReport
from d2v_ds.run.run_folder import RunFolder
from d2v_ds.telemetry.metrics import MetricsWriter
from d2v_ds.telemetry.pictures import masked_picture


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a TensorBoard that shows a run that was killed and resumed."""
    run = RunFolder(tmp_path_factory.mktemp("board") / "run")
    with MetricsWriter(run, PretrainReport.tags) as writer:
        for step in range(1, 8):
            writer.scalars(step, step * 8, {"loss": 5.0 - step, "lr": 1e-3})
        writer.text("configuration", "optim:\n  lr: 0.001", 0)
        mel = np.random.default_rng(0).standard_normal((200, 40))
        writer.image("mask/speech", masked_picture(mel, np.arange(100) % 2 == 0), 5)
    with MetricsWriter(
        run, PretrainReport.tags, step=5
    ) as writer:  # as after a kill at step 7 with a checkpoint at step 5
        for step in range(6, 11):
            writer.scalars(step, step * 8, {"loss": 50.0 + step, "lr": 1e-3})
    port = free_port()
    program = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run.tensorboard)]
    process = subprocess.Popen(
        [*program, "--port", str(port), "--host", "127.0.0.1", "--load_fast=false"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 90
    while not loaded(address):
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline, "TensorBoard does not answer"
        time.sleep(0.3)
    yield address
    process.terminate()
    process.communicate(timeout=30)


def loaded(address: str) -> bool:
    try:
        return bool(get(address, "/data/plugin/scalars/tags"))
    except (urllib.error.URLError, ConnectionError):
        return False


def get(address: str, path: str) -> dict[str, dict[str, object]]:
    with urllib.request.urlopen(address + path, timeout=10) as answer:
        found: dict[str, dict[str, object]] = json.load(answer)
        return found


def test_a_resumed_run_is_one_curve(board: str) -> None:
    assert {"loss/total", "optim/lr"} <= set(get(board, "/data/plugin/scalars/tags")["."])
    points = get(board, "/data/plugin/scalars/scalars?run=.&tag=loss%2Ftotal")
    values = {step: value for _, step, value in points}  # type: ignore[misc]
    assert list(values) == list(range(1, 11)), "steps overlap or are missing"
    assert values == {s: 5.0 - s if s <= 5 else 50.0 + s for s in range(1, 11)}


def test_the_picture_and_the_configuration_are_shown(board: str) -> None:
    assert "mask/speech" in get(board, "/data/plugin/images/tags")["."]
    assert "configuration/text_summary" in get(board, "/data/plugin/text/tags")["."]


def test_a_browser_shows_the_curves(board: str, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        assert "D2V_REQUIRE_BROWSER" not in os.environ, "a browser is required here"
        pytest.skip("needs chromium or google-chrome")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    quiet = "--disable-background-networking --disable-component-update --disable-sync"
    done = subprocess.run(
        [
            browser,
            *flags.split(),
            *quiet.split(),
            f"--user-data-dir={tmp_path}",
            "--window-size=1600,1200",
            "--virtual-time-budget=30000",
            "--dump-dom",
            f"{board}/#timeseries",
        ],
        capture_output=True,
        text=True,
        timeout=150,
    )
    # TensorBoard draws the cards of the first two groups and only the headings of the others.
    for text in ("loss/total", "mask/speech", ">optim<"):
        assert text in done.stdout, f"{text} is not on the page"
