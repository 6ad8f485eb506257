"""Loss curves: they show the run that was, also one that was interrupted, diverged or has only begun."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from recipes.lib.plots import loss_curve_png, loss_curve_terminal, read_curve, smoothed


def line(step: int, loss: float | None = None, attempt: int = 1, **others: Any) -> dict[str, Any]:
    loss = 8.0 / step if loss is None else loss
    return {"attempt": attempt, "step": step, "steps": 100, "loss": loss, "tokens_per_second": 1e4, **others}


def metrics(tmp_path: Path, lines: list[dict[str, Any]], torn: str = "") -> Path:
    folder = tmp_path / "ch4_fsdp-20260102-030405"
    folder.mkdir()
    file = folder / "metrics.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in lines) + torn, encoding="utf-8")
    return file


RUNS: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "one": [line(1)],
    "few": [line(step) for step in (1, 2, 3)],
    "long": [line(step) for step in range(1, 2000)],
    "constant": [line(step, 2.0) for step in range(1, 50)],
    "interrupted": [line(step) for step in range(1, 60)] + [line(step, attempt=2) for step in range(51, 90)],
    "diverged": [line(step) for step in range(1, 30)] + [line(30, math.nan), line(31, math.inf)],
    "only nan": [line(1, math.nan)],
    "without rates": [{"attempt": 1, "step": step, "loss": 1.0 / step} for step in range(1, 9)],
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("error")
def test_every_kind_of_run_makes_a_picture_and_a_text(name: str, tmp_path: Path) -> None:
    file, picture = metrics(tmp_path, RUNS[name]), tmp_path / "loss.png"
    loss_curve_png(file, picture)
    with Image.open(picture) as image:
        assert image.size == (1200, 675)
        assert len(set(image.convert("L").tobytes())) > 5
    for width, height in ((80, 16), (100, 24), (20, 3), (30, 5)):
        rows = loss_curve_terminal(file, width, height).splitlines()
        assert len(rows) <= height
        assert all(len(row) <= width for row in rows)


def test_of_a_step_that_two_attempts_ran_the_later_one_counts(tmp_path: Path) -> None:
    first = [line(step, 5.0) for step in range(1, 8)]
    second = [line(step, 3.0, attempt=2) for step in range(5, 10)]
    curve = read_curve(metrics(tmp_path, first + second))
    assert curve.steps.tolist() == list(range(1, 10))
    assert curve.loss.tolist() == [5.0] * 4 + [3.0] * 5
    assert curve.attempts == [(2, 5)]


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    curve = read_curve(metrics(tmp_path, [line(1), line(2)], torn='{"attempt": 1, "step": 3, "lo'))
    assert curve.steps.tolist() == [1, 2]


def test_the_text_falls_from_the_upper_left_to_the_lower_right(tmp_path: Path) -> None:
    rows = loss_curve_terminal(
        metrics(tmp_path, [line(s, 11.0 - s) for s in range(1, 11)]), 60, 12
    ).splitlines()
    assert rows[0] == "loss 10.000 → 1.000"
    canvas = [row.partition("│")[2] for row in rows[1:-1]]
    begins = [len(row) - len(row.lstrip()) for row in canvas]
    assert all(canvas)
    assert begins == sorted(set(begins))
    assert begins[0] == 0
    assert len(canvas[-1]) == max(map(len, canvas)) == 60 - len(" 10.000│")
    assert rows[1].startswith(" 10.000│")
    assert rows[-2].startswith("  1.000│")
    assert rows[-1].endswith("10")
    assert "└step 1─" in rows[-1]


def test_steps_without_a_finite_loss_are_told(tmp_path: Path) -> None:
    text = loss_curve_terminal(metrics(tmp_path, RUNS["diverged"]), 80, 10)
    assert text.splitlines()[0].endswith("(2 steps without a finite loss)")


def test_smoothing_keeps_ends_and_level_and_calms_noise() -> None:
    noise = np.random.default_rng(0).normal(3.0, 0.1, 400)
    calm = smoothed(noise)
    assert (calm[0], calm[-1]) == pytest.approx((noise[0], noise[-1]))
    assert calm[10:-10].std() < 0.3 * noise.std()
    ramp = np.linspace(8, 2, 400)
    assert np.allclose(smoothed(ramp), ramp), "a straight line must not lag"
    jump = np.repeat([8.0, 2.0], 200)
    changed = np.flatnonzero(smoothed(jump) != jump)
    assert (changed.min(), changed.max()) == (190, 209), (
        "what lies farther away than the window must not count"
    )


def test_the_text_needs_no_matplotlib(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; from recipes.lib.plots import loss_curve_terminal;"
        "loss_curve_terminal(pathlib.Path(sys.argv[1]), 80, 16);"
        "print(*{'matplotlib', 'torch'} & set(sys.modules))"
    )
    file = metrics(tmp_path, RUNS["long"])
    command = [sys.executable, "-c", script, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == ""
