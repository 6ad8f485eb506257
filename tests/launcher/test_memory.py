"""What cannot fit a cluster's GPUs is said before it is submitted; what nobody knows is never in the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.config import compose
from launcher.memory import check_memory
from launcher.paths import REPOSITORY
from launcher.spec import UserError

SITE = """
inherits: slurm
gpus_per_node: 8
cpus_per_node: 64
"""


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster whose GPUs each test names itself."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "mine.yaml").write_text(SITE)
    monkeypatch.setenv("LAUNCHER_CLUSTERS", str(folder))
    return folder


def said(*words: str) -> str | None:
    return check_memory(compose(["cluster=mine", *words], repository=REPOSITORY))


def test_what_arithmetic_excludes_is_refused_with_by_how_much_and_the_nearest_that_fits() -> None:
    with pytest.raises(UserError) as caught:
        said("recipe=ch4_fsdp", "nodes=1", "checks.sku=H100 80GB", "args.model=llama_70b")
    # 70,553,706,496 parameters of 16 bytes over 8 GPUs: 131.4 GiB. An H100 has 79.1.
    line = str(caught.value)
    assert "take 131.4 GiB per GPU, 52.3 GiB more than the 79.1 of a H100 80GB" in line
    assert "nearest that fits: nodes=2 args.activation_checkpointing=full args.microbatch_size=1" in line
    assert len(line.splitlines()) == 1


def test_what_is_only_estimated_is_a_warning() -> None:
    words = (
        "recipe=ch4_fsdp",
        "nodes=1",
        "checks.sku=H100 80GB",
        "args.model=llama_8b",
        "args.sequence_length=8192",
    )
    line = said(*words, "args.batch_size=64")
    assert line is not None
    assert "will probably not fit" in line
    assert "nearest that fits: args.activation_checkpointing=" in line


def test_the_nearest_that_fits_does_fit() -> None:
    words = (
        "recipe=ch4_fsdp",
        "nodes=1",
        "checks.sku=H100 80GB",
        "args.model=llama_8b",
        "args.sequence_length=8192",
    )
    line = said(*words, "args.batch_size=64")
    assert line is not None
    changes = line.partition("nearest that fits: ")[2].partition(" (")[0].split()
    assert said(*words, "args.batch_size=64", *changes) is None


def test_a_whole_copy_that_cannot_fit_is_sent_to_shards() -> None:
    with pytest.raises(UserError, match=r"ch3_ddp .* nearest that fits: recipe=ch4_fsdp"):
        said("recipe=ch3_ddp", "nodes=2", "checks.sku=H100 80GB", "args.model=llama_8b")


@pytest.mark.parametrize(
    "words",
    [
        ("recipe=ch3_ddp", "args.model=llama_8b"),  # the profile names no GPU
        ("recipe=ch3_ddp", "args.model=llama_8b", "checks.sku=X9000"),  # nobody knows it
        ("recipe=ch3_ddp", "args.model=llama_8b", "checks.sku=H100", "args.device=cpu"),
        ("recipe=ch4_fsdp", "args.model=llama_8b", "checks.sku=H100 80GB"),  # it fits
        ("recipe=ch4_fsdp", "args.model=llama_70b", "nodes=1", "checks.sku=H200", "args.cpu_offload=true"),
        ("recipe=ch2_pairs", "checks.sku=H100"),  # trains nothing
    ],
)
def test_nobody_is_kept_from_what_may_work(words: tuple[str, ...]) -> None:
    assert said(*words) is None


def test_what_megatron_splits_is_counted_as_it_splits_it() -> None:
    words = (
        "recipe=ch5_megatron",
        "nodes=1",
        "checks.sku=H100 80GB",
        "args.model=llama_8b",
        "args.batch_size=64",
    )
    assert said(*words) is None  # 6 bytes of each parameter, and an eighth of 12
    with pytest.raises(UserError) as caught:
        said(*words, "args.distributed_optimizer=false")
    # 8,030,261,248 parameters of 18 bytes: 134.6 GiB.
    assert "take 134.6 GiB per GPU, 55.5 GiB more than the 79.1 of a H100 80GB" in str(caught.value)
    # With 6 bytes of each, an eighth of 12, and 1.7 GiB of a sequence's activations and logits.
    assert "nearest that fits: args.distributed_optimizer=true (57.8 GiB)" in str(caught.value)
    # Of 8 experts a rank has 4, a quarter of each: 5.64 billion parameters of 18 bytes, 94.5 GiB; on twice as many
    # ranks two have the same and share 12 of the 18 bytes: 63.0 GiB, 5.0 for everything else, and activations.
    mixture = (*words, "args.experts=8", "args.tensor_parallel=4", "args.expert_parallel=2")
    with pytest.raises(UserError, match=r"nearest that fits: nodes=2 \(68.7 GiB\)"):
        said(*mixture)
    assert said(*mixture, "nodes=2") is None


ON_H100S = ("nodes=1", "checks.sku=H100 80GB", "args.batch_size=8")
ZERO_OF_70B = {0: 16.0, 1: 2 + 4 + 12 / 8, 2: 2 + 16 / 8, 3: 18 / 8}
"""Bytes of a parameter on each of 8 ranks: it computes in bfloat16, is updated and has gradients in float32."""


@pytest.mark.parametrize("stage", ZERO_OF_70B)
def test_what_zero_shares_is_counted_by_its_stage(stage: int) -> None:
    words = ("recipe=ch5_deepspeed", *ON_H100S, f"args.stage={stage}")
    needed = ZERO_OF_70B[stage] * 70_553_706_496 / 2**30
    with pytest.raises(UserError, match=f"take {needed:.1f} GiB per GPU, {needed - 79.1:.1f} GiB more"):
        said(*words, "args.model=llama_70b")
    if stage:
        assert said(*words, "args.model=llama_8b") is None
    else:
        with pytest.raises(UserError, match=r"nearest that fits: args.stage=1 \("):
            said(*words, "args.model=llama_8b")


def test_a_stage_that_cannot_fit_is_sent_to_offload_with_what_the_hosts_must_hold() -> None:
    words = ("recipe=ch5_deepspeed", *ON_H100S, "args.model=llama_70b")
    with pytest.raises(UserError) as caught:
        said(*words, "args.stage=3")
    line = str(caught.value)
    # 70,553,706,496 parameters of 18 bytes over 8 GPUs; offloaded 16 of them are the host's, with 4 for gradients that
    # are there twice, and 2 an eighth each.
    assert "take 147.8 GiB per GPU, 68.7 GiB more than the 79.1 of a H100 80GB" in line
    assert "nearest that fits: args.offload_optimizer=cpu " in line
    assert "and 1,314 GiB of each node's own memory (24." in line
    assert said(*words, "args.stage=3", "args.offload_optimizer=cpu", "args.microbatch_size=1") is None


def test_what_a_stage_of_zero_only_probably_exceeds_is_a_warning() -> None:
    words = ("recipe=ch5_deepspeed", "nodes=1", "checks.sku=H100 80GB", "args.model=llama_8b")
    line = said(*words, "args.batch_size=64", "args.sequence_length=8192")
    assert line is not None
    assert "will probably not fit" in line
    changes = line.partition("nearest that fits: ")[2].partition(" (")[0].split()
    assert said(*words, "args.batch_size=64", "args.sequence_length=8192", *changes) is None


@pytest.mark.parametrize(
    ("recipe", "words", "line"),
    [
        # Half of 70 billion parameters, 16 bytes each.
        (
            "ch5_deepspeed_pipeline",
            ("args.model=llama_70b",),
            r"nearest that fits: nodes=4 args.pipeline_parallel=32 ",
        ),
        # 8 experts of each layer, one on each rank.
        ("ch5_deepspeed_moe", ("args.model=llama_8b", "args.experts=8"), r"nearest that fits: nodes=2 \("),
    ],
)
def test_pipelines_and_mixtures_are_counted_too(recipe: str, words: tuple[str, ...], line: str) -> None:
    with pytest.raises(UserError, match=f"{recipe} .* cannot fit: .*{line}"):
        said(f"recipe={recipe}", *ON_H100S, *words)
    assert said(f"recipe={recipe}", *ON_H100S, "args.model=llama_1b") is None


def test_what_megatron_keeps_for_the_backward_pass_is_a_warning() -> None:
    words = ("recipe=ch5_megatron", "nodes=1", "checks.sku=H100 80GB", "args.model=llama_8b")
    words += ("args.batch_size=64", "args.sequence_length=8192", "args.microbatch_size=2")
    line = said(*words)
    assert line is not None
    assert "will probably not fit" in line
    # A layer keeps 8192 x 2 x (18 x 4096 + 8 x 14336) bytes, the logits 10 bytes a number.
    lean = ("args.activation_checkpointing=full", "args.microbatch_size=1")
    assert f"nearest that fits: {' '.join(lean)} (" in line
    assert said(*words[:-1], *lean) is None


@pytest.mark.parametrize("name", ["aws-p5", "aws-p5en", "azure-ndv5", "dgx-h100", "gcp-a3mega", "oci-h100"])
def test_profiles_of_known_clusters_name_a_gpu_that_the_planner_knows(name: str) -> None:
    spec = compose(
        ["recipe=ch4_fsdp", f"cluster={name}", "nodes=1", "args.model=llama_70b"], repository=REPOSITORY
    )
    if name == "aws-p5en":
        assert "nearest that fits" in (check_memory(spec) or "")
        return
    with pytest.raises(UserError, match="cannot fit"):
        check_memory(spec)


def test_submit_ends_with_the_line_before_anything_is_made(tmp_path: Path) -> None:
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\nexit 1\n")
    sbatch.chmod(0o755)
    words = ["recipe=ch4_fsdp", "cluster=mine", "nodes=1", "checks.sku=H100 80GB", "args.model=llama_70b"]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "launcher", "submit", *words, f"run_root={tmp_path / 'runs'}"],
        cwd=REPOSITORY, env={**os.environ, "PATH": f"{sbatch.parent}:{os.environ['PATH']}"}, capture_output=True,
        text=True, check=False, timeout=60,
    )  # fmt: skip
    timed, said = [], []
    for line in done.stderr.splitlines():
        (timed if line.startswith("import time:") else said).append(line)
    assert (done.returncode, len(said)) == (2, 1), done.stderr[-500:]
    assert "cannot fit" in said[0]
    assert not (tmp_path / "runs").exists()
    assert not {line.split("|")[-1].strip() for line in timed} & {"torch", "numpy"}
