"""What a measurement should give: the shipped figures, a cluster's own, and files that are of neither form."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from checks import __main__ as command_line
from checks import active, baselines, recorded
from checks.baselines import Baseline, BaselineError
from checks.expectations import Expectations
from checks.measured import Job
from checks.pairs import Blame
from tests.checks.active_nodes import changed, node

GIB = 1 << 30
ENTRY: dict[str, Any] = {
    "what": "all_reduce", "gpu": "H100", "fabric": "node", "nodes": [1, 1], "ranks": 8, "payload": 0,
    "value": 460.0, "least": 0.75, "source": "a test",
}  # fmt: skip
INFINIBAND = Expectations(gpus=2, fabric="infiniband")


def file_with(folder: Path, text: str) -> Path:
    path = folder / "own.json"
    path.write_text(text)
    return path


# --- the file ---------------------------------------------------------------------------------------------


def test_every_shipped_figure_has_a_source_and_a_threshold() -> None:
    shipped = baselines.read(baselines.SHIPPED)
    assert shipped
    for one in shipped:
        assert (0 < one.floor <= one.value, bool(one.source)) == (True, True), one


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    own = [Baseline(**{**ENTRY, "nodes": (1, 1)}), Baseline(**{**ENTRY, "nodes": (2, 64), "source": "ü"})]
    baselines.write(tmp_path / "own.json", own)
    assert baselines.read(tmp_path / "own.json") == own


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no JSON"),
        ("[{", "no JSON"),
        ('{"what": 1}', "a list of entries was expected"),
        ("[3]", "entry 1: "),
        (json.dumps([ENTRY, {**ENTRY, "nodes": 3}]), "entry 2: "),
        (json.dumps([{**ENTRY, "nodes": [2, 1]}]), "make no sense"),
        (json.dumps([{**ENTRY, "value": 0}]), "make no sense"),
        (json.dumps([{**ENTRY, "least": 1.5}]), "make no sense"),
        (json.dumps([{**ENTRY, "source": ""}]), "make no sense"),
        (json.dumps([{**ENTRY, "value": "fast"}]), "entry 1: "),
        (json.dumps([{**ENTRY, "sku": "H100"}]), "entry 1: "),
        (json.dumps([{k: v for k, v in ENTRY.items() if k != "gpu"}]), "entry 1: "),
    ],
)
def test_a_file_of_another_form_is_one_line_that_names_the_entry(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    path = file_with(tmp_path, text)
    status = command_line.main(["--tier=active", f"--baselines={path}"])
    said = capsys.readouterr().err
    assert (status, said.count("\n")) == (64, 1), said
    assert f"{path}: " in said
    assert says in said


def test_bytes_that_are_no_text_and_a_file_that_is_not_there_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    with pytest.raises(BaselineError, match="No such file"):
        baselines.read(path)
    path.write_bytes(b"[\xff\xfe]")
    with pytest.raises(BaselineError, match="no JSON"):
        baselines.read(path)


# --- which figure -----------------------------------------------------------------------------------------


def found(entries: list[Baseline], **changed: Any) -> Baseline | None:
    asked = {
        "gpu": "NVIDIA H100 80GB HBM3",
        "fabric": "node",
        "nodes": 1,
        "ranks": 8,
        "payload": GIB,
        **changed,
    }
    return baselines.find(entries, "all_reduce", **asked)


def entry(**changed: Any) -> Baseline:
    return Baseline(**{**ENTRY, "nodes": (1, 1), **changed})


def test_a_figure_holds_for_its_gpu_fabric_nodes_and_ranks_and_for_nothing_else() -> None:
    one = entry()
    assert found([one]) == one
    for other in ({"gpu": "NVIDIA A100"}, {"fabric": "infiniband"}, {"nodes": 2}, {"ranks": 4}):
        assert found([one], **other) is None, other
    assert baselines.find([one], "copy", gpu="H100", fabric="node", nodes=1, ranks=8) is None


def test_any_fabric_and_any_number_of_ranks_is_said_and_never_assumed() -> None:
    everywhere = entry(fabric="any", ranks=0, nodes=(1, 64))
    assert found([everywhere], fabric="roce", ranks=3, nodes=64) == everywhere
    assert found([everywhere], nodes=65) is None


def test_the_figure_of_the_largest_message_that_is_not_larger_counts() -> None:
    small, large = entry(payload=1 << 20, value=12.5), entry(payload=1 << 28, value=338.0)
    assert found([small, large], payload=1 << 28) == large
    assert found([small, large], payload=(1 << 28) - 1) == small
    assert found([small, large], payload=1) is None


def test_of_two_that_fit_alike_the_clusters_own_is_taken() -> None:
    own, shipped = entry(source="ours"), entry()
    assert found([own, shipped]) == own


# --- a cluster's own --------------------------------------------------------------------------------------


def own_figures(**records: Any) -> dict[tuple[str, int], Baseline]:
    entries = recorded.own_baselines(records, list(records), INFINIBAND)
    return {(one.what, one.payload): one for one in entries}


def test_a_clusters_own_figures_are_medians_for_its_gpus_fabric_nodes_ranks_and_sizes() -> None:
    figures = own_figures(n1=node(), n2=changed(("ranks", 0, "all_reduce 1048576"), 30.0))
    whole = figures["all_reduce", 1 << 20]
    assert (whole.gpu, whole.fabric, whole.nodes, whole.ranks) == (
        "NVIDIA H100 80GB HBM3",
        "infiniband",
        (2, 2),
        2,
    )
    assert (whole.value, whole.least) == (10.0, recorded.LEAST)  # the median: one rank's 30 is an outlier
    assert "median of 4 ranks on 2 nodes" in whole.source
    assert {figures[what, 0].value for what in ("burn", "copy", "to device")} == {700.0, 2500.0, 50.0}
    assert figures["ib_write_bw", 0].value == 391.5


def test_what_was_recorded_judges_the_same_nodes_as_good_and_slower_ones_as_bad() -> None:
    entries = tuple(own_figures(n1=node(), n2=node()).values())
    job = Job(nodes=2, best_burn=700.0, baselines=entries)
    records = {"n1": node(), "n2": changed(("ranks", 1, "all_reduce 268435456"), 150.0)}
    results = active.judged(("n1", "n2"), records, job, INFINIBAND, ["net.all_reduce"])
    assert [results[name][0].verdict.value for name in ("n1", "n2")] == ["pass", "fail"]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("ranks",), []),
        (("ranks", 0, "burn"), None),
        (("ranks", 1, "host"), {"to device": "fast"}),
        (("ranks", 0, "all_reduce 1048576"), -1.0),
        (("rails", "mlx5_0", "sent"), {"problem": "timed out", "detail": "no answer"}),
    ],
)
def test_figures_with_a_gap_are_not_recorded(place: tuple[Any, ...], value: Any) -> None:
    with pytest.raises(recorded.NotWhole):
        own_figures(n1=node(), n2=changed(place, value))


def test_a_node_that_never_reported_is_named() -> None:
    with pytest.raises(recorded.NotWhole, match=r"^n2: timed out: this node never reported"):
        own_figures(n1=node(), n2=None)


def test_one_rank_alone_records_no_collective() -> None:
    single = changed(("ranks",), node()["ranks"][:1])
    assert {what for what, _ in own_figures(n1=single)} == {
        "burn",
        "copy",
        "to device",
        "to host",
        "ib_write_bw",
    }


# --- the command ------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> active.Found:
    """What the measurement came to; it is not made again for each of these."""
    one = active.Found({"n1": node()}, Job(), [], 12.0)
    monkeypatch.setattr(active, "measure_here", lambda *_, **__: (("n1",), one))
    return one


def test_new_figures_replace_those_of_the_same_shape_and_leave_others(
    tmp_path: Path, measured: active.Found, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.json"
    assert command_line.main(["baseline", str(path), "--fabric=infiniband"]) == 0
    first = baselines.read(path)
    assert f"{path}: {len(first)} figures of 1 node in 12.0 s" in capsys.readouterr().out
    kept = replace(first[0], gpu="B200")
    stale = replace(first[0], value=1.0)
    baselines.write(path, [stale, kept])
    assert command_line.main(["baseline", str(path), "--fabric=infiniband"]) == 0
    assert [(one.gpu, one.value) for one in baselines.read(path)].count(("B200", kept.value)) == 1
    assert stale not in baselines.read(path)
    assert len(baselines.read(path)) == len(first) + 1


def test_nodes_that_are_not_good_are_no_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for job in (
        Job(blames=(Blame("node", ("n1",), "slow"),)),
        Job(rail_blames=(Blame("rail", ("n1",), "slow", ("mlx5_0",)),)),
    ):
        found = active.Found({"n1": node()}, job, [], 1.0)
        monkeypatch.setattr(active, "measure_here", lambda *_, found=found, **__: (("n1",), found))
        assert command_line.main(["baseline", str(tmp_path / "own.json")]) == 64
        assert "the nodes are not good: " in capsys.readouterr().err
    assert not (tmp_path / "own.json").exists()


def test_a_file_that_cannot_be_written_is_one_line(
    measured: active.Found, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(["baseline", "/proc/own.json"]) == 64
    assert capsys.readouterr().err.count("\n") == 1
