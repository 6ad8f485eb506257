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


def test_raw_metrics_hold_the_mfu_that_follows_from_them() -> None:
    """Every line of the committed metrics of Llama-3-8B at 4096 on H200s."""
    peak = peak_flops("H200")
    assert peak is not None
    flops = flops_per_token(SIZES["llama_8b"], 4096)
    files = sorted((ROOT / "benchmarks" / "llama_8b_h200_2026-11-21").glob("*.jsonl"))
    assert len(files) > 5
    for path in files:
        for line in map(json.loads, path.read_text().splitlines()):
            assert line["mfu"] == pytest.approx(
                line["tokens_per_second_per_device"] * flops.full / peak, rel=1e-6
            )
            assert line["mfu"] < 0.68


@pytest.mark.parametrize(
    ("name", "told"),
    [("4gpu_compiled_none", "11,148"), ("1gpu_eager_full_b1", "6,732"), ("2gpu_compiled_none", "11,062")],
)
def test_a_published_median_is_that_of_the_committed_metrics(name: str, told: str) -> None:
    folder = ROOT / "benchmarks" / "llama_8b_h200_2026-11-21"
    lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    median = statistics.median(line["tokens_per_second_per_device"] for line in lines[5:])
    assert f"{median:,.0f}" == told
    assert f"| {told} (" in (ROOT / "benchmarks" / "llama_8b_h200_2026-11-21.md").read_text()


# --- planted figures ----------------------------------------------------------------------------------------

HEAD = (
    "# Llama-3-8B on four H200s, sequence length 8192\n\n"
    "| settings | tokens/s per GPU | MFU (formula F) |\n|---|---|---|\n"
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (HEAD + "| torchtitan | 10,335 | 60.5% |", []),
        (HEAD + "| rounded | 10,000 | 59% |", []),
        (HEAD + "| causal figure under F's name | 10,335 | 53.8% |", ["10,335 tokens/s are 60.5% MFU, not 53.8%"]),
        (
            HEAD + "| a clock that misses the backward pass | 17,000 | 99.5% |",
            ["17,000 tokens/s are more arithmetic than a large matrix product does on an H200"],
        ),
        (
            HEAD + "| above the bound | 12,000 | 70.3% |",
            ["12,000 tokens/s are 70.3% MFU, and the bound is 68%"],
        ),
        (
            HEAD + "| 4x one GPU's | 41,340 | 242.1% |",
            ["41,340 tokens/s are more arithmetic than a large matrix product does on an H200"],
        ),
        (HEAD + "| float8 | 13,000 | 76.1% |", ["work in float8 has no MFU: the peak is bfloat16's"]),
        (HEAD + "| float8 | 13,000 | |", []),
        (HEAD + "| spread | 10,000 (10,100 to 10,300) | 58.6% |", ["10,000 is not between 10,100 and 10,300"]),
        (
            "| settings | tokens/s per GPU |\n|---|---|\n| unknown | 10 |",
            ["nothing says which model and sequence and gpu 10 tokens/s are of"],
        ),
        (
            HEAD + "| `model=llama_1b sequence_length=4096` | 60,254 | 60.0% |",
            ["60,254 tokens/s are 55.0% MFU, not 60.0%"],
        ),
        (
            HEAD.replace("MFU (formula F)", "of the matrix rate") + "| x | 10,335 | 90% |",
            ["10,335 tokens/s are 75.8% of the matrix rate, not 90.0%"],
        ),
        ("Words only, 99,999 tokens/s per GPU.", []),
    ],
)  # fmt: skip
def test_planted_figures_are_seen(text: str, found: list[str]) -> None:
    assert [line.partition(": ")[2] for line in problems(text)] == found


def test_what_is_said_later_counts_for_what_comes_after_it() -> None:
    table = "| settings | tokens/s per GPU | MFU |\n|---|---|---|\n| x | 11,151 | 58.0% |\n"
    assert problems(f"Llama-3-8B, H200, sequence length 8192\n\nNow sequence length 4096:\n\n{table}") == []
    assert (
        len(problems(f"Llama-3-8B, H200, sequence length 4096\n\nNow sequence length 8192:\n\n{table}")) == 1
    )
