"""Rendered job files: what jobs/ holds, what a submission adds, and that shells and Slurm read them as meant."""

from __future__ import annotations

import dataclasses
import re
import signal
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest

from launcher.clusters import profile_files
from launcher.config import compose
from launcher.paths import REPOSITORY
from launcher.preflight_job import render_preflight
from launcher.recipes import recipe_files
from launcher.render import Submission, render, sbatch_flags, slurm_time
from launcher.spec import Container, JobSpec

RECIPES = sorted(recipe_files(REPOSITORY))
CLUSTERS = sorted(profile_files(REPOSITORY))
SHELLCHECK = Path(sysconfig.get_path("scripts")) / "shellcheck"
"""Beside this interpreter, as `make setup` installs it: nobody has to activate the environment to run the tests."""


def spec(**changes: object) -> JobSpec:
    return dataclasses.replace(compose(["recipe=ch4_fsdp", "cluster=slurm"]), **changes)  # type: ignore[arg-type]


def submission(tmp: str = "/scratch/a b/it's 100%") -> Submission:
    folder = Path(tmp)
    log = f"{tmp.replace('%', '%%')}/submitit/%j_0_log.out"
    return Submission(
        run_dir=folder, repository=Path("/home/ü/re po"), python="/home/ü/re po/bin/python", log=log
    )


def test_sizes_are_always_stated_so_that_none_leaks_in_from_an_outer_job() -> None:
    flags = sbatch_flags(spec(nodes=4, tasks_per_node=8, cpus_per_task=12, gpus_per_node=8), None)
    for flag in ("--nodes=4", "--ntasks-per-node=8", "--cpus-per-task=12", "--gpus-per-node=8"):
        assert flag in flags


def test_every_flag_is_one_word_with_an_equals_sign() -> None:
    for flag in sbatch_flags(
        spec(partition="a b", sbatch={"exclusive": "", "comment": "it's"}), submission()
    ):
        assert re.fullmatch(r"--[a-z-]+(=.+)?", flag), flag


def test_no_gpu_flag_where_no_gpu_is_asked_for() -> None:
    assert not [flag for flag in sbatch_flags(spec(gpus_per_node=0), None) if "gpu" in flag]


@pytest.mark.parametrize(
    ("minutes", "text"), [(1, "00:01:00"), (90, "01:30:00"), (3 * 1440 + 61, "3-01:01:00")]
)
def test_time_limits_are_written_as_slurm_reads_them(minutes: int, text: str) -> None:
    assert slurm_time(minutes) == text


def test_further_sbatch_flags_of_the_profile_are_passed_on() -> None:
    flags = sbatch_flags(spec(sbatch={"exclusive": "", "constraint": "h100&ib"}), None)
    assert "--exclusive" in flags
    assert "--constraint='h100&ib'" in flags


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_file_in_jobs_is_what_render_prints(recipe: str) -> None:
    path = REPOSITORY / "jobs" / f"{recipe}.sbatch"
    assert path.read_text() == render(compose([f"recipe={recipe}", "cluster=slurm"])), (
        "python -m launcher render --all --write brings jobs/ up to date"
    )


def test_jobs_holds_no_file_without_a_recipe_but_the_preflight() -> None:
    assert {path.stem for path in (REPOSITORY / "jobs").glob("*.sbatch")} == {*RECIPES, "preflight"}
    assert (REPOSITORY / "jobs" / "preflight.sbatch").read_text() == render_preflight()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_file_of_jobs_holds_no_path_of_a_machine(recipe: str) -> None:
    text = (REPOSITORY / "jobs" / f"{recipe}.sbatch").read_text()
    assert str(REPOSITORY) not in text
    assert not re.search(r"[=\s'\"](/home|/root|/work|/scratch|/tmp)\b", text)


