"""The harness behind the tests of documents: it sees a broken command, a missing reason, a prompt."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.docs.blocks import Block, blocks, commands, problems
from tests.docs.sandbox import Failure, Sandbox, make_sandbox


def markdown(*lines: str, before: str = "") -> str:
    return "\n".join(["# Title", "", before, "```bash", *lines, "```", ""])


def only_block(text: str) -> Block:
    (block,) = blocks(text, "README.md")
    return block


def problem(text: str) -> str:
    """The one problem of a document; empty for none."""
    found = problems(text, "README.md")
    assert len(found) <= 1
    return found[0] if found else ""


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    """A shell in an empty folder; the real copy has a test of its own."""
    return Sandbox(tree=tmp_path, environment={"PATH": "/usr/bin:/bin"}, scratch=tmp_path)


def run(sandbox: Sandbox, *lines: str, seconds: float = 20) -> Failure | None:
    return sandbox.run(commands(only_block(markdown(*lines))), seconds)


# --- running ----------------------------------------------------------------------------------------------


def test_commands_that_work_are_no_failure(sandbox: Sandbox) -> None:
    assert (
        run(sandbox, "mkdir inner", "cd inner && HERE=$(pwd)", 'test "$(basename "$HERE")" = inner') is None
    )


@pytest.mark.parametrize("line", ["false", "false && true", "false | true", "no-such-command", "(exit 3)"])
def test_a_command_that_fails_is_named_with_its_last_output(sandbox: Sandbox, line: str) -> None:
    failure = run(sandbox, "echo before", line, "touch after")
    assert failure is not None
    assert (failure.command.text, failure.command.line) == (line, 6)
    assert "before" in failure.tail
    assert not (sandbox.tree / "after").exists(), "nothing runs after a failure"


def test_a_command_that_never_ends_is_ended_and_named(sandbox: Sandbox) -> None:
    failure = run(sandbox, "true", "sleep 987", seconds=2)
    assert failure is not None
    assert failure.command.text == "sleep 987"
    assert "still running" in failure.how


def test_what_a_command_leaves_running_does_not_hold_the_test(sandbox: Sandbox) -> None:
    assert run(sandbox, "setsid sleep 5 &", "echo done") is None


def test_several_lines_of_one_command_stay_together() -> None:
    text = markdown(
        "# a comment",
        "echo one \\",
        "  two",
        "",
        "cat >file <<'END'",
        "# text",
        "END",
        "for i in 1; do",
        "  :",
        "done",
    )
    found = [(command.line, command.text.splitlines()[0]) for command in commands(only_block(text))]
    assert found == [(6, "echo one \\"), (9, "cat >file <<'END'"), (12, "for i in 1; do")]


def test_the_copy_holds_new_files_nothing_ignored_and_leaves_the_tree_alone(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / ".venv" / "bin").mkdir(parents=True)
    for name, text in (
        ("tracked", "1"),
        ("sub/new", "2"),
        ("ignored", "3"),
        (".gitignore", "ignored\n/.venv/\n"),
    ):
        (tree / name).write_text(text)
    subprocess.check_call(["git", "init", "--quiet", str(tree)])
    subprocess.check_call(["git", "-C", str(tree), "add", "tracked"])
    sandbox = make_sandbox(tree, tmp_path / "copy", tmp_path / "home")
    assert " " in str(sandbox.tree)
    assert sorted(path.name for path in sandbox.tree.iterdir()) == [
        ".git",
        ".gitignore",
        ".venv",
        "sub",
        "tracked",
    ]
    assert run(sandbox, "echo changed >tracked", 'test -z "$(git status --porcelain sub)"') is None
    assert (tree / "tracked").read_text() == "1"


# --- what a document may look like ------------------------------------------------------------------------


def test_a_plain_block_is_fine() -> None:
    assert problem(markdown("make setup", "python -m launcher recipes")) == ""


def test_a_block_inside_a_list_loses_its_indent() -> None:
    text = "1. First:\n\n   ```bash\n   cat <<END\n   x\n   END\n   ```\n"
    assert problem(text) == ""
    assert only_block(text).text == "cat <<END\nx\nEND"


def test_a_marked_block_is_not_run_and_keeps_its_reason() -> None:
    text = markdown("sbatch jobs/x.sbatch", before="<!-- not run here: needs a cluster -->")
    assert problem(text) == ""
    assert only_block(text).marked
    assert only_block(text).reason == "needs a cluster"


def test_a_marker_without_reason_is_a_problem() -> None:
    assert "wants a reason" in problem(markdown("sbatch x", before="<!-- not run here: -->"))


def test_a_block_that_could_run_must_not_be_marked() -> None:
    text = markdown(
        "# sbatch in a comment", "python -m launcher recipes", before="<!-- not run here: slow -->"
    )
    assert "nothing in it needs" in problem(text)


@pytest.mark.parametrize("line", ["make test", "make clean && make setup", "rm -rf .venv"])
def test_a_block_that_must_not_run_inside_a_test_must_be_marked(line: str) -> None:
    assert "mark it" in problem(markdown(line))
    assert problem(markdown(line, before="<!-- not run here: it runs this test -->")) == ""


def test_a_marker_counts_only_right_before_its_block() -> None:
    block = only_block("<!-- not run here: needs a cluster -->\nSome words.\n" + markdown("sbatch x"))
    assert not block.marked


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (markdown("$ make setup"), "a prompt"),
        ("```console\nmake setup\n```", "commands stand in ```bash"),
        ("```bash\nmake setup\n", "never closed"),
        ("<!-- not run here: old -->\n```text\nout\n```", "not ```bash"),
        (markdown("cat <<END", "never ended"), "here-document"),
        (markdown("if true; then"), "unexpected end of file"),
    ],
)
def test_what_a_reader_would_stumble_over_is_found(text: str, said: str) -> None:
    assert said in problem(text)
