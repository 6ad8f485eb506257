"""Arithmetic per token and peaks of devices, against published figures; impossible figures stand out."""

from __future__ import annotations

import pytest
import torch

from recipes.lib.flops import flops_per_token, parameter_count, peak_flops
from recipes.lib.model import Transformer
from recipes.lib.model_sizes import SIZES

H200 = 989e12


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_counted_as_the_model_has_them(name: str) -> None:
    size = SIZES[name]
    if not size.vocab_size:
        return_vocab = 263
        size = type(size)(**{**size.__dict__, "vocab_size": return_vocab})
    with torch.device("meta"):
        model = Transformer(size)
    assert parameter_count(size) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("smollm2_135m", 134_515_008),
        ("llama_1b", 1_235_814_400),
        ("llama_8b", 8_030_261_248),
        ("llama_70b", 70_553_706_496),
    ],
)
def test_published_models_have_their_published_size(name: str, parameters: int) -> None:
    assert parameter_count(SIZES[name]) == parameters


@pytest.mark.parametrize(
    ("sequence_length", "full", "causal"), [(4096, 51.5e9, 48.3e9), (8192, 57.9e9, 51.5e9)]
)
def test_llama_8b_costs_what_both_conventions_say(sequence_length: int, full: float, causal: float) -> None:
    cost = flops_per_token(SIZES["llama_8b"], sequence_length)
    assert cost.full == pytest.approx(full, rel=2e-3)
    assert cost.causal == pytest.approx(causal, rel=2e-3)


def test_tying_the_head_saves_memory_but_no_arithmetic() -> None:
    tied = SIZES["llama_1b"]
    untied = type(tied)(**{**tied.__dict__, "tied": False})
    assert parameter_count(tied) < parameter_count(untied)
    assert flops_per_token(tied, 2048) == flops_per_token(untied, 2048)


@pytest.mark.parametrize(
    ("tokens_per_second", "sequence_length", "mfu"),
    [
        (8458, 8192, 0.495),
        (9489, 8192, 0.556),
        (10_335, 8192, 0.605),
        (10_156, 4096, 0.529),
        (11_151, 4096, 0.58),
    ],
)
def test_torchtitans_figures_on_h200_come_out(
    tokens_per_second: float, sequence_length: int, mfu: float
) -> None:
    """Llama-3-8B on four H200s, measured with torchtitan 0.2.2, which reports the full convention."""
    cost = flops_per_token(SIZES["llama_8b"], sequence_length)
    assert tokens_per_second * cost.full / H200 == pytest.approx(mfu, abs=2e-3)


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA B200", 2250),
    ],
)
def test_known_devices_have_their_dense_peak(device: str, tflops: float) -> None:
    assert peak_flops(device) == tflops * 1e12


@pytest.mark.parametrize(
    "device",
    ["NVIDIA GeForce RTX 4090", "NVIDIA H20", "NVIDIA GH200 480GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", ""],
)
def test_unknown_devices_have_no_peak(device: str) -> None:
    assert peak_flops(device) is None
