"""What `scontrol requeue` means by how it ends. Its words and statuses are played by a script of its name."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from launcher import ownjob, slurm

IS_THERE = '[ "$1" = ping ] && echo "Slurmctld(primary) is UP"'


def scontrol_that(folder: Path, monkeypatch: pytest.MonkeyPatch, does: str) -> Path:
    """Puts it first on PATH; gives the file to which it writes how it was called."""
    calls = folder / "calls"
    script = folder / "scontrol"
    script.write_text(f"#!/bin/sh\necho \"$@\" >> '{calls}'\n{does}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return calls


def test_ended_by_the_jobs_own_sigterm_it_has_done_its_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As seen with Slurm 22.05: the signal was there before scontrol could report that the job was requeued."""
    calls = scontrol_that(tmp_path, monkeypatch, f"{IS_THERE} || kill -TERM $$")
    ownjob.requeue("1", (), time.time() + 5, print)
    assert calls.read_text().splitlines()[0] == "requeue 1"


def test_a_refusal_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says_no = 'echo "Requested operation is presently disabled" >&2; exit 1'
    scontrol_that(tmp_path, monkeypatch, f"{IS_THERE} || {{ {says_no}; }}")
    with pytest.raises(slurm.SlurmError, match="presently disabled"):
        ownjob.requeue("1", (), time.time() + 5, print)
