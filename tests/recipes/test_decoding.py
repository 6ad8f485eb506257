"""Decoding with a cache gives what the whole forward pass gives; the stream answers everybody, and counts honestly."""

from __future__ import annotations

import pytest
import torch

from recipes.lib.counted import Counted
from recipes.lib.decoding import Cache, advance
from recipes.lib.flops import flops_per_token
from recipes.lib.model import Transformer, materialize
from recipes.lib.model_sizes import ModelSize, RopeScaling
from recipes.lib.request_stream import arrivals, serve

SIZE = ModelSize(
    layers=2, width=32, heads=4, kv_heads=2, ffn_width=48, vocab_size=61, rope_theta=1e4, tied=False,
    rope_scaling=RopeScaling(factor=4.0, original_context=8),
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Transformer:
    with torch.device("meta"):
        made = Transformer(SIZE)
    made.to(torch.float64)
    materialize(made, 0, torch.device("cpu"))
    with torch.no_grad():  # initial weights are so small that attention would hardly matter
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return made.requires_grad_(False)


def greedy(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """By recomputing everything for every token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_a_prompt_and_tokens_after_it_give_the_logits_of_the_whole_sequence(model: Transformer) -> None:
    tokens = torch.randint(SIZE.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
    whole_BSV = model(tokens)
    cache = Cache(model, rows=2, room=9)
    for begin, end in ((0, 5), (5, 6), (6, 9)):
        lengths = torch.full((2,), begin)
        logits_BV = advance(model, cache, slice(None), tokens[:, begin:end], lengths, end)
        torch.testing.assert_close(logits_BV, whole_BSV[:, end - 1], rtol=1e-6, atol=1e-6)


def test_sequences_of_different_lengths_do_not_see_each_other(model: Transformer) -> None:
    tokens = torch.randint(SIZE.vocab_size, (2, 8), generator=torch.Generator().manual_seed(2))
    cache = Cache(model, rows=2, room=8)
    for row, length in ((0, 3), (1, 6)):
        advance(model, cache, slice(row, row + 1), tokens[row : row + 1, :length], torch.tensor([0]), length)
    next_tokens = torch.stack([tokens[0, 3], tokens[1, 6]])[:, None]
    logits_BV = advance(model, cache, slice(None), next_tokens, torch.tensor([3, 6]), 7)
    for row, length in ((0, 4), (1, 7)):
        expected_V = model(tokens[row : row + 1, :length])[0, -1]
        torch.testing.assert_close(logits_BV[row], expected_V, rtol=1e-6, atol=1e-6)


def test_a_full_cache_is_refused(model: Transformer) -> None:
    with pytest.raises(ValueError, match="5 tokens do not fit into a cache of 4"):
        advance(
            model, Cache(model, 1, 4), slice(None), torch.zeros(1, 5, dtype=torch.int64), torch.tensor([0]), 5
        )


def test_every_request_of_a_stream_gets_its_own_answer(model: Transformer) -> None:
    """More requests than rows: rows are used again, and what was in them must not show."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(SIZE.vocab_size, (length,), generator=generator) for length in (4, 7, 2, 5, 3)]
    served = serve(model, prompts, [0.0, 0.0, 0.0, 0.01, 0.02], rows=2, new_tokens=4)
    for request, prompt in zip(served.requests, prompts, strict=True):
        assert request.tokens == greedy(model, prompt.tolist(), 4)
        assert request.due <= request.started <= request.first_token <= request.ended
    assert served.tokens == 20
    assert 1 <= served.rows_used <= 2
    # Two rows, three requests at once: the third waits until one of the others is done.
    assert served.requests[2].started >= min(served.requests[0].ended, served.requests[1].ended)
    assert served.figures()["wait_max"] >= served.requests[2].started


def test_arrivals_have_the_asked_rate_and_can_be_repeated() -> None:
    due = arrivals(2000, per_second=50.0, seed=4)
    assert due == arrivals(2000, per_second=50.0, seed=4)
    assert due != arrivals(2000, per_second=50.0, seed=5)
    assert due[0] == 0.0
    assert due[-1] / 1999 == pytest.approx(1 / 50, rel=0.1)


def test_counted_operations_are_those_of_the_formula(model: Transformer) -> None:
    """Forward and backward of a batch: formula F, which counts no recomputation and attention in full."""
    with torch.device("meta"):
        trained = Transformer(SIZE)
    materialize(trained, 0, torch.device("cpu"))
    tokens = torch.zeros(2, 64, dtype=torch.int64)
    with Counted() as work:
        trained(tokens, tokens).backward()
    norms = 6 * SIZE.width * (2 * SIZE.layers + 1)  # the formula takes norms for products, too
    # The backward pass of attention has five products for the forward's two, not four: the scores come again.
    again = 2 * SIZE.layers * SIZE.width * 64
    expected = tokens.numel() * (flops_per_token(SIZE, 64).full - norms + again)
    assert work.flops == pytest.approx(expected, rel=1e-6)


def test_bytes_are_what_operations_read_and_write() -> None:
    left, right, table = torch.zeros(8, 16), torch.zeros(16, 4), torch.zeros(1000, 4)
    for call, size in (
        (lambda: left @ right, 4 * (128 + 64 + 32)),
        (lambda: left + left, 4 * 3 * 128),
        (lambda: left.T, 0),
        (lambda: torch.nn.functional.embedding(torch.tensor([1, 2]), table), 2 * 4 * 8),
    ):
        with Counted() as work:
            call()
        assert work.bytes == size
