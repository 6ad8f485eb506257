"""What all tests share: one box (Slurm on this machine) for the whole session, and the order of the files."""

from __future__ import annotations

import os
import re
from pathlib import Path

import psutil
import pytest

from launcher import box as boxes

_NAME_VARIABLE = "TEST_BOX_NAME"
LONGEST_FIRST = (
    "box_runs/test_conformance.py",
    "docs/test_commands_chapter_2.py",
    "box_runs/test_preflight_in_a_run.py",
    "docs/test_commands_chapter_1.py",
    "box_runs/test_conformance_of_nodes.py",
    "box_runs/test_every_way_to_start.py",
    "recipes/test_parity.py",
    "box_runs/test_conformance_of_stacks.py",
    "box_runs/test_life_of_a_run.py",
    "docs/test_commands_chapter_4.py",
    "docs/test_commands_readme.py",
    "box_runs/test_measuring_recipes.py",
    "docs/test_commands_chapter_3.py",
    "docs/test_commands_chapter_5.py",
    "recipes/test_megatron.py",
    "recipes/test_deepspeed.py",
    "recipes/test_deepspeed_moe.py",
    "recipes/test_pipeline_parity.py",
    "recipes/test_checkpoint.py",
    "recipes/test_by_hand.py",
    "recipes/test_measuring_recipes.py",
    "checks/test_active_on_nodes.py",
    "recipes/test_debug.py",
    "box_runs/test_survival_by_successors.py",
    "box_runs/test_survival_under_torchrun.py",
    "box_runs/test_stragglers.py",
    "recipes/test_bad_input.py",
    "recipes/test_first_chapter.py",
    "recipes/test_compare.py",
)
"""Files that take more than a minute on two busy cores, the longest (ten minutes) first. A worker of
pytest-xdist takes whole files in this order, so that none of them is left for one worker alone at the end."""


def pytest_configure(config: pytest.Config) -> None:
    # The first process names the box; pytest-xdist's workers inherit the environment and so share it.
    os.environ.setdefault(_NAME_VARIABLE, f"test-{os.getpid()}")
    # Thousands of processes of these tests import the modules of this tree: without their bytecode each compiles them
    # anew, a third of what a controller or a node's checks cost.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    place = {here / name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


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
