"""Composition: which layer wins, what becomes absolute, and the one line that answers each mistake."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from launcher.spec import Container, JobSpec

if TYPE_CHECKING:
    from tests.launcher.conftest import SampleCheckout


def test_defaults_come_from_the_dataclass_the_recipe_and_the_profile(checkout: SampleCheckout) -> None:
    spec = checkout.compose("recipe=ch4_fsdp", "cluster=slurm")
    assert spec.args["batch_size"] == 8, "the dataclass"
    assert (spec.args["steps"], spec.args["lr"]) == (100, 1e-4), "the recipe's file"
    assert (spec.nodes, spec.time_minutes) == (2, 30), "the recipe's job"
    assert (spec.gpus_per_node, spec.tasks_per_node, spec.executor) == (8, 8, "slurm"), "the profile"
    assert spec.entrypoint == "recipes.ch4.fsdp"


def test_later_layers_win(checkout: SampleCheckout) -> None:
    recipe = "recipe=ch4_fsdp"
    assert checkout.compose(recipe, "cluster=slurm").time_minutes == 30
    checkout.write("env/clusters/mine.yaml", "inherits: slurm\ntime: 2h\nenv: {A: profile, B: profile}\n")
    assert checkout.compose(recipe, "cluster=mine").time_minutes == 120
    typed = checkout.compose(recipe, "cluster=mine", "time=3h", "env.B=typed", "args.lr=0.5")
    assert typed.time_minutes == 180
    assert (typed.environment["A"], typed.environment["B"]) == ("profile", "typed")
    assert typed.args["lr"] == 0.5


def test_what_a_person_types_takes_a_setting_of_the_profile_away(checkout: SampleCheckout) -> None:
    checkout.write("env/clusters/mine.yaml", "inherits: slurm\npartition: gpu\naccount: team\n")
    spec = checkout.compose("recipe=ch4_fsdp", "cluster=mine", "partition=", "account=null")
    assert (spec.partition, spec.account) == (None, None)


def test_variables_are_the_fabric_s_then_the_profile_s_then_the_typed_ones(checkout: SampleCheckout) -> None:
    checkout.write("env/fabrics/own.yaml", "env: {A: fabric, B: fabric, C: fabric}\n")
    checkout.write("env/clusters/mine.yaml", "inherits: slurm\nfabric: own\nenv: {B: profile, C: profile}\n")
    environment = checkout.compose("recipe=ch4_fsdp", "cluster=mine", "env.C=typed").environment
    assert (environment["A"], environment["B"], environment["C"]) == ("fabric", "profile", "typed")


def test_a_value_of_the_shell_arrives_unchanged_through_the_spec(checkout: SampleCheckout) -> None:
    value = "/a b/ü [x]=(y)"
    spec = checkout.compose("recipe=ch4_fsdp", f"args.data={value}")
    assert JobSpec.from_json(spec.to_json()).args["data"] == value
    assert f"data={value}" in spec.recipe_argv()


def test_every_key_of_a_job_can_be_typed(checkout: SampleCheckout) -> None:
    words = shlex.split(
        "recipe=ch4_fsdp cluster=slurm nodes=3 tasks_per_node=4 gpus_per_node=4 cpus_per_task=6 "
        "time=1-02:00:00 memory=64G partition=a,b account=team qos=high exclude=n[1,3],n7 "
        "sbatch.exclusive= sbatch.gres=x:1,y:2 "
        "launch=torchrun preflight=off container.kind=pyxis container.image=team/image:1 "
        "container.mounts=/a:/a,/b:/b container.python=/usr/bin/python3 activate='module load cuda' "
        "python=/shared/python fabric=tcp env.HCA=mlx5_0,mlx5_1 run_root=/shared/runs args.schedules=a,b"
    )
    spec = checkout.compose(*words)
    assert (spec.nodes, spec.tasks_per_node, spec.gpus_per_node, spec.cpus_per_task) == (3, 4, 4, 6)
    assert (spec.time_minutes, spec.memory) == (26 * 60, "64G")
    assert (spec.partition, spec.account, spec.qos) == ("a,b", "team", "high")
    assert spec.exclude == ("n[1,3]", "n7")
    assert spec.sbatch == {"exclusive": "", "gres": "x:1,y:2"}
    assert (spec.launch, spec.preflight, spec.fabric) == ("torchrun", "off", "tcp")
    assert spec.container == Container("pyxis", "team/image:1", ("/a:/a", "/b:/b"), "/usr/bin/python3")
    assert (spec.activate, spec.python) == (("module load cuda",), "/shared/python")
    assert spec.environment["HCA"] == "mlx5_0,mlx5_1"
    assert spec.run_root == "/shared/runs"
    assert spec.args["schedules"] == ["a", "b"]
    assert JobSpec.from_json(spec.to_json()) == spec


def test_the_spec_holds_plain_json_values(checkout: SampleCheckout) -> None:
    spec = checkout.compose("recipe=ch4_fsdp", "args.schedules=a")
    assert json.loads(json.dumps(spec.args)) == spec.args


# --- sweeps


def test_a_sweep_is_one_job_per_combination(checkout: SampleCheckout) -> None:
    jobs = checkout.sweep("recipe=ch4_fsdp", "cluster=slurm", "args.lr=1e-4,3e-4", "nodes=1,2")
    found = [(job.spec.args["lr"], job.spec.nodes) for job in jobs]
    assert found == [(1e-4, 1), (1e-4, 2), (3e-4, 1), (3e-4, 2)]


def test_quotes_inside_the_word_keep_a_comma(checkout: SampleCheckout) -> None:
    (job,) = checkout.sweep("recipe=ch4_fsdp", 'args.note="a, b"')
    assert job.spec.args["note"] == "a, b"


def test_one_wrong_value_in_a_sweep_is_found_before_any_job(checkout: SampleCheckout) -> None:
    assert checkout.mistake("recipe=ch4_fsdp", "args.steps=1,2").startswith("args.steps=1,2: the comma makes")
    with pytest.raises(Exception, match=r"^args.steps=two: wants a whole number"):
        checkout.sweep("recipe=ch4_fsdp", "args.steps=1,two")


@pytest.mark.parametrize("point", range(2))
def test_the_words_of_a_job_compose_it_again_from_any_folder(
    checkout: SampleCheckout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: int
) -> None:
    here = tmp_path / "here"
    (here / "texts").mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("PWD", str(here))
    typed = [
        "recipe=ch4_fsdp",
        "nodes=1",
        "args.data=texts",
        "run_root=runs",
        'args.note="a, b"',
        "args.lr=1,2",
    ]
    job = checkout.sweep(*typed)[point]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PWD", str(tmp_path))
    assert checkout.compose(*job.words) == job.spec


# --- paths


def test_relative_paths_start_where_the_person_is(checkout: SampleCheckout, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "image.sqsh").touch()
    words = ["run_root=../runs", "args.init_from=weights", "args.data=texts", "python=bin/python"]
    words += ["container.kind=pyxis", "container.image=image.sqsh"]
    spec = checkout.compose("recipe=ch4_fsdp", *words, cwd=tmp_path)
    assert spec.run_root == str(tmp_path.parent / "runs")
    assert spec.args["init_from"] == str(tmp_path / "weights")
    assert spec.args["data"] == str(tmp_path / "texts")
    assert spec.python == str(tmp_path / "bin/python")
    assert spec.container.image == str(tmp_path / "image.sqsh")


@pytest.mark.parametrize("name", ["stdlib", "team/dataset", "wikitext"])
def test_a_name_of_data_that_is_no_folder_stays_a_name(
    checkout: SampleCheckout, tmp_path: Path, name: str
) -> None:
    assert checkout.compose("recipe=ch4_fsdp", f"args.data={name}", cwd=tmp_path).args["data"] == name


def test_a_link_in_the_working_directory_is_kept(
    checkout: SampleCheckout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "link")
    monkeypatch.setenv("PWD", str(tmp_path / "link"))
    assert checkout.compose("recipe=ch4_fsdp", "run_root=runs").run_root == str(tmp_path / "link/runs")


# --- origins


def test_every_value_that_is_no_default_has_an_origin(checkout: SampleCheckout) -> None:
    composed = checkout.composed("recipe=ch4_fsdp", "cluster=local", "args.seed=3", "env.A=1")
    assert composed.origins["args.lr"] == "recipes/ch4/fsdp.yaml"
    assert composed.origins["fabric"] == "env/clusters/local.yaml"
    assert composed.origins["args.seed"] == composed.origins["env.A"] == "command line"
    assert "args.dtype" not in composed.origins


# --- mistakes: one line each


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("cluster=slrum", "unknown cluster 'slrum' (cluster=): did you mean slurm?"),
        ("fabric=infiband", "unknown fabric 'infiband' (fabric=): did you mean infiniband?"),
        ("args.stpes=3", "args.stpes: ch4_fsdp has no such argument; did you mean args.steps?"),
        ("stpes=3", "unknown key 'stpes': did you mean args.steps?"),
        ("steps=3", "unknown key 'steps': did you mean args.steps?"),
        ("node=3", "unknown key 'node': did you mean nodes?"),
        ("NODES=3", "unknown key 'NODES': did you mean nodes?"),
        ("container.img=x", "unknown key 'container.img': did you mean container.image?"),
        ("env=1", "env=1: a name is wanted after 'env', such as env.NCCL_DEBUG=INFO"),
        ("nodes=two", "nodes=two: a whole number is wanted"),
        ("nodes=0", "nodes=0: 1 or more is wanted"),
        ("args.steps=two", "args.steps=two: wants a whole number (int)"),
        ("args.batch_size=3", "args.batch_size=3: wants an even number"),
        ("launch=mpirun", "launch=mpirun: one of srun, torchrun is wanted; did you mean srun?"),
        ("time=10:30", "time=10:30: write 10:30:00 for hours or 10m30s for minutes"),
        (
            "memory=64GB",
            "memory=64GB: memory per node is wanted with one of K, M, G, T: 64G; 0 is all of it",
        ),
        ("sbatch.nodes=4", "sbatch.nodes=4: write nodes="),
        ("sbatch.output=x", "sbatch.output=x: the launcher sets this flag itself"),
        ("env.RANK=0", "env.RANK=0: the launcher sets this variable itself"),
        ("env.1A=0", "env.1A=0: '1A' cannot be the name of a variable"),
        ("container.kind=pyxis", "container.kind=pyxis: container.image= is missing"),
        (
            "container.image=x",
            "container.image: no container runs it; add container.kind=pyxis or container.kind=apptainer",
        ),
        (
            "cluster=local nodes=2",
            "nodes=2: cluster 'local' is this one machine; cluster=box tries several nodes on it",
        ),
        ("cluster=slurm gpus_per_node=16", "gpus_per_node=16: cluster 'slurm' has 8 per node"),
        (
            "cluster=local args.device=cuda",
            "args.device=cuda: the job gets no GPU on cluster 'local' (gpus_per_node=0); "
            "args.device=cpu runs without",
        ),
    ],
)
def test_a_mistake_is_one_line_with_the_nearest_right_thing(
    checkout: SampleCheckout, words: str, line: str
) -> None:
    assert checkout.mistake("recipe=ch4_fsdp", *words.split()) == line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("nodes=2", "recipe= is missing; there is ch1_baseline, ch4_fsdp"),
        ("recipe=ch4_fsdb", "unknown recipe 'ch4_fsdb' (recipe=): did you mean ch4_fsdp?"),
        (
            "recipe=ch1_baseline,ch4_fsdp",
            "recipe=ch1_baseline,ch4_fsdp: one recipe at a time; a sweep is over other keys",
        ),
        (
            "recipe=ch1_baseline cluster=slurm tasks_per_node=2",
            "tasks_per_node=2: ch1_baseline is for 1 rank at most, not 2; for more take recipe=ch4_fsdp",
        ),
    ],
)
def test_a_mistake_in_the_choice_of_a_recipe_names_another(
    checkout: SampleCheckout, words: str, line: str
) -> None:
    assert checkout.mistake(*words.split()) == line


def test_a_line_break_cannot_leave_its_sbatch_line(checkout: SampleCheckout) -> None:
    line = checkout.mistake("recipe=ch4_fsdp", "account=team\nrm -rf ~")
    assert line == "account=team\\nrm -rf ~: a line break cannot be part of it"


def test_a_key_that_nothing_resembles_lists_what_there_is(checkout: SampleCheckout) -> None:
    line = checkout.mistake("recipe=ch4_fsdp", "zzz=1")
    assert line.startswith("unknown key 'zzz': there is recipe, cluster, nodes, ")
    assert len(line) < 400


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("jobs: {}", "unknown key 'jobs': did you mean job?"),
        ("job: {node: 2}", "job: unknown key 'node': did you mean nodes?"),
        ("job: {nodes: two}", "job: nodes: a whole number is wanted"),
        ("job: [nodes]", "job: a mapping of names to values is wanted"),
        ("job: {env: [A]}", "job: env: a mapping of names to values is wanted"),
        ("args: {stpes: 2}", "args: unknown argument 'stpes': did you mean steps?"),
        ("args: {steps: two}", "args: steps=two: wants a whole number (int)"),
        ("max_world_size: 0", "max_world_size: a whole number above zero is wanted"),
        ("summary: twice", "not YAML: line 5: the key 'summary' is there twice"),
        ("job: {", "not YAML: line 6: expected the node content, but found '<stream end>'"),
    ],
)
def test_a_mistake_in_a_recipe_s_file_names_file_and_key(
    checkout: SampleCheckout, text: str, line: str
) -> None:
    start = "summary: x\nentrypoint: recipes.ch9.bad\narguments: sample_checkout_arguments:SampleArgs\n"
    checkout.write("recipes/ch9/bad.yaml", f"{start}\n{text}\n")
    assert checkout.mistake("recipe=ch9_bad", "cluster=local") == f"recipes/ch9/bad.yaml: {line}"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            "no_such_module_here:Args",
            "recipes/ch9/bad.yaml: arguments: there is no module no_such_module_here",
        ),
        (
            "sample_checkout_arguments:Nope",
            "recipes/ch9/bad.yaml: arguments: sample_checkout_arguments has no dataclass 'Nope'",
        ),
        ("SampleArgs", "recipes/ch9/bad.yaml: arguments: 'module:Class' is wanted"),
    ],
)
def test_a_recipe_whose_arguments_are_nowhere_is_named(
    checkout: SampleCheckout, arguments: str, line: str
) -> None:
    checkout.write("recipes/ch9/bad.yaml", f"summary: x\nentrypoint: y\narguments: {arguments}\n")
    assert checkout.mistake("recipe=ch9_bad", "cluster=local") == line


def test_an_argument_module_with_a_typing_error_is_named_with_its_line(checkout: SampleCheckout) -> None:
    broken = checkout.write("modules/broken_arguments.py", "x = 1\ny = (\n")
    checkout.write("recipes/ch9/bad.yaml", "summary: x\nentrypoint: y\narguments: broken_arguments:Args\n")
    assert checkout.mistake("recipe=ch9_bad") == f"{broken}: line 2: '(' was never closed"
