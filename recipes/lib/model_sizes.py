"""The named model sizes, as plain numbers: the launcher reads them before submission, so no torch here."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretching of the rotary frequencies (Hugging Face calls it `rope_type: llama3`)."""

    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192
    """Positions that the model saw before its context was stretched."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """The shape of a Llama-type decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn_width: int
    vocab_size: int
    """Rows of the embedding; 0 follows the tokenizer (only for sizes that nobody publishes weights of)."""
    rope_theta: float
    tied: bool
    """Whether the output projection is the embedding itself."""
    lr: float = field(default=3e-4, compare=False)
    """A peak learning rate that suits the size. Llama 3's from its paper (arXiv 2407.21783, table 3); the small ones
    tried on the built-in corpus."""
    context: int = field(default=0, compare=False)
    """Positions of the longest sequence that it was made for; 0: any (sizes that nobody publishes weights of)."""
    norm_epsilon: float = 1e-5
    rope_scaling: RopeScaling | None = None
    experts: int = 0
    """Feed-forward networks in each layer; 0: one, and no router."""
    experts_per_token: int = 0
    """Of these, those that work on a token."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads


SIZES: dict[str, ModelSize] = {
    # Heads of 32: the smallest that the serving engines of the later chapters accept (16 stops vLLM on CPU).
    "tiny": ModelSize(
        layers=4,
        width=128,
        heads=4,
        kv_heads=2,
        ffn_width=384,
        vocab_size=0,
        rope_theta=10_000.0,
        tied=True,
        lr=3e-3,
    ),
    "small": ModelSize(
        layers=8,
        width=384,
        heads=6,
        kv_heads=2,
        ffn_width=1024,
        vocab_size=0,
        rope_theta=10_000.0,
        tied=False,
        lr=1e-3,
    ),
    "smollm2_135m": ModelSize(
        layers=30,
        width=576,
        heads=9,
        kv_heads=3,
        ffn_width=1536,
        vocab_size=49_152,
        rope_theta=100_000.0,
        tied=True,
        lr=1e-3,
        context=8192,
    ),
    "llama_1b": ModelSize(
        layers=16,
        width=2048,
        heads=32,
        kv_heads=8,
        ffn_width=8192,
        vocab_size=128_256,
        rope_theta=500_000.0,
        tied=True,
        lr=3e-4,
        context=131_072,
        rope_scaling=RopeScaling(factor=32.0),
    ),
    "llama_8b": ModelSize(
        layers=32,
        width=4096,
        heads=32,
        kv_heads=8,
        ffn_width=14_336,
        vocab_size=128_256,
        rope_theta=500_000.0,
        tied=False,
        lr=3e-4,
        context=8192,
    ),
    # 19.9 billion: with 16 bytes each twice what an H200 holds, and half of what four hold. Rows and names of the
    # published weights (huggingface.co/internlm/internlm2-20b, config.json) are arranged in another way than Llama's;
    # the shape is the same decoder.
    "internlm2_20b": ModelSize(
        layers=48,
        width=6144,
        heads=48,
        kv_heads=8,
        ffn_width=16_384,
        vocab_size=92_544,
        rope_theta=1_000_000.0,
        tied=False,
        lr=3e-4,
        context=32_768,
    ),
    "llama_70b": ModelSize(
        layers=80,
        width=8192,
        heads=64,
        kv_heads=8,
        ffn_width=28_672,
        vocab_size=128_256,
        rope_theta=500_000.0,
        tied=False,
        lr=1.5e-4,
        context=8192,
    ),
}
"""By name: `llama_1b` is Llama-3.2-1B, `llama_8b` and `llama_70b` are Llama 3 (not 3.1: no RoPE scaling),
`internlm2_20b` is InternLM2-20B."""
