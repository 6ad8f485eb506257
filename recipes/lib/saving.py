"""When checkpoints are written, and what becomes of them: in the background, announced, and not for ever kept.

The state is copied to (pinned) host memory, and a thread writes it from there. On a GPU the copy goes on during the
next forward and backward pass, which change nothing of it: only the optimizer's update waits for its end. The first
copy takes seconds, because it allocates that memory: it is rehearsed after the first step, before it is wanted.
One save is under way at a time: the next one waits for it, and so does the end of a run. Host memory holds one copy
of a rank's part of the state.

RUN_DIR/checkpoints.jsonl tells whoever watches, one line per event: started, saved, failed, skipped; passed_over where
a run begins and does not go on from a checkpoint, because it is torn or corrupt; loaded, for the one it goes on from.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

from recipes.lib import manifest
from recipes.lib.checkpoint import PassedOver, Progress, Trained, state_of
from recipes.lib.distributed import World, attempt, from_first
from recipes.lib.lines import Lines
from recipes.lib.optimizer import own_part
from recipes.lib.staging import Stager, State
from recipes.lib.writing import NotSaved, write_checkpoint

ANNOUNCEMENTS_FILE = "checkpoints.jsonl"
SECONDS_FOR_THE_LAST = 20.0
"""How long a run that ends with an error waits for the save under way: its other ranks may be dead."""
_SPARE_BYTES = 16 * 2**20
"""What a checkpoint takes beside its tensors: names, random states, the manifest."""


@dataclass(frozen=True)
class Saved:
    """How one save ended, the same on every rank but for the seconds."""

    step: int
    event: str
    """saved, failed or skipped."""
    reason: str = ""
    bytes: int = 0
    seconds_blocked: float = 0.0
    """For which the step loop stood still: for the copy, as far as it outlasted the passes, and for the save before."""
    seconds_total: float = 0.0
    """From the beginning until the checkpoint was safe."""

    def __str__(self) -> str:
        name = f"step-{self.step:08d}"
        if self.event != "saved":
            return f"warning: {name} is not saved: {self.reason}"
        return (
            f"saved {name}: {self.seconds_blocked:.2f} s blocked, {self.seconds_total:.2f} s in all, "
            f"{self.bytes / 2**20:,.1f} MiB"
        )


class Saver:
    """Saves a run's checkpoints; a context in which a save under way is waited for at the end."""

    def __init__(
        self,
        run_directory: Path,
        trained: Trained,
        world: World,
        *,
        keep: int,
        keep_every: int,
        in_background: bool,
        say: Callable[[str], None] = print,
    ) -> None:
        """`keep` checkpoints are kept, and those of every `keep_every`-th step (0: none of them)."""
        self._run_directory, self._trained, self._world = run_directory, trained, world
        self._keep, self._keep_every, self._say = keep, keep_every, say
        # What a stack writes itself is what it has, not a copy: the steps wait.
        copied = in_background and trained.own is None
        self._stager = Stager(world.device) if copied else None
        self._copy: Future[State] | None = None
        """Of the state as it was at the save, while the next step computes."""
        self._rehearsal: Future[State] | None = None
        self._blocked = 0.0
        self._needed: int | None = None
        """Bytes of a checkpoint, once one was begun: they do not change."""
        self._hook: RemovableHandle | None = None
        if copied:
            self._hook = own_part(trained.optimizer).register_step_pre_hook(self._before_the_update)
        self._lines = Lines(run_directory / ANNOUNCEMENTS_FILE) if world.is_first else None
        self._thread: threading.Thread | None = None
        self._outcome: Saved | None = None
        self.newest_saved: int | None = None
        """The step of the newest checkpoint that this attempt has written."""
        self._error: Exception | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif self._thread is not None:
            # On an error of this rank alone, the others wait in another collective: not for ever.
            self._thread.join(SECONDS_FOR_THE_LAST)
            if self._thread.is_alive():
                return  # it still uses what would be closed
        if self._hook is not None:
            self._hook.remove()
        if self._stager is not None:
            self._stager.close()
        if self._lines is not None:
            self._lines.close()

    def rehearse(self) -> None:
        """Allocate what the copies will need, in the background; call it once the optimizer has its moments.

        For an 8B model on four GPUs that is 22 GiB of pinned memory a rank, and took 11 s when the first save did it.
        """
        if self._stager is not None and self._stager.overlaps and self._rehearsal is None:
            self._rehearsal = self._stager.stage(state_of(self._trained, Progress(), self._world))

    def save(self, progress: Progress) -> None:
        """Begin to save; all ranks call this together, at a step boundary.

        When it returns, the state may change by the optimizer's next step, which waits where it has to, and by
        nothing else.

        What goes wrong with the disk is announced and leaves the run going; `wait` tells how it ended.
        """
        began = time.perf_counter()
        self.wait()
        step = progress.step
        state = state_of(self._trained, progress, self._world)
        if self._needed is None:
            self._needed = bytes_of_all(state, self._trained, self._world)
        too_full = self._space_problem(self._needed) if self._world.is_first else None
        too_full = from_first(too_full, self._world)
        if too_full is not None:
            self._outcome = Saved(step, "skipped", too_full)
            self._announce(self._outcome)
            return
        self._announce(Saved(step, "started"))
        if self._stager is None:
            self._finish(state, step, began)
            self.wait()
            return
        self._copy = self._stager.stage(state)
        self._blocked = time.perf_counter() - began
        # A daemon: a process that ends with an error must not wait for ranks that are gone.
        self._thread = threading.Thread(
            target=self._finish, args=(self._copy, step, began), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _before_the_update(self, *_: object) -> None:
        """The optimizer is about to change what is being copied."""
        if self._copy is not None:
            began = time.perf_counter()
            wait_for([self._copy])  # its error, if any, is the thread's to report
            self._copy = None
            self._blocked += time.perf_counter() - began

    def wait(self) -> Saved | None:
        """Wait for the save under way. How the newest ended, on every rank alike; None before the first."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error
        return self._outcome

    def _finish(self, state: State | Future[State], step: int, began: float) -> None:
        """Write, announce, delete what is kept no longer. In the background, where there is one."""
        world = self._world
        try:
            if world.device.type == "cuda":
                torch.cuda.set_device(world.device)  # of this thread; its own would be the first GPU
            group = world.background
            description = self._trained.description(step, world)
            if isinstance(state, Future):
                state = state.result()
            try:
                written = write_checkpoint(
                    state, description, self._run_directory, world, group, self._trained.own
                )
                outcome = Saved(step, "saved", bytes=written.size)
                self.newest_saved = step
            except NotSaved as error:
                outcome = Saved(step, "failed", str(error))
            total = time.perf_counter() - began
            blocked = total if self._stager is None else self._blocked
            self._outcome = dataclasses.replace(outcome, seconds_total=total, seconds_blocked=blocked)
            self._announce(self._outcome)
            if world.is_first and outcome.event == "saved":
                self._delete_surplus(step)
        except Exception as error:  # noqa: BLE001 - a thread's error is its waiter's: wait() raises it
            self._error = error

    def _announce(self, what: Saved) -> None:
        """Rank 0 writes the line and says it."""
        if self._lines is None:
            return
        line = {**dataclasses.asdict(what), "attempt": attempt(), "time": time.time()}
        self._lines.append(line)
        if what.event != "started":
            self._say(str(what))

    def _space_problem(self, needed: int) -> str | None:
        """Why a checkpoint of that many bytes cannot fit; None where it may. A quota shows only when it is hit."""
        folder = self._run_directory / "checkpoints"
        try:
            folder.mkdir(exist_ok=True)
            found = os.statvfs(folder)
        except OSError as error:
            return f"{folder}: {error.strerror}"
        free = found.f_bavail * found.f_frsize
        if found.f_blocks == 0 or free >= needed:  # some network file systems do not say how large they are
            return None
        return f"it needs {needed / 2**30:.3f} GiB, {folder} has {free / 2**30:.3f} GiB free"

    def _delete_surplus(self, newest: int) -> None:
        """Delete by the rule of `keep` and `keep_every`. Only sound ones count, and only those are deleted."""
        sound = []
        for folder in manifest.folders(self._run_directory):
            if manifest.step_of(folder) > newest:
                continue  # passed over when the run began, or it would have gone on from there
            try:
                sound.append(manifest.check_sizes(folder).step)
            except (manifest.Unsound, manifest.TooNew):
                continue  # kept for whoever wants to look; a resume says what is wrong with it
        for step in manifest.surplus(sound, self._keep, self._keep_every):
            try:
                manifest.remove(manifest.folder_of(self._run_directory, step))
            except OSError as error:
                print(f"warning: step-{step:08d} is not deleted: {error}", file=sys.stderr, flush=True)


def announce_passed_over(run_directory: Path, passed_over: Sequence[PassedOver], world: World) -> None:
    """Rank 0 says which checkpoints a run does not go on from: on stderr, and to whoever watches."""
    if not world.is_first or not passed_over:
        return
    lines = Lines(run_directory / ANNOUNCEMENTS_FILE)
    for one in passed_over:
        print(f"warning: {one}", file=sys.stderr, flush=True)
        about = {"event": "passed_over", "step": one.step, "reason": one.problem}
        lines.append({**about, "attempt": attempt(), "time": time.time()})
    lines.close()


@dataclass(frozen=True)
class Loaded:
    """What it took to come back from a checkpoint."""

    folder: Path
    seconds_checking: float
    """To find the newest sound one: the ranks read every byte of it for its checksum."""
    seconds_reading: float
    """To fill model, optimizer and random state."""

    def __str__(self) -> str:
        seconds = f"{self.seconds_checking:.1f} s to check it, {self.seconds_reading:.1f} s to read it"
        return f"going on from {self.folder.name} ({seconds})"


def announce_loaded(run_directory: Path, loaded: Loaded, world: World) -> None:
    """Rank 0 tells whoever watches how long the run took to come back."""
    if not world.is_first:
        return
    about = {
        "event": "loaded",
        "step": manifest.step_of(loaded.folder),
        "seconds_checking": loaded.seconds_checking,
        "seconds_reading": loaded.seconds_reading,
    }
    lines = Lines(run_directory / ANNOUNCEMENTS_FILE)
    lines.append({**about, "attempt": attempt(), "time": time.time()})
    lines.close()


def bytes_of_all(state: dict[str, Any], trained: Trained, world: World) -> int:
    """Bytes that the checkpoint will have, on rank 0; all ranks call this together.

    A sharded tensor counts whole and a replicated one once, whichever ranks have it: of a pipeline's stages and of a
    mixture's experts each rank knows its own alone.
    """
    if trained.own is not None:
        return trained.own.size() + _SPARE_BYTES
    mine = {
        f"{part}.{name}": tensor.numel() * tensor.element_size()
        for part in ("model", "optimizer")
        for name, tensor in state[part].items()
        if isinstance(tensor, torch.Tensor)
    }
    everyone: list[Any] = [mine] * world.size
    if world.size > 1:
        dist.gather_object(mine, everyone if world.is_first else None, group=world.patient)
    return sum({name: size for each in everyone for name, size in each.items()}.values()) + _SPARE_BYTES


def save(run_directory: Path, trained: Trained, progress: Progress, world: World) -> Path:
    """Write one checkpoint now, and delete none; all ranks call this together. Gives its folder.

    Raises NotSaved on every rank alike.
    """
    state = state_of(trained, progress, world)
    description = trained.description(progress.step, world)
    write_checkpoint(state, description, run_directory, world, world.patient, trained.own)
    return manifest.folder_of(run_directory, progress.step)


def keep_tokenizer(source: Path, run_directory: Path) -> None:
    """Put the tokenizer of the run's data beside its checkpoints: the cache that it is in may be emptied."""
    folder = run_directory / "tokenizer"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (source / name).is_file() and not (folder / name).exists():
            folder.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)
