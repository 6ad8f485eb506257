"""The thin wrapper around a recipe: finds its rank, meets the others, then becomes the recipe. Subprocess-free.

    python -m launcher.task rank   --attempt-dir DIR --master ADDRESS -- recipes.ch4.fsdp model=tiny
    python -m launcher.task agent  --attempt-dir DIR --master ADDRESS --workers 8 -- recipes.ch4.fsdp model=tiny
    python -m launcher.task worker --attempt-dir DIR -- recipes.ch4.fsdp model=tiny

`rank` is one process per device under srun or on this machine; `agent` is one torchrun agent per node, whose `worker`s
are the ranks. The recipe runs in this very process (runpy), because rank 0 holds the rendezvous store open: between
"found a free port" and "listens on it" there is no moment in which another job could take the port.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from launcher import node_environment, rendezvous, witness
from launcher.outcome import STOPPED_EXIT
from recipes.lib.garbage import spare_imports

ENDPOINT_FILE = "rendezvous/endpoint.json"
"""In a folder of its own: waiting ranks list it, and the attempt's folder holds a log of each of them."""

RENDEZVOUS_SECONDS = 300.0
"""How long ranks wait for rank 0. Importing torch from a cold parallel file system takes minutes, not seconds."""


def main(argv: Sequence[str] | None = None) -> None:
    options, recipe = _parse(sys.argv[1:] if argv is None else argv)
    faulthandler.enable()
    spare_imports()  # torch comes next, also in an agent and for a recipe from elsewhere
    if options.mode != "worker":  # a worker inherits its agent's
        node_environment.apply(options.attempt_dir, os.environ)
    if options.mode == "agent":
        _run_agent(options, recipe)
        return
    if options.mode == "worker":
        _redirect(options.attempt_dir / f"rank-{os.environ['RANK']}.log")
    rank = rendezvous.rank_from_environment(os.environ)
    witness.dump_stacks_on_signal(options.attempt_dir / f"stacks-{rank.rank}.txt")
    witness.dump_collectives_on_signal(witness.collectives_file(options.attempt_dir, rank.rank))
    os.environ.update(rank.environment())
    try:
        store = _meet(options, rank) if options.mode == "rank" else None
        _become(recipe)
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code == STOPPED_EXIT:
            # srun ends the slower ranks when the first one has stopped, and Python drops its handlers on the way out.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _record_error(options.attempt_dir, rank, error)
        raise
    del store  # rank 0's store outlives the recipe, so that the others' last collective can finish


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m launcher.task", description=__doc__)
    parser.add_argument("mode", choices=("rank", "agent", "worker"))
    parser.add_argument("--attempt-dir", type=Path, required=True)
    parser.add_argument("--master", help="address of the first node")
    parser.add_argument("--workers", type=int, help="ranks per node (agent)")
    split = argv.index("--") if "--" in argv else len(argv)
    options, recipe = parser.parse_args(list(argv[:split])), list(argv[split + 1 :])
    if not recipe:
        parser.error("no recipe module after --")
    return options, recipe


def _meet(options: argparse.Namespace, rank: rendezvous.Rank) -> Any:
    """Set MASTER_ADDR and MASTER_PORT. Rank 0 returns the store that listens there; keep it until the recipe ends.

    TORCHELASTIC_USE_AGENT_STORE makes torch's env:// connect to that store in every rank instead of rank 0 binding
    the port a second time.
    """
    store = None
    path = options.attempt_dir / ENDPOINT_FILE
    if rank.rank == 0:
        store, port = _listen(options.master)
        rendezvous.publish(path, rendezvous.Endpoint(options.master, port))
    else:
        import torch.distributed  # noqa: F401  the slow import, while rank 0 does the same, not after it
    endpoint = rendezvous.wait_for(path, deadline_seconds=RENDEZVOUS_SECONDS)
    os.environ.update(
        MASTER_ADDR=endpoint.address,
        MASTER_PORT=str(endpoint.port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    return store


def _listen(address: str) -> tuple[Any, int]:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but torch lists it nowhere

    store = TCPStore(
        address,
        0,
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,  # torchrun's agent in this process then finds this server instead of binding the port again
        timeout=timedelta(seconds=RENDEZVOUS_SECONDS),
    )
    return store, int(store.port)


def _run_agent(options: argparse.Namespace, recipe: list[str]) -> None:
    """One torchrun agent for this node, with the node's Slurm number as its rank, so that ranks follow nodes."""
    agent = rendezvous.rank_from_environment(os.environ)
    witness.dump_stacks_on_signal(options.attempt_dir / f"stacks-agent-{agent.rank}.txt")
    # Ended by a warning that is meant for the ranks, the agent would leave its workers behind.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    path = options.attempt_dir / ENDPOINT_FILE
    store = None
    if agent.rank == 0:
        store, port = _listen(options.master)
        rendezvous.publish(path, rendezvous.Endpoint(options.master, port))
    endpoint = rendezvous.wait_for(path, deadline_seconds=RENDEZVOUS_SECONDS)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(_agent_arguments(options, recipe, agent, endpoint))
    except ChildFailedError as failed:
        # The agent takes a worker that stopped as asked for a failure, and would say so with status 1.
        if all(failure.exitcode == STOPPED_EXIT for failure in failed.failures.values()):
            sys.exit(STOPPED_EXIT)
        raise
    del store


def _agent_arguments(
    options: argparse.Namespace, recipe: list[str], agent: rendezvous.Rank, endpoint: rendezvous.Endpoint
) -> list[str]:
    return [
        f"--nnodes={agent.world_size}",
        f"--nproc-per-node={options.workers}",
        f"--node-rank={agent.rank}",
        f"--master-addr={endpoint.address}",
        f"--master-port={endpoint.port}",
        "--max-restarts=0",
        "-m",
        "launcher.task",
        "worker",
        f"--attempt-dir={options.attempt_dir}",
        "--",
        *recipe,
    ]


def _become(recipe: list[str]) -> None:
    """Run the recipe's module as __main__ with its own argv."""
    module, *arguments = recipe
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _redirect(log: Path) -> None:
    """Send this process's output, and that of its children, to its rank's log."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _record_error(attempt_dir: Path, rank: rendezvous.Rank, error: BaseException) -> None:
    """Leave the exception where the controller finds it: the first one by time is the cause, the rest are echoes."""
    if isinstance(error, SystemExit) and error.code in (None, 0, STOPPED_EXIT):
        return
    # A recipe that printed one line has raised SystemExit(2) from what it is about: a traceback would bury it.
    one_line = isinstance(error, SystemExit) and error.__cause__ is not None
    if one_line and error.__cause__ is not None:
        error = error.__cause__
    record = {
        "time": time.time(),
        "rank": rank.rank,
        "node": os.environ.get("SLURMD_NODENAME", socket.gethostname()),
        "type": type(error).__name__,
        "message": str(error),
        "traceback": "" if one_line else _traceback_from_the_recipe(error),
    }
    path = attempt_dir / f"error-{rank.rank}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, ensure_ascii=False))
    os.replace(temporary, path)


def _traceback_from_the_recipe(error: BaseException) -> str:
    """The traceback without this wrapper's and runpy's own frames: what the reader wrote, not how it was started."""
    full = traceback.TracebackException.from_exception(error)
    own = [index for index, frame in enumerate(full.stack) if frame.filename in (__file__, "<frozen runpy>")]
    inner = full.stack[own[-1] + 1 :] if own else full.stack
    if inner:
        full.stack = traceback.StackSummary.from_list(inner)
    return "".join(full.format())


if __name__ == "__main__":
    main()
