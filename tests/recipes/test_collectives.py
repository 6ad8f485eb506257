"""Definitions of bandwidth, numbers that tell who sent them, and whom a wrong result is blamed on. No processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes.lib.collectives import (
    COLLECTIVES,
    MODULUS,
    Wrong,
    bandwidths,
    blamed,
    merged,
    numbers,
    rounded_elements,
    summed,
)
from recipes.lib.limits import Impossible, Limit, Link, limit_between, link_of, refuse_impossible
from recipes.lib.topology import read_machine
from tests.recipes.synthetic_machines import dgx

CPU = torch.device("cpu")
GIGABYTE = 10**9

BUS_BANDWIDTH_OF_1_GB_IN_1_S = {
    "all_reduce": {2: 1.0, 4: 1.5, 8: 1.75},
    "reduce_scatter": {2: 0.5, 4: 0.75, 8: 0.875},
    "all_gather": {2: 0.5, 4: 0.75, 8: 0.875},
    "broadcast": {2: 1.0, 4: 1.0, 8: 1.0},
    "reduce": {2: 1.0, 4: 1.0, 8: 1.0},
    "all_to_all": {2: 0.5, 4: 0.75, 8: 0.875},
    "scatter": {2: 0.5, 4: 0.75, 8: 0.875},
    "gather": {2: 0.5, 4: 0.75, 8: 0.875},
    "send_recv": {2: 1.0, 4: 1.0, 8: 1.0},
}
"""By the formulas of nccl-tests' doc/PERFORMANCE.md, and its scatter.cu, gather.cu and sendrecv.cu, on paper."""


@pytest.mark.parametrize("name", COLLECTIVES)
def test_bandwidths_are_those_of_nccl_tests(name: str) -> None:
    for ranks, bus in BUS_BANDWIDTH_OF_1_GB_IN_1_S[name].items():
        assert bandwidths(name, GIGABYTE, 1.0, ranks) == pytest.approx((1.0, bus))
        assert bandwidths(name, GIGABYTE, 0.25, ranks) == pytest.approx((4.0, 4 * bus))


@pytest.mark.parametrize("ranks", [1, 2, 3, 64, MODULUS, MODULUS + 5])
def test_the_expected_sum_is_the_sum(ranks: int) -> None:
    count = MODULUS + 100
    by_hand = sum(numbers(rank, count, CPU).to(torch.float64) for rank in range(ranks))
    assert torch.equal(summed(0, count, ranks, CPU).to(torch.float64), by_hand)


def test_sums_over_4096_ranks_are_exact_in_float32() -> None:
    assert int(summed(0, MODULUS, 4096, CPU).max()) < 2**24


def test_no_two_ranks_and_no_two_places_have_the_same_numbers() -> None:
    first = {tuple(numbers(rank, 3, CPU).tolist()) for rank in range(MODULUS)}
    assert len(first) == MODULUS


@pytest.mark.parametrize(
    ("size", "ranks", "elements"), [(4096, 2, 1024), (4096, 3, 1023), (1, 8, 1), (100, 8, 24)]
)
def test_every_rank_has_an_equal_part(size: int, ranks: int, elements: int) -> None:
    found = rounded_elements(size, ranks)
    assert found == max(elements, ranks)
    assert found % ranks == 0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ([Wrong(0, (2,)), Wrong(1, (2,)), Wrong(2, (2,))], "rank 2 sends wrong numbers"),
        ([Wrong(1, (0, 2, 3))], "rank 1 receives wrong numbers from ranks 0, 2, 3"),
        ([Wrong(1, (0,))], "rank 1 receives wrong numbers from rank 0: one of the two, or the way between"),
        ([Wrong(1, (1,))], "rank 1 has wrong numbers of its own"),
        (
            [Wrong(0, ()), Wrong(3, ())],
            "the sum is wrong on ranks 0, 3, though every rank's numbers arrive right",
        ),
        ([Wrong(0, (1,)), Wrong(2, (3,))], "wrong numbers arrive from rank 1 to 0, rank 3 to 2"),
    ],
)
def test_blame(wrong: list[Wrong], words: str) -> None:
    assert blamed(wrong) == words


def test_what_several_collectives_show_is_put_together() -> None:
    assert merged([Wrong(2, (1,)), Wrong(0, (1,)), Wrong(2, (1, 3))]) == [Wrong(0, (1,)), Wrong(2, (1, 3))]


# --- impossible figures -------------------------------------------------------------------------------------

NVLINK = Limit(450.0, "a GPU's 18 NVLinks", members=8, ranks=8)


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_bus_bandwidth_above_the_link_is_refused(name: str) -> None:
    refuse_impossible(name, 2**30, 449.0, NVLINK, in_network=False)
    with pytest.raises(
        Impossible, match=rf"{name} of 1073741824 bytes: 470.0 GB/s .* 18 NVLinks carry 450.0 GB/s"
    ):
        refuse_impossible(name, 2**30, 470.0, NVLINK, in_network=False)
    refuse_impossible(name, 2**30, 1e6, None, in_network=False)


def test_a_switch_that_adds_up_allows_more_than_the_link_carries() -> None:
    """Eight H100s with NVLS show about 480 GB/s; a number crosses the link once, not 14/8 times."""
    refuse_impossible("all_reduce", 2**30, 480.0, NVLINK, in_network=True)
    with pytest.raises(Impossible):
        refuse_impossible("all_reduce", 2**30, 2 * 450.0, NVLINK, in_network=True)
    with pytest.raises(Impossible):
        refuse_impossible("all_gather", 2**30, 480.0, NVLINK, in_network=True)


def test_two_machines_exchange_what_their_cards_carry() -> None:
    """A hierarchical all-reduce of 16 ranks on two machines sends S once through the cards, not 30/16 times."""
    between = Limit(400.0, "a machine's network cards", members=2, ranks=16)
    assert between.bus_bandwidth("all_reduce", in_network=False) == pytest.approx(400 * 1.875)
    assert between.bus_bandwidth("all_to_all", in_network=False) == pytest.approx(400 / 4 * 15 / 16)
    assert between.bus_bandwidth("send_recv", in_network=False) == 400.0


def test_the_limit_is_the_narrowest_link_and_unknown_where_one_is() -> None:
    fast, slow = (Link("a", rate, "18 NVLinks", 50.0) for rate in (478.0, 300.0))
    unknown, elsewhere = Link("a", None, "", 50.0), Link("b", 478.0, "18 NVLinks", 25.0)
    assert limit_between([fast, slow]) == Limit(300.0, "a GPU's 18 NVLinks", 2, 2)
    assert limit_between([fast, unknown]) is None
    assert limit_between([fast, slow, elsewhere]) == Limit(25.0, "a machine's network cards", 2, 3)
    assert limit_between([fast, Link("b", 478.0, "18 NVLinks", None)]) is None


def test_a_rank_s_link_is_its_gpu_s(tmp_path: Path) -> None:
    gpus = dgx(tmp_path)
    machine = read_machine("n1", gpus, tmp_path)
    found = link_of(machine, gpus[3].uuid, "boot")
    assert found.gpu == pytest.approx(18 * 26.562)
    assert found.gpu_link == "18 NVLinks"
    assert found.cards == pytest.approx(8 * 50.0 + 2 * 12.5)
    assert link_of(machine, "", "boot").gpu is None
    without = read_machine("n1", [type(gpus[0])("H100 PCIe", "GPU-x", gpus[0].address)], tmp_path)
    assert link_of(without, "GPU-x", "boot").gpu == pytest.approx(32 * 128 / 130 * 16 / 8)
