"""Megatron-Core on a CPU with gloo: it names CUDA in a hundred places, and its arithmetic is torch's.

    python -m tests.recipes.megatron_on_cpu recipes.ch5.megatron steps=5 tensor_parallel=2

What says "cuda" gets the CPU. Nothing of Megatron-Core's own is replaced but the two functions that read and set the
random state of a GPU; all sums, splits, schedules and files are its own.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class CudaIsTheCpu(TorchFunctionMode):
    """Every call of torch that wants memory on a GPU gets it on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizer takes parameters by this name alone.
            return function(*args).replace("torch.", "torch.cuda.")
        return function(*args, **kwargs)


class Stream:
    """A CPU does one thing after the other: there is nothing to wait for."""

    def wait_stream(self, stream: Stream) -> None:
        """Nothing."""


def install() -> None:
    """From here on Megatron-Core runs in this process."""
    warnings.filterwarnings("ignore")
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.manual_seed = torch.default_generator.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *_: Stream()  # type: ignore[assignment, return-value]
    CudaIsTheCpu().__enter__()
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    from recipes.ch5 import megatron

    megatron.want_gpus = lambda world: None


if __name__ == "__main__":
    install()
    recipe = importlib.import_module(sys.argv.pop(1))
    recipe.main()
