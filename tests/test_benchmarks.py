"""No published figure is impossible: what benchmark files say is computed again from their own numbers."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

from recipes.lib.flops import flops_per_token, peak_flops
from recipes.lib.model_sizes import SIZES
from tests.benchmark_tables import problems, rows

ROOT = Path(__file__).resolve().parent.parent
RECORDS = sorted((ROOT / "benchmarks").glob("*.md"))
BESIDE_RECIPES = sorted((ROOT / "recipes").glob("ch*/benchmarks.md"))


def test_figures_are_looked_at() -> None:
    paths = (*RECORDS, *BESIDE_RECIPES)
    looked_at = {str(path.relative_to(ROOT)): len(list(rows(path.read_text()))) for path in paths}
    assert looked_at["benchmarks/llama_8b_h200_2026-11-21.md"] == 16
    assert looked_at["recipes/ch4/benchmarks.md"] >= 4


@pytest.mark.parametrize("path", [*RECORDS, *BESIDE_RECIPES], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_figure_is_possible_and_its_mfu_right(path: Path) -> None:
    assert problems(path.read_text()) == []


@pytest.mark.parametrize("path", BESIDE_RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_stands_beside_a_recipe_stands_in_the_record_that_it_links(path: Path) -> None:
    """One place decides a figure: the record. The page beside the recipe says the same, or it is wrong."""
    for row in rows(path.read_text()):
        (link,) = re.findall(r"\]\(([^)]+\.md)\)", " ".join(row.cells.values()))
        record = (path.parent / link).resolve()
        assert record in RECORDS, f"line {row.line}: {link} is no record"
        figure = re.match(r"[\d,.]+", row.cells["tokens/s per GPU"])
        assert figure is not None
        assert re.search(rf"\| {re.escape(figure[0])}[ |]", record.read_text()), (
            f"line {row.line}: {figure[0]}"
        )


AGAINST_TORCHTITAN = "llama_8b_against_torchtitan_2026-11-21"
SEVERAL = "several_h200_2026-11-22"


@pytest.mark.parametrize(
    ("folder", "files", "model", "sequence"),
    [
        ("llama_8b_h200_2026-11-21", "*", "llama_8b", 4096),
        (AGAINST_TORCHTITAN, "4k_*", "llama_8b", 4096),
        (AGAINST_TORCHTITAN, "8k_*", "llama_8b", 8192),
        ("planner_h200_2026-11-21", "8b_*_8k", "llama_8b", 8192),
        ("one_gpu_h200_2026-11-22", "*", "llama_1b", 4096),
        (SEVERAL, "4k_*", "llama_8b", 4096),
        (SEVERAL, "8k_*", "llama_8b", 8192),
    ],
)
def test_raw_metrics_hold_the_mfu_that_follows_from_them(
    folder: str, files: str, model: str, sequence: int
) -> None:
    """Every line of the committed metrics in bfloat16 on H200s."""
    peak = peak_flops("H200")
    assert peak is not None
    flops = flops_per_token(SIZES[model], sequence)
    found = sorted((ROOT / "benchmarks" / folder).glob(f"{files}.jsonl"))
    assert len(found) > 1
    for path in found:
        for line in map(json.loads, path.read_text().splitlines()):
            assert line["mfu"] == pytest.approx(
                line["tokens_per_second_per_device"] * flops.full / peak, rel=1e-6
            )
            assert line["mfu"] < 0.68


@pytest.mark.parametrize(
    ("folder", "name", "told"),
    [
        ("llama_8b_h200_2026-11-21", "4gpu_compiled_none", "11,148"),
        ("llama_8b_h200_2026-11-21", "1gpu_eager_full_b1", "6,732"),
        ("llama_8b_h200_2026-11-21", "2gpu_compiled_none", "11,062"),
        (AGAINST_TORCHTITAN, "4k_b5_none_gradop", "12,114"),
        (AGAINST_TORCHTITAN, "4k_b7_sel_gradop", "11,852"),
        (AGAINST_TORCHTITAN, "8k_b2_none", "10,687"),
        (AGAINST_TORCHTITAN, "8k_b2_none_gradop", "10,837"),
        (AGAINST_TORCHTITAN, "8k_b3_sel_gradop", "11,022"),
        (AGAINST_TORCHTITAN, "f8_4k_b5", "15,907"),
        (AGAINST_TORCHTITAN, "f8_8k_b3_sel", "14,751"),
        (SEVERAL, "8k_b3_sel20", "10,761"),
        (SEVERAL, "8k_b3_sel32", "10,722"),
        (SEVERAL, "4k_fsdp", "11,685"),
        (SEVERAL, "4k_megatron", "9,624"),
        (SEVERAL, "4k_zero2", "10,295"),
        (SEVERAL, "4k_zero3", "9,469"),
    ],
)
def test_a_published_median_is_that_of_the_committed_metrics(folder: str, name: str, told: str) -> None:
    lines = [
        json.loads(line) for line in (ROOT / "benchmarks" / folder / f"{name}.jsonl").read_text().splitlines()
    ]
    median = statistics.median(line["tokens_per_second_per_device"] for line in lines[5:])
    assert f"{median:,.0f}" == told
    assert told in (ROOT / "benchmarks" / f"{folder}.md").read_text()
