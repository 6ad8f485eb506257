"""Captures through the production import, and what every check then says of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from checks import passive
from checks.expectations import Expectations
from checks.verdict import CheckResult

NOTHING_ASKED = Expectations()


def verdicts(
    paths: Sequence[Path], *checks: str, part: str = "", expected: Expectations = NOTHING_ASKED
) -> dict[str, CheckResult]:
    """By check, of captures that are one node's; all checks where none is named."""
    bundle, captured = passive.opened(paths, part)
    assert captured
    return {one.check: one for one in passive.look_at(bundle, expected, checks, part=True).results}


def judged(
    folder: Path, data: bytes | str, *checks: str, expected: Expectations = NOTHING_ASKED
) -> dict[str, CheckResult]:
    """The same of one capture that is written here first."""
    file = folder / "capture"
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return verdicts([file], *checks, expected=expected)
