"""Recipe, cluster profile and the words of a command line, composed into a JobSpec. File system (reads only).

What counts, later over earlier: the defaults of the recipe's argument dataclass, its YAML file (`job:`,
`args:`), the cluster profile, the command line. The cluster's capacity (GPUs, CPUs, nodes) is a limit and a
default: see shape.py.

OmegaConf reads `${oc.env:VAR}`; Hydra's compose was weighed and left out. It costs 0.15 s more at every
start, refuses sweeps outside its own main function, and cannot parse what a person types in a shell: a value
with spaces, brackets or `=` fails in its grammar unless it is quoted a second time. The two groups are two
file look-ups here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin

from launcher.clusters import AUTO, ClusterProfile, auto_note, load_fabric, load_profile
from launcher.overrides import Override, as_word, expand, last_of_each, parse_words, refuse_sweep
from launcher.paths import REPOSITORY, absolute
from launcher.recipes import RecipeEntry, load_recipe, recipe_files, recipe_for_more_ranks
from launcher.settings import OPEN_GROUPS, SETTINGS, is_setting, read_setting
from launcher.shape import SHAPE_KEYS, Shape, resolve_shape
from launcher.spec import Container, Expected, JobSpec, UserError
from launcher.suggest import did_you_mean, nearest
from recipes.lib.arguments import (
    Argument,
    ArgumentError,
    UnknownArgument,
    arguments_of,
    convert,
    with_overrides,
)

FILE_KEYS = ("recipe", "cluster")
"""Words that choose a file; every other word sets a key."""

COMMAND_LINE = "command line"
"""The origin of what was typed."""

DEFAULT_MINUTES = 60
"""Time limit where neither recipe, profile nor command line names one."""


@dataclass(frozen=True)
class Composed:
    """A JobSpec and where its keys come from."""

    spec: JobSpec
    origins: Mapping[str, str]
    """By dotted key (`args.lr`, `time`, `env.NCCL_DEBUG`): what set it. No entry: a default."""
    words: tuple[str, ...]
    """Words for this job alone that compose it again from any folder: paths absolute, `cluster=auto`
    resolved.
    """
    note: str
    """What `cluster=auto` was taken for and why; empty where a cluster was named."""


def compose(words: Sequence[str], *, repository: Path = REPOSITORY, cwd: Path | None = None) -> JobSpec:
    """One job. Raises UserError, one line, for every mistake in the words or in the files that they name.

    `cwd` is where relative paths in the words start (default: the working directory).
    """
    return compose_with_origins(words, repository=repository, cwd=cwd).spec


def compose_with_origins(
    words: Sequence[str], *, repository: Path = REPOSITORY, cwd: Path | None = None
) -> Composed:
    """As `compose`, with the origin of every key that is not a default."""
    chosen = _choose(parse_words(words), repository, cwd)
    refuse_sweep(chosen.overrides, chosen.sweeps)
    (point,) = expand(chosen.overrides, chosen.sweeps)
    return _compose_point(chosen, point)


def compose_points(
    words: Sequence[str], *, repository: Path = REPOSITORY, cwd: Path | None = None
) -> list[Composed]:
    """Every job of a sweep, the last word changing fastest; one job without a sweep. Raises UserError."""
    chosen = _choose(parse_words(words), repository, cwd)
    return [_compose_point(chosen, point) for point in expand(chosen.overrides, chosen.sweeps)]


@dataclass(frozen=True)
class _Chosen:
    """What the words `recipe=` and `cluster=` name, and the words that are left."""

    recipe: RecipeEntry
    arguments: type[Any]
    known: Mapping[str, Argument]
    profile: ClusterProfile
    overrides: Sequence[Override]
    """One per key, the last one typed, paths absolute."""
    repository: Path
    note: str

    def sweeps(self, key: str) -> bool:
        """Whether a comma in this key's value separates values to try."""
        if key.startswith("args."):
            return not _is_list(self.known[key.removeprefix("args.")].kind)
        return key in SETTINGS and SETTINGS[key].sweeps


def _choose(overrides: Sequence[Override], repository: Path, cwd: Path | None) -> _Chosen:
    files = {override.key: override.value for override in overrides if override.key in FILE_KEYS}
    if "recipe" not in files:
        names = ", ".join(recipe_files(repository)) or "none yet"
        raise UserError(f"recipe= is missing; there is {names}")
    for key, name in files.items():
        if "," in name:
            raise UserError(f"{key}={name}: one {key} at a time; a sweep is over other keys")
    recipe = load_recipe(files["recipe"], repository)
    arguments = recipe.arguments_class()
    known = arguments_of(arguments)
    rest = [override for override in last_of_each(overrides) if override.key not in FILE_KEYS]
    for override in rest:
        _check_key(override, recipe, known)
    cluster = files.get("cluster", AUTO)
    note = auto_note() if cluster == AUTO else ""
    profile = load_profile(cluster, repository)
    return _Chosen(recipe, arguments, known, profile, _absolute(rest, cwd), repository, note)


