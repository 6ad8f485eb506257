"""Arguments of `ch2_allreduce`."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.lib.arguments import argument
from recipes.lib.size_arguments import SizeArgs

COLLECTIVES = (
    *("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"),
    *("reduce", "scatter", "gather", "send_recv"),
)


@dataclass(frozen=True, kw_only=True)
class AllReduceArgs(SizeArgs):
    """Which collectives, by which algorithm, between whom."""

    collectives: list[str] = argument(
        ["all_reduce", "all_gather", "reduce_scatter", "all_to_all"], "what is measured", COLLECTIVES
    )
    algorithms: list[str] = argument(
        ["auto"],
        "of all_reduce: auto is the library's choice; NCCL takes the others as NCCL_ALGO, gloo has no choice: "
        "there, ring and tree are the ones by hand of ch2_patterns",
        ("auto", "ring", "tree", "nvls", "nvlstree", "collnetdirect", "collnetchain"),
    )
    scopes: list[str] = argument(
        ["world"],
        "who talks: all ranks (world), the ranks of each node (node), one rank of each node, all such groups at "
        "once (across)",
        ("world", "node", "across"),
    )
    log_choices: bool = argument(
        False,
        "read the algorithm of every size from NCCL's log; a line for every call slows small sizes down",
    )
