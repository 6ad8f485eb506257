"""FSDP, ZeRO and Megatron-Core on the same work in one job: memory, speed and stall side by side.

    torchrun --nproc-per-node 4 -m recipes.ch5.compare model=llama_1b sequence_length=4096 batch_size=16

As `ch4_compare`, whose strategies all can take part: same weights, same sequences, so the losses must be equal.
DeepSpeed, Megatron-Core and its GPUs are asked for before anything is measured: one line where one is missing.
"""

from __future__ import annotations

from recipes.ch4.compare import STRATEGIES, compare
from recipes.ch4.compare_args import CompareArgs
from recipes.ch5.compare_args import Chapter5CompareArgs, megatron_args
from recipes.lib.arguments import parse_or_exit
from recipes.lib.deepspeed_stack import check_deepspeed
from recipes.lib.distributed import World
from recipes.lib.layout import Layout
from recipes.lib.training import Plan, Technique, recipe_main


@recipe_main
def main() -> None:
    """Measure one stack after the other; rank 0 prints and draws."""
    args = parse_or_exit(Chapter5CompareArgs)
    if args.zero:
        check_deepspeed(f"strategies={args.zero[0]}")
    if "megatron" not in args.strategies:
        return compare("ch5_compare", args, STRATEGIES)
    from recipes.ch5 import megatron  # here, because the others do without it

    def layout(world: World) -> Layout:
        return megatron.make_layout(world, megatron_args(args))

    def build(plan: Plan, _: CompareArgs) -> Technique:
        return megatron.Megatron.build(plan, megatron_args(args))

    compare("ch5_compare", args, {**STRATEGIES, "megatron": build}, {"megatron": layout}, megatron.want_gpus)


if __name__ == "__main__":
    main()
