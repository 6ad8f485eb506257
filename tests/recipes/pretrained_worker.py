"""One rank of test_pretrained's distributed test: loads FOLDER into a model sliced by FSDP, then by
tensor parallelism, and compares.

python pretrained_worker.py FOLDER
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from recipes.ch4.fsdp import make_grid, shard
from recipes.ch4.fsdp_args import FsdpArgs
from recipes.lib.distributed import joined
from recipes.lib.model import Transformer
from recipes.lib.parallelism import precision
from recipes.lib.pretrained import load_pretrained, size_of, to_hugging_face
from recipes.lib.tensor_parallel import split_layers
from tests.recipes.test_pretrained import CONFIG


def main(folder: str) -> None:
    wanted = load_file(f"{folder}/model.safetensors")
    # Every row of the vocabulary is a target once: those of the first rank and those of the second.
    tokens, targets = torch.arange(36)[None], torch.arange(1, 37)[None]
    computed = []
    with joined("cpu") as world:
        for args in (FsdpArgs(), FsdpArgs(tensor_parallel=2)):
            with torch.device("meta"):
                model = Transformer(size_of(CONFIG))
            grid = make_grid(world, args)
            if grid.tensor is not None:
                split_layers(model, grid.tensor)
            shard(model, grid, precision("float32", world.device), args)
            model.to_empty(device="cpu")
            load_pretrained(model, folder)
            for name, parameter in model.named_parameters():
                assert isinstance(parameter, DTensor)
                assert torch.equal(parameter.full_tensor(), wanted[to_hugging_face(name)]), name
            loss = model(tokens, targets)
            loss.backward()
            # Ranks that slice whole layers have both trained on the sequence; those that split layers did it together.
            times = 2 / args.tensor_parallel
            gradients = [parameter.grad.full_tensor() / times for parameter in model.parameters()]
            computed.append([loss, *gradients])
        for whole, split in zip(*computed, strict=True):
            assert torch.allclose(whole, split, rtol=1e-4, atol=1e-5), (whole, split)


if __name__ == "__main__":
    main(sys.argv[1])
