"""What all tests share: one box (Slurm on this machine) for the whole session."""

from __future__ import annotations

import os
import re

import psutil
import pytest

from launcher import box as boxes

_NAME_VARIABLE = "TEST_BOX_NAME"


def pytest_configure(config: pytest.Config) -> None:
    # The first process names the box; pytest-xdist's workers inherit the environment and so share it.
    os.environ.setdefault(_NAME_VARIABLE, f"test-{os.getpid()}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    name = os.environ[_NAME_VARIABLE]
    if not hasattr(session.config, "workerinput") and boxes.recorded_shape(name):
        boxes.down(name)


@pytest.fixture(scope="session")
def box() -> boxes.Box:
    """A running box of four nodes, one for all tests of the session and all workers.

    Tests that run at the same time share it: look at your own jobs only, and leave its nodes alone. Where no
    box can run, the test is skipped with the reason, or fails if the environment variable CI is set.
    """
    _clear_forgotten()
    try:
        return boxes.up(nodes=4, name=os.environ[_NAME_VARIABLE], gpus=0)
    except boxes.BoxUnavailable as reason:
        if os.environ.get("CI"):
            pytest.fail(f"no box: {reason}")
        pytest.skip(f"no box: {reason}")


def _clear_forgotten() -> None:
    """Bring down the boxes of test sessions that were killed before they could."""
    for name in boxes.names():
        session = re.fullmatch(r"test-(\d+)", name)
        if session and not psutil.pid_exists(int(session[1])):
            boxes.down(name)