@pytest.mark.parametrize("launch", ["srun", "torchrun"])
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_shellcheck_has_nothing_to_say(cluster: str, launch: str, tmp_path: Path) -> None:
    """Of all recipes' files. Those that a shell reads as the same but for the recipe's name are checked once."""
    different: dict[str, str] = {}
    for recipe in RECIPES:
        composed = compose([f"recipe={recipe}", f"cluster={cluster}", f"launch={launch}"])
        texts = [render(composed), render(composed, submission())]
        texts.append(render(dataclasses.replace(composed, activate=("module purge", "module load cuda/13"))))
        texts.append(render(dataclasses.replace(composed, container=Container("pyxis", "nvcr+pytorch.sqsh"))))
        for text in texts:
            different.setdefault(as_a_shell_reads_it(text, recipe), text)
    paths = [tmp_path / f"{index}.sbatch" for index in range(len(different))]
    for path, text in zip(paths, different.values(), strict=True):
        path.write_text(text)
    done = subprocess.run(
        [str(SHELLCHECK), "--severity=style", *map(str, paths)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def as_a_shell_reads_it(text: str, recipe: str) -> str:
    """Without the lines that are Slurm's, and with one name for all recipes."""
    return re.sub(r"^#SBATCH .*\n", "", text, flags=re.MULTILINE).replace(recipe, "RECIPE")


def test_odd_paths_arrive_unchanged_in_the_shell(tmp_path: Path) -> None:
    """Runs the script's own shell with a controller that prints its arguments in place of the real one."""
    repository = tmp_path / "a b 'c' $d ü"
    (repository / "launcher").mkdir(parents=True)
    (repository / "launcher" / "__init__.py").touch()
    (repository / "launcher" / "controller.py").write_text("import sys; print(sys.argv[1:])")
    run_dir = tmp_path / 'run $HOME `id` "q"'
    text = render(spec(), Submission(run_dir, repository, "python3", "x"))
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([f"--run-dir={run_dir}"])


@pytest.mark.parametrize(("exit_code", "expected"), [(0, 0), (1, 1), (2, 2), (99, 99)])
def test_the_shell_ends_with_the_controllers_status(tmp_path: Path, exit_code: int, expected: int) -> None:
    (tmp_path / "launcher").mkdir()
    (tmp_path / "launcher" / "__init__.py").touch()
    (tmp_path / "launcher" / "controller.py").write_text(f"raise SystemExit({exit_code})")
    text = render(spec(), Submission(tmp_path, tmp_path, "python3", "x"))
    assert subprocess.run(["bash", "-c", text], check=False).returncode == expected


def test_the_shell_passes_a_signal_on_and_waits_for_the_controllers_own_end(tmp_path: Path) -> None:
    (tmp_path / "launcher").mkdir()
    (tmp_path / "launcher" / "__init__.py").touch()
    (tmp_path / "launcher" / "controller.py").write_text(
        # os.write: a signal that comes while `print` still flushes would find the stream locked ("reentrant call").
        "import os, signal, sys, time\n"
        "def stop(number, frame):\n    time.sleep(0.3); os.write(1, b'saved\\n'); sys.exit(7)\n"
        "signal.signal(signal.SIGTERM, stop)\nos.write(1, b'ready\\n')\ntime.sleep(300)\n"
    )
    text = render(spec(), Submission(tmp_path, tmp_path, "python3", "x"))
    process = subprocess.Popen(["bash", "-c", text], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    # The controller may be ready before the shell has come to its traps; the one for USR2 is the last of them.
    until = time.monotonic() + 60
    while signal.SIGUSR2 not in caught_by(process.pid):
        assert time.monotonic() < until
        time.sleep(0.01)
    process.terminate()
    assert process.communicate(timeout=60)[0] == "saved\n"
    assert process.returncode == 7


def caught_by(process: int) -> set[int]:
    """The signals that a process has handlers for, from the kernel's mask."""
    (mask,) = re.findall(r"^SigCgt:\s*(\w+)", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return {number for number in signal.Signals if int(mask, 16) >> (number - 1) & 1}


def test_a_missing_repository_is_one_line_before_anything_starts() -> None:
    environment = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": "/nowhere"}
    text = "scontrol() { :; }\n" + render(spec())
    done = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "ch4_fsdp.sbatch: no repository at '' or '/nowhere'; set LAUNCHER_REPOSITORY to its folder"
    ]
