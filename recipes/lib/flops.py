"""How much arithmetic a token costs, and how much a device could do. Pure; no torch.

Two conventions are in use and differ by the attention term. `full` (PaLM, torchtitan, MaxText) counts the
whole S×S attention matrix; `causal` (Megatron-LM) counts the half that a causal model needs. Recomputed
activations count in neither. A figure without the name of its convention cannot be compared.
"""

from __future__ import annotations

from dataclasses import dataclass

from recipes.lib.model_sizes import ModelSize


@dataclass(frozen=True)
class FlopsPerToken:
    """Floating-point operations of one token's forward and backward pass."""

    full: float
    causal: float


def parameter_count(size: ModelSize) -> int:
    """Parameters of the model; a tied embedding counts once."""
    return _parameters(size, size.experts or 1)


def largest_matrix(size: ModelSize) -> int:
    """Parameters of the largest matrix: the table, or one of the feed-forward."""
    return size.width * max(size.vocab_size, size.ffn_width)


def _parameters(size: ModelSize, networks: int) -> int:
    """With so many feed-forward networks in each layer."""
    attention = size.width * size.head_dim * (2 * size.heads + 2 * size.kv_heads)
    feed_forward = networks * 3 * size.width * size.ffn_width + size.experts * size.width
    layer = attention + feed_forward + 2 * size.width
    tables = 1 if size.tied else 2
    return size.layers * layer + size.width + tables * size.vocab_size * size.width


def flops_per_token(size: ModelSize, sequence_length: int) -> FlopsPerToken:
    """6 FLOP per parameter that is multiplied, plus attention: 12·L·D·S in full, half of it causal.

    The input embedding is a look-up and costs nothing; a tied one is multiplied at the output all the same,
    so that tied and untied models of one shape cost the same.
    """
    looked_up = 0 if size.tied else size.vocab_size * size.width
    multiplied = 6.0 * (_parameters(size, size.experts_per_token or 1) - looked_up)
    attention = 12.0 * size.layers * size.heads * size.head_dim * sequence_length
    return FlopsPerToken(full=multiplied + attention, causal=multiplied + attention / 2)


_BF16_DENSE_TFLOPS = {
    # Data sheets, dense bfloat16 (their larger figure is with 2:4 sparsity). The key is a part of the name
    # that CUDA reports. Forms that the data sheet rates lower have their own line, and the longest match
    # counts.
    "A100": 312.0,
    "H100": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "B200": 2250.0,
}


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of the device's matrix units in dense bfloat16; None for a device that is not in the table.

    Unknown stays unknown: a guess (an H200 taken for an A100, say) prints an MFU above 100%.
    """
    words = device_name.split()
    matches = [name for name in _BF16_DENSE_TFLOPS if set(name.split()) <= set(_parts(words))]
    if not matches or "MIG" in words:
        # A MIG slice carries the whole GPU's name and has a part of its units.
        return None
    return _BF16_DENSE_TFLOPS[max(matches, key=len)] * 1e12


def _parts(words: list[str]) -> list[str]:
    """Words of a device name, also split at hyphens: `NVIDIA A100-SXM4-80GB` holds `A100`."""
    return [part for word in words for part in (word, *word.split("-"))]
