r"""DeepSpeed's mixture of experts: each layer has many feed-forward networks, and a router picks some for every token.

    torchrun --nproc-per-node 2 -m recipes.ch5.deepspeed_moe steps=20
    torchrun --nproc-per-node 2 -m recipes.ch5.deepspeed_moe steps=20 load_balance=0 experts=8 experts_per_token=1

A token costs what the experts that work on it cost, however many there are: more parameters for the same arithmetic.
The experts are spread over `expert_parallel` ranks. In every layer tokens are sent to the ranks of their experts and
the results back, two all-to-alls; everything else is data parallelism, with ZeRO 1 or 2 over the copies: of an expert
over the ranks that have it, too, of the rest over all ranks.

An expert takes `capacity_factor` times its even share of a microbatch's tokens; what comes after that is dropped: the
token skips this layer. So that few are, the router is trained to spread them, by a second loss (`load_balance`). What
each expert got, and what was dropped, stands in experts.jsonl, and at the end in a table and in experts.png.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recipes.ch5.deepspeed_args import DeepSpeedArgs
from recipes.ch5.deepspeed_config import deepspeed_config
from recipes.ch5.deepspeed_engine import Engine, show, start
from recipes.ch5.deepspeed_moe_args import DeepSpeedMoeArgs
from recipes.ch5.deepspeed_moe_load import Load, show_load
from recipes.lib.arguments import TrainArgs, parse_or_exit
from recipes.lib.dataset import rank_rows
from recipes.lib.deepspeed_stack import check_deepspeed, import_deepspeed
from recipes.lib.distributed import World, joined, sum_over_ranks
from recipes.lib.layout import Layout
from recipes.lib.model import FeedForward, Transformer
from recipes.lib.model_sizes import ModelSize
from recipes.lib.parallelism import checkpoint_activations
from recipes.lib.training import Microbatch, Plan, make_plan, microbatch_rows, recipe_main, train


class Mixture(nn.Module):
    """In place of a layer's feed-forward: the router, this rank's experts, and DeepSpeed's exchange between them."""

    def __init__(self, size: ModelSize, args: DeepSpeedMoeArgs, ranks: int, rank: int) -> None:
        """`ranks` have all experts together, and of them this one is number `rank`."""
        super().__init__()
        from deepspeed.moe.layer import MoE

        moe = MoE(
            size.width,
            FeedForward(size),  # DeepSpeed copies it
            num_experts=args.experts,
            ep_size=ranks,
            k=args.experts_per_token,
            capacity_factor=args.capacity_factor,
            min_capacity=1,
            drop_tokens=args.drop_tokens,
            use_rts=args.random_selection,
            top2_2nd_expert_sampling=args.random_selection,
        )
        here = moe.deepspeed_moe.experts.deepspeed_experts
        # Named before DeepSpeed's own module, so that these names count: in them an expert has the same number whatever
        # rank it is on, and a checkpoint loads into any number of ranks.
        self.router: nn.Linear = moe.deepspeed_moe.gate.wg
        self.experts = nn.ModuleDict({str(rank * len(here) + n): expert for n, expert in enumerate(here)})
        self.moe = moe
        self.balance = torch.zeros(())
        """Of the last microbatch: 1 where its tokens are spread evenly, up to `experts` where one gets all."""
        self.wanted, self.taken = torch.zeros(args.experts), torch.zeros(args.experts)
        """Of each expert: tokens of the last microbatch that chose it, and those that it had room for."""
        moe.deepspeed_moe.gate.register_forward_hook(self._note)

    def forward(self, x_BSD: Tensor) -> Tensor:
        output_BSD: Tensor = self.moe(x_BSD)[0]
        return output_BSD

    def _note(self, gate: nn.Module, inputs: Any, output: tuple[Any, ...]) -> None:
        self.balance, _, experts, chosen, _, _, self.wanted = output
        self.taken = torch.bincount(chosen[chosen >= 0], minlength=experts)  # -1: it was full


