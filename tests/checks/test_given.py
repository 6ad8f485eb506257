"""Who has set a variable: the environment, and NCCL's configuration files as NCCL reads them (src/misc/param.cc)."""

from __future__ import annotations

from checks.given import Given, given_by, parse_nccl_conf, replaced


def test_only_variables_of_a_fabric_are_looked_at() -> None:
    variables = {
        "NCCL_DEBUG": "INFO",
        "HOME": "/x",
        "UCX_TLS": "",
        "FI_PROVIDER": "efa",
        "AWS_SECRET_ACCESS_KEY": "s",
    }
    variables["NCCL_HOSTID"] = "n1"  # another one on each node
    assert given_by(variables, "here") == {
        "NCCL_DEBUG": Given("INFO", "here"),
        "UCX_TLS": Given("", "here"),
        "FI_PROVIDER": Given("efa", "here"),
    }


def test_only_a_value_that_changes_is_said_to_be_replaced() -> None:
    mine = given_by({"NCCL_NET": "IB", "NCCL_IB_TC": "41", "NCCL_IB_SL": "0", "UCX_TLS": "tcp"}, "your shell")
    theirs = given_by({"NCCL_NET": "Socket", "NCCL_IB_TC": "41", "NCCL_IB_SL": ""}, "a file")
    assert replaced(mine, theirs) == [
        "NCCL_NET=IB (your shell): a file says Socket and wins; env.NCCL_NET=IB keeps yours",
        "NCCL_IB_SL=0 (your shell): a file says nothing and wins; env.NCCL_IB_SL=0 keeps yours",
    ]


def test_a_configuration_file_is_read_as_nccl_reads_it() -> None:
    own = "# NCCL_NET=Socket\nNCCL_IB_HCA==mlx5_0,mlx5_1\n\nno equals sign\nNCCL_DEBUG=\nNCCL_IB_TC=41\nNCCL_IB_TC=42\n"
    system = "NCCL_IB_HCA=mlx5\nNCCL_SOCKET_IFNAME=eth0\n"
    assert parse_nccl_conf([("~/.nccl.conf", own), ("/etc/nccl.conf", system)]) == {
        "NCCL_IB_HCA": ("=mlx5_0,mlx5_1", "~/.nccl.conf"),
        "NCCL_DEBUG": ("", "~/.nccl.conf"),
        "NCCL_IB_TC": ("41", "~/.nccl.conf"),
        "NCCL_SOCKET_IFNAME": ("eth0", "/etc/nccl.conf"),
    }
