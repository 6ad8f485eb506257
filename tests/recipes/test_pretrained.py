"""Published weights: they give transformers' logits, and a folder that does not fit is refused."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from recipes.lib.arguments import ArgumentError
from recipes.lib.model import Transformer
from recipes.lib.model_sizes import SIZES
from recipes.lib.pretrained import (
    check_folder,
    check_init_from,
    from_hugging_face,
    hugging_face_config,
    load_pretrained,
    size_of,
    to_hugging_face,
)

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
SCALING = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TIED = {**CONFIG, "tie_word_embeddings": True, "rope_scaling": SCALING}
# The same as transformers 5 writes it.
NEW_STYLE = {
    **TIED,
    "rope_theta": None,
    "rope_scaling": None,
    "rope_parameters": {**SCALING, "rope_theta": 1e4},
}

# transformers 5.23.0, eager attention, float32, on these weights: the first six logits after the last
# token, and the sum of all logits of TOKENS.
TOKENS = (torch.arange(24) * 7 % 37)[None]
TRANSFORMERS_UNTIED = [-4.98506, -2.97511, 0.53673, 3.77762, 5.11149, 3.86498], -143.88352
TRANSFORMERS_TIED = [0.50812, -0.50872, -1.26875, -1.38828, -0.80699, 0.18169], 0.14059


def weights_of(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights by a formula, sines of a running number: the same here as where transformers computed."""
    with torch.device("meta"):
        shapes = {
            to_hugging_face(name): p.shape for name, p in Transformer(size_of(config)).named_parameters()
        }
    weights = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        wave = torch.sin(torch.arange(shape.numel(), dtype=torch.float64) * (0.37 + 0.01 * number) + number)
        weights[name] = (1 + 0.3 * wave if len(shape) == 1 else 0.25 * wave).reshape(shape).float()
    return weights


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(weights_of(config), folder / "model.safetensors")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "llama", CONFIG)