@dataclass(frozen=True, kw_only=True)
class Experts(Engine):
    """A model with a mixture in each layer, in DeepSpeed's engine."""

    args: DeepSpeedMoeArgs
    load: Load

    @classmethod
    def build(cls, plan: Plan, args: DeepSpeedMoeArgs) -> Experts:
        """The engine over the model with its initial weights. Raises LaunchError."""
        deepspeed = import_deepspeed("ch5_deepspeed_moe", plan.world)
        ranks, device = args.ranks_with_experts(plan.world.size), plan.world.device
        rank = make_groups(ranks)
        with torch.device("meta"):  # shapes only
            model = Transformer(plan.size)
        # Not on the meta device: a parameter that leaves it is a new one, which lacks DeepSpeed's mark of an expert,
        # and would be averaged with other ranks' other experts.
        with torch.device(device):
            for layer in model.layers:
                layer.mlp = Mixture(plan.size, args, ranks, rank)
        checkpoint_activations(model, args.activation_checkpointing)
        # Without ZeRO there is no float32 beside parameters that have been rounded.
        model.to_empty(device=device).to(plan.precision.compute if args.stage else plan.precision.master)
        named = dict(model.named_parameters())
        # DeepSpeed takes the experts out of each, into a group of their own.
        matrices, vectors = (
            [p for p in named.values() if (p.ndim > 1) is wanted] for wanted in (True, False)
        )
        groups = [
            {"name": "matrices", "params": matrices, "weight_decay": args.weight_decay},
            {"name": "vectors", "params": vectors, "weight_decay": 0.0},
        ]
        config = compose(plan, args)
        engine, state = start(deepspeed, model, groups, config, plan)
        load = Load(plan.run_directory, plan.world, plan.size.layers, args.experts)
        return cls(
            engine=engine, plan=plan, config=config, stage=args.stage, state=state, args=args, load=load
        )

    @property
    def mixtures(self) -> list[Mixture]:
        """Of all layers."""
        return [module for module in self.model.modules() if isinstance(module, Mixture)]

    def accumulate_gradients(self, microbatches: Sequence[Microbatch], token_count: Tensor) -> Tensor:
        """Forward and backward of each microbatch; the engine sums gradients over the ranks that have a parameter."""
        factor = self.plan.world.size  # it divides by it, for experts as for all else
        rows = len(microbatches[0][0])
        groups = (
            self.args.batch_size // rows
        )  # whose tokens were routed together; their balances have one mean
        own = (
            len(rank_rows(self.plan.layout.data_rank, self.plan.layout.data_size, self.args.batch_size))
            // rows
        )
        total = torch.zeros((), device=token_count.device)
        for number, (tokens_BS, targets_BS) in enumerate(microbatches, start=1):
            self.engine.set_gradient_accumulation_boundary(number == len(microbatches))
            with self.autocast():
                loss = self.engine(tokens_BS, targets_BS)
            balance = torch.stack([mixture.balance for mixture in self.mixtures])
            is_real = number <= own  # padding has been routed, too, and is nobody's load
            weight = self.args.load_balance / groups if is_real else 0.0
            if is_real:
                self.load.add(balance.detach() / groups, self.mixtures)
            self.engine.backward(factor * (loss / token_count + weight * balance.sum()), scale_wrt_gas=False)
            total = total + loss.detach()
        self.load.end_step()
        return total

    def clip(self) -> Tensor:
        """Stage 0: experts of all ranks count."""
        return clip_by_true_norm(self.model, self.args.clip_norm)

    def memory(self) -> dict[str, float]:
        """For the numbers of the steps in experts.jsonl."""
        return {"step": self.load.step}

    def recall(self, memory: dict[str, float]) -> None:
        """Go on counting."""
        self.load.step = int(memory["step"])


def make_groups(ranks: int) -> int:
    """DeepSpeed's groups of `ranks` neighbours with all experts together; gives this rank's number in its group."""
    from deepspeed.utils import groups

    name = f"ep_size_{ranks}"
    if name not in groups._get_expert_parallel_group_dict():
        # Here, not when the engine finds the layers: every rank would say that it makes them.
        groups._create_expert_and_data_parallel(ranks)
    number: int = groups._get_expert_parallel_rank(name)
    return number


def compose(plan: Plan, args: DeepSpeedMoeArgs) -> dict[str, Any]:
    """The configuration of chapter 5's ZeRO, which has no word about experts: those are the layers' own."""
    shared = {field.name: getattr(args, field.name) for field in dataclasses.fields(TrainArgs)}
    zero = DeepSpeedArgs(**shared, stage=args.stage, bucket_size=args.bucket_size, overlap=args.overlap)
    rows, microbatches = microbatch_rows(args, plan.layout)
    return deepspeed_config(
        zero,
        rows=rows,
        microbatches=microbatches,
        shares=plan.layout.data_size,
        bfloat16=plan.precision.is_mixed,
        on_gpu=plan.world.device.type == "cuda",
    )


def clip_by_true_norm(model: nn.Module, limit: float) -> Tensor:
    """Clip to `limit` by the norm over all experts, each counted once; gives that norm, before clipping.

    DeepSpeed's own clipping without ZeRO takes the mean of the ranks' norms, which is less where ranks have different
    experts (github.com/deepspeedai/DeepSpeed/issues/8475). Under ZeRO 1 and 2 it sums squares over all ranks: right.
    """
    of_experts = {
        p for module in model.modules() if isinstance(module, Mixture) for p in module.experts.parameters()
    }
    shared, own = [], []
    for parameter in model.parameters():
        (own if parameter in of_experts else shared).append(parameter.grad)
    mixture = next(module for module in model.modules() if isinstance(module, Mixture))
    squares = sum_over_ranks(nn.utils.get_total_norm(own).square(), mixture.moe.deepspeed_moe.ep_group)
    norm = (nn.utils.get_total_norm(shared).square() + squares).sqrt()
    if limit > 0:
        nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return norm


def make_layout(world: World, args: DeepSpeedMoeArgs) -> Layout:
    """Every rank trains on sequences of its own, whoever has the experts. Raises ArgumentError."""
    args.check_ranks(world.size, world.local_size)
    return Layout.each_its_own(world)


@recipe_main
def main() -> None:
    """Train; then show what each expert got."""
    args = parse_or_exit(DeepSpeedMoeArgs)
    check_deepspeed("ch5_deepspeed_moe")
    with joined(args.device) as world:
        plan = make_plan("ch5_deepspeed_moe", args, world, make_layout(world, args))
        size = dataclasses.replace(plan.size, experts=args.experts, experts_per_token=args.experts_per_token)
        plan = dataclasses.replace(plan, size=size)
        technique = Experts.build(plan, args)
        show(technique.config, plan.run_directory, world)
        train(plan, technique)
        ranks = args.ranks_with_experts(world.size)
        what = (
            f"{args.experts} experts over {ranks} of {world.size} ranks, {args.experts_per_token} per token"
        )
        show_load(plan.run_directory, world, f"{args.model}; {what}; load_balance={args.load_balance:g}")


if __name__ == "__main__":
    main()
