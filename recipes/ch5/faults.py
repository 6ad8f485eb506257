"""The faults of `ch5_debug`: each is planted in a tiny model, really happens, and a tool names it.

Some DeepSpeed refuses, and its own words are enough once one knows what they mean. The others train on without a word:
there somebody has to ask, and the question is the tool.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recipes.lib.distributed import World

WIDTH, SAMPLES = 8, 4


class NotNamed(Exception):
    """The tool did not say what was planted."""


@dataclass(frozen=True)
class Finding:
    """What was found, and how."""

    tool: str
    said: str
    """The tool's own words, or what they come to."""
    named: str
    """The culprit."""


class Tiny(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH, bias=False)
        self.outer = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, samples: Tensor) -> Tensor:
        return self.outer(self.inner(samples).relu())


def batch_sizes(deepspeed: Any, world: World, rank: int) -> Finding:
    """Two sequences, three times, on each rank: the sum of all is written down as one too many."""
    wrong = 2 * 3 * world.size + 1
    sizes = {"train_batch_size": wrong, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}
    said = _refusal(lambda: _engine(deepspeed, Tiny(), **sizes))
    found = re.search(r"train_batch_size is not equal .*?(\d+) != (\d+) \* (\d+) \* (\d+)", said, re.DOTALL)
    if found is None or [int(each) for each in found.groups()] != [wrong, 2, 3, world.size]:
        raise NotNamed(said)
    return Finding(
        "DeepSpeed's message", said, f"train_batch_size={wrong}, and {2 * 3 * world.size} would be right"
    )


def parameter_outside(deepspeed: Any, world: World, rank: int) -> Finding:
    """A layer beside the model that the engine got: it learns on each rank from that rank's samples alone."""
    torch.manual_seed(0)
    model, aside = (
        Tiny(),
        nn.Linear(WIDTH, 1, bias=False).to(world.device),
    )  # planted: not a part of the model
    engine = _engine(deepspeed, model)
    optimizer = torch.optim.SGD(aside.parameters(), lr=0.1)
    torch.manual_seed(world.rank)
    for _ in range(2):
        loss = aside(engine(torch.randn(SAMPLES, WIDTH, device=world.device))).square().mean()
        engine.backward(loss)
        engine.step()
        optimizer.step()
        optimizer.zero_grad()
    parameters = {f"{part}.{name}": p for part, module in (("model", model), ("aside", aside))
                  for name, p in module.named_parameters()}  # fmt: skip
    apart = [name for name, value in parameters.items() if _differs(value.detach(), world)]
    if apart != ["aside.weight"]:
        raise NotNamed(f"the ranks differ in {apart}")
    said = f"after 2 steps the ranks agree on {len(parameters) - 1} parameters, and not on {apart[0]}"
    return Finding("each parameter compared among the ranks", said, apart[0])


def overflow_loop(deepspeed: Any, world: World, rank: int) -> Finding:
    """One rank's loss has no finite gradient. DeepSpeed leaves out the step, and the next one, and the next."""
    torch.manual_seed(0)
    # As fp16 has it by itself, which not every CPU can do. There the scale is halved at each overflow, and after some
    # 16 of them DeepSpeed ends with "Current loss scale already at minimum - cannot decrease scale anymore".
    engine = _engine(deepspeed, Tiny(), bf16={"enabled": True, "check_grad_overflow": True})
    own: list[
        bool
    ] = []  # whether the gradient was finite where it begins, before it is summed over the ranks
    for _ in range(3):
        output = engine(torch.randn(SAMPLES, WIDTH, device=world.device).bfloat16())
        loss = output.float().square().mean()
        if world.rank == rank:
            loss = (loss * 0).sqrt()  # planted: the root of 0 has no gradient
        output.register_hook(lambda gradient: own.append(bool(gradient.isfinite().all())))
        engine.backward(loss)
        engine.step()
    everyone = [own] * world.size
    dist.all_gather_object(everyone, own, group=world.patient)
    wrong = [number for number, each in enumerate(everyone) if not all(each)]
    if engine.was_step_applied() or engine.skipped_steps != 3 or wrong != [rank]:
        raise NotNamed(
            f"{engine.skipped_steps} steps left out, ranks {wrong} have a gradient that is not finite"
        )
    said = f"was_step_applied() is False, skipped_steps is {engine.skipped_steps} of 3"
    return Finding("engine.was_step_applied(), and each rank's own gradient", said, f"rank {rank}")


def refused_optimizer(deepspeed: Any, world: World, rank: int) -> Finding:
    """ZeRO slices the state of Adam and its kin; another optimizer it takes only when told."""
    model = Tiny()
    said = _refusal(lambda: _engine(deepspeed, model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)))
    if "untested ZeRO Optimizer" not in said:
        raise NotNamed(said)
    (key,) = re.findall(r'"(zero_\w+)"', said)
    return Finding("DeepSpeed's message", said, f"SGD under ZeRO, without {key}")


def missing_compiler(deepspeed: Any, world: World, rank: int) -> Finding:
    """Offload with DeepSpeed's own AdamW, which is compiled at first use, where there is nothing to compile with."""
    adam = {"type": "AdamW", "params": {"lr": 1e-3}}
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    with _without_tools():
        said = _refusal(lambda: _engine(deepspeed, Tiny(), config_optimizer=adam, zero_optimization=zero))
    found = re.search(r"Unable to JIT load the (\w+) op due to (ninja) not being installed", said)
    if found is None:
        raise NotNamed(said)
    return Finding("DeepSpeed's message", said, f"{found[2]}, for the operator {found[1]}")


HAPPENINGS: Mapping[str, Callable[[Any, World, int], Finding]] = {
    "batch_sizes": batch_sizes,
    "parameter_outside": parameter_outside,
    "overflow_loop": overflow_loop,
    "refused_optimizer": refused_optimizer,
    "missing_compiler": missing_compiler,
}


def _engine(deepspeed: Any, model: nn.Module, optimizer: Any = None, **config: Any) -> Any:
    """ZeRO 2 over `model`, with torch's AdamW; `config` wins."""
    standard = {
        "train_micro_batch_size_per_gpu": SAMPLES,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000},
        "steps_per_print": None,
    }
    if optimizer is None:
        own = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
        standard["optimizer"] = config.pop("config_optimizer", own)
    parameters = model.parameters() if optimizer is None else None
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, model_parameters=parameters, config={**standard, **config}
    )
    return engine


def _refusal(attempt: Callable[[], object]) -> str:
    """What DeepSpeed says when it refuses, and why; it has no error of its own for that."""
    said = []
    try:
        attempt()
    except (AssertionError, RuntimeError, ValueError, ImportError) as error:
        reason: BaseException | None = error
        while reason is not None:  # the last word is often the first one's cause, further up in the traceback
            said.append(" ".join(str(reason).split()))
            reason = reason.__cause__
    if not said:
        raise NotNamed("nothing was refused")
    return "; because: ".join(said)


def _differs(value: Tensor, world: World) -> bool:
    """Whether any two ranks have different values."""
    largest, smallest = value.float().clone(), value.float().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    return not torch.equal(largest, smallest)


@contextmanager
def _without_tools() -> Iterator[None]:
    """Neither ninja nor a compiler, nor what was compiled before."""
    kept = {name: os.environ.get(name) for name in ("PATH", "TORCH_EXTENSIONS_DIR")}
    with tempfile.TemporaryDirectory() as empty:
        os.environ.update(PATH=empty, TORCH_EXTENSIONS_DIR=empty)
        try:
            yield
        finally:
            for name, value in kept.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