def empty_model(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Transformer:
    with torch.device("meta"):
        model = Transformer(size_of(config)).to(dtype)
    model.to_empty(device="cpu")
    return model


@pytest.mark.parametrize(
    ("config", "wanted"),
    [(CONFIG, TRANSFORMERS_UNTIED), (TIED, TRANSFORMERS_TIED), (NEW_STYLE, TRANSFORMERS_TIED)],
    ids=["untied", "tied and stretched", "config of transformers 5"],
)
def test_the_logits_are_those_of_transformers(
    config: dict[str, Any], wanted: tuple[list[float], float], tmp_path: Path
) -> None:
    model = empty_model(config)
    load_pretrained(model, write_model(tmp_path / "llama", config))
    with torch.no_grad():
        logits_BSV = model(TOKENS)
    assert logits_BSV[0, -1, :6].tolist() == pytest.approx(wanted[0], abs=2e-5)
    assert float(logits_BSV.double().sum()) == pytest.approx(wanted[1], abs=1e-3)


def split_in_two(folder: Path) -> None:
    weights = sorted(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    save_file(dict(weights[:5]), folder / "model-00001-of-00002.safetensors")
    save_file(dict(weights[5:]), folder / "model-00002-of-00002.safetensors")
    places = {name: f"model-0000{1 + (n >= 5)}-of-00002.safetensors" for n, (name, _) in enumerate(weights)}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def test_weights_in_several_files_are_the_same_weights(folder: Path) -> None:
    wanted = load_file(folder / "model.safetensors")
    split_in_two(folder)
    model = empty_model(CONFIG)
    load_pretrained(model, folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[to_hugging_face(name)]), name


@pytest.mark.parametrize(
    ("stored", "computed"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_weights_are_converted_to_the_models_dtype(
    folder: Path, stored: torch.dtype, computed: torch.dtype
) -> None:
    weights = {name: tensor.to(stored) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    model = empty_model(CONFIG, computed)
    load_pretrained(model, folder)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == computed
        assert torch.equal(tensor, weights[to_hugging_face(name)].to(computed)), name


def test_loading_trains_on_afterwards(folder: Path) -> None:
    model = empty_model(CONFIG)
    load_pretrained(model, folder)
    model(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    assert all(p.requires_grad and p.grad is not None and p.grad.any() for p in model.parameters())


def test_each_rank_loads_its_own_part(folder: Path) -> None:
    """On two ranks that do not divide the vocabulary of 37, sliced and split; and both compute the same."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parents[2]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    command = [sys.executable, "-m", "tests.recipes.pretrained_worker", str(folder)]
    processes = [subprocess.Popen(command, cwd=root, env={**common, **rank}) for rank in ranks]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]


def test_names_translate_both_ways() -> None:
    for config in (CONFIG, TIED):
        with torch.device("meta"):
            ours = list(Transformer(size_of(config)).state_dict())
        theirs = [to_hugging_face(name) for name in ours]
        assert [from_hugging_face(name) for name in theirs] == ours
        assert "model.layers.1.self_attn.q_proj.weight" in theirs
        assert ("lm_head.weight" in theirs) is not config["tie_word_embeddings"]
    with pytest.raises(ValueError, match=r"transformer\.wte\.weight is not the name"):
        from_hugging_face("transformer.wte.weight")


@pytest.mark.parametrize("name", SIZES)
def test_a_config_that_we_write_describes_the_size_it_was_written_for(name: str) -> None:
    size = replace(SIZES[name], vocab_size=SIZES[name].vocab_size or 4096)
    config = hugging_face_config(size, context=2048)
    assert size_of(json.loads(json.dumps(config))) == size


@pytest.mark.parametrize("name", SIZES)
def test_each_size_accepts_the_config_of_its_published_weights(name: str, tmp_path: Path) -> None:
    size = replace(SIZES[name], vocab_size=SIZES[name].vocab_size or 4096)
    (tmp_path / "config.json").write_text(
        json.dumps(hugging_face_config(size, context=2048)), encoding="utf-8"
    )
    with pytest.raises(ArgumentError, match=r"holds no \*\.safetensors file"):
        check_init_from(str(tmp_path), name)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("num_hidden_layers", 3, "has num_hidden_layers 3, the model has 2"),
        ("hidden_size", 64, "has hidden_size 64, the model has 32"),
        ("intermediate_size", 64, "has intermediate_size 64, the model has 48"),
        ("num_attention_heads", 8, "has num_attention_heads 8, the model has 4"),
        ("num_key_value_heads", 4, "has num_key_value_heads 4, the model has 2"),
        ("vocab_size", 40, "has vocab_size 40, the model has 37"),
        ("rope_theta", 5e5, "has rope_theta 500000.0, the model has 10000.0"),
        ("rms_norm_eps", 1e-6, "has rms_norm_eps 1e-06, the model has 1e-05"),
        ("tie_word_embeddings", True, "has tie_word_embeddings true, the model has false"),
        ("rope_scaling", SCALING, 'has rope_scaling {"factor": 4.0'),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, 'rope_type is "linear"'),
        ("head_dim", 16, "head_dim is 16"),
        ("model_type", "mistral", 'model_type is "mistral"; this model does "llama" only'),
        ("hidden_act", "gelu", 'hidden_act is "gelu"'),
        ("attention_bias", True, "attention_bias is true"),
    ],
)
def test_a_config_that_differs_is_refused_with_the_field(
    folder: Path, field: str, value: object, problem: str
) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, field: value}), encoding="utf-8")
    with pytest.raises(ArgumentError) as caught:
        check_folder(str(folder), size_of(CONFIG))
    assert str(caught.value).startswith(f"init_from={folder}: its config.json")
    assert problem in str(caught.value)


def test_a_config_rounded_by_a_converter_fits(folder: Path) -> None:
    rounded = {**CONFIG, "rms_norm_eps": 9.999999747378752e-06}
    (folder / "config.json").write_text(json.dumps(rounded), encoding="utf-8")
    check_folder(str(folder), size_of(CONFIG))


def test_the_right_model_is_suggested(folder: Path) -> None:
    config = hugging_face_config(SIZES["llama_8b"], context=8192)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ArgumentError, match="model=llama_1b has 16; nearest: model=llama_8b"):
        check_init_from(str(folder), "llama_1b")
    with pytest.raises(ArgumentError, match=r"has vocab_size 128256, model=llama_8b has 50000$"):
        check_init_from(str(folder), "llama_8b", vocab_size=50_000)
    check_init_from("", "llama_1b")


def cut_short(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1000])


def pointer_instead(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 538090408\n"
    (folder / "model.safetensors").write_text(pointer, encoding="utf-8")


def one_missing(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")


def one_too_many(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    save_file(weights, folder / "model.safetensors")


def a_second_set(folder: Path) -> None:
    save_file(load_file(folder / "model.safetensors"), folder / "consolidated.safetensors")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (cut_short, "its header says .*: cut short"),
        (pointer_instead, r"model\.safetensors is not a safetensors file"),
        (one_missing, r"lack model\.layers\.1\.mlp\.up_proj\.weight \(1 of 21 tensors\)"),
        (one_too_many, r"hold model\.layers\.0\.self_attn\.q_proj\.bias, which this model lacks"),
        (a_second_set, "keep one set of"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"holds no \*\.safetensors file"),
        (lambda folder: (folder / "config.json").unlink(), r"holds no config\.json"),
        (lambda folder: (folder / "config.json").write_text("{", encoding="utf-8"), "is not JSON"),
        (
            lambda folder: (folder / "config.json").write_text("{}", encoding="utf-8"),
            "has no num_hidden_layers",
        ),
    ],
)
def test_a_damaged_folder_is_refused_before_anything_is_loaded(
    folder: Path, damage: Callable[[Path], object], problem: str
) -> None:
    check_folder(str(folder), size_of(CONFIG))
    damage(folder)
    with pytest.raises(ArgumentError, match=problem):
        check_folder(str(folder), size_of(CONFIG))


def test_a_tied_file_may_hold_the_head_and_an_old_one_its_frequencies(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "llama", TIED)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, folder / "model.safetensors")
    load_pretrained(empty_model(TIED), folder)


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(ArgumentError, match="init_from=/nowhere: no folder /nowhere"):
        check_init_from("/nowhere", "llama_8b")


def test_the_check_does_not_import_torch() -> None:
    script = "import sys, recipes.lib.pretrained; print(*{'torch', 'numpy'} & set(sys.modules))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == ""
