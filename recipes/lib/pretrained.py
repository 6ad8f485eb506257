"""Weights of Llama-type models as Hugging Face publishes them: config.json and *.safetensors in one folder.

Everything but `load_pretrained` is torch-free, so that `init_from=…` is checked before anything is submitted.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.lib.arguments import ArgumentError
from recipes.lib.model_sizes import SIZES, ModelSize, RopeScaling

if TYPE_CHECKING:
    from torch import Tensor

    from recipes.lib.model import Transformer

CONFIG_FILE = "config.json"
_PREFIX, _HEAD = "model.", "lm_head.weight"
_COMPUTED = "rotary_emb.inv_freq"
"""End of the name of a table that old files hold and every model computes itself."""

_HUGGING_FACE_NAMES = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "ffn_width": "intermediate_size",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "tied": "tie_word_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "rope_scaling": "rope_scaling",
}


def to_hugging_face(name: str) -> str:
    """The name in a Hugging Face file of our parameter `name`."""
    return name if name == _HEAD else _PREFIX + name


def from_hugging_face(name: str) -> str:
    """Our parameter's name for the tensor `name` of a Hugging Face file; the inverse of `to_hugging_face`.

    Raises ValueError for a name that no Llama-type model has.
    """
    if name != _HEAD and not name.startswith(_PREFIX):
        raise ValueError(f"{name} is not the name of a tensor of a Llama-type model")
    return name.removeprefix(_PREFIX)


def hugging_face_config(size: ModelSize, *, context: int) -> dict[str, Any]:
    """The config.json of a model of this size; `context` is the number of positions that it is good for."""
    fields = {theirs: getattr(size, ours) for ours, theirs in _HUGGING_FACE_NAMES.items()}
    fields["rope_scaling"] = size.rope_scaling and {
        "rope_type": "llama3",
        "factor": size.rope_scaling.factor,
        "low_freq_factor": size.rope_scaling.low_frequency_factor,
        "high_freq_factor": size.rope_scaling.high_frequency_factor,
        "original_max_position_embeddings": size.rope_scaling.original_context,
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **fields,
        "head_dim": size.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": context,
    }


def size_of(config: Mapping[str, Any]) -> ModelSize:
    """The size that a config.json describes. Raises ValueError naming the field that our model cannot do."""
    for field, wanted in (
        ("model_type", "llama"),
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
    ):
        if config.get(field, wanted) != wanted:
            raise ValueError(f"{field} is {_json(config[field])}; this model does {_json(wanted)} only")
    missing = [name for name in _REQUIRED if name not in config]
    if missing:
        raise ValueError(f"has no {missing[0]}")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    if (config.get("head_dim") or width // heads) * heads != width:
        raise ValueError(
            f"head_dim is {config['head_dim']}; this model does hidden_size / num_attention_heads only"
        )
    # transformers 5 keeps both in rope_parameters, older versions write two fields; 10000 is its own default.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return ModelSize(
        layers=config["num_hidden_layers"],
        width=width,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        ffn_width=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        tied=config.get("tie_word_embeddings", False),
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        rope_scaling=_scaling(rope),
    )


_REQUIRED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")


def _scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f'rope_type is {_json(kind)}; this model does "default" and "llama3" only')
    return RopeScaling(
        factor=float(rope["factor"]),
        low_frequency_factor=float(rope["low_freq_factor"]),
        high_frequency_factor=float(rope["high_freq_factor"]),
        original_context=rope["original_max_position_embeddings"],
    )


def check_init_from(init_from: str, model: str, vocab_size: int = 0) -> None:
    """Find a folder that the model `model` cannot start from, from its config and file headers alone.

    `vocab_size` is the argument of that name: rows of the embedding, 0 for the model's own. An empty
    `init_from` is right. Raises ArgumentError naming the file or the field that is wrong, and the nearest
    right model.
    """
    if not init_from:
        return
    size = SIZES[model]
    rows = vocab_size or size.vocab_size
    check_folder(init_from, dataclasses.replace(size, vocab_size=rows), model)


def check_folder(init_from: str, size: ModelSize, model: str = "") -> None:
    """`check_init_from` for a size; a `vocab_size` of 0 is not compared."""
    folder = Path(init_from).expanduser()
    if not folder.is_dir():
        raise ArgumentError("init_from", init_from, f"no folder {folder.absolute()}")
    config = _read_config(init_from, folder)
    try:
        found = size_of(config)
    except ValueError as error:
        raise ArgumentError("init_from", init_from, f"its {CONFIG_FILE}: {error}") from None
    for name, published_name in _HUGGING_FACE_NAMES.items():
        ours, theirs = getattr(size, name), getattr(found, name)
        if not _agree(ours, theirs) and not (name == "vocab_size" and ours == 0):
            problem = f"its {CONFIG_FILE} has {published_name} {_fact(theirs)}, "
            problem += f"model={model} has {_fact(ours)}" if model else f"the model has {_fact(ours)}"
            nearest = next((known for known in SIZES if _same_size(SIZES[known], found)), None)
            hint = f"; nearest: model={nearest}" if nearest and nearest != model else ""
            raise ArgumentError("init_from", init_from, problem + hint)
    _check_tensors(init_from, folder, tied=size.tied, layers=size.layers)


def load_pretrained(
    model: Transformer, folder: str | Path, tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Fill the parameters of `model` in place from the safetensors in `folder`, converting to their dtypes.

    Or, where they are kept elsewhere, what stands for each of them in `tensors`.

    The model has its memory already, and may be sharded: a rank reads the slices of its own shards, one
    tensor at a time, out of memory-mapped files; ranks exchange nothing. Raises ArgumentError as
    `check_init_from` does.
    """
    import torch
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    check_folder(str(folder), model.size)
    ours = {to_hugging_face(name): tensor for name, tensor in (tensors or model.state_dict()).items()}
    reader = HuggingFaceStorageReader(str(Path(folder).expanduser()))
    with torch.no_grad(), warnings.catch_warnings():
        # no_dist is on purpose: a rank that cannot read must fail by itself, not leave the others in a
        # collective.
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
        )
        load(ours, storage_reader=reader, no_dist=True)


