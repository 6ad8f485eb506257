"""One controller at a time works on a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher import ownership
from launcher.ownership import Owner
from launcher.spec import UserError

FIRST = Owner("box", "7", "n1", 100, 1.0)
SECOND = Owner("box", "8", "n2", 200, 2.0)


def never(owner: Owner) -> bool:
    raise AssertionError(f"{owner} was asked for")


def test_the_first_one_owns_it_until_it_lets_go(tmp_path: Path) -> None:
    assert ownership.acquire(tmp_path, FIRST, never) is None
    assert ownership.read(tmp_path) == FIRST
    ownership.release(tmp_path, SECOND)
    assert ownership.read(tmp_path) == FIRST, "somebody else's release took it away"
    ownership.release(tmp_path, FIRST)
    assert list(tmp_path.iterdir()) == []


def test_the_second_one_gets_one_line_while_the_first_lives(tmp_path: Path) -> None:
    ownership.acquire(tmp_path, FIRST, never)
    with pytest.raises(UserError) as refused:
        ownership.acquire(tmp_path, SECOND, lambda owner: owner == FIRST)
    assert str(refused.value) == f"{tmp_path.name}: job 7 works on this run; cancel it first, or wait for it"
    assert ownership.read(tmp_path) == FIRST
    assert len(list(tmp_path.iterdir())) == 1


def test_a_dead_owner_is_replaced(tmp_path: Path) -> None:
    ownership.acquire(tmp_path, FIRST, never)
    assert ownership.acquire(tmp_path, SECOND, lambda owner: False) == FIRST
    assert ownership.read(tmp_path) == SECOND


def test_a_requeued_job_is_its_own_heir(tmp_path: Path) -> None:
    ownership.acquire(tmp_path, FIRST, never)
    again = Owner("box", "7", "n3", 300, 9.0)
    assert ownership.acquire(tmp_path, again, never) is None
    assert ownership.read(tmp_path) == again


def test_the_same_process_number_on_another_machine_is_another_owner(tmp_path: Path) -> None:
    here, there = Owner("", "", "a", 100, 1.0), Owner("", "", "b", 100, 1.0)
    ownership.acquire(tmp_path, here, never)
    with pytest.raises(UserError, match="process 100 on a works on this run"):
        ownership.acquire(tmp_path, there, lambda owner: True)


def test_taking_away_a_stale_file_leaves_a_newer_owner_alone(tmp_path: Path) -> None:
    ownership.acquire(tmp_path, SECOND, never)
    ownership._remove(tmp_path, FIRST, Owner("box", "9", "n3", 300, 3.0))
    assert ownership.read(tmp_path) == SECOND