def _check_key(override: Override, recipe: RecipeEntry, known: Mapping[str, Argument]) -> None:
    """Raise UserError where the key is neither a job's nor an argument of the recipe."""
    key = override.key
    if key.startswith("args."):
        name = key.removeprefix("args.")
        if name not in known:
            hint = did_you_mean(name, known, prefix="args.")
            raise UserError(f"{key}: {recipe.name} has no such argument; {hint}")
    elif key in OPEN_GROUPS or key in ("args", "container"):
        raise UserError(f"{override}: a name is wanted after '{key}', such as {_EXAMPLES[key]}")
    elif not is_setting(key):
        job_keys = [*FILE_KEYS, *SETTINGS, *(f"{group}.NAME" for group in OPEN_GROUPS)]
        argument = nearest(key, known)
        if argument is not None and nearest(key, [*job_keys, *known]) == argument:
            raise UserError(f"unknown key '{key}': did you mean args.{argument}?")
        raise UserError(f"unknown key '{key}': {did_you_mean(key, [*job_keys, *_ARGUMENTS_AS_ONE])}")


_ARGUMENTS_AS_ONE = ("args.NAME",)
_EXAMPLES = {
    "args": "args.steps=100",
    "env": "env.NCCL_DEBUG=INFO",
    "sbatch": "sbatch.exclusive=",
    "container": "container.image=IMAGE",
}


def _compose_point(chosen: _Chosen, point: Sequence[Override]) -> Composed:
    recipe, profile = chosen.recipe, chosen.profile
    origins = {"recipe": COMMAND_LINE, "cluster": chosen.note or COMMAND_LINE}
    args = _arguments(chosen, point, origins)
    typed: dict[str, Any] = {}
    for override in point:
        if not override.key.startswith("args."):
            key, value = read_setting(override.key, override.value, shown=str(override))
            typed[key] = value
    merged: dict[str, Any] = {}
    for origin, layer in (
        (recipe.file, recipe.job),
        (profile.file, profile.settings),
        (COMMAND_LINE, typed),
    ):
        merged |= layer
        origins |= dict.fromkeys(layer, origin)
    shape = resolve_shape(
        {key: typed[key] for key in SHAPE_KEYS if key in typed},
        {key: recipe.job[key] for key in SHAPE_KEYS if key in recipe.job},
        profile.capacity,
        cluster=profile.name,
        executor=profile.executor,
        max_world_size=recipe.max_world_size,
        on_cpu=args.get("device") == "cpu",
    )
    _check_world_size(shape, chosen, typed)
    _check_ranks(shape, chosen, args)
    _check_spares(merged.get("spares") or 0, shape, profile)
    if args.get("device") == "cuda" and shape.gpus_per_node == 0:
        raise UserError(
            f"args.device=cuda: the job gets no GPU on cluster '{profile.name}' (gpus_per_node=0); "
            "args.device=cpu runs without"
        )
    words = [f"recipe={recipe.name}", f"cluster={profile.name}"]
    words += [as_word(override, chosen.sweeps) for override in point]
    return Composed(_spec(chosen, args, merged, shape), origins, tuple(words), chosen.note)


def _check_spares(spares: int, shape: Shape, profile: ClusterProfile) -> None:
    if spares and profile.executor != "slurm":
        raise UserError(
            f"spares={spares}: cluster '{profile.name}' is this one machine; it has no node in reserve"
        )
    most = profile.capacity.max_nodes
    if spares and most is not None and shape.nodes + spares > most:
        raise UserError(
            f"spares={spares}: {shape.nodes} nodes and {spares} in reserve; cluster '{profile.name}' gives a job {most}"
        )


def _arguments(chosen: _Chosen, point: Sequence[Override], origins: dict[str, str]) -> dict[str, Any]:
    """The recipe's arguments, complete. Notes in `origins` where they come from."""
    recipe = chosen.recipe
    for name, value in recipe.args.items():
        try:
            convert(chosen.arguments, {name: value})
        except UnknownArgument:
            hint = did_you_mean(str(name), chosen.known)
            raise UserError(f"{recipe.file}: args: unknown argument '{name}': {hint}") from None
        except ArgumentError as error:
            raise UserError(f"{recipe.file}: args: {error}") from None
        origins[f"args.{name}"] = recipe.file
    typed = {}
    for override in point:
        if override.key.startswith("args."):
            name = override.key.removeprefix("args.")
            typed[name] = override.value
            origins[override.key] = COMMAND_LINE
    try:
        return with_overrides(chosen.arguments, recipe.args, typed)
    except ArgumentError as error:
        raise UserError(f"args.{error}") from None


def _check_world_size(shape: Shape, chosen: _Chosen, typed: Mapping[str, Any]) -> None:
    recipe, ranks = chosen.recipe, shape.nodes * shape.tasks_per_node
    if recipe.max_world_size is None or ranks <= recipe.max_world_size:
        return
    key = next((key for key in ("tasks_per_node", "nodes", "gpus_per_node") if typed.get(key, 1) > 1), None)
    culprit = f"{key}={typed[key]}: " if key else ""
    other = recipe_for_more_ranks(recipe, ranks, chosen.repository)
    hint = f"; for more take recipe={other.name}" if other else ""
    raise UserError(
        f"{culprit}{recipe.name} is for {recipe.max_world_size} "
        f"rank{'s'[: recipe.max_world_size > 1]} at most, not {ranks}{hint}"
    )


