"""`parity` with Megatron-Core among its techniques: a module of its own, because its import takes seconds.

    python -m tests.recipes.megatron_parity FOLDER CASES.json cpu    (one rank; torch's variables in the environment)

With "cuda" instead, on GPUs as it is.
"""

from __future__ import annotations

if __name__ == "__main__":
    # All imports are in here: Megatron's writer starts a process, which runs the rest of this module again.
    import sys

    from tests.recipes import megatron_on_cpu, parity

    if sys.argv[3] == "cpu":
        megatron_on_cpu.install()
    from megatron.core import parallel_state

    from recipes.ch5.megatron import Megatron, make_layout
    from recipes.ch5.megatron_args import MegatronArgs
    from recipes.lib.distributed import World
    from recipes.lib.layout import Layout

    def layout(world: World, args: MegatronArgs) -> Layout:
        """A new grid for each case."""
        parallel_state.destroy_model_parallel()
        return make_layout(world, args)

    parity.TECHNIQUES["megatron"] = parity.Kind(MegatronArgs, Megatron.build, layout)
    parity.main()
