"""Which ways there are to train a model on some GPUs, which of them fit, and which is fastest. Pure; no torch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from recipes.lib.arguments import ArgumentError
from recipes.lib.calibration import GIB
from recipes.lib.divisors import nearest_divisor
from recipes.lib.flops import flops_per_token
from recipes.lib.gpus import Gpu
from recipes.lib.memory_model import Memory, predict_memory
from recipes.lib.model_sizes import SIZES, ModelSize
from recipes.lib.step_time_model import Fabric, StepTime, predict_step_time
from recipes.lib.workload import Workload

CHECKPOINTING = ("none", "selective", "full")
MICROBATCHES = (1, 2, 4, 8, 16)
AS_FAST = 0.02
"""Two ways are as fast as each other within this: the model's own errors are not smaller. The simpler one wins."""
SIMPLEST_FIRST = ("single", "ddp", "shard_grad_op", "full_shard", "hybrid_shard")


@dataclass(frozen=True)
class Request:
    """What is asked. Zeros are free for the planner to choose."""

    model: str
    gpu: Gpu
    nodes: int
    gpus_per_node: int
    network_gb_s: float
    sequence_length: int
    batch_size: int = 0
    """Sequences per optimizer step over all GPUs."""
    microbatch: int = 0
    checkpointing: str = ""
    compiled: bool = True
    master_bytes: int = 4
    tensor: int = 0
    pipeline: int = 0

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def fabric(self) -> Fabric:
        return Fabric(self.gpus_per_node, self.network_gb_s)


@dataclass(frozen=True)
class Candidate:
    """One way, and what it would take."""

    work: Workload
    memory: Memory
    time: StepTime
    gpu: Gpu

    @property
    def spare_gib(self) -> float:
        """Free memory; below zero it is missing."""
        return self.gpu.memory_gib - self.memory.needed / GIB

    @property
    def fits(self) -> bool:
        return self.spare_gib >= 0

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU."""
        return self.work.step_tokens / self.time.seconds / self.work.gpus

    @property
    def mfu(self) -> float:
        """By formula F."""
        return (
            self.tokens_per_second
            * flops_per_token(self.work.size, self.work.sequence_length).full
            / self.gpu.peak
        )

    @property
    def complexity(self) -> tuple[int, int, int]:
        kinds = (self.work.tensor > 1) + (self.work.pipeline > 1)
        return kinds, SIMPLEST_FIRST.index(self.work.strategy), CHECKPOINTING.index(self.work.checkpointing)


def model_size(name: str, vocab_size: int = 0) -> ModelSize:
    """A size with a vocabulary: where nobody published one, that of the recipes' own tokenizer (4,096 tokens)."""
    size = SIZES[name]
    return dataclasses.replace(size, vocab_size=vocab_size or size.vocab_size or 4096)


def check(request: Request) -> None:
    """Raise ArgumentError for what cannot be: sizes that do not divide, a sequence that the model cannot take."""
    context = SIZES[request.model].context
    if context and request.sequence_length > context:  # 0: nobody published a limit
        problem = f"wants at most {context}, the context that {request.model} was made for"
        raise ArgumentError("sequence_length", request.sequence_length, problem)
    split = (request.tensor or 1) * (request.pipeline or 1)
    if request.gpus % split:
        key = "tensor" if (request.tensor or 1) > 1 else "pipeline"
        nearest = nearest_divisor(request.gpus, split)
        problem = (
            f"tensor {request.tensor or 1} x pipeline {request.pipeline or 1} = {split} does not divide "
            f"{request.gpus} GPUs ({request.nodes} x {request.gpus_per_node}); nearest: {nearest}"
        )
        raise ArgumentError(key, getattr(request, key), problem)
    size = SIZES[request.model]
    if request.tensor and size.kv_heads % request.tensor:
        problem = f"wants a divisor of {size.kv_heads}, the key/value heads of {request.model}"
        raise ArgumentError("tensor", request.tensor, problem)
    if request.pipeline and request.pipeline > size.layers:
        raise ArgumentError(
            "pipeline", request.pipeline, f"wants at most {size.layers}, the layers of {request.model}"
        )
    share = request.gpus // split
    if request.batch_size and request.batch_size % (share * (request.microbatch or 1)):
        problem = f"wants a multiple of {share * (request.microbatch or 1)}: shares of the batch times microbatch_size"
        raise ArgumentError("batch_size", request.batch_size, problem)


