"""What DeepSpeed's ZeRO holds of model and optimizer, under the names and in the shapes that checkpoints have.

ZeRO copies the parameters into flat buffers in float32 and gives each rank a part of them; the optimizer sees these
buffers alone. Here each parameter's part is found in them: a view, so a save copies nothing and a load fills it in
place. In stages 1 and 2 a group of parameters is one buffer, cut into as many parts as there are ranks; in stage 3
every parameter is cut, and the parts of many make a buffer. A buffer that is offloaded to a disk is empty between
steps: it is brought to host memory to be filled, and copied from there for a save.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from recipes.lib.flat_slices import FlatSlice
from recipes.lib.memory import Kept

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Part:
    """This rank's numbers of one parameter."""

    group: int
    """Number of the buffer among ZeRO's."""
    start: int
    """Position of the first in the parameter."""
    buffer: Tensor
    """The flat one that holds them, in float32; the optimizer's state is filed under it."""
    begin: int
    """Their position in the buffer."""
    count: int

    def of(self, flat: Tensor) -> Tensor:
        """The same numbers of a buffer of the same length."""
        return flat.detach().narrow(0, self.begin, self.count)


class ZeroState:
    """The state of `zero`, an engine's optimizer in stage 1, 2 or 3, over the parameters of `model`."""

    def __init__(self, model: nn.Module, zero: Any, stage: int) -> None:
        self._zero, self._stage = zero, stage
        self._parameters = list(model.parameters())
        self.shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
        self._parts = dict(self._sliced(model) if stage == 3 else self._grouped(model))

    def model(self) -> dict[str, FlatSlice]:
        """The parameters in float32: views, or of what is on a disk copies, which `take` brings back."""
        return self._slices()

    def optimizer(self) -> dict[str, Any]:
        """The optimizer's state and options as torch's AdamW would name them, under each parameter's name."""
        moments = {key: self._slices(key) for key in MOMENTS}
        step = torch.tensor(float(next(self._moments(part.buffer)["step"] for part in self._parts.values())))
        found: dict[str, Any] = {}
        for name, shape in self.shapes.items():
            found[f"state.{name}.step"] = step
            found |= {f"state.{name}.{key}": slices[name] for key, slices in moments.items()}
            found |= {f"param_groups.{name}.{key}": value for key, value in self._options(shape).items()}
        return found

    def loaded(self, model: dict[str, Any], optimizer: dict[str, Any]) -> None:
        """After what `model` and `optimizer` gave was filled: the rest follows. All ranks call this together."""
        step = float(next(value for key, value in optimizer.items() if key.endswith(".step")))
        for part in self._parts.values():
            state = self._moments(part.buffer)
            state["step"] = (
                torch.full_like(state["step"], step) if isinstance(state["step"], Tensor) else int(step)
            )
        self.take(model, optimizer)

    def take(self, model: Mapping[str, Any], optimizer: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Bring to the disk what was filled of copies, and to the parameters that compute what is in float32."""
        for present in self._groups(self._on_disk):
            for name, part in present.items():
                part.of(part.buffer).copy_(model[name].numbers())
                for key in MOMENTS if optimizer else ():
                    part.of(self._moments(part.buffer)[key]).copy_(optimizer[f"state.{name}.{key}"].numbers())
        self.compute_with_it()

    def fill(self, value: Callable[[str, tuple[int, ...]], Tensor]) -> None:
        """Give every parameter, whole, its initial values, and compute with them. All ranks call this together."""
        for present in self._groups():
            for name, part in present.items():
                whole = value(name, self.shapes[name]).flatten()
                part.of(part.buffer).copy_(whole[part.start : part.start + part.count])
        self.compute_with_it()

    def kept(self) -> Kept:
        """Bytes on this rank between two steps. The parameters are there twice: those that compute, and in float32.

        In stage 3 those that stay whole, too, beside this rank's part of them; and where the host updates, it has
        gradients twice, as they are summed and as they are taken in the update.
        """
        own = sum(part.count for part in self._parts.values())
        # One that is not gathered is empty; on one rank a whole one is its part.
        computing = sum(p.nbytes for p in self._parameters if self._stage < 3 or not _share(p, p.ds_tensor))
        computing += sum(p.ds_tensor.nbytes for p in self._parameters if self._stage == 3)
        whole = sum(math.prod(shape) for shape in self.shapes.values())
        size = next(iter(self._parts.values())).buffer.element_size()
        gradients = whole if self._stage == 1 else own
        if self._stage == 3 and self._zero.offload_optimizer:
            gradients *= 2
        return Kept(computing + own * size, gradients * size, 2 * own * size)

    def compute_with_it(self) -> None:
        """Bring what is in float32 to the parameters that compute. All ranks call this together."""
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        for number in range(len(self._zero.fp32_partitioned_groups_flat)):
            with self._present(number):
                self._zero._reassign_or_swap_out_partitioned_parameters(number)
        if whole := self._zero.persistent_parameters:
            whole[0].partition(whole)
            whole[0].all_gather(whole)

    def _grouped(self, model: nn.Module) -> Iterator[tuple[str, _Part]]:
        for name, parameter in model.named_parameters():
            if (mapping := parameter._hp_mapping) is not None:
                (buffer,) = self._zero.optimizer.param_groups[mapping.param_group_index]["params"]
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                group = mapping.param_group_index
                yield name, _Part(group, there.start, buffer, here.start, here.numel)

    def _sliced(self, model: nn.Module) -> Iterator[tuple[str, _Part]]:
        for name, parameter in model.named_parameters():
            number, begin, room = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start = room * torch.distributed.get_rank(parameter.ds_process_group)
            count = min(room, parameter.ds_numel - start)  # the last ranks' slices are filled up with zeros
            if count > 0:
                buffer = self._zero.fp32_partitioned_groups_flat[number]
                yield name, _Part(number, start, buffer, begin, count)

    def _on_disk(self, group: int) -> bool:
        return self._stage == 3 and bool(self._zero._swappable_optimizer_subgroup(group))

    @contextmanager
    def _present(self, group: int) -> Iterator[None]:
        """While a buffer and its moments are in memory; what has become of them goes back to the disk."""
        if self._on_disk(group):
            self._zero._optimizer_states_and_gradient_swap_in(group)
        yield
        if self._on_disk(group):
            self._zero._optimizer_states_and_gradient_swap_out(group)

    def _groups(self, wanted: Callable[[int], bool] = lambda group: True) -> Iterator[dict[str, _Part]]:
        """The parts of one buffer after the other, by parameter, each while it is in memory."""
        for group in sorted({part.group for part in self._parts.values() if wanted(part.group)}):
            with self._present(group):
                yield {name: part for name, part in self._parts.items() if part.group == group}

    def _slices(self, moment: str = "") -> dict[str, FlatSlice]:
        """What this rank has of every parameter, or of a moment of it."""
        found = {name: FlatSlice(shape, 0, torch.empty(0)) for name, shape in self.shapes.items()}
        for present in self._groups():
            for name, part in present.items():
                own = part.of(self._moments(part.buffer)[moment] if moment else part.buffer)
                own = own.clone() if self._on_disk(part.group) else own
                found[name] = FlatSlice(self.shapes[name], part.start, own)
        return found

    def _moments(self, buffer: Tensor) -> dict[str, Any]:
        """The optimizer's state of a buffer; made where there was no step yet, as torch's AdamW makes it."""
        state: dict[str, Any] = self._zero.optimizer.state[buffer]
        if not state:
            torchs = isinstance(self._zero.optimizer, torch.optim.AdamW)
            state["step"] = torch.zeros((), device=buffer.device) if torchs else 0
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(buffer)
        return state

    def _options(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Of torch's AdamW, whoever's is in use: every technique finds in a checkpoint what it asks for."""
        torchs = torch.optim.AdamW([torch.empty(0)], fused=True).param_groups[0]
        ours = self._zero.optimizer.param_groups[0 if len(shape) > 1 else 1]
        return {name: ours.get(name, value) for name, value in torchs.items() if name != "params"}


def _share(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
