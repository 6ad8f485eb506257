"""Memory of one GPU in a training step, by part and by moment. Pure; no torch.

The peak is not a sum of everything: what is gathered, kept and summed comes and goes. So each moment that can be the
fullest is added up on its own, and the fullest one counts:

- **head**: the loss is being differentiated; every layer's activations are there, no gradient of a layer yet
- **last layer**: the first layer that the backward pass comes to, while the head's gradients are summed
- **first layer**: the last one; all other gradients are there
- **embedding**: all activations are gone; the largest single gradient is being summed
- **update**: parameters, gradients and both moments

`tensor_bytes` of each moment is what `torch.cuda.max_memory_allocated` counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from recipes.lib.calibration import CALIBRATION, GIB, Calibration
from recipes.lib.layer_memory import head_bytes, layer_bytes
from recipes.lib.workload import Stage, Workload, stages
from recipes.lib.zero_memory import Zero

PARTS = (
    "parameters",
    "optimizer",
    "gradients",
    "activations",
    "logits and loss",
    "gathered parameters",
    "communication",
    "workspace",
)


@dataclass(frozen=True)
class Moment:
    """One moment of a step on one GPU."""

    name: str
    parts: dict[str, float] = field(default_factory=dict)
    """Bytes by part; those that are not named are nothing."""

    @property
    def tensor_bytes(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Memory:
    """What one GPU needs."""

    moments: tuple[Moment, ...]
    """Of the fullest stage."""
    outside: float
    """Bytes beside torch's tensors: driver, NCCL, and what lies unused between blocks."""

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.tensor_bytes)

    @property
    def needed(self) -> float:
        """Bytes of the GPU's total."""
        return self.peak.tensor_bytes + self.outside

    @property
    def certain(self) -> float:
        """Bytes that parameters, gradients and moments take at the update: exact, whatever the activations."""
        update = self.moments[-1]
        return sum(update.parts.get(part, 0.0) for part in ("parameters", "gradients", "optimizer"))


def predict_memory(work: Workload, calibration: Calibration = CALIBRATION) -> Memory:
    """The fullest stage's moments."""
    of_stages = [_moments(work, stage, calibration) for stage in stages(work)]
    fullest = max(of_stages, key=lambda moments: max(moment.tensor_bytes for moment in moments))
    peak = max(moment.tensor_bytes for moment in fullest)
    outside = calibration.context_gib + (calibration.nccl_gib if work.gpus > 1 else 0.0)
    return Memory(tuple(fullest), outside * GIB + calibration.fragmentation * peak)


def _moments(work: Workload, stage: Stage, calibration: Calibration) -> list[Moment]:
    kind: type[_Sharded | _Whole | Zero] = _Sharded if work.sharded else Zero if work.zero else _Whole
    ordered = kind(work, stage)
    first = layer_bytes(work, calibration)
    # The first ones recompute; the backward pass comes to the last one first.
    again = stage.recomputed(work)
    last = first if again == stage.layers else layer_bytes(replace(work, checkpointing="none"), calibration)
    kept = (again * first.kept + (stage.layers - again) * last.kept) * stage.in_flight
    rotation = 2 * work.sequence_length * work.size.head_dim * 4
    always = {**ordered.states, "workspace": calibration.workspace_bytes + rotation}
    found = []
    if stage.vocabulary:
        logits, around = head_bytes(work, stage)
        found.append(
            Moment(
                "head",
                _sum(always, ordered.at_head, {"activations": kept + around, "logits and loss": logits}),
            )
        )
    activations = {"activations": kept + last.backward}
    found.append(Moment("last layer", _sum(always, ordered.at_last_layer, activations)))
    activations = {"activations": first.kept * stage.in_flight + first.backward}
    found.append(Moment("first layer", _sum(always, ordered.at_first_layer, activations)))
    found.append(Moment("embedding", _sum(always, ordered.at_embedding)))
    found.append(Moment("update", _sum(always, ordered.at_update)))
    return found


