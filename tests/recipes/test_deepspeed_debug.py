"""`ch5_debug` and `ch5_deepspeed_pipeline` as one starts them: faults that are named, and a picture that is true."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from recipes.ch5.debug_args import FAULTS
from recipes.ch5.deepspeed_pipeline import order_of
from recipes.ch5.deepspeed_pipeline_args import DeepSpeedPipelineArgs
from recipes.ch5.faults import HAPPENINGS
from recipes.lib.arguments import ArgumentError
from recipes.lib.pipeline_orders import one_forward_one_backward
from tests.recipes.test_training import metrics_of, start

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
NAMED = {
    "batch_sizes": "train_batch_size=13, and 12 would be right",
    "parameter_outside": "aside.weight",
    "overflow_loop": "rank 1",
    "refused_optimizer": "SGD under ZeRO, without zero_allow_untested_optimizer",
    "missing_compiler": "ninja, for the operator cpu_adam",
}


def test_every_fault_happens_and_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", *TORCHRUN, "recipes.ch5.debug", "device=cpu"],
        cwd=Path(__file__).parents[2], env={**os.environ, "RUN_DIR": str(run), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert {line["fault"]: line["named"] for line in lines if line["kind"] == "measurement"} == NAMED
    assert tuple(HAPPENINGS) == FAULTS == tuple(NAMED)
    shown = (run / "results.txt").read_text()
    assert all(re.search(rf"^{fault}: ", shown, re.MULTILINE) for fault in FAULTS)


def test_a_pipeline_trains_saves_and_draws_itself(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [*TORCHRUN, "recipes.ch5.deepspeed_pipeline", "steps=2", "batch_size=3"]
    done = start(words, tmp_path, RUN_DIR=str(run))
    assert done.returncode == 0, done.stderr[-4000:]
    assert [line["step"] for line in metrics_of(run)] == [1, 2]
    assert (run / "checkpoints" / "step-00000002" / "manifest.json").is_file()
    report = json.loads((run / "pipeline.json").read_text())
    assert (report["ranks"], report["microbatches"]) == (2, 3)
    assert sorted(action for _, action, _, _ in report["spans"]) == sorted(
        f"{stage}{kind}{number}" for stage in range(2) for kind in "FB" for number in range(3)
    )
    with Image.open(run / "pipeline.png") as image:
        assert len(set(image.convert("L").tobytes())) > 5


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 2), (2, 1), (2, 8), (4, 3), (4, 8)])
def test_deepspeeds_order_is_1f1b(stages: int, microbatches: int) -> None:
    from deepspeed.runtime.pipe import schedule

    ours = one_forward_one_backward(stages, microbatches)
    assert order_of(schedule, microbatches, stages) == ours


REFUSED: dict[str, dict[str, Any]] = {
    "dtype": {"dtype": "float64"},
    "pipeline_parallel": {"pipeline_parallel": 5},  # of a model with four layers
    "compile": {"compile": True},
    "init_from": {"init_from": "/weights"},
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_a_pipeline_cannot_do_is_one_line_that_names_the_key(key: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        DeepSpeedPipelineArgs(**REFUSED[key])
    assert caught.value.key == key
    assert "\n" not in str(caught.value)


def test_ranks_that_are_no_whole_pipelines_are_refused() -> None:
    args = DeepSpeedPipelineArgs(pipeline_parallel=2)
    args.check_ranks(4, 4)
    with pytest.raises(ArgumentError, match="pipeline_parallel=2: wants a divisor of 3"):
        args.check_ranks(3, 3)
