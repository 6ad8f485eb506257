"""One rank of test_pretrained's distributed test: loads FOLDER into a model sharded by FSDP, and compares.

python pretrained_worker.py FOLDER
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from recipes.lib.model import Transformer
from recipes.lib.pretrained import load_pretrained, size_of, to_hugging_face
from tests.recipes.test_pretrained import CONFIG


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    with torch.device("meta"):
        model = Transformer(size_of(CONFIG))
    for block in model.layers:
        fully_shard(block)
    fully_shard(model)
    model.to_empty(device="cpu")
    load_pretrained(model, folder)
    wanted = load_file(f"{folder}/model.safetensors")
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        assert torch.equal(parameter.full_tensor(), wanted[to_hugging_face(name)]), name
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
