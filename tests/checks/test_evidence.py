"""Sources: whatever the machine does, there is an answer within the deadline, and a record of it answers the same."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from checks.collect import collect_node
from checks.evidence import Live, Recorded, Source
from checks.expectations import Expectations
from checks.reading import Problem, Unread, integer, line, parsed, shortened
from checks.worker import masked


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    with Live(str(tmp_path)) as live:
        yield live


def problem_of(answer: object) -> Problem:
    assert isinstance(answer, Unread), answer
    return answer.problem


def test_files_are_read_under_the_root(source: Source, tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "version").write_text("Linux\n")
    assert source.read("/proc/version") == "Linux\n"
    assert source.list("/proc") == ("version",)


def test_what_is_missing_says_so(source: Source) -> None:
    assert problem_of(source.read("/none")) is Problem.MISSING
    assert problem_of(source.list("/none")) is Problem.MISSING
    assert problem_of(source.link("/none")) is Problem.MISSING
    assert problem_of(source.run(["no-such-command"])) is Problem.MISSING


def test_a_folder_in_place_of_a_file_is_an_error_and_a_file_in_place_of_a_folder_is_missing(
    source: Source, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    assert problem_of(source.read("/folder")) is Problem.ERROR
    assert problem_of(source.list("/file")) is Problem.MISSING


def test_bytes_that_are_not_text_survive(source: Source, tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(b"a\xff\xfe\n")
    text = source.read("/odd")
    assert isinstance(text, str)
    assert text.encode(errors="surrogateescape") == b"a\xff\xfe\n"
    assert shortened(text) == "a"


def test_a_fifo_costs_its_deadline_and_the_next_question_is_answered(source: Source, tmp_path: Path) -> None:
    """A FIFO nobody writes to blocks its reader as a dead mount does."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("here")
    began = time.monotonic()
    assert problem_of(source.read("/fifo")) is Problem.TIMED_OUT
    # Twice a second at most, where its reader had no CPU. A FIFO that is waited for lasts for ever.
    assert 0.9 < time.monotonic() - began < 15
    assert source.read("/file") == "here"


def test_a_command_that_hangs_costs_its_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checks.evidence.RUN_SECONDS", 0.5)
    with Live(str(tmp_path)) as source:
        began = time.monotonic()
        assert problem_of(source.run(["sleep", "300"])) is Problem.TIMED_OUT
        assert time.monotonic() - began < 15


def test_a_node_full_of_hanging_files_costs_the_budget_and_no_more(tmp_path: Path) -> None:
    for name in ("limits", "mounts"):
        (tmp_path / "proc" / "self").mkdir(parents=True, exist_ok=True)
        os.mkfifo(tmp_path / "proc" / "self" / name)
    for name in ("cpuinfo", "meminfo", "modules"):
        os.mkfifo(tmp_path / "proc" / name)
    folder = tmp_path / "sys" / "class" / "infiniband" / "mlx5_0" / "ports" / "1"
    folder.mkdir(parents=True)
    for name in ("state", "phys_state", "rate", "link_layer"):
        os.mkfifo(folder / name)
    began = time.monotonic()
    with Live(str(tmp_path), budget=3.0) as source:
        node = collect_node(source, "n1", Expectations())
        silent = [
            record["detail"] for record in source.records.values() if record.get("problem") == "timed out"
        ]
    assert problem_of(node.host.limits) is Problem.TIMED_OUT
    # Each is waited for a second; when the budget is spent, the others are not asked any more.
    unasked = [detail for detail in silent if detail.endswith(": no time was left")]
    assert unasked, silent
    assert all("no answer within" in detail for detail in silent if detail not in unasked), silent
    assert time.monotonic() - began < 30, "the budget is 3 s"


def test_what_hangs_under_sys_costs_nothing_of_proc(tmp_path: Path) -> None:
    folder = tmp_path / "sys" / "class" / "net" / "eth0"
    folder.mkdir(parents=True)
    for name in ("mtu", "operstate", "speed", "type", "carrier_changes"):
        os.mkfifo(folder / name)
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "limits").write_text(
        "Limit\nMax open files            1024      4096      files\n"
    )
    with Live(str(tmp_path), budget=3.0) as source:
        node = collect_node(source, "n1", Expectations())
    assert node.host.limits == {"Max open files": "1024"}
    assert not isinstance(node.environment, Unread)
    assert not isinstance(node.interfaces, Unread)
    assert problem_of(node.interfaces[0].mtu) is Problem.TIMED_OUT