def _check_ranks(shape: Shape, chosen: _Chosen, args: Mapping[str, Any]) -> None:
    """Ask the recipe whether so many ranks can be divided as its arguments say, where it has an opinion."""
    arguments = chosen.arguments(**args)
    if hasattr(arguments, "check_ranks"):
        try:
            arguments.check_ranks(shape.nodes * shape.tasks_per_node, shape.tasks_per_node)
        except ArgumentError as error:
            raise UserError(f"args.{error}") from None


def _spec(chosen: _Chosen, args: Mapping[str, Any], merged: Mapping[str, Any], shape: Shape) -> JobSpec:
    settings = {key: value for key, value in merged.items() if value is not None}
    fabric = load_fabric(settings.get("fabric", AUTO), chosen.repository)
    environment = {
        "OMP_NUM_THREADS": str(_threads(shape, chosen.profile.capacity.cores_per_node)),
        **fabric.environment,
        **_group(settings, "env"),
    }
    container = Container(
        kind=settings.get("container.kind", "none"),
        image=settings.get("container.image", ""),
        mounts=settings.get("container.mounts", ()),
        python=settings.get("container.python", Container.python),
    )
    if container.kind == "none" and (container.image or container.mounts):
        key = "image" if container.image else "mounts"
        raise UserError(
            f"container.{key}: no container runs it; add container.kind=pyxis or container.kind=apptainer"
        )
    if container.kind != "none" and not container.image:
        raise UserError(f"container.kind={container.kind}: container.image= is missing")
    expected = Expected(
        settings.get("checks.sku"), settings.get("checks.rails"), settings.get("checks.without", ()),
        settings.get("checks.links", Expected.links),
    )  # fmt: skip
    _check_names(expected.without)
    plain = {
        key: settings[key]
        for key in (
            *("memory", "partition", "account", "qos", "exclude", "launch", "preflight"),
            *("activate", "python", "run_root"),
        )
        if key in settings
    }
    return JobSpec(
        recipe=chosen.recipe.name,
        entrypoint=chosen.recipe.entrypoint,
        args=args,
        cluster=chosen.profile.name,
        executor=chosen.profile.executor,
        nodes=shape.nodes,
        tasks_per_node=shape.tasks_per_node,
        gpus_per_node=shape.gpus_per_node,
        cpus_per_task=shape.cpus_per_task,
        time_minutes=settings.get("time", DEFAULT_MINUTES),
        sbatch=_group(settings, "sbatch"),
        checks=expected,
        container=container,
        fabric=fabric.name,
        fabric_kind=fabric.kind,
        spares=settings.get("spares", 0),
        environment=environment,
        **plain,
    )


def _check_names(names: Sequence[str]) -> None:
    """Raise UserError for a check that does not exist: on a node it would cost a start."""
    if not names:
        return
    from checks.catalog import UnknownCheck, named  # many checks, which most commands have no use for

    try:
        named(names, None)
    except UnknownCheck as error:
        raise UserError(f"checks.without: {error}") from None


def _threads(shape: Shape, cores_per_node: int | None) -> int:
    """Threads per rank: its CPUs, but no more than its share of real cores.

    Without this every rank takes a thread per core of the machine, and ranks on one node stall each other.
    """
    if cores_per_node is None:
        return shape.cpus_per_task
    return max(1, min(shape.cpus_per_task, cores_per_node // shape.tasks_per_node))


def _group(settings: Mapping[str, Any], group: str) -> dict[str, str]:
    return {
        key.removeprefix(f"{group}."): value for key, value in settings.items() if key.startswith(f"{group}.")
    }


def _absolute(overrides: Sequence[Override], cwd: Path | None) -> list[Override]:
    """The words with their paths absolute: the job runs in another folder than the person who types."""
    start = cwd or _working_directory()
    absolutes = []
    for override in overrides:
        value = override.value
        path = absolute(value, start)
        if override.key in ("run_root", "args.init_from"):
            is_path = bool(value)
        elif override.key == "python":
            is_path = "/" in value
        elif override.key == "container.image":
            is_path = bool(value) and path.exists()
        elif override.key == "args.data":
            # A name too (stdlib, a dataset): only a folder that is there, or what is spelt as a path.
            spelt_as_path = value.startswith(("./", "../", "~/", "/"))
            is_path = spelt_as_path or (value not in ("", "stdlib") and path.exists())
        else:
            is_path = False
        absolutes.append(Override(override.key, str(path)) if is_path else override)
    return absolutes


def _working_directory() -> Path:
    """The working directory as the person sees it: cwd() resolves links, to what a node may not have."""
    shown = Path(os.environ.get("PWD", ""))
    if shown.is_absolute() and shown.is_dir() and shown.samefile(Path.cwd()):
        return shown
    return Path.cwd()


def _is_list(kind: Any) -> bool:
    return get_origin(kind) is list or any(get_origin(part) is list for part in getattr(kind, "__args__", ()))
