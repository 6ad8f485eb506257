"""`submit` and `resume`: compose, validate, freeze, hand over; `--wait` stays and shows the run."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Sequence

from rich.console import Console

from launcher import badnodes, codeversion, proven, runs, status
from launcher.cluster_commands import use_cluster, use_cluster_of
from launcher.config import Composed, compose_points
from launcher.memory import check_memory
from launcher.paths import REPOSITORY, known_run_roots, remember_run_root, run_root
from launcher.render import render
from launcher.spec import JobSpec, UserError
from launcher.submittable import check_submittable


def run(options: argparse.Namespace) -> int:
    console = Console(stderr=options.json)
    points = compose_points(options.words)
    for note in dict.fromkeys(point.note for point in points if point.note):
        console.print(note, highlight=False, soft_wrap=True)
    for point in points:
        use_cluster(point.spec.cluster)
        check_submittable(point.spec)
    warnings = [line for point in points for line in proven.unproven_options(point.spec)]
    warnings += [line for point in points if (line := check_memory(point.spec))]
    for warning in dict.fromkeys(warnings):
        console.print(f"[yellow]warning[/]: {warning}", highlight=False, soft_wrap=True)
    if options.dry_run:
        for point in points:
            print(render(point.spec, words=point.words), end="")
        return 0
    started = [_start_new(point, options, console) for point in points]
    return _wait_for(started, options, console)


def resume(options: argparse.Namespace) -> int:
    """Submit an existing run again: it continues from its newest checkpoint in the same directory."""
    console = Console(stderr=options.json)
    name, changes = options.run, list(options.words)
    if name is not None and "=" in name:  # `resume nodes=2`: the first word is a change, not a run
        name, changes = None, [name, *changes]
    found = runs.find(known_run_roots(), name)
    use_cluster_of(found)
    now = status.status_of(found)
    if not now.is_over and now.state != "unsubmitted":
        raise UserError(f"run {found.id} is {now.state} (job {now.job_id}); cancel it first, or wait for it")
    spec = found.spec()
    if changes:
        words = _merged(found.info()["words"], changes)
        (point,) = compose_points(words)
        if point.spec.recipe != spec.recipe:
            # DDP's checkpoints are FSDP's as well; a recipe that cannot read them says so before its first step.
            console.print(
                f"run {found.id} goes on as {point.spec.recipe}; it was a {spec.recipe}", highlight=False
            )
        if point.spec.args.get("resume") is False and any(
            word.startswith("args.resume=") for word in changes
        ):
            raise UserError(
                f"args.resume=false: run {found.id} does not go backwards; submit a new run instead"
            )
        spec = point.spec
        use_cluster(spec.cluster)
        check_submittable(spec)
        if warning := check_memory(spec):
            console.print(f"[yellow]warning[/]: {warning}", highlight=False, soft_wrap=True)
        found.write_spec(spec)
        found.write_words(words)
    _submit(found, spec, options, console)
    return _wait_for([found], options, console)


def _merged(words: Sequence[str], changes: Sequence[str]) -> list[str]:
    """The run's own words with the changed keys replaced."""
    keys = {word.partition("=")[0] for word in changes}
    return [*(word for word in words if word.partition("=")[0] not in keys), *changes]


def _start_new(point: Composed, options: argparse.Namespace, console: Console) -> runs.Run:
    root = run_root(point.spec.run_root)
    new = runs.create(root, point.spec, point.words)
    try:
        codeversion.record_code(REPOSITORY, new.path)
        _submit(new, point.spec, options, console)
    except UserError:
        shutil.rmtree(new.path)  # nothing was submitted: leave no empty run behind
        raise
    if point.spec.run_root:
        remember_run_root(root)
    return new


def _submit(new: runs.Run, spec: JobSpec, options: argparse.Namespace, console: Console) -> None:
    from launcher import executors  # submitit: a fifth of a second that --help and mistakes need not wait for

    left_out = badnodes.leave_out(new.path.parent, spec)
    for line in left_out.lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    # Not in the frozen spec: a later submission of the run looks at the record of its own day.
    job_id = executors.submit(new, dataclasses.replace(spec, exclude=left_out.nodes))
    if options.json:
        print(
            json.dumps({"run": new.id, "job_id": job_id, "recipe": spec.recipe, "directory": str(new.path)})
        )
        return
    size = f"{spec.nodes} node{'s'[: spec.nodes != 1]} x {spec.tasks_per_node} rank{'s'[: spec.tasks_per_node != 1]}"
    console.print(
        f"run [bold]{new.id}[/]  {spec.recipe} on {spec.cluster}, {size}, job {job_id}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"directory  {new.path}", highlight=False, soft_wrap=True)
    if not options.wait:
        console.print(f"follow it  python -m launcher logs -f {new.id}", highlight=False)


def _wait_for(started: Sequence[runs.Run], options: argparse.Namespace, console: Console) -> int:
    if not options.wait:
        return 0
    from launcher import progress

    failed = False
    for each in started:
        try:
            current = progress.follow(each, console)
        except KeyboardInterrupt:
            console.print(
                f"\nrun {each.id} goes on; follow it: python -m launcher logs -f {each.id}", highlight=False
            )
            return 130
        progress.summary(each, current, console)
        failed = failed or current.state != "done"
    return int(failed)
