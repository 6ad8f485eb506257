"""Finding one's way: the list of recipes, the resolved job, one line for a mistake, the Tab key."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import argcomplete
import pytest
import yaml

from launcher.__main__ import COMMANDS, main
from launcher.paths import REPOSITORY
from launcher.recipes import load_recipes, recipe_files
from launcher.spec import JobSpec

RECIPES = list(recipe_files())


def output(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 0
    return capsys.readouterr().out


# --- recipes


def test_there_are_recipes() -> None:
    assert "ch1_baseline" in RECIPES


def test_the_table_names_every_recipe_and_what_it_shows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    table = output(capsys, "recipes")
    for entry in load_recipes():
        assert f"{entry.name} " in table
        assert entry.summary in table


def test_the_list_is_there_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(output(capsys, "recipes", "--json"))
    assert [fact["name"] for fact in facts] == RECIPES
    assert {"summary", "chapter", "entrypoint", "file"} <= facts[0].keys()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_composes_on_this_machine_and_on_the_plain_cluster(name: str) -> None:
    for cluster in ("local", "slurm"):
        assert main(["show", f"recipe={name}", f"cluster={cluster}", "--json"]) == 0


@pytest.mark.parametrize("entry", load_recipes(), ids=lambda entry: entry.name)
def test_every_recipe_names_an_entrypoint_that_is_there(entry: object) -> None:
    path = REPOSITORY / (str(vars(entry)["entrypoint"]).replace(".", "/") + ".py")
    assert path.is_file()


# --- show


def test_show_prints_the_resolved_job_under_the_keys_that_one_types(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = output(
        capsys, "show", "recipe=ch4_fsdp", "cluster=slurm", "time=90m", "args.lr=1e-4", "env.A=x: y"
    )
    shown = yaml.safe_load(text)
    assert (shown["recipe"], shown["cluster"], shown["time"]) == ("ch4_fsdp", "slurm", "01:30:00")
    assert shown["args"]["lr"] == 1e-4
    assert shown["env"]["A"] == "x: y"


def test_options_may_stand_among_the_words(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "show", "recipe=ch4_fsdp", "--json", "cluster=slurm", "nodes=3")
    assert JobSpec.from_json(text).nodes == 3


def test_show_says_where_a_value_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "show", "recipe=ch4_fsdp", "cluster=local", "args.seed=7", "--origins")
    assert "  seed: 7  # command line\n" in text
    assert "fabric: loopback  # env/clusters/local.yaml\n" in text
    assert "  clip_norm: 1.0\n" in text


# --- mistakes


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("sumbit recipe=ch4_fsdp", "error: unknown command 'sumbit': did you mean submit?"),
        ("recipe=ch4_fsdp", "error: a command is wanted before 'recipe=ch4_fsdp': recipes, "),
        ("show --recipe=ch4_fsdp", "error: unrecognized arguments: --recipe=ch4_fsdp; see "),
        ("show recipe=ch4_fsdb", "error: unknown recipe 'ch4_fsdb' (recipe=): did you mean ch4_fsdp?"),
        ("show ch4_fsdp", "error: 'ch4_fsdp' is not a key=value word; write ch4_fsdp=VALUE"),
        ("show", "error: recipe= is missing; there is ch1_baseline, "),
        (
            "submit recipe=ch5_deepspeed args.offload=cpu",
            "error: args.offload: ch5_deepspeed has no such argument; did you mean args.offload_optimizer?",
        ),
        (
            "submit recipe=ch4_fsdp args.stpes=3",
            "error: args.stpes: ch4_fsdp has no such argument; did you mean",
        ),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], words: str, line: str
) -> None:
    assert main(words.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(line)
    assert printed.err.count("\n") == 1


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = (
        f"{shlex.quote(sys.executable)} -m launcher show recipe=ch4_fsdp | true; exit ${{PIPESTATUS[0]}}"
    )
    # Buffered, as in a person's shell: the write then fails at the end, not in print.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    finished = subprocess.run(
        ["bash", "-c", command],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (finished.returncode, finished.stderr) == (0, "")


def test_help_names_every_command_and_the_rule_for_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert re.search(rf"^  +{name}\s", text, re.M)
        assert command.help in " ".join(text.split()), "wrapped or not"
    assert "A comma makes a sweep" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([name, "--help"])
    assert exit_info.value.code == 0
    assert name in capsys.readouterr().out


# --- the Tab key: argcomplete's protocol, then bash itself


def tab(line: str, tmp_path: Path, *, starting_words: int = 3) -> list[str]:
    """What the shell is offered when Tab is pressed at the end of `line`."""
    answer = tmp_path / "answer"
    environment = {
        **os.environ,
        "_ARGCOMPLETE": str(starting_words),
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n\"'><=;|&(:",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
        "LAUNCHER_RUNS": str(tmp_path / "runs"),
    }
    command = [sys.executable, "-m", "launcher"]
    subprocess.run(command, env=environment, cwd=REPOSITORY, timeout=60, check=True)
    return [word.rstrip() for word in answer.read_text().split("\n") if word]


def test_tab_offers_commands_recipes_clusters_keys_and_choices(tmp_path: Path) -> None:
    start = "python -m launcher"
    assert tab(f"{start} su", tmp_path) == ["submit"]
    assert tab(f"{start} submit recipe=", tmp_path) == RECIPES
    assert tab(f"{start} submit recipe=ch4_fsdp cluster=b", tmp_path) == ["box"]
    assert tab(f"{start} submit recipe=ch4_fsdp args.st", tmp_path) == ["args.steps=", "args.strategy="]
    assert tab(f"{start} submit recipe=ch4_fsdp args.dtype=float32,fl", tmp_path) == [
        "float32,float32",
        "float32,float64",
    ]
    assert tab(f"{start} show recipe=ch4_fsdp --", tmp_path) == ["--help", "--json", "--origins"]


def test_tab_offers_files_for_paths_and_ids_of_runs(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    line = f"python -m launcher submit recipe=ch4_fsdp args.data={tmp_path}/te"
    assert tab(line, tmp_path) == [f"{tmp_path}/texts/"]
    (tmp_path / "runs/ch4_fsdp-k3f9xq").mkdir(parents=True)
    (tmp_path / "runs/ch4_fsdp-k3f9xq/run.json").write_text("{}")
    assert tab("python -m launcher logs k", tmp_path) == ["k3f9xq"]


def test_tab_is_silent_where_a_file_is_wrong(tmp_path: Path) -> None:
    assert tab("python -m launcher submit recipe=nope args.mod", tmp_path) == []


def test_bash_completes_python_m_launcher() -> None:
    """The whole way, through the function that activate-global-python-argcomplete installs."""
    function = Path(argcomplete.__file__).parent / "bash_completion.d" / "_python-argcomplete"
    script = f"""
source {shlex.quote(str(function))}
COMP_LINE="python -m launcher show recipe=ch4_fs"; COMP_POINT=${{#COMP_LINE}}; COMP_TYPE=9
COMP_WORDS=(python -m launcher show recipe = ch4_fs); COMP_CWORD=6
_python_argcomplete_global python ch4_fs =
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    finished = subprocess.run(
        ["bash", "-c", script],
        cwd=REPOSITORY,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert finished.stdout.split() == ["ch4_fsdp"]
