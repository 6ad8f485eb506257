"""Nodes, ranks, GPUs and CPUs: what is typed is taken or refused, what nobody typed follows the cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from launcher.spec import JobSpec
    from tests.launcher.conftest import SampleCheckout


def shape(spec: JobSpec) -> tuple[int, int, int, int]:
    return spec.nodes, spec.tasks_per_node, spec.gpus_per_node, spec.cpus_per_task


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", (2, 8, 8, 12)),
        ("nodes=4", (4, 8, 8, 12)),
        ("tasks_per_node=4", (2, 4, 4, 12)),
        ("gpus_per_node=4", (2, 4, 4, 12)),
        ("gpus_per_node=8 tasks_per_node=1", (2, 1, 8, 96)),
        ("gpus_per_node=0", (2, 1, 0, 96)),
        ("gpus_per_node=0 tasks_per_node=16", (2, 16, 0, 6)),
        ("args.device=cpu", (2, 1, 0, 96)),
        ("cpus_per_task=2", (2, 8, 8, 2)),
    ],
)
def test_a_node_with_eight_gpus_and_96_cpus(
    checkout: SampleCheckout, words: str, expected: tuple[int, ...]
) -> None:
    checkout.write("env/clusters/mine.yaml", "inherits: slurm\ncpus_per_node: 96\n")
    assert shape(checkout.compose("recipe=ch4_fsdp", "cluster=mine", *words.split())) == expected


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "tasks_per_node=16",
            "tasks_per_node=16: cluster 'mine' gives 8 GPUs per node, one per rank; "
            "gpus_per_node=0 runs the ranks on CPUs",
        ),
        ("gpus_per_node=9", "gpus_per_node=9: cluster 'mine' has 8 per node"),
        ("nodes=5", "nodes=5: cluster 'mine' gives a job 4 nodes at most"),
        ("cpus_per_task=13", "cpus_per_task=13: 8 tasks of 13 CPUs; cluster 'mine' has 96 per node"),
        (
            "gpus_per_node=0 tasks_per_node=97",
            "tasks_per_node=97: 97 tasks of 1 CPUs; cluster 'mine' has 96 per node",
        ),
    ],
)
def test_more_than_the_cluster_has_is_refused(checkout: SampleCheckout, words: str, line: str) -> None:
    checkout.write("env/clusters/mine.yaml", "inherits: slurm\ncpus_per_node: 96\nmax_nodes: 4\n")
    assert checkout.mistake("recipe=ch4_fsdp", "cluster=mine", *words.split()) == line


def test_a_recipe_s_wishes_are_cut_to_what_the_cluster_has(checkout: SampleCheckout, four_gpus: None) -> None:
    checkout.write(
        "recipes/ch9/large.yaml",
        "summary: x\nentrypoint: y\narguments: sample_checkout_arguments:SampleArgs\n"
        "job: {nodes: 64, tasks_per_node: 8, gpus_per_node: 8, cpus_per_task: 32}\n",
    )
    assert shape(checkout.compose("recipe=ch9_large", "cluster=local")) == (1, 4, 4, 4)


def test_this_machine_s_gpus_are_used_by_default(checkout: SampleCheckout, four_gpus: None) -> None:
    assert shape(checkout.compose("recipe=ch4_fsdp", "cluster=local")) == (1, 4, 4, 4)
    assert shape(checkout.compose("recipe=ch4_fsdp", "cluster=box")) == (2, 2, 2, 4)
    assert shape(checkout.compose("recipe=ch4_fsdp", "cluster=debug")) == (1, 1, 1, 16)


def test_without_gpus_two_ranks_run_on_cpus(checkout: SampleCheckout) -> None:
    assert shape(checkout.compose("recipe=ch4_fsdp", "cluster=local")) == (1, 2, 0, 2)


def test_a_recipe_for_one_rank_gets_one_rank_on_a_large_node(checkout: SampleCheckout) -> None:
    assert shape(checkout.compose("recipe=ch1_baseline", "cluster=slurm")) == (1, 1, 1, 8)


def test_debug_runs_one_task(checkout: SampleCheckout) -> None:
    line = checkout.mistake("recipe=ch4_fsdp", "cluster=debug", "tasks_per_node=2")
    assert line == "tasks_per_node=2: cluster 'debug' runs one task; cluster=local runs several"


@pytest.mark.parametrize(("cores", "threads"), [(2, "1"), (16, "4")])
def test_ranks_in_the_box_share_the_real_cores(
    checkout: SampleCheckout, monkeypatch: pytest.MonkeyPatch, cores: int, threads: str
) -> None:
    from launcher.machine import NodeFacts

    node = NodeFacts(gpus=0, cpus=64, cores=cores // 2)
    monkeypatch.setattr("launcher.clusters.box_node", lambda: node)
    spec = checkout.compose("recipe=ch4_fsdp", "cluster=box")
    assert spec.environment["OMP_NUM_THREADS"] == threads


def test_threads_follow_the_cpus_of_a_rank_and_can_be_typed(checkout: SampleCheckout) -> None:
    words = ("recipe=ch4_fsdp", "cluster=slurm", "cpus_per_task=6")
    assert checkout.compose(*words).environment["OMP_NUM_THREADS"] == "6"
    assert checkout.compose(*words, "env.OMP_NUM_THREADS=3").environment["OMP_NUM_THREADS"] == "3"
