"""Checkpoints by command: what is there, what is wrong with it, what may go, and a copy for transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from launcher.__main__ import main
from recipes.ch1.baseline import Baseline
from recipes.lib import checkpoint, export, manifest
from recipes.lib.distributed import World
from recipes.lib.model import Transformer, materialize
from recipes.lib.pretrained import load_pretrained, size_of, to_hugging_face
from recipes.lib.training import train
from tests.launcher.test_runs import spec
from tests.recipes.test_training import plan_in

ONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run directory with checkpoints of steps 2, 4 and 6, and the weights of the last."""
    folder = tmp_path_factory.mktemp("export")
    plan = plan_in(folder, steps=6, save_every=2)
    technique = Baseline.build(plan)
    train(plan, technique)
    weights = {name: tensor.detach().clone() for name, tensor in technique.model.state_dict().items()}
    (plan.run_directory / "tokenizer").mkdir()
    (plan.run_directory / "tokenizer" / "tokenizer.json").write_text("{}")
    return plan.run_directory, weights


@pytest.fixture
def run_directory(
    trained: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A copy of it, as a run that the launcher knows."""
    copy = tmp_path / "runs" / "ch1_baseline-abcdef"
    shutil.copytree(trained[0], copy)
    (copy / "run.json").write_text('{"id": "abcdef", "recipe": "ch1_baseline", "created": 1.0}')
    (copy / "spec.json").write_text(spec().to_json())
    monkeypatch.setenv("LAUNCHER_RUNS", str(copy.parent))
    return copy


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    """What `checkpoints --json` prints."""
    capsys.readouterr()
    main(["checkpoints", "abcdef", "--json", *words])
    return list(json.loads(capsys.readouterr().out))


def flip(folder: Path) -> None:
    """Change one bit of the tensors."""
    file = folder / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("largest", [export.FILE_BYTES, 30_000])
def test_an_export_loads_back_equal(
    largest: int,
    trained: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export, "FILE_BYTES", largest)
    source, weights = trained
    target = tmp_path / "exported"
    assert export.main([str(manifest.folder_of(source, 6)), str(target)]) == 0
    files = sorted(file.name for file in target.glob("*.safetensors"))
    assert (len(files) > 1) == (largest == 30_000)
    config = json.loads((target / "config.json").read_text())
    with torch.device("meta"):
        model = Transformer(size_of(config))
    materialize(model, 5, torch.device("cpu"))
    load_pretrained(model, target)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert (target / "tokenizer.json").read_text() == "{}"
    if len(files) > 1:
        index = json.loads((target / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == {to_hugging_face(name) for name in weights}
        for name, file in index["weight_map"].items():
            with safe_open(target / file, "pt") as opened:
                assert name in opened.keys()  # noqa: SIM118 - it is no mapping


def test_an_export_may_round(trained: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    source, weights = trained
    export.export(manifest.folder_of(source, 6), tmp_path / "rounded", torch.bfloat16)
    with safe_open(tmp_path / "rounded" / "model.safetensors", "pt") as opened:
        name = "norm.weight"
        assert torch.equal(opened.get_tensor(to_hugging_face(name)), weights[name].bfloat16())
    assert json.loads((tmp_path / "rounded" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_an_export_overwrites_nothing_and_reads_no_corrupt_checkpoint(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = manifest.folder_of(run_directory, 6), tmp_path / "there"
    target.mkdir()
    (target / "mine").write_text("x")
    assert export.main([str(source), str(target)]) == 2
    assert capsys.readouterr().err == f"error: {target} exists and is not empty: name a new folder\n"
    flip(source)
    assert export.main([str(source), str(tmp_path / "new")]) == 2
    assert "__0_0.distcp is corrupt" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_command_exports_the_newest_sound_one(run_directory: Path, tmp_path: Path) -> None:
    (manifest.folder_of(run_directory, 6) / manifest.MANIFEST_FILE).unlink()
    assert main(["checkpoints", "abcdef", "--export", str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf" / "model.safetensors").exists()


def test_the_list_says_what_a_resume_would_say(
    run_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(manifest.folder_of(run_directory, 6))
    (manifest.folder_of(run_directory, 4) / manifest.MANIFEST_FILE).unlink()
    quick = listed(capsys)
    assert [(one["step"], one["sound"], one["verified"]) for one in quick] == [
        (6, True, False),
        (4, False, False),
        (2, True, False),
    ]
    assert (quick[0]["world_size"], quick[0]["recipe"]) == (1, "run")
    assert quick[0]["bytes"] > 0
    thorough = listed(capsys, "--verify")
    assert [one["sound"] for one in thorough] == [False, False, True]
    assert "corrupt" in thorough[0]["problem"]
    assert main(["checkpoints", "abcdef", "--verify"]) == 1
    shown = capsys.readouterr().out
    assert "__0_0.distcp is corrupt" in shown
    assert "manifest.json is missing" in shown
    assert checkpoint.newest(run_directory, ONE)[0] == manifest.folder_of(run_directory, 2)


def test_pruning_deletes_only_when_told_and_only_what_is_sound(
    run_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (manifest.folder_of(run_directory, 4) / manifest.MANIFEST_FILE).unlink()
    assert main(["checkpoints", "abcdef", "--prune", "--keep", "1"]) == 0
    assert "would delete" in capsys.readouterr().out
    assert len(manifest.folders(run_directory)) == 3
    assert main(["checkpoints", "abcdef", "--prune", "--keep", "1", "--yes"]) == 0
    left = [manifest.step_of(folder) for folder in manifest.folders(run_directory)]
    assert left == [6, 4]
    assert "step-00000004 is left alone: manifest.json is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prune"], "--prune wants --keep N"),
        (["--prune", "--keep", "0"], "--keep=0: wants 1 or more"),
        (["--keep", "2"], "--keep goes with --prune"),
        (["--yes"], "--yes goes with --prune"),
        (["--step", "2"], "--step goes with --export"),
        (["--export", "x", "--step", "3"], "has no such checkpoint to export (it has: 6, 4, 2)"),
    ],
)
def test_options_that_make_no_sense_delete_nothing(
    words: list[str], message: str, run_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoints", "abcdef", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert len(manifest.folders(run_directory)) == 3
