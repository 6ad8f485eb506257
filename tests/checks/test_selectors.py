"""Lists of interfaces and devices, read as NCCL reads them (src/misc/utils.cc)."""

from __future__ import annotations

import pytest

from checks.selectors import exact_names, nccl_selector

NAMES = [("eth0", None), ("eth10", None), ("ib0", None), ("lo", None)]


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        ("", ["eth0", "eth10", "ib0", "lo"]),
        ("eth", ["eth0", "eth10"]),
        ("eth1", ["eth10"]),
        ("=eth1", []),
        ("=eth0", ["eth0"]),
        ("=eth0,lo", ["eth0", "lo"]),
        ("^eth", ["ib0", "lo"]),
        ("^=eth0", ["eth10", "ib0", "lo"]),
        ("^eth1,lo", ["eth0", "ib0"]),
        ("eth0,,ib", ["eth0", "ib0"]),
        ("=^eth0", []),  # only ^ before = is a sign; the other way round it is a name
    ],
)
def test_interfaces(value: str, taken: list[str]) -> None:
    assert [name for name, port in NAMES if nccl_selector(value).matches(name, port)] == taken


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        ("mlx5_1", ["mlx5_1:1", "mlx5_1:2", "mlx5_10:1"]),
        ("=mlx5_1", ["mlx5_1:1", "mlx5_1:2"]),
        ("=mlx5_1:2", ["mlx5_1:2"]),
        ("=mlx5_1:2:0:1", ["mlx5_1:2"]),  # rail and plane, NCCL 2.28 and later
        ("^mlx5_1:1", ["mlx5_0:1", "mlx5_1:2"]),
        ("=mlx5_0:,mlx5_10", ["mlx5_0:1", "mlx5_10:1"]),
    ],
)
def test_ports(value: str, taken: list[str]) -> None:
    ports = [("mlx5_0", 1), ("mlx5_1", 1), ("mlx5_1", 2), ("mlx5_10", 1)]
    assert [f"{name}:{port}" for name, port in ports if nccl_selector(value).matches(name, port)] == taken


def test_elements_that_stand_for_nothing_are_named_unless_they_only_exclude() -> None:
    assert nccl_selector("=eth0,eth7,ib9").elements_without_match(NAMES) == ["eth7", "ib9"]
    assert nccl_selector("mlx5_0:3").elements_without_match([("mlx5_0", 1)]) == ["mlx5_0:3"]
    assert nccl_selector("^docker,virbr").elements_without_match(NAMES) == []


def test_exact_names_have_no_signs() -> None:
    assert exact_names(" eth0, ib0 ,,") == ["eth0", "ib0"]