def test_a_process_that_hangs_in_a_read_exits_at_once(tmp_path: Path) -> None:
    """A thread in the same place would keep the interpreter from exiting."""
    os.mkfifo(tmp_path / "fifo")
    code = "import sys; from checks.evidence import Live; print(Live(sys.argv[1]).read('/fifo'))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith("timed out")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can drop to another user")
def test_what_another_user_may_not_read_is_not_permitted(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "secret").touch(mode=0o600)
    (tmp_path / "closed").mkdir(mode=0o700)
    code = (
        # In this process: an ordinary user may not even see the interpreter that would be the worker.
        "import os, sys\nfrom checks.worker import answered\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "for op, name in (('read', 'secret'), ('list', 'closed'), ('written', 'closed')):\n"
        "    print(answered(op, [os.path.join(sys.argv[1], name)])['problem'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["not permitted"] * 3, done.stderr


def test_a_command_that_is_refused_is_not_permitted_and_one_that_fails_is_an_error(source: Source) -> None:
    refused = source.run(
        ["sh", "-c", "echo 'dmesg: read kernel buffer failed: Operation not permitted' >&2; exit 1"]
    )
    assert problem_of(refused) is Problem.NOT_PERMITTED
    failed = source.run(["sh", "-c", "echo broken >&2; exit 3"])
    assert str(failed) == "error: sh -c echo broken >&2; exit 3: status 3: broken"


def test_of_a_long_answer_only_what_is_looked_at_is_recorded(source: Source) -> None:
    assert source.run(["printf", "keep 1\\ndrop\\nkeep 2\\n"], keep="keep") == "keep 1\nkeep 2\n"
    assert "drop" not in str([record["value"] for record in source.records.values()])


def test_a_record_answers_as_the_machine_did(source: Source, tmp_path: Path) -> None:
    (tmp_path / "count").write_text("1\n")
    assert source.read("/count") == "1\n"
    (tmp_path / "count").write_text("2\n")
    assert source.read("/count", sample=1) == "2\n"
    gone = source.read("/none")
    recorded = Recorded(source.records)
    assert (recorded.read("/count"), recorded.read("/count", sample=1)) == ("1\n", "2\n")
    assert recorded.read("/none") == gone
    assert problem_of(recorded.read("/other")) is Problem.NOT_RECORDED


@pytest.mark.parametrize("record", [{}, {"problem": "bad luck"}, {"detail": "x"}])
def test_a_record_of_no_known_form_is_an_error(record: dict[str, str]) -> None:
    assert problem_of(Recorded({"read /x": record}).read("/x")) is Problem.ERROR


def test_a_folder_is_written_synced_and_left_as_it_was(source: Source, tmp_path: Path) -> None:
    took = source.ask("written", "/")
    assert isinstance(took, float)
    assert list(tmp_path.iterdir()) == []


def test_secrets_are_masked() -> None:
    assert masked("WANDB_API_KEY", "abc") == masked("HF_TOKEN", "abc") == masked("db_password", "x") == "***"
    assert masked("NCCL_DEBUG", "INFO") == "INFO"
    assert masked("NCCL_PROXY", "http://me:pass@proxy:80") == "http://me:***@proxy:80"


@pytest.mark.parametrize(
    "text", ["N/A (no PMA)", "[N/A]", "N/A", "[Not Supported]", "Requested functionality has been deprecated"]
)
def test_what_drivers_print_instead_of_a_value_is_no_value(text: str) -> None:
    assert problem_of(integer(text)) is Problem.UNSUPPORTED
    assert problem_of(line(text + "\n")) is Problem.UNSUPPORTED


def test_numbers_and_what_is_none() -> None:
    assert integer("12\n") == 12
    assert integer("0x15") == 21
    assert problem_of(integer("")) is Problem.ERROR
    assert problem_of(integer("twelve")) is Problem.ERROR
    assert problem_of(line("")) is Problem.ERROR
    assert problem_of(parsed("x", lambda text: {"y": 1}[text])) is Problem.ERROR
