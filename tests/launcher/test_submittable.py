"""What is found wrong before a job is submitted, and where run directories go."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from launcher.paths import REPOSITORY, absolute, cache_dir, run_root
from launcher.spec import UserError
from launcher.submittable import check_submittable

if TYPE_CHECKING:
    from tests.launcher.conftest import SampleCheckout

NOBODY, WITHOUT_HOME = 65534, 54321
"""User ids: one that every system has, one that no passwd file knows."""


def mistake(checkout: SampleCheckout, *words: str, cwd: Path) -> str:
    spec = checkout.compose("recipe=ch4_fsdp", *words, cwd=cwd)
    with pytest.raises(UserError) as caught:
        check_submittable(spec)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def as_ordinary_user(code: str, user: int = NOBODY, **environment: str) -> str:
    """What a Python process prints that is not root, with this environment alone."""
    drop = f"import os\nif os.geteuid() == 0: os.setgid({user}); os.setuid({user})\n"
    start = f"import sys\nsys.path[:] = {[str(REPOSITORY), *sys.path]!r}\n"
    finished = subprocess.run(
        # The modules are read as root where this is root: the checkout may be closed to others.
        [sys.executable, "-c", f"{start}import launcher.submittable, launcher.paths\n{drop}{code}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def test_a_good_job_passes(checkout: SampleCheckout, tmp_path: Path) -> None:
    check_submittable(checkout.compose("recipe=ch4_fsdp", "run_root=runs/deep/er", cwd=tmp_path))
    assert not (tmp_path / "runs").exists(), "checking makes nothing"


def test_slurm_wants_sbatch(checkout: SampleCheckout, tmp_path: Path, sbatch_on_path: None) -> None:
    words = ("cluster=slurm", f"run_root={tmp_path}")
    spec = checkout.compose("recipe=ch4_fsdp", *words)
    check_submittable(spec)
    (tmp_path / "bin/sbatch").unlink()
    assert mistake(checkout, *words, cwd=tmp_path) == (
        "cluster=slurm: sbatch is not on PATH; submit on a login node, "
        "or try cluster=box (a Slurm on this machine) or cluster=local"
    )
    check_submittable(dataclasses.replace(spec, cluster="box"))


def test_missing_folders_and_files_are_named(checkout: SampleCheckout, tmp_path: Path) -> None:
    def found(*words: str) -> str:
        return mistake(checkout, "run_root=runs", *words, cwd=tmp_path)

    assert found("args.init_from=gone") == f"args.init_from={tmp_path}/gone: no folder {tmp_path}/gone"
    (tmp_path / "empty").mkdir()
    assert found("args.init_from=empty").startswith(f"args.init_from={tmp_path}/empty: holds no config.json")
    assert found("args.data=./gone").startswith(f"args.data={tmp_path}/gone: no folder")
    image = ("container.kind=apptainer", "container.image=./gone.sif")
    assert found(*image) == "container.image=./gone.sif: there is no such file"


def test_a_file_in_place_of_the_run_root_is_named(checkout: SampleCheckout, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    expected = f"run_root={tmp_path}/file/runs: {tmp_path}/file is not a folder"
    assert mistake(checkout, "run_root=file/runs", cwd=tmp_path) == expected


@pytest.fixture
def closed_folder() -> Iterator[Path]:
    """A folder that anybody may enter and only root may write in; pytest's own are closed to other users."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        yield folder


def test_a_run_root_that_others_own_is_refused(closed_folder: Path) -> None:
    code = f"""
from pathlib import Path
from launcher.spec import UserError
try:
    launcher.submittable.check_run_root(Path({str(closed_folder / "runs")!r}))
except UserError as error:
    print(error)
"""
    expected = f"you may not write in {closed_folder}; name another folder with run_root="
    assert as_ordinary_user(code) == f"run_root={closed_folder}/runs: {expected}"


# --- the rule for run directories and caches


def test_the_run_root_is_the_named_one_then_the_variable_then_the_checkout(tmp_path: Path) -> None:
    variable = {"LAUNCHER_RUNS": str(tmp_path / "variable")}
    named = run_root(str(tmp_path / "named"), repository=tmp_path, environment=variable)
    assert named == tmp_path / "named"
    assert run_root(repository=tmp_path, environment=variable) == tmp_path / "variable"
    assert run_root(repository=tmp_path, environment={}) == tmp_path / "runs"


def test_a_checkout_of_others_leaves_runs_in_the_state_folder(closed_folder: Path) -> None:
    repository = f"repository=Path({str(closed_folder)!r})"
    code = f"from pathlib import Path; print(launcher.paths.run_root({repository}))"
    state = "/home/reader/.local/state"
    assert as_ordinary_user(code, XDG_STATE_HOME=state) == f"{state}/distributed-recipes/runs"


def test_the_cache_needs_no_home_if_it_is_named_and_says_so_if_not(tmp_path: Path) -> None:
    assert cache_dir({"CACHE_DIR": str(tmp_path)}) == tmp_path
    code = """
from launcher.spec import UserError
try:
    print(launcher.paths.cache_dir({}))
except UserError as error:
    print(error)
"""
    assert as_ordinary_user(code, HOME="/home/reader") == "/home/reader/.cache/distributed-recipes"
    answer = as_ordinary_user(code, user=WITHOUT_HOME)
    if os.geteuid() == 0:  # only root can become a user without a home
        assert answer == "HOME is not set and this user has no home; name a folder in CACHE_DIR"
    else:
        assert Path(answer).is_absolute()


def test_a_path_is_made_absolute_without_following_links(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/")
    assert absolute("link/../x", tmp_path) == tmp_path / "x"
    assert absolute("/a//b/", tmp_path) == Path("/a/b")
    assert absolute("~nobody-of-this-name/x", tmp_path) == tmp_path / "~nobody-of-this-name/x"