class _Sharded:
    """FSDP2 as `ch4_fsdp` wraps the model: each layer, the input embedding, and the last norm with the head, apart."""

    def __init__(self, work: Workload, stage: Stage) -> None:
        share = work.shard
        number, master, summed = work.compute_bytes, work.master_bytes, work.reduce_bytes
        on_gpu = 0 if work.cpu_offload else 1
        mine = stage.parameters / share
        gradient = master / share * on_gpu
        self.states = {"parameters": mine * master * on_gpu, "optimizer": 2 * mine * master * on_gpu}
        # Over several microbatches gradients stay: sharded, or, where their sum is deferred, whole.
        stays = work.microbatches > 1
        whole = stage.parameters * summed if work.defer_reduction and stays else 0.0
        before = mine * master * on_gpu if stays and not work.defer_reduction else 0.0
        tied = work.size.tied
        # Gathered by the root, from the first to the last operation.
        outer = stage.table + stage.head if tied else 0
        # With one rank nothing is gathered ahead: the copy is made when it is needed.
        ahead = int(share > 1)
        keeps = work.strategy == "shard_grad_op"
        everything = stage.parameters * number
        layers = stage.layers * stage.layer

        def gathered(some: float) -> dict[str, float]:
            return {"gathered parameters": everything if keeps else some * number}

        def gradients(done: float) -> dict[str, float]:
            return {"gradients": max(before, done * gradient) + whole}

        # A tied table's gradient from the head waits for the one from the embedding.
        waiting = outer * number
        head = outer or stage.head
        if work.fused_loss:
            # Still in the forward pass: no layer is gathered ahead, and the message that brought the head is there
            # until the next one comes.
            self.at_head = _sum(gathered(head), gradients(0), {"communication": ahead * head * number})
        else:
            self.at_head = _sum(gathered(head + ahead * stage.layer), gradients(0))
        reduced_head = 0 if tied else stage.head
        self.at_last_layer = _sum(
            gathered(outer + (1 + ahead) * stage.layer),
            gradients(reduced_head),
            {"communication": reduced_head * summed + waiting},
        )
        # The embedding is gathered ahead of a backward pass that does not need it.
        self.at_first_layer = _sum(
            gathered(outer + stage.layer + (0 if tied else ahead * stage.table)),
            gradients(reduced_head + layers - stage.layer),
            {"communication": stage.layer * summed + waiting},
        )
        if keeps:
            self.at_first_layer["gathered parameters"] = number * (
                outer + stage.layer + (0 if tied else stage.table)
            )
        last = stage.table + stage.head if tied else stage.table or stage.layer
        # With one rank it is a scaled copy, made after the gradient is gone.
        copies = summed + number if share > 1 else 2 * summed
        self.at_embedding = _sum(gradients(stage.parameters), {"communication": last * copies})
        self.at_update = {"gradients": stage.parameters * gradient}


class _Whole:
    """A whole copy on every GPU under autocast: one device alone, or DistributedDataParallel."""

    def __init__(self, work: Workload, stage: Stage) -> None:
        master, number = work.master_bytes, work.compute_bytes
        all_of_them = stage.parameters * master
        self.states = {"parameters": all_of_them, "optimizer": 2 * all_of_them}
        buckets = all_of_them if work.strategy == "ddp" else 0.0
        # In buckets gradients are always there; on their own they begin anew each step.
        apart = not (work.strategy == "ddp" and work.bucket_view)
        before = all_of_them if apart and work.microbatches > 1 else 0.0
        multiplied = stage.layers * stage.layer + stage.vocabulary * work.size.width
        rounds = number != master
        # The backward pass makes a layer's rounded weights anew where it is recomputed or compiled; but autocast holds
        # the forward pass's until its end, where the head is (1.81 GiB for llama_1b on an H200).
        held = multiplied * number * rounds
        rounded = held if work.checkpointing == "none" and not work.compiled else 0.0
        head = stage.vocabulary * work.size.width

        def gradients(done: float) -> dict[str, float]:
            own = max(before, done * master)
            return {"gradients": own, "communication": buckets} if apart else {"gradients": buckets}

        self.at_head = _sum(gradients(0), {"gathered parameters": held})
        layer = rounded - head * number * rounds if rounded else stage.layer * number * rounds
        self.at_last_layer = _sum(gradients(head), {"gathered parameters": layer})
        self.at_first_layer = _sum(
            gradients(stage.parameters - stage.table - stage.layer),
            {"gathered parameters": stage.layer * number * rounds},
        )
        # DDP copies a finished gradient into its bucket.
        self.at_embedding = _sum(
            gradients(stage.parameters), {"communication": stage.table * master if not apart else 0.0}
        )
        self.at_update = gradients(stage.parameters)


def _sum(*dicts: dict[str, float]) -> dict[str, float]:
    total: dict[str, float] = {}
    for each in dicts:
        for part, amount in each.items():
            total[part] = total.get(part, 0.0) + amount
    return {part: total[part] for part in PARTS if total.get(part)}
