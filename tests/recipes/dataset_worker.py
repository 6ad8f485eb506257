"""One rank of test_dataset's distributed tests: opens datasets together with the others, tells what it saw.

python dataset_worker.py DATA RESULT_FOLDER: opens DATA, then a folder that does not exist, then DATA once
more while the last rank does not see CACHE_DIR. One start for all three, because most of it is importing
torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from recipes.lib import dataset as module
from recipes.lib.dataset import Dataset
from recipes.lib.shards import TokenShards, UnreadableShards


def unseen(folder: Path) -> TokenShards:
    raise UnreadableShards(f"there is no {folder}/index.json")


def open_and_tell(data: str) -> dict[str, Any]:
    try:
        dataset = Dataset.open(data, sequence_length=8, seed=3)
    except Exception as error:  # noqa: BLE001 - the test looks at it
        return {"error": type(error).__name__, "message": str(error)}
    inputs_BS, targets_BS = dataset.batch(5, dist.get_rank(), dist.get_world_size(), 4)
    return {"fingerprint": dataset.fingerprint, "inputs": inputs_BS.tolist(), "targets": targets_BS.tolist()}


def main(data: str, results: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    seen = {"good": open_and_tell(data), "missing": open_and_tell("/nowhere/texts")}
    module.SECONDS_UNTIL_VISIBLE = 0.2
    if rank == dist.get_world_size() - 1:
        module.TokenShards = unseen  # type: ignore[misc,assignment]
    seen["blind"] = open_and_tell(data)
    (results / f"{rank}.json").write_text(json.dumps(seen), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
