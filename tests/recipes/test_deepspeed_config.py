"""What `ch5_deepspeed` refuses to be told, and what it tells DeepSpeed."""

from __future__ import annotations

import pytest

from recipes.ch5.deepspeed_args import DeepSpeedArgs
from recipes.ch5.deepspeed_config import BETAS, deepspeed_config
from recipes.ch5.deepspeed_moe_args import DeepSpeedMoeArgs
from recipes.lib import optimizer
from recipes.lib.arguments import ArgumentError

REFUSED = {
    "dtype": {"dtype": "float64"},
    "offload_optimizer": {"stage": 0, "offload_optimizer": "cpu"},
    "offload_parameters": {"stage": 2, "offload_parameters": "cpu", "offload_optimizer": "cpu"},
    "nvme_folder": {"stage": 3, "offload_optimizer": "nvme", "adam": "deepspeed", "async_save": False},
    "adam": {"stage": 3, "offload_optimizer": "nvme", "nvme_folder": "/nvme", "async_save": False},
    "async_save": {"stage": 3, "offload_optimizer": "nvme", "nvme_folder": "/nvme", "adam": "deepspeed"},
    "compile": {"stage": 3, "compile": True},
    "activation_checkpointing": {"stage": 3, "activation_checkpointing": "selective"},
    "persistence_threshold": {"persistence_threshold": 5},
    "bucket_size": {"stage": 2, "model": "llama_8b", "bucket_size": 50_000_000},
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_does_not_go_together_is_one_line_that_names_the_key(key: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        DeepSpeedArgs(**REFUSED[key])
    assert caught.value.key == key
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments", [DeepSpeedArgs, DeepSpeedMoeArgs])
def test_a_bucket_of_a_few_numbers_is_refused(arguments: type[DeepSpeedArgs | DeepSpeedMoeArgs]) -> None:
    with pytest.raises(ArgumentError, match="bucket_size=999: wants 0, or at least 1000"):
        arguments(stage=1, bucket_size=999)
    arguments(stage=1, bucket_size=1000)


def test_stages_below_three_keep_parameters_on_the_device() -> None:
    for more in ({"stage": 2, "offload_optimizer": "nvme"}, {"stage": 3, "offload_parameters": "cpu"}):
        with pytest.raises(ArgumentError):
            DeepSpeedArgs(nvme_folder="/nvme" if "nvme" in more.values() else "", **more)


def config_of(*, on_gpu: bool = False, bfloat16: bool = False, **args: object) -> dict[str, object]:
    return deepspeed_config(
        DeepSpeedArgs(**args), rows=2, microbatches=3, shares=4, bfloat16=bfloat16, on_gpu=on_gpu
    )


def test_the_batch_sizes_multiply_out() -> None:
    config = config_of()
    assert config["train_batch_size"] == 24
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (2, 3)
    assert BETAS == optimizer.BETAS


def test_stage_two_has_room_for_the_gradient_of_the_largest_matrix() -> None:
    """It frees a larger one while it sums it (github.com/deepspeedai/DeepSpeed/issues/5347)."""
    table = 128_256 * 4096
    assert config_of(stage=2, model="llama_8b")["zero_optimization"]["reduce_bucket_size"] == table
    for args in ({"stage": 1, "model": "llama_8b"}, {"stage": 3, "model": "llama_8b"}, {"stage": 2}):
        assert config_of(**args)["zero_optimization"]["reduce_bucket_size"] == 50_000_000
    smaller = config_of(stage=2, model="llama_8b", bucket_size=1000, overlap=False, on_gpu=True)
    assert smaller["zero_optimization"]["reduce_bucket_size"] == 1000


def test_offload_is_pinned_for_gpus_alone() -> None:
    for on_gpu in (False, True):
        section = config_of(stage=3, offload_optimizer="cpu", offload_parameters="cpu", on_gpu=on_gpu)[
            "zero_optimization"
        ]
        assert (
            section["offload_optimizer"]
            == section["offload_param"]
            == {"device": "cpu", "pin_memory": on_gpu}
        )
        assert section["overlap_comm"] is on_gpu


def test_gradients_are_summed_in_float32_whatever_is_computed_in() -> None:
    config = config_of(bfloat16=True)
    assert config["bf16"] == {"enabled": True}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["communication_data_type"] == "fp32"
    assert "bf16" not in config_of(stage=0, bfloat16=True)
