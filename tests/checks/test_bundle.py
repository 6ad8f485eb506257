"""A bundle gives the same verdicts anywhere, and one that is broken says so in one line."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest

from checks import bundle, passive
from checks.__main__ import main
from checks.bundle import BundleError
from checks.evidence import key_of
from checks.expectations import Expectations
from tests.checks.nodes import healthy, value

EXPECTED = Expectations(gpus=2, fabric="infiniband", folders=("/tmp",))


@pytest.fixture(params=["evidence.json.gz", "evidence.json"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    file = tmp_path / str(request.param)
    bundle.write(bundle.make("n1", EXPECTED, healthy()), file)
    return file


def test_what_was_written_is_read(path: Path) -> None:
    read = bundle.read(path)
    assert (read.node, read.expected, read.records) == ("n1", EXPECTED, healthy())


def test_this_machine_and_its_bundle_are_judged_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "here.json.gz"
    looked = passive.look("here", Expectations(gpus=0, fabric="tcp"))
    bundle.write(bundle.make("here", looked.expected, looked.records), file)
    again = passive.look_at(bundle.read(file), looked.expected)
    assert again.results == looked.results
    assert again.node.versions == looked.node.versions


def test_collect_and_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "here.json.gz"
    assert main(["collect", str(file), "--gpus=0", "--fabric=tcp"]) == 0
    assert "answers of" in capsys.readouterr().out
    assert main(["judge", str(file), "--check=host.nofile"]) in (0, 1, 2)
    assert "host.nofile" in capsys.readouterr().out


def test_undecodable_bytes_survive_the_file(tmp_path: Path) -> None:
    file = tmp_path / "odd.json.gz"
    bundle.write(bundle.make("n1", EXPECTED, {"read /x": value("a\udcff")}), file)
    assert bundle.read(file).records["read /x"] == value("a\udcff")


def test_secrets_do_not_reach_the_file(tmp_path: Path) -> None:
    file = tmp_path / "secret.json"
    records = {key_of("environment", ["NCCL_"]): value({"NCCL_API_KEY": "abc123", "NCCL_DEBUG": "INFO"})}
    bundle.write(bundle.make("n1", EXPECTED, records), file)
    assert "abc123" not in file.read_text()
    assert "INFO" in file.read_text()


def broken(file: Path) -> str:
    with pytest.raises(BundleError) as error:
        bundle.read(file)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("left", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_a_bundle_that_was_cut_says_so(path: Path, left: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * left)])
    broken(path)


def test_a_bundle_that_was_edited_says_so(tmp_path: Path) -> None:
    file = tmp_path / "edited.json"
    bundle.write(bundle.make("n1", EXPECTED, healthy()), file)
    file.write_text(file.read_text().replace("4: ACTIVE", "1: DOWN"))
    assert "checksum" in broken(file)


def test_a_damaged_archive_says_so(tmp_path: Path) -> None:
    file = tmp_path / "damaged.json.gz"
    data = bytearray(gzip.compress(b"x" * 1000))
    data[12:20] = b"\x00" * 8
    file.write_bytes(bytes(data))
    broken(file)


def test_a_bundle_of_another_version_says_which(tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    bundle.write(bundle.make("n1", EXPECTED, {}), file)
    file.write_text(file.read_text().replace('"version": 1', '"version": 9'))
    assert "version 9; this program reads version 1" in broken(file)


@pytest.mark.parametrize("text", ["{}", "[]", '{"format": "other"}', "null", "{", "not json", "\x00"])
def test_what_is_no_bundle_says_so(tmp_path: Path, text: str) -> None:
    file = tmp_path / "other"
    file.write_text(text)
    assert "not a bundle" in broken(file)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"node": "n1", "taken": 1, "expected": {}, "records": []},
        {"node": "n1", "taken": 1, "expected": {}, "records": {"read /x": 3}},
        {"node": "n1", "taken": 1, "expected": {"colour": "red"}, "records": {}},
        {"node": "n1", "taken": "soon", "expected": {}, "records": {}},
        {"node": "n1", "taken": 1, "expected": 7, "records": {}},
        {"node": "n1", "taken": 1, "expected": {"gpus": "many"}, "records": {}},
        {"node": "n1", "taken": 1, "expected": {"fabric": "string"}, "records": {}},
    ],
)
def test_a_malformed_body_is_one_line(tmp_path: Path, body: object, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "malformed.json"
    bundle.write(bundle.make("n1", EXPECTED, {}), file)
    text = file.read_text()
    start = text.index('"body":') + len('"body":')
    changed = text[:start] + "\n" + json.dumps(body) + "}\n"
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    old = json.loads(text)["sha256"]
    file.write_text(changed.replace(old, digest))
    broken(file)


def test_a_missing_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["judge", str(tmp_path / "none.json.gz")]) == 64
    assert (
        capsys.readouterr().err == f"python -m checks: {tmp_path}/none.json.gz: No such file or directory\n"
    )


def test_a_file_of_no_known_kind_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "poem.txt").write_text("Roses are red\n")
    assert main(["judge", str(tmp_path / "poem.txt")]) == 64
    assert "not a capture that is known" in capsys.readouterr().err
    assert main(["judge", str(tmp_path)]) == 64
    assert "in this folder" in capsys.readouterr().err
