"""Five faults of trainings with DeepSpeed, and the message or the question that names each.

torchrun --nproc-per-node 2 -m recipes.ch5.debug
torchrun --nproc-per-node 2 -m recipes.ch5.debug fault=overflow_loop rank=0
"""

from __future__ import annotations

from recipes.ch5.debug_args import FAULTS, DebugArgs
from recipes.ch5.faults import HAPPENINGS, Finding, NotNamed
from recipes.lib.arguments import ArgumentError, parse_or_exit
from recipes.lib.deepspeed_stack import check_deepspeed, import_deepspeed
from recipes.lib.distributed import joined
from recipes.lib.measurements import Measurements, several
from recipes.lib.training import recipe_main


@recipe_main
def main() -> None:
    """Let each fault happen, and print what the tool says."""
    args = parse_or_exit(DebugArgs)
    check_deepspeed("ch5_debug")
    faults = FAULTS if args.fault == "all" else (args.fault,)
    with joined(args.device) as world:
        several(world)
        if args.rank >= world.size:
            raise ArgumentError("rank", args.rank, f"wants less than {world.size}, the number of ranks")
        deepspeed = import_deepspeed("ch5_debug", world)
        with Measurements("ch5_debug", world, len(faults)) as results:
            for fault in faults:
                try:
                    finding = HAPPENINGS[fault](deepspeed, world, args.rank)
                except NotNamed as error:
                    raise NotNamed(f"{fault}: {error}") from None
                results.show(report(fault, finding))
                results.add(f"{fault}: {finding.named}", fault=fault, **vars(finding))


def report(fault: str, finding: Finding) -> str:
    """What went wrong, and how one knows."""
    meaning = " ".join((HAPPENINGS[fault].__doc__ or "").split())
    rows = (("tool", finding.tool), ("says", finding.said), ("so it is", finding.named))
    return "\n".join([f"{fault}: {meaning}", *(f"  {name:<9} {value}" for name, value in rows), ""])


if __name__ == "__main__":
    main()