def published_tensors(folder: str | Path, size: ModelSize) -> Callable[[str], Tensor]:
    """What gives each tensor in the safetensors in `folder` by our parameter's name, whole, in its own dtype.

    Raises ArgumentError as `check_init_from` does.
    """
    from safetensors import safe_open

    check_folder(str(folder), size)
    files = {
        name: file
        for file in sorted(Path(folder).expanduser().glob("*.safetensors"))
        for name in _tensor_names(str(folder), file)
    }

    def read(name: str) -> Tensor:
        with safe_open(files[to_hugging_face(name)], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(to_hugging_face(name))
            return tensor

    return read


def _read_config(init_from: str, folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ArgumentError("init_from", init_from, f"holds no {CONFIG_FILE}") from None
    except ValueError as error:
        raise ArgumentError("init_from", init_from, f"its {CONFIG_FILE} is not JSON: {error}") from None


def _check_tensors(init_from: str, folder: Path, *, tied: bool, layers: int) -> None:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ArgumentError("init_from", init_from, "holds no *.safetensors file")
    found: set[str] = set()
    for file in files:
        names = _tensor_names(init_from, file)
        if twice := found & names:
            problem = f"{min(twice)} is in {file.name} and in another file; keep one set of *.safetensors"
            raise ArgumentError("init_from", init_from, problem)
        found |= names
    wanted = {to_hugging_face(name) for name in _parameter_names(layers, tied=tied)}
    if missing := wanted - found:
        problem = f"its safetensors lack {min(missing)} ({len(missing)} of {len(wanted)} tensors)"
        raise ArgumentError("init_from", init_from, problem)
    # A tied file may hold the head as well: the same numbers twice.
    extra = {name for name in found - wanted - {_HEAD} if not name.endswith(_COMPUTED)}
    if extra:
        raise ArgumentError(
            "init_from", init_from, f"its safetensors hold {min(extra)}, which this model lacks"
        )


def _parameter_names(layers: int, *, tied: bool) -> list[str]:
    """What `Transformer.state_dict()` of such a model holds, without building one."""
    projections = [f"self_attn.{part}_proj" for part in "qkvo"] + [
        f"mlp.{part}_proj" for part in ("gate", "up", "down")
    ]
    parts = [*projections, "input_layernorm", "post_attention_layernorm"]
    names = [f"layers.{layer}.{part}.weight" for layer in range(layers) for part in parts]
    return ["embed_tokens.weight", *names, "norm.weight", *([] if tied else [_HEAD])]


def _tensor_names(init_from: str, file: Path) -> set[str]:
    """The names in the header of a safetensors file: 8 bytes of its length, then JSON."""
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= 100 * 2**20:  # The format's own limit; a Git LFS pointer looks like far more.
            raise ArgumentError("init_from", init_from, f"{file.name} is not a safetensors file")
        header = json.loads(stream.read(length))
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    if file.stat().st_size != 8 + length + end:
        problem = (
            f"{file.name} has {file.stat().st_size} bytes, its header says {8 + length + end}: cut short?"
        )
        raise ArgumentError("init_from", init_from, problem)
    return set(header) - {"__metadata__"}


def _same_size(ours: ModelSize, theirs: ModelSize) -> bool:
    return all(_agree(getattr(ours, name), getattr(theirs, name)) for name in _HUGGING_FACE_NAMES)


def _agree(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        # Some converters store 1e-5 in float32 and write 9.999999747378752e-06 into the config.
        return math.isclose(ours, theirs, rel_tol=1e-6)
    return bool(ours == theirs)


def _fact(value: Any) -> str:
    return (
        _json(dataclasses.asdict(value))
        if dataclasses.is_dataclass(value) and not isinstance(value, type)
        else _json(value)
    )


def _json(value: Any) -> str:
    return json.dumps(value)
