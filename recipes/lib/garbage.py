"""When Python looks for garbage in a process that imports torch: not while that starts, and not while it ends.

`import torch` and what a recipe imports after it make 300,000 objects that live as long as the process. Python's
collector goes through them hundreds of times while they are made, and several times more when the process ends,
where the kernel takes back all memory at once anyway. Together these were a fifth of the CPU seconds that a short
run of one rank took; with many ranks per node, they are seconds in which GPUs wait.
"""

from __future__ import annotations

import atexit
import functools
import gc

WHILE_IMPORTING = 50_000
"""New objects until Python looks among them: seldom enough to cost nothing, and still some bound."""

_OF_PYTHON = gc.get_threshold()


@functools.cache
def spare_imports() -> None:
    """Look for garbage seldom until `imports_are_done`, and never at the end of the process. Before `import torch`."""
    gc.set_threshold(WHILE_IMPORTING, *_OF_PYTHON[1:])
    # Frozen objects are passed over. What an object does when nothing points to it any more, it still does; what
    # has to happen at the end of a process belongs into `with` or `atexit`: Python promises no more than that.
    atexit.register(gc.freeze)


def imports_are_done() -> None:
    """From here on as Python does it, without what is there already.

    A training loop must not keep the usual number of dead cycles fifty times over: some hold a GPU's memory.
    """
    gc.freeze()
    gc.set_threshold(*_OF_PYTHON)