def candidates(request: Request) -> list[Candidate]:
    """Every way that divides evenly, whether it fits or not. Raises ArgumentError as `check` does."""
    check(request)
    found = []
    for work in _ways(request):
        time = predict_step_time(work, request.gpu, request.fabric)
        found.append(Candidate(work, predict_memory(work), time, request.gpu))
    return found


def best_of_each(found: Sequence[Candidate]) -> list[Candidate]:
    """Of each strategy the fastest that fits, or where none does the one that misses least; fastest first."""
    kinds: dict[str, list[Candidate]] = {}
    for each in found:
        kinds.setdefault(each.work.name, []).append(each)
    chosen = [max(each, key=_rank) for each in kinds.values()]
    return sorted(chosen, key=_rank, reverse=True)


def recommended(found: Sequence[Candidate]) -> Candidate | None:
    """The simplest of the fastest that fit; None where nothing fits."""
    fitting = [each for each in found if each.fits]
    if not fitting:
        return None
    fastest = max(each.tokens_per_second for each in fitting)
    near = [each for each in fitting if each.tokens_per_second >= fastest * (1 - AS_FAST)]
    return min(near, key=lambda each: (each.complexity, -each.tokens_per_second))


def what_would_fit(request: Request) -> list[str]:
    """Changes that make a model fit that no strategy fits, the smallest first; each with what it leaves free."""
    tries: list[tuple[str, Request]] = []
    if request.checkpointing not in ("", "full"):
        tries.append(("activation_checkpointing=full", dataclasses.replace(request, checkpointing="full")))
    if request.microbatch > 1:
        smaller = dataclasses.replace(request, microbatch=1, checkpointing="full")
        tries.append(("microbatch_size=1 activation_checkpointing=full", smaller))
    if request.master_bytes > 2:
        tries.append(
            ("param_dtype=bfloat16", dataclasses.replace(request, master_bytes=2, checkpointing="full"))
        )
    nodes = request.nodes
    while nodes < 4096:
        nodes *= 2
        more = dataclasses.replace(request, nodes=nodes, batch_size=0)
        if any(each.fits for each in candidates(more)):
            tries.append((f"nodes={nodes}", more))
            break
    said = []
    for words, changed in tries:
        best = recommended(candidates(changed))
        if best is not None:
            said.append(f"{words}: {best.work.name}, {best.spare_gib:.1f} GiB to spare")
    return said


def _rank(each: Candidate) -> tuple[bool, float]:
    return each.fits, each.tokens_per_second if each.fits else each.spare_gib


def _ways(request: Request) -> Iterator[Workload]:
    size = model_size(request.model)
    tensors = [request.tensor] if request.tensor else _powers(min(request.gpus_per_node, size.kv_heads))
    pipelines = [request.pipeline] if request.pipeline else _powers(min(request.gpus, size.layers, 16))
    modes = [request.checkpointing] if request.checkpointing else CHECKPOINTING
    for tensor in tensors:
        for pipeline in pipelines:
            if request.gpus % (tensor * pipeline):
                continue
            data = request.gpus // (tensor * pipeline)
            for strategy, shard in _data_strategies(request, data, tensor):
                for mode in modes:
                    for microbatch in [request.microbatch] if request.microbatch else MICROBATCHES:
                        rounds = _rounds(request, data, pipeline, microbatch)
                        if rounds is None:
                            continue
                        yield Workload(
                            size=size, sequence_length=request.sequence_length, microbatch=microbatch,
                            microbatches=rounds, strategy=strategy, data=data, shard=shard, tensor=tensor,
                            pipeline=pipeline, checkpointing=mode, compiled=request.compiled,
                            master_bytes=request.master_bytes,
                        )  # fmt: skip


def _data_strategies(request: Request, data: int, tensor: int) -> list[tuple[str, int]]:
    if data == 1:
        return [("single", 1)]
    found = [("ddp", 1), ("full_shard", data), ("shard_grad_op", data)]
    inside = request.gpus_per_node // tensor
    if 1 < inside < data and data % inside == 0:
        found.append(("hybrid_shard", inside))
    return found


def _rounds(request: Request, data: int, pipeline: int, microbatch: int) -> int | None:
    if not request.batch_size:
        # A pipeline needs several to be full: with four per stage a fifth of the time is its bubble.
        return 4 * pipeline if pipeline > 1 else 1
    rounds, rest = divmod(request.batch_size, data * microbatch)
    return rounds if rounds and not rest else None


@functools.cache
def _powers(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length()) if 1 << power <= most]
