"""`python -m checks`: the table, the statuses, and a line for each mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from checks import bundle
from checks.__main__ import main
from checks.evidence import Record, key_of
from checks.expectations import Expectations
from tests.checks.nodes import healthy, problem, value, with_answers

HEALTHY = ("--gpus=2", "--fabric=infiniband")


@pytest.fixture(autouse=True)
def _outside_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)


def evidence(folder: Path, changes: dict[str, Record] | None = None) -> str:
    path = folder / "n1.json"
    bundle.write(bundle.make("n1", Expectations(), with_answers(healthy(), changes or {})), path)
    return f"--evidence={folder}/{{node}}.json"


def test_the_table_says_check_verdict_read_expected_and_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    pending = {key_of("nvml", ["nvmlDeviceGetRemappedRows", 1]): value([0, 0, 1, 0])}
    assert main([evidence(tmp_path, pending), "--node=n1", *HEALTHY]) == 1
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["check", "verdict", "read", "expected", "what", "to", "do"]
    (row,) = [row for row in rows if row.startswith("gpu.remap")]
    assert row.split()[1] == "fail"
    assert "GPU 1: a remap is pending" in row
    assert "reset the GPU" in row
    assert rows[-2].startswith("fail: ")
    assert "s a GPU)" in rows[-1] or rows[-1] == "it took no time"


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, 0),
        ({"run lspci -vvv": problem("not permitted")}, 0),
        ({"list /dev/infiniband": value(["uverbs0"])}, 1),
        ({"clock": value({"state": 5, "status": 0})}, 2),
        ({"run dmesg": problem("timed out")}, 3),
    ],
)
def test_the_status_says_the_verdict(tmp_path: Path, changes: dict[str, Record], status: int) -> None:
    assert main([evidence(tmp_path, changes), "--node=n1", *HEALTHY]) == status


def test_what_only_root_may_read_can_be_demanded(tmp_path: Path) -> None:
    denied = {"run lspci -vvv": problem("not permitted")}
    assert main([evidence(tmp_path, denied), "--node=n1", *HEALTHY, "--demand-permission"]) == 3


def test_a_profile_leaves_out_what_its_machine_has_no_evidence_for(tmp_path: Path) -> None:
    denied = {"run dmesg": problem("missing")}
    words = [evidence(tmp_path, denied), "--node=n1", *HEALTHY]
    assert main(words) == 3
    without = [
        f"--without={check}" for check in ("gpu.xid", "nvlink.sxid", "gdr.log", "pcie.bandwidth", "rdma.log")
    ]
    assert main([*words, *without]) == 0


def test_bundles_of_many_nodes_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for node in ("n1", "n2", "n3", "n4"):
        driver = {
            key_of("nvml", ["nvmlSystemGetDriverVersion"]): value("570.10" if node == "n4" else "590.48.01")
        }
        files.append(str(tmp_path / f"{node}.json.gz"))
        bundle.write(bundle.make(node, Expectations(gpus=2), {**healthy(), **driver}), Path(files[-1]))
    assert main(["judge", *files, "--fabric=infiniband"]) == 1
    out = capsys.readouterr().out
    assert "same.driver" in out
    assert out.endswith("fail: 4 nodes (n[1-4])\nleave out: sbatch --exclude=n4\n")
    assert main(["judge", files[0], files[0]]) == 64
    assert "a second bundle of node n1" in capsys.readouterr().err


def test_json_is_one_line_for_a_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([evidence(tmp_path), "--node=n1", "--json", *HEALTHY, "gpu.ecc"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    said = json.loads(line)
    assert said["node"] == "n1"
    assert [one["check"] for one in said["checks"]] == ["gpu.ecc"]
    assert said["traits"]["driver"] == "590.48.01"


def test_subjects_and_checks_can_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([evidence(tmp_path), "--node=n1", *HEALTHY, "clock", "gpu.ecc"]) == 0
    names = [row.split()[0] for row in capsys.readouterr().out.splitlines()[1:-2]]
    assert names == ["gpu.ecc", "clock.source", "clock.sync"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["gpu.eec"], "no check 'gpu.eec' in tier passive: did you mean gpu.ecc?"),
        (["--without=moon"], "no check 'moon'"),
        (["list", "rdmaa"], "did you mean rdma?"),
    ],
)
def test_an_unknown_check_is_one_line(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


@pytest.mark.parametrize(
    "argv",
    [["--tier=loud"], ["--fabric=string"], ["--gpus=-1"], ["--gpus=x"], ["--master=here"], ["--master=h:0"],
     ["judge"], ["collect", "--gpus=x"], ["--none"], ["--budget=-1"], ["--budget=0"], ["--budget=nan"],
     ["--deadline=inf"], ["--tier=active", "--active-budget=x"], ["collect", "--deadline=-3"]],
)  # fmt: skip
def test_wrong_usage_is_64(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 64
    assert capsys.readouterr().err


def test_the_list_says_what_is_read_and_who_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "gpu.recovery"]) == 0
    out = capsys.readouterr().out
    assert "nvml_field * 230 1" in out
    assert "NVML_FI_DEV_GET_GPU_RECOVERY_ACTION" in out


def test_a_folder_of_the_job_is_written_and_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    assert main(["--gpus=0", "--fabric=tcp", "--node=n1", f"--writable={shared}", "--json", "fs.write"]) == 0
    assert (shared / "node-n1").read_text() == "n1"
    assert (
        main(["--gpus=0", "--fabric=tcp", "--node=n1", f"--writable={tmp_path}/none", "--json", "fs.write"])
        == 1
    )
    assert '"check": "run_dir", "verdict": "fail"' in capsys.readouterr().out


def test_this_machine_is_checked_within_five_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpus=0", "--fabric=tcp"]) in (0, 1, 2, 3)
    *_, summary, costs = capsys.readouterr().out.splitlines()
    assert float(summary.rpartition(" in ")[2].split()[0]) < 5.0
    assert costs.startswith("it took ")


def test_a_check_in_place_of_a_file_is_told_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evidence(tmp_path)
    assert main(["judge", str(tmp_path / "n1.json"), "gpu.eec"]) == 64
    assert "gpu.eec: no such file; one check alone: --check=gpu.eec" in capsys.readouterr().err


def test_a_root_that_is_not_there_is_no_broken_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root=/nowhere/at/all"]) == 64
    assert capsys.readouterr().err == "python -m checks: --root=/nowhere/at/all: no such folder\n"


def test_a_reader_that_leaves_early_ends_it_without_a_traceback() -> None:
    """`python -m checks list | head -1`: more than a pipe holds is written, and nobody reads it."""
    writer = subprocess.Popen(
        [sys.executable, "-m", "checks", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    writer.stdout.close()
    said = writer.stderr.read() if writer.stderr else ""
    assert (writer.wait(timeout=60), said) == (141, "")
