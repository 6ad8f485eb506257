"""Ranks wait for the address that rank 0 publishes; they find it soon, and say what was missing."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from launcher import rendezvous

ADDRESS = rendezvous.Endpoint("10.0.0.1", 40123)


def test_a_rank_that_comes_first_finds_the_address_soon_after_it_is_published(tmp_path: Path) -> None:
    path = tmp_path / "rendezvous" / "endpoint.json"
    published: list[float] = []

    def publish() -> None:
        published.append(time.monotonic())
        rendezvous.publish(path, ADDRESS)

    timer = threading.Timer(0.3, publish)
    timer.start()
    found = rendezvous.wait_for(path, deadline_seconds=250.0)
    late = time.monotonic() - published[0]
    timer.join()
    assert found == ADDRESS
    assert late < 5.0, "it looks every 0.5 s at least"


def test_a_rank_that_comes_last_does_not_wait(tmp_path: Path) -> None:
    rendezvous.publish(tmp_path / "endpoint.json", ADDRESS)
    assert rendezvous.wait_for(tmp_path / "endpoint.json", deadline_seconds=0.0) == ADDRESS


def test_looks_get_rarer_but_never_cost_more_than_a_twentieth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock of its own: ten minutes of waiting for nobody."""
    now, pauses = [0.0], list[float]()

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(rendezvous.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(rendezvous.time, "sleep", sleep)
    with pytest.raises(rendezvous.RendezvousError, match=r"rank 0 published no address in .* within 600 s"):
        rendezvous.wait_for(tmp_path / "endpoint.json", deadline_seconds=600.0)
    assert (min(pauses), max(pauses)) == (0.02, 0.5)
    assert len(pauses) < 1400, "a look every 0.02 s would be 30,000"
