"""Rules that hold for every file: size, who imports whom, no swallowed errors, nothing of one machine."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import LONGEST_FIRST
from tests.docs.sandbox import files_of

ROOT = Path(__file__).resolve().parent.parent
FILES = files_of(ROOT)
MODULES = [name for name in FILES if name.endswith(".py")]
MODULE_NAMES = {name[:-3].replace("/", ".").removesuffix(".__init__"): name for name in MODULES}
MOST_LINES = 450
LAYERS = (
    "launcher.spec",
    "launcher.config",
    "launcher.render",
    "launcher.executors",
    "launcher.commands.submit",
    "launcher.__main__",
)
"""From the types that everything speaks to the command line: each may use only those before it."""


# --- size -------------------------------------------------------------------------------------------------


def test_a_module_has_one_reason_to_exist_and_few_lines() -> None:
    lengths = {name: len(text.splitlines()) for name, text in texts(MODULES)}
    assert {name: length for name, length in lengths.items() if length >= MOST_LINES} == {}, "take them apart"


# --- who imports whom -------------------------------------------------------------------------------------


def test_recipes_and_checks_run_without_the_launcher() -> None:
    users = [name for name in MODULES if name.startswith(("recipes/", "checks/"))]
    assert users, "nothing was looked at"
    assert [name for name in users if any(room(used) == "launcher" for used in imports(name))] == []


def test_the_types_import_nothing_of_ours() -> None:
    assert [
        used for used in imports("launcher/spec.py") if room(used) in ("launcher", "recipes", "checks")
    ] == []


@pytest.mark.parametrize(("lower", "upper"), list(itertools.pairwise(LAYERS)))
def test_imports_point_one_way(lower: str, upper: str) -> None:
    """No module that a lower layer uses, directly or not, may use a layer above it."""
    assert {lower, upper} <= graph().keys(), "a layer is gone"
    above = set(LAYERS[LAYERS.index(upper) :])
    assert reachable(lower) & above == set()


def test_the_launcher_has_no_import_cycle() -> None:
    """Imports inside functions count: a cycle that is loaded late is still one."""
    assert [name for name in graph() if name in reachable(name)] == []


def test_tests_are_imported_by_tests_alone() -> None:
    users = [name for name in MODULES if not name.startswith("tests/")]
    assert [name for name in users if any(room(used) == "tests" for used in imports(name))] == []


def test_the_test_files_that_come_first_are_there() -> None:
    assert [name for name in LONGEST_FIRST if not (ROOT / "tests" / name).is_file()] == []
    assert len(set(LONGEST_FIRST)) == len(LONGEST_FIRST)


def test_the_command_line_loads_no_torch() -> None:
    loaded = subprocess.check_output(
        [sys.executable, "-c", f"import sys, {', '.join(LAYERS)}; print(*sys.modules)"], text=True, cwd=ROOT
    ).split()
    assert [name for name in ("torch", "numpy", "matplotlib", "transformers") if name in loaded] == []


def test_every_package_that_is_imported_is_asked_for() -> None:
    """Locked environments of other stacks ask for theirs in env/requirements."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [
        *project["dependencies"],
        *(word for extra in project["optional-dependencies"].values() for word in extra),
    ]
    for name in FILES:
        if name.startswith("env/requirements/"):
            asked += (ROOT / name).read_text().splitlines()
    known = {_normal(match[0]) for line in asked if (match := re.match(r"[A-Za-z0-9._-]+", line))}
    distributions = importlib.metadata.packages_distributions()
    foreign = {room(used) for name in MODULES for used in imports(name)} - set(sys.stdlib_module_names)
    ours = {Path(name).parts[0].removesuffix(".py") for name in MODULES}
    missing = [
        name
        for name in foreign - ours
        if not known & {_normal(one) for one in distributions.get(name, [name])}
    ]
    assert missing == []


# --- errors -----------------------------------------------------------------------------------------------


