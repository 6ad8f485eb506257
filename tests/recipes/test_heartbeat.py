"""The sign of life of a rank: always one whole line, written often enough and not too often."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from recipes.lib import heartbeat
from recipes.lib.heartbeat import Heartbeat


def line_of(folder: Path, rank: int) -> dict[str, Any]:
    """What a watcher reads."""
    text = (folder / "heartbeat" / f"rank-{rank}").read_bytes()
    assert len(text) == heartbeat.LINE_BYTES
    assert text.endswith(b"\n")
    assert text.count(b"\n") == 1
    return dict(json.loads(text))


def test_a_line_says_who_where_and_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat.time, "time", lambda: 1000.5)
    Heartbeat(tmp_path, 3).beat(12, "step")
    line = line_of(tmp_path, 3)
    assert line.pop("host")
    assert line == {"step": 12, "time": 1000.5, "phase": "step", "pid": os.getpid()}


def test_a_line_says_slurms_name_of_the_node_and_the_ranks_own_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hostname may differ from what Slurm calls the node, and that name is the one to drain."""
    monkeypatch.setenv("SLURMD_NODENAME", "gpu-017")
    Heartbeat(tmp_path, 3).beat(12, "step", 0.12345678)
    line = line_of(tmp_path, 3)
    assert (line["host"], line["own"]) == ("gpu-017", 0.123457)


def test_a_new_phase_is_written_at_once_and_a_step_at_most_twice_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(heartbeat.time, "time", lambda: now)
    beats = Heartbeat(tmp_path, 0)
    beats.beat(0, "start")
    beats.beat(1, "step")
    now = 1000.4
    beats.beat(2, "step")
    assert line_of(tmp_path, 0)["step"] == 1
    now = 1000.5
    beats.beat(3, "step")
    assert line_of(tmp_path, 0)["step"] == 3
    beats.beat(3, "save")
    assert line_of(tmp_path, 0)["phase"] == "save"
    # A clock that was set back must not silence it for hours.
    now = 400.0
    beats.beat(4, "save")
    assert line_of(tmp_path, 0)["step"] == 4


def test_without_an_attempt_folder_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Heartbeat(None, 0).beat(1, "step")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_stops_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "heartbeat").write_text("a file is in the way")
    beats = Heartbeat(tmp_path, 0)
    beats.beat(1, "step")
    beats.beat(2, "save")
    assert capsys.readouterr().err.count("no heartbeat from here on") == 1
