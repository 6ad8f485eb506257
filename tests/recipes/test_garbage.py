"""Python does not look for garbage among what `import torch` makes: not while it is made, and not at the end."""

from __future__ import annotations

import json
import subprocess
import sys

SCRIPT = """
import atexit, gc, json, sys
said = {}
def at_the_end():  # registered before the recipes' own, so it runs after that
    said["alive at the end"] = len(gc.get_objects())
    print(json.dumps(said))
atexit.register(at_the_end)
said["as Python does"] = gc.get_threshold()
import recipes
said["while importing"] = gc.get_threshold()
import torch
from recipes.lib.distributed import alone
said["imported"] = len(gc.get_objects())
with alone("cpu"):
    said["in the recipe"] = gc.get_threshold()
    said["alive in the recipe"] = len(gc.get_objects())
    kept = [[number] for number in range(100_000)]
"""


def test_a_rank_looks_for_garbage_only_in_what_its_recipe_makes() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    assert said["while importing"][0] > 10 * said["as Python does"][0]
    assert said["in the recipe"] == said["as Python does"]
    assert said["imported"] > 100_000
    assert said["alive in the recipe"] < 1000
    assert said["alive at the end"] < 1000
