"""Memory of one GPU under DeepSpeed's ZeRO, by part and by moment, as `ch5_deepspeed` configures it. Pure; no torch.

The ZeRO paper (arXiv 1910.02054, section 3.1) has 2 bytes of parameters, 2 of gradients and 12 of optimizer state per
parameter in bfloat16; N ranks share the 12 in stage 1, the gradients as well in stage 2, and all in stage 3. Here
gradients are summed in float32, so they are 4 bytes. DeepSpeed's own `estimate_zero2_model_states_mem_needs` says 2 of
each parameter and 18 of a rank's part, `estimate_zero3_model_states_mem_needs` 18 of its part: in stage 2 they count
the 2 bytes of a gradient before it is summed, too, which here are the bucket's.
"""

from __future__ import annotations

from recipes.lib.workload import Stage, Workload

MOST_GATHERED = 1_000_000_000
"""Numbers: DeepSpeed's `stage3_max_live_parameters`, and its `sub_group_size`. The recipe leaves both as they are."""


def zero_states(work: Workload, numbers: float, ranks: int) -> dict[str, float]:
    """Bytes between two steps of so many parameters that `ranks` ranks share, and of gradients right before a step.

    What is offloaded is not on the GPU: in stage 1 and 2 every rank still computes with all parameters.
    """
    computes, master, stage = work.compute_bytes, work.master_bytes, work.zero
    part = numbers / ranks
    if stage == 0:
        return {
            "parameters": numbers * master,
            "gradients": numbers * master,
            "optimizer": 2 * numbers * master,
        }
    parameters = numbers * computes if stage < 3 else part * computes * (not work.parameters_offloaded)
    if work.optimizer_offloaded:
        return {"parameters": parameters, "gradients": 0.0, "optimizer": 0.0}
    # In float32, too, what computes and what is updated are two. Stage 3 means to have one of both, and asks whether a
    # device is the one that it has by its name, which to torch is never the same (stage3.py, 0.19.8).
    parameters += part * master
    gradients = (numbers if stage == 1 else part) * work.reduce_bytes
    return {"parameters": parameters, "gradients": gradients, "optimizer": 2 * part * master}


class Zero:
    """The moments of a step in stage 1, 2 or 3."""

    def __init__(self, work: Workload, stage: Stage) -> None:
        number = work.compute_bytes
        kept = zero_states(work, stage.parameters, work.data)
        self.states = {part: kept[part] for part in ("parameters", "optimizer")}
        head = stage.head or stage.table  # a tied table is both
        bucket = min(work.bucket, stage.parameters)
        if work.zero == 3:
            # One buffer for the sums, from the beginning to the end.
            always = {"gradients": kept["gradients"]}
            live = min(stage.parameters, max(MOST_GATHERED, head + stage.layer))
            always["gathered parameters"] = live * number
            self.at_head = always
            self.at_last_layer = self.at_first_layer = {**always, "communication": bucket * number}
            self.at_embedding = {**always, "communication": (bucket + stage.table) * number}
            part = stage.parameters / work.data
            # What a group of parameters is updated by is a copy of its gradients.
            flat = 0.0 if work.optimizer_offloaded else min(MOST_GATHERED, part) * work.reduce_bytes
            self.at_update = {"gradients": kept["gradients"], "communication": flat}
            return
        # With overlap there are two buckets: one that is sent, and one that is filled. Stage 1 fills them in float32.
        buckets = 2 * bucket * (work.reduce_bytes if work.zero == 1 else number)
        several = work.microbatches > 1
        whole = stage.parameters * work.reduce_bytes
        # Offloaded gradients leave the GPU with the last microbatch; in stage 1 they are whole until then.
        waiting = whole if work.zero == 1 and several and work.optimizer_offloaded else 0.0
        before = kept["gradients"] if several else 0.0

        def gradients(done: float) -> dict[str, float]:
            share = done / stage.parameters
            return {"gradients": max(before, waiting, share * kept["gradients"])}

        reduced = 0 if work.size.tied else stage.head
        self.at_head = gradients(0)
        self.at_last_layer = {**gradients(reduced), "communication": buckets}
        layers = stage.layers * stage.layer
        self.at_first_layer = {**gradients(reduced + layers - stage.layer), "communication": buckets}
        self.at_embedding = {**gradients(stage.parameters), "communication": buckets + stage.table * number}
        flat = 0.0 if work.optimizer_offloaded else stage.parameters / work.data * work.reduce_bytes
        self.at_update = {"gradients": kept["gradients"], "communication": flat}