def test_no_error_is_swallowed() -> None:
    """Neither a bare `except:`, nor one that catches everything and goes on; `# noqa` does not help."""
    found = {name: list(swallowing(text)) for name, text in texts(MODULES)}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("try:\n    f()\nexcept:\n    raise", [3]),
        ("try:\n    f()\nexcept Exception:\n    pass", [3]),
        ("try:\n    f()\nexcept (OSError, BaseException):\n    ...", [3]),
        ("for x in y:\n    try:\n        f()\n    except Exception:\n        continue", [4]),
        ("import contextlib\nwith contextlib.suppress(Exception):\n    f()", [2]),
        ("try:\n    f()\nexcept FileNotFoundError:\n    pass", []),
        ("try:\n    f()\nexcept Exception as error:\n    report(error)", []),
    ],
)
def test_swallowed_errors_are_seen(code: str, lines: list[int]) -> None:
    assert list(swallowing(code)) == lines


# --- nothing of one machine -------------------------------------------------------------------------------

# Put together from pieces, so that this file passes its own test.
# Where Amazon's EFA installer puts its tools is the same on every machine that has it.
MACHINE_PATH = re.compile(
    r"(?<![\w.}~-])/(?:" + "|".join(("wo" + "rk", "ro" + "ot", "op" + "t")) + r")/(?!amazon/efa/)"
)
REGISTRY_HOSTS = tuple(
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("deb", "debian", "org"),
        ("archive", "ubuntu", "com"),
        ("registry", "npmjs", "org"),
        ("download", "pytorch", "org"),
    )
)


def test_no_file_names_a_path_of_one_machine_or_a_package_registry() -> None:
    found = {name: list(machine_words(text)) for name, text in texts(FILES)}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_machine_words_are_seen() -> None:
    for word in ("cd /wo" + "rk/main", "'/ro" + "ot/x'", "https://" + REGISTRY_HOSTS[0]):
        assert list(machine_words(f"one\n{word}\n")) == [f"line 2: {word}"]
    assert list(machine_words("runs/wo" + "rk/x and $HOME/ro" + "otless and ~/op" + "t/x")) == []
    assert list(machine_words("/op" + "t/amazon/efa/bin/fi_info")) == []
    assert list(machine_words("/op" + "t/amazon/x")) != []


# --- looking ----------------------------------------------------------------------------------------------


def texts(names: list[str]) -> Iterator[tuple[str, str]]:
    """Name and content of each file. One test looks at all of them: a test for each would be hundreds."""
    for name in names:
        yield name, (ROOT / name).read_text(errors="replace")


def machine_words(text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        if MACHINE_PATH.search(line) or any(host in line for host in REGISTRY_HOSTS):
            yield f"line {number}: {line.strip()}"


def swallowing(code: str) -> Iterator[int]:
    """Lines on which every error is caught and dropped."""
    everything = {"Exception", "BaseException"}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ExceptHandler):
            caught = (
                {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)}
                if node.type
                else everything
            )
            dropped = all(
                isinstance(step, ast.Pass | ast.Continue) or _is_ellipsis(step) for step in node.body
            )
            if node.type is None or (dropped and caught & everything):
                yield node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("suppress", "contextlib.suppress"):
            yield from {node.lineno for argument in node.args if ast.unparse(argument) in everything}


def _is_ellipsis(step: ast.stmt) -> bool:
    return isinstance(step, ast.Expr) and isinstance(step.value, ast.Constant) and step.value.value is ...


@functools.cache
def imports(name: str) -> frozenset[str]:
    """Full names of the modules that a file imports, at its top and inside functions."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: line {node.lineno}: write imports in full"
            outer = node.module or ""
            inner = {f"{outer}.{alias.name}" for alias in node.names}
            found |= {module if module in MODULE_NAMES else outer for module in inner}
    return frozenset(found)


def room(module: str) -> str:
    return module.split(".")[0]


@functools.cache
def graph() -> dict[str, frozenset[str]]:
    """Module of the launcher to the modules of the launcher that it imports."""
    names = {module: file for module, file in MODULE_NAMES.items() if room(module) == "launcher"}
    return {module: (imports(file) & names.keys()) - {module} for module, file in names.items()}


def reachable(module: str) -> set[str]:
    """Everything that `module` imports, directly or not."""
    found: set[str] = set()
    waiting = list(graph().get(module, ()))
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(graph()[name])
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
