"""What the box writes for Slurm, as text."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from launcher.box import config, gpus
from launcher.box.config import Layout, Node
from launcher.box.gpus import Gpu
from launcher.spec import UserError


def layout_of(*gpus_of_nodes: tuple[Gpu, ...], accounting_port: int | None = None) -> Layout:
    return Layout(
        cluster="box-t",
        user="ada",
        state_dir=Path("/cache/boxes/t"),
        plugin_dir=Path("/cache/slurm/plugins"),
        controller_port=20000,
        nodes=tuple(
            Node(config.node_name(index), config.node_address(index), 20001 + index, share)
            for index, share in enumerate(gpus_of_nodes)
        ),
        cpus_per_node=16,
        accounting_port=accounting_port,
    )


def settings_of(layout: Layout) -> dict[str, str]:
    lines = config.slurm_conf(layout).splitlines()
    return dict(line.split("=", 1) for line in lines if not line.startswith(("NodeName", "PartitionName")))


def prolog_output(layout: Layout, **environment: str) -> list[str]:
    script = config.task_prolog(layout)
    return subprocess.run(
        ["/bin/sh", "-c", script],
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()


def test_every_node_has_an_address_and_a_port_of_its_own() -> None:
    layout = layout_of(*[()] * 300)
    assert len({node.address for node in layout.nodes}) == 300
    assert all(node.address.startswith("127.0.") for node in layout.nodes)
    lines = [line for line in config.slurm_conf(layout).splitlines() if line.startswith("NodeName=n300 ")]
    assert "Port=20300 " in lines[0]


def test_only_those_who_hold_the_key_can_submit() -> None:
    """slurmd listens on every interface, so a cluster that trusts everybody would be open to the network."""
    settings = settings_of(layout_of((), ()))
    assert settings["AuthType"] == "auth/munge"
    assert settings["CredType"] == "cred/munge"


def test_a_cluster_without_accounting_has_no_trace_of_it() -> None:
    assert not [key for key in settings_of(layout_of((), ())) if key.startswith("Accounting")]
    assert settings_of(layout_of((), (), accounting_port=21000))["AccountingStoragePort"] == "21000"


def test_each_node_names_the_device_files_of_its_own_gpus() -> None:
    first, second = Gpu("/dev/nvidia0", "0"), Gpu("/dev/nvidia1", "1")
    layout = layout_of((first,), (second,))
    assert config.gres_conf(layout).splitlines() == [
        "NodeName=n1 Name=gpu File=/dev/nvidia0",
        "NodeName=n2 Name=gpu File=/dev/nvidia1",
    ]
    assert config.slurm_conf(layout).count("Gres=gpu:1") == 2


@pytest.mark.parametrize(
    ("environment", "visible"),
    [
        ({"SLURMD_NODENAME": "n1", "SLURM_JOB_GPUS": "0,1"}, "4,5"),
        ({"SLURMD_NODENAME": "n2", "SLURM_JOB_GPUS": "0,1"}, "6,GPU-7"),
        ({"SLURMD_NODENAME": "n2", "SLURM_JOB_GPUS": "0,1", "SLURM_STEP_GPUS": "1"}, "GPU-7"),
        ({"SLURMD_NODENAME": "n2"}, ""),
        ({"SLURMD_NODENAME": "n2", "CUDA_VISIBLE_DEVICES": "6"}, ""),
        ({"SLURMD_NODENAME": "n3"}, ""),
    ],
    ids=[
        "first node",
        "second node",
        "one GPU per task",
        "no GPU asked for",
        "inherited",
        "node without GPUs",
    ],
)
def test_a_task_sees_the_gpus_that_slurm_gave_it(environment: dict[str, str], visible: str) -> None:
    share = (Gpu("/dev/nvidia0", "4"), Gpu("/dev/nvidia1", "5"))
    other = (Gpu("/dev/nvidia2", "6"), Gpu("/dev/nvidia3", "GPU-7"))
    output = prolog_output(layout_of(share, other, ()), **environment)
    assert f"export CUDA_VISIBLE_DEVICES={visible}" in output


def test_a_task_that_lost_its_path_finds_the_commands() -> None:
    layout = layout_of(())
    exports = prolog_output(layout)
    assert f"export PATH={layout.bin_dir}:/usr/bin:/bin" in exports
    already = prolog_output(layout, PATH=f"/usr/bin:/bin:{layout.bin_dir}")
    assert not [line for line in already if "PATH=" in line]


@pytest.mark.parametrize(
    ("inherited", "given"),
    [
        ({}, True),
        ({"NCCL_HOSTID": "n1", "BOX_HOSTID": "n1"}, True),
        ({"NCCL_HOSTID": "mine"}, False),
        ({"NCCL_HOSTID": "mine", "BOX_HOSTID": "n1"}, False),
        ({"NCCL_HOSTID": ""}, False),
    ],
    ids=["nothing", "the batch script's", "set before sbatch", "set in the batch script", "set to nothing"],
)
def test_a_node_is_a_host_to_nccl_unless_somebody_has_said_which(
    inherited: dict[str, str], given: bool
) -> None:
    exports = prolog_output(layout_of((), ()), SLURMD_NODENAME="n2", **inherited)
    assert ("export NCCL_HOSTID=n2" in exports) == given
    assert ("export BOX_HOSTID=n2" in exports) == given


def test_commands_get_libraries_without_a_variable_that_jobs_would_inherit() -> None:
    wrapper = config.client_wrapper(Path("/t/usr/bin/srun"), "/lib/ld.so", "/t/lib", Path("/b/slurm.conf"))
    assert "LD_LIBRARY_PATH" not in wrapper
    assert (
        wrapper.splitlines()[-1] == 'exec /lib/ld.so --library-path /t/lib --argv0 srun /t/usr/bin/srun "$@"'
    )


# --- GPUs -------------------------------------------------------------------------------------------------


def names_of(devices: list[str], **environment: str) -> list[str]:
    return [gpu.cuda_name for gpu in gpus.detect([Path(device) for device in devices], environment)]


def test_cuda_counts_from_zero_whatever_the_device_files_are_called() -> None:
    assert gpus.detect([Path("/dev/nvidia10"), Path("/dev/nvidia9")], {}) == (
        Gpu("/dev/nvidia9", "0"),
        Gpu("/dev/nvidia10", "1"),
    )


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("1,0", ["1", "0"]),
        ("GPU-a", ["GPU-a"]),
        ("", []),
        ("-1", []),
        ("1,-1,0", ["1"]),
        ("0,1,2,3", ["0", "1", "2"]),
    ],
)
def test_a_cuda_visible_devices_that_is_set_narrows_the_choice(visible: str, expected: list[str]) -> None:
    devices = ["/dev/nvidia0", "/dev/nvidia1", "/dev/nvidia2"]
    assert names_of(devices, CUDA_VISIBLE_DEVICES=visible) == expected


@pytest.mark.parametrize(
    ("count", "nodes", "expected"), [(4, 2, [2, 2]), (2, 2, [1, 1]), (5, 3, [2, 2, 1]), (0, 2, [0, 0])]
)
def test_gpus_are_dealt_evenly_and_none_is_left_over(count: int, nodes: int, expected: list[int]) -> None:
    dealt = gpus.share_out([Gpu(f"/dev/nvidia{index}", str(index)) for index in range(count)], nodes)
    assert [len(share) for share in dealt] == expected
    assert [gpu.cuda_name for share in dealt for gpu in share] == [str(index) for index in range(count)]


def test_fewer_gpus_than_nodes_are_shared_so_that_no_node_has_none() -> None:
    one, other = Gpu("/dev/nvidia0", "0"), Gpu("/dev/nvidia1", "1")
    assert gpus.share_out([one], 2) == ((one,), (one,))
    assert gpus.share_out([one, other], 3) == ((one,), (other,), (one,))


def test_more_gpus_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match="gpus=2: this machine has 1"):
        gpus.choose([Gpu("/dev/nvidia0", "0")], 2)
