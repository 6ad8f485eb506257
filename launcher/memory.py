"""Whether a training recipe fits the GPUs of its cluster, as far as the cluster's profile says what they are.

It refuses only what arithmetic excludes: parameters, gradients and moments that alone are more than the GPU has. What
an estimate excludes is a warning: the estimate can be wrong, and nobody may stand before a launcher that will not let
them try. A GPU that the profile does not name, or that nobody knows, is never in the way.
"""

from __future__ import annotations

from launcher.spec import JobSpec, UserError


def check_memory(spec: JobSpec) -> str | None:
    """A warning where the recipe is unlikely to fit. Raises UserError where it cannot."""
    if not spec.checks.sku or not spec.gpus_per_node:
        return None
    # Here, because most submissions name no GPU and need not wait for these.
    from recipes.ch5 import memory as of_stacks
    from recipes.lib.fitting import misfit
    from recipes.lib.gpus import gpu_of_sku

    gpu = gpu_of_sku(spec.checks.sku)
    if gpu is None:
        return None
    judge = of_stacks.misfit if spec.recipe in of_stacks.PREDICTED else misfit
    found = judge(spec.recipe, spec.args, spec.nodes, spec.tasks_per_node, gpu)
    if found is None:
        return None
    nearest = f"nearest that fits: {found.nearest}" if found.nearest else "nothing near it fits"
    model = f"{spec.recipe} with args.model={spec.args['model']}"
    has = f"{found.missing_gib:.1f} GiB more than the {gpu.memory_gib:.1f} of a {spec.checks.sku}"
    if found.certain:
        raise UserError(
            f"{model} cannot fit: parameters, gradients and moments take {found.needed_gib:.1f} GiB per GPU, "
            f"{has}; {nearest}"
        )
    return f"{model} will probably not fit: about {found.needed_gib:.1f} GiB per GPU, {has}; {nearest}"
