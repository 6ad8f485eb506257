"""The model computes what a Llama-type decoder does, and its memory savers change nothing but memory."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from recipes.lib.model import IGNORE, Head, Transformer, materialize, rotary_table, rotate
from recipes.lib.model_sizes import ModelSize, RopeScaling
from recipes.lib.parallelism import checkpoint_activations, compile_blocks

SIZE = ModelSize(
    layers=3, width=48, heads=4, kv_heads=2, ffn_width=90, vocab_size=67, rope_theta=1e4, tied=False
)


def make_model(size: ModelSize = SIZE, seed: int = 0) -> Transformer:
    """A model in float64, where equality means the same computation."""
    with torch.device("meta"):
        model = Transformer(size)
    model.double()
    materialize(model, seed, torch.device("cpu"))
    return model


def some_tokens(rows: int = 2, length: int = 16) -> Tensor:
    """Token ids [rows, length]."""
    return torch.randint(SIZE.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def gradients(model: Transformer, tokens: Tensor) -> list[Tensor]:
    """Of the summed loss, for each parameter."""
    model.zero_grad()
    model(tokens, tokens.roll(-1, 1)).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_no_token_sees_a_later_one() -> None:
    model, tokens = make_model(), some_tokens()
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % SIZE.vocab_size
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.isclose(before[:, 9:], after[:, 9:]).all(-1).any()


def test_the_loss_is_the_sum_over_the_targets_that_count() -> None:
    model, tokens = make_model(), some_tokens()
    targets = tokens.roll(-1, 1)
    targets[0, 3:] = IGNORE
    chosen = model(tokens).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    assert torch.allclose(model(tokens, targets), -chosen[targets != IGNORE].sum(), rtol=1e-12)
    nothing = model(tokens, torch.full_like(tokens, IGNORE))
    nothing.backward()
    assert nothing.item() == 0
    assert all(torch.count_nonzero(parameter.grad) == 0 for parameter in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_logits", [67 * 32, 67 * 31, 67 * 10, 67, 1])
def test_a_loss_in_chunks_is_the_loss_in_one(max_logits: int, tied: bool) -> None:
    model, tokens = make_model(dataclasses.replace(SIZE, tied=tied)), some_tokens()
    whole_loss, whole = model(tokens, tokens), gradients(model, tokens)
    model.lm_head.max_logits = max_logits
    assert torch.allclose(model(tokens, tokens), whole_loss, rtol=1e-12)
    for ours, theirs in zip(gradients(model, tokens), whole, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-13)


def test_chunks_hold_few_logits_at_once() -> None:
    head, largest = Head(SIZE, max_logits=67 * 4), 0
    torch.nn.init.normal_(head.weight)

    def remember(x: Tensor, weight: Tensor, targets: Tensor, compute: Any = head.chunk_loss) -> Any:
        nonlocal largest
        largest = max(largest, len(x))
        return compute(x, weight, targets)

    head.chunk_loss = remember
    head(torch.randn(2, 15, 48), torch.zeros(2, 15, dtype=torch.long)).backward()
    assert largest == 4


def test_shared_key_value_heads_are_repeated_ones() -> None:
    grouped, tokens = make_model(), some_tokens()
    plain = make_model(dataclasses.replace(SIZE, kv_heads=SIZE.heads))
    state = grouped.state_dict()
    for name, weight in state.items():
        if "k_proj" in name or "v_proj" in name:
            heads = weight.view(SIZE.kv_heads, SIZE.head_dim, SIZE.width)
            state[name] = heads.repeat_interleave(SIZE.heads // SIZE.kv_heads, 0).flatten(0, 1)
    plain.load_state_dict(state)
    assert torch.allclose(grouped(tokens), plain(tokens), rtol=1e-10)


def test_rotation_tells_distance_not_position() -> None:
    cos, sin = (table.double() for table in rotary_table(SIZE, 64, torch.device("cpu")))
    q, k = torch.randn(2, SIZE.head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores = rotate(q.expand(64, -1), cos, sin) @ rotate(k.expand(64, -1), cos, sin).T
    for distance in (0, 1, 7, 40):
        same = scores.diagonal(-distance)
        assert torch.allclose(same, same[:1], rtol=1e-5)
    assert not torch.isclose(scores[0, 0], scores[1, 0], rtol=1e-2)


def test_rotation_pairs_dimensions_as_hugging_face_does() -> None:
    """Position 1 of Llama's `rotate_half` layout: dimension i turns with i + E/2."""
    cos, sin = rotary_table(SIZE, 2, torch.device("cpu"))
    x = torch.zeros(2, SIZE.head_dim)
    x[1, 0] = 1.0
    turned = rotate(x, cos, sin)[1]
    assert turned[0] == pytest.approx(torch.cos(torch.tensor(1.0)).item())
    assert turned[SIZE.head_dim // 2] == pytest.approx(torch.sin(torch.tensor(1.0)).item())


def test_stretched_rotation_keeps_fast_dimensions_and_slows_the_others() -> None:
    """Llama 3.1's: below one turn per original context divided by the factor, above four kept."""
    size = dataclasses.replace(SIZE, width=4 * 64, rope_theta=500_000.0)
    scaling = RopeScaling(factor=8.0, original_context=8192)
    stretched = dataclasses.replace(size, rope_scaling=scaling)

    def frequencies(which: ModelSize) -> Tensor:
        _, sin = rotary_table(which, 2, torch.device("cpu"))
        return sin[1, : which.head_dim // 2].double().asin()

    # Without the first dimension, whose angle of 1 asin cannot take back exactly.
    ratio = frequencies(size)[1:] / frequencies(stretched)[1:]
    turns = 8192 * frequencies(size)[1:] / (2 * torch.pi)
    assert torch.allclose(ratio[turns > 4], torch.ones(()).double(), rtol=1e-5)
    assert torch.allclose(ratio[turns < 1], torch.full((), 8.0).double(), rtol=1e-5)
    between = ratio[(turns > 1) & (turns < 4)]
    assert len(between) > 0
    assert ((between > 1) & (between < 8)).all()


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputing_changes_no_gradient(mode: str) -> None:
    plain, saving, tokens = make_model(), make_model(), some_tokens()
    checkpoint_activations(saving, mode)
    for ours, theirs in zip(gradients(saving, tokens), gradients(plain, tokens), strict=True):
        assert torch.equal(ours, theirs)


def test_recomputing_trades_memory_for_arithmetic_as_promised() -> None:
    kept, flops = {}, {}
    for mode in ("none", "selective", "full"):
        model, tokens = make_model(), some_tokens()
        checkpoint_activations(model, mode)
        kept[mode] = _kept_bytes(model, tokens)
        with FlopCounterMode(display=False) as counter:
            gradients(model, tokens)
        flops[mode] = counter.get_total_flops()
    assert kept["full"] < kept["selective"] < kept["none"]
    assert flops["selective"] == flops["none"]
    # One more forward pass of the layers; the head, a part of a small model's cost, is not repeated.
    assert 1.15 * flops["none"] < flops["full"] < 1.34 * flops["none"]


def _kept_bytes(model: Transformer, tokens: Tensor) -> int:
    """Bytes that were allocated in the forward pass and are still held at its end, for the backward pass."""
    with _Allocations() as allocations:
        loss = model(tokens, tokens)
        assert loss.requires_grad
        return sum(size for storage, size in allocations.made.items() if not storage.expired())


class _Allocations(TorchDispatchMode):
    """Notes the memory of every result, without holding it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[StorageWeakRef(storage)] = storage.nbytes()
        return result


def test_all_layers_share_one_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    plain, compiled, tokens = make_model(), make_model(), some_tokens()
    checkpoint_activations(compiled, "selective")
    compile_blocks(compiled)
    for ours, theirs in zip(gradients(compiled, tokens), gradients(plain, tokens), strict=True):
        assert torch.equal(ours, theirs)
    assert graphs == 2  # a layer, and the loss


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    first, second = make_model().state_dict(), make_model().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = make_model(seed=1).state_dict()
    drawn = [name for name in first if "norm" not in name]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    q_projections = [first[name].flatten() for name in drawn if "q_proj" in name]
    assert not torch.equal(q_projections[0], q_projections[1])
    deeper = make_model(dataclasses.replace(SIZE, layers=5)).state_dict()
    assert torch.equal(first["layers.2.mlp.up_proj.weight"], deeper["layers.2.mlp.up_proj.weight"])


def test_a_model_without_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size=0"):
        Transformer(dataclasses.replace(SIZE, vocab_size=0))
