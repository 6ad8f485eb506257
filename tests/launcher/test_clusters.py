"""Cluster profiles: where they are found, what they inherit, how their mistakes are named."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from launcher.clusters import load_fabric, load_profile, profile_files
from launcher.machine import NodeFacts, parse_box_nodes, this_machine

if TYPE_CHECKING:
    from tests.launcher.conftest import SampleCheckout

RECIPE = "recipe=ch4_fsdp"


@pytest.mark.parametrize("name", profile_files(environment={}))
def test_every_profile_of_the_project_can_be_read(name: str) -> None:
    profile = load_profile(name, environment={})
    load_fabric(profile.settings["fabric"], environment={})


def test_auto_is_local_without_sbatch(checkout: SampleCheckout) -> None:
    composed = checkout.composed(RECIPE)
    assert (composed.spec.cluster, composed.spec.executor) == ("local", "local")
    assert composed.note == "cluster=auto is local: sbatch is not on PATH"
    assert checkout.composed(RECIPE, "cluster=local").note == ""


def test_auto_is_slurm_where_sbatch_is(checkout: SampleCheckout, sbatch_on_path: None) -> None:
    composed = checkout.composed(RECIPE, "cluster=auto")
    assert (composed.spec.cluster, composed.spec.executor) == ("slurm", "slurm")
    assert composed.note == "cluster=auto is slurm: sbatch is on PATH"


def test_a_profile_outside_the_checkout_comes_first_and_may_inherit_its_namesake(
    checkout: SampleCheckout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "site"
    (folder / "fabrics").mkdir(parents=True)
    (folder / "slurm.yaml").write_text("inherits: slurm\npartition: gpu\nfabric: ours\ngpus_per_node: 4\n")
    (folder / "fabrics/ours.yaml").write_text("env: {NCCL_IB_HCA: 'mlx5_0,mlx5_1'}\n")
    monkeypatch.setenv("LAUNCHER_CLUSTERS", f"{folder}:")
    spec = checkout.compose(RECIPE, "cluster=slurm")
    assert (spec.partition, spec.gpus_per_node, spec.executor) == ("gpu", 4, "slurm")
    assert spec.environment["NCCL_IB_HCA"] == "mlx5_0,mlx5_1"
    (folder / "slurm.yaml").write_text("partitionn: gpu\n")
    line = checkout.mistake(RECIPE, "cluster=slurm")
    assert line == f"{folder}/slurm.yaml: unknown key 'partitionn': did you mean partition?"


def test_a_folder_of_profiles_that_is_not_there_is_no_silence(
    checkout: SampleCheckout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAUNCHER_CLUSTERS", str(tmp_path / "nowhere"))
    line = checkout.mistake(RECIPE, "cluster=slurm")
    assert line == f"LAUNCHER_CLUSTERS: there is no folder {tmp_path / 'nowhere'}"


def test_null_takes_back_what_a_profile_inherits(checkout: SampleCheckout) -> None:
    checkout.write(
        "env/clusters/a.yaml", "inherits: slurm\npartition: gpu\nsbatch: {gres: x}\nenv: {A: '1'}\n"
    )
    checkout.write(
        "env/clusters/b.yaml", "inherits: a\npartition: null\nsbatch: {gres: null}\nenv: {A: null}\n"
    )
    assert checkout.compose(RECIPE, "cluster=a").sbatch == {"gres": "x"}
    spec = checkout.compose(RECIPE, "cluster=b")
    assert (spec.partition, spec.sbatch, "A" in spec.environment) == (None, {}, False)


def test_a_profile_takes_variables_of_the_shell(
    checkout: SampleCheckout, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout.write("env/clusters/mine.yaml", "inherits: slurm\naccount: ${oc.env:TEAM}\n")
    monkeypatch.setenv("TEAM", "vision")
    assert checkout.compose(RECIPE, "cluster=mine").account == "vision"
    monkeypatch.delenv("TEAM")
    assert "the variable TEAM is not set" in checkout.mistake(RECIPE, "cluster=mine")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("nodes: 4", "unknown key 'nodes': did you mean max_nodes?"),
        ("executor: slrum", "executor: one of slurm, local, debug is wanted"),
        ("partition: gpu", "executor: one of slurm, local, debug is wanted"),
        ("inherits: slrum", "inherits: unknown cluster 'slrum': did you mean slurm?"),
        (
            "inherits: bad",
            "inherits: unknown cluster 'bad': there is aws-p5, aws-p5en, azure-ndv5, box, debug, dgx-h100, "
            "gcp-a3mega, local, oci-h100, slurm",
        ),
        (
            "inherits: slurm\ngpus_per_node: many",
            "gpus_per_node: a whole number is wanted (or machine or box)",
        ),
        ("inherits: slurm\ncpu_tasks_per_node: box", "cpu_tasks_per_node: a whole number is wanted"),
        (
            "inherits: slurm\ncontainer: {kind: docker}",
            "container.kind: one of none, pyxis, apptainer is wanted",
        ),
        ("inherits: slurm\ncontainer: {kin: x}", "unknown key 'container.kin': did you mean container.kind?"),
        ("inherits: slurm\ncontainer: pyxis", "container: a mapping of names to values is wanted"),
        ("inherits: slurm\nenv: {A: 1.5}", "env.A: text is wanted; in YAML, put quotes around it"),
        ("inherits: slurm\nenv: {RANK: 0}", "env.RANK: the launcher sets this variable itself"),
        ("inherits: slurm\nactivate: module load cuda", None),
    ],
)
def test_a_mistake_in_a_profile_names_file_and_key(
    checkout: SampleCheckout, text: str, line: str | None
) -> None:
    checkout.write("env/clusters/bad.yaml", f"{text}\n")
    if line is None:
        checkout.compose(RECIPE, "cluster=bad")
    else:
        assert checkout.mistake(RECIPE, "cluster=bad") == f"env/clusters/bad.yaml: {line}"


def test_profiles_that_inherit_each_other_are_named(checkout: SampleCheckout) -> None:
    checkout.write("env/clusters/a.yaml", "inherits: b\n")
    checkout.write("env/clusters/b.yaml", "inherits: a\n")
    line = checkout.mistake(RECIPE, "cluster=a")
    assert line == "env/clusters/a.yaml: inherits: the profiles inherit each other"


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, 3), ("0,1", 2), ("", 0), ("-1", 0), ("1,-1,2", 1), ("0,1,2,3", 3)]
)
def test_the_gpus_of_this_machine_are_its_device_files_that_cuda_may_see(
    tmp_path: Path, visible: str | None, expected: int
) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia11", "nvidiactl", "nvidia-uvm", "nvidia-caps"):
        (tmp_path / name).touch()
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert this_machine(devices=tmp_path, environment=environment).gpus == expected


@pytest.mark.parametrize(
    ("sinfo", "expected"),
    [
        ("n1|16|(null)\nn1|16|(null)\nn2|16|(null)\n", NodeFacts(gpus=0, cpus=1, cores=1, nodes=2)),
        ("n1|16|gpu:2\nn2|16|gpu:h100:1(S:0-1)\n", NodeFacts(gpus=1, cpus=1, cores=1, nodes=2)),
        ("n1|1|gpu:4\n", NodeFacts(gpus=4, cpus=1, cores=2, nodes=1)),
    ],
)
def test_a_node_of_the_box_has_what_its_slurm_reports(sinfo: str, expected: NodeFacts) -> None:
    machine = NodeFacts(gpus=3, cpus=2, cores=2)
    assert parse_box_nodes(sinfo, machine) == expected


def test_a_job_larger_than_the_box_is_refused(
    checkout: SampleCheckout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.clusters.box_node", lambda: NodeFacts(0, 1, 1, nodes=2))
    line = checkout.mistake(RECIPE, "cluster=box", "nodes=4")
    assert line == (
        "nodes=4: cluster 'box' gives a job 2 nodes at most; "
        "make a larger one: box down, then box up --nodes 4"
    )
