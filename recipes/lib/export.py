"""From a checkpoint to Hugging Face files: config.json, *.safetensors and the tokenizer, which transformers loads.

    python -m recipes.lib.export RUN_DIR/checkpoints/step-00000100 FOLDER [--dtype bfloat16]

One process reads the shards of any number of ranks, one tensor after the other: it holds one file of 5 GB in
memory, not the model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader, state_dict_loader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from recipes.lib import checkpoint, manifest
from recipes.lib.model_sizes import ModelSize, RopeScaling
from recipes.lib.pretrained import CONFIG_FILE, hugging_face_config, to_hugging_face

FILE_BYTES = 5 * 10**9
"""Largest file of weights, as Hugging Face's own tools cut them."""
_MODEL = "model."


class CannotExport(Exception):
    """The message is one line for the person who wanted the export."""


def export(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Write the model in the checkpoint `source` to the new folder `target`, which is complete or not there.

    `dtype` is that of the written weights; None keeps the saved one. Raises CannotExport.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CannotExport(f"{target} exists and is not empty: name a new folder")
    try:
        described = manifest.check(source)
    except (manifest.Unsound, manifest.TooNew) as error:
        raise CannotExport(f"{source}: {error}") from None
    if not described.model:
        raise CannotExport(f"{source}: its manifest does not say how large the model is")
    if described.model.get("experts"):
        raise CannotExport(f"{source}: it has experts, and what is written here is a dense Llama-type model")
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f"{target.name}.tmp")
    if beside.exists():
        shutil.rmtree(beside)
    beside.mkdir()
    written = _write_weights(source, beside, dtype)
    config = hugging_face_config(_size(described), context=described.context)
    config["torch_dtype"] = str(written).removeprefix("torch.")
    (beside / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer = source.parent.parent / "tokenizer"
    for file in sorted(tokenizer.iterdir()) if tokenizer.is_dir() else ():
        shutil.copyfile(file, beside / file.name)
    beside.rename(target)


def _write_weights(source: Path, folder: Path, dtype: torch.dtype | None) -> torch.dtype:
    """Write all weights; gives the dtype of the last."""
    reader = FileSystemReader(source)
    found = {
        name.removeprefix(_MODEL): entry
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(_MODEL) and isinstance(entry, TensorStorageMetadata)
    }
    bytes_of = {
        name: entry.size.numel() * (dtype or entry.properties.dtype).itemsize for name, entry in found.items()
    }
    files = _divide(bytes_of)
    weight_map, kept = {}, torch.float32
    for number, names in enumerate(files, start=1):
        file = (
            "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        )
        tensors = {}
        for name in names:
            tensor = torch.empty(found[name].size, dtype=found[name].properties.dtype)
            state_dict_loader.load({"model": {name: tensor}}, storage_reader=reader, no_dist=True)
            tensors[to_hugging_face(name)] = tensor if dtype is None else tensor.to(dtype)
            kept = tensors[to_hugging_face(name)].dtype
            weight_map[to_hugging_face(name)] = file
        # transformers refuses files that do not say "pt" here.
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(bytes_of.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return kept


def _divide(bytes_of: dict[str, int]) -> list[list[str]]:
    """Names in groups that each fit a file; one tensor that is larger than a file has one of its own."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in bytes_of.items():
        if groups[-1] and filled + size > FILE_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _size(described: manifest.Manifest) -> ModelSize:
    scaling = described.model.get("rope_scaling")
    return ModelSize(**{**described.model, "rope_scaling": scaling and RopeScaling(**scaling)})


def main(argv: Sequence[str] | None = None) -> int:
    """Export as the words say; the status is 2 after a one-line error."""
    parser = argparse.ArgumentParser(prog="python -m recipes.lib.export", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as saved")
    options = parser.parse_args(argv)
    try:
        export(options.checkpoint, options.folder, options.dtype and getattr(torch, options.dtype))
    except CannotExport as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.checkpoint.name} is in {options.folder}")
    return 0


if __name__ == "__main__":
    assert checkpoint  # its import quiets torch's warning that a single process reads
    sys.exit(main())
