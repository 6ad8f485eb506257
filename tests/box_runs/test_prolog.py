"""env/prolog.sh against a real slurmctld: what drains a node, what does not, and whose drain it ends."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from checks import bundle as bundles
from checks.evidence import Record
from launcher import box as boxes
from launcher import slurm
from launcher.paths import REPOSITORY
from tests.box_runs.support import Launcher, wait_until
from tests.checks.nodes import LIMITS

PROLOG = REPOSITORY / "env" / "prolog.sh"
ONLY = "host.nofile"


@dataclass(frozen=True)
class Site:
    """A box whose administrator set the prolog up."""

    launcher: Launcher
    box: boxes.Box
    folder: Path

    def conf(self, *words: str, **more: str) -> Path:
        lines = [f"words=({shlex.join(words)})", f"python={shlex.quote(sys.executable)}"]
        lines += [f"{name}={shlex.quote(value)}" for name, value in more.items()]
        path = self.folder / "prolog.conf"
        path.write_text("\n".join([f"scontrol={self.box.bin_dir}/scontrol", *lines]) + "\n")
        return path

    def prolog(self, *words: str, job: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        """As slurmd starts it: with next to no environment."""
        environment = {
            "PATH": "/usr/bin:/bin",
            "SLURMD_NODENAME": "n2",
            "PREFLIGHT_CONF": str(self.conf(*words, **more)),
        }
        environment |= {"SLURM_JOB_ID": job} if job else {}
        began = time.monotonic()
        done = subprocess.run(
            [PROLOG], env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert time.monotonic() - began < 30, "slurmd kills a prolog that takes longer"
        return done

    def node(self) -> tuple[str, str]:
        """State and reason of n2. After a resume slurmctld has to ping it before it counts as responding."""
        record = slurm.parse_key_values(self.launcher.slurm("scontrol", "show", "node", "-o", "n2"))
        return record["State"].replace("+NOT_RESPONDING", ""), record.get("Reason", "")

    def update(self, *words: str) -> None:
        self.launcher.slurm("scontrol", "update", "nodename=n2", *words)


@pytest.fixture
def site(own_box: tuple[Launcher, boxes.Box], tmp_path: Path) -> Site:
    return Site(*own_box, tmp_path)


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Record | None], str]:
    """The words that judge this machine's own evidence with one answer changed."""
    folder = tmp_path_factory.mktemp("evidence")
    whole = folder / "whole.json"
    subprocess.run([sys.executable, "-m", "checks", "collect", str(whole), "--gpus=0", "--fabric=none"], check=True,
                   cwd=REPOSITORY, capture_output=True)  # fmt: skip
    taken = bundles.read(whole)

    def changed(name: str, record: Record | None) -> str:
        keys = [key for key in taken.records if "self/limits" in key]
        assert keys, sorted(taken.records)
        records = {**taken.records, **(dict.fromkeys(keys, record) if record else {})}
        path = folder / f"{name}.json"
        bundles.write(bundles.make(taken.node, taken.expected, records), path)
        return f"--evidence={path}"

    return changed


LOW = {"value": LIMITS.replace("1048576", "64     ")}


def test_only_a_failure_drains_and_only_an_own_drain_is_ended(
    site: Site, evidence: Callable[[str, Record | None], str]
) -> None:
    healthy = evidence("healthy", None)
    few = evidence("few", LOW)
    unseen = evidence("unseen", {"problem": "timed out", "detail": "3 s"})
    hidden = evidence("hidden", {"problem": "not permitted", "detail": "root"})

    assert site.prolog(ONLY, healthy).returncode == 0
    for word, said in ((unseen, "timed out"), (hidden, "")):
        done = site.prolog(ONLY, word)
        assert (done.returncode, site.node()[0]) == (0, "IDLE"), done.stderr
        assert said in done.stderr

    failed = site.prolog(ONLY, few)
    assert failed.returncode == 1, failed.stderr
    state, reason = site.node()
    assert state == "IDLE+DRAIN"
    assert reason.startswith("preflight: host.nofile: Max open files 64, expected at least 4096")
    assert site.prolog(ONLY, unseen).returncode == 0
    assert site.node()[0] == "IDLE+DRAIN"  # nobody knows whether it is well again
    assert site.prolog(ONLY, healthy, job="7").returncode == 0
    assert site.node()[0] == "IDLE+DRAIN"  # a prolog ends no drain
    assert site.prolog(ONLY, healthy).returncode == 0
    assert site.node()[0] == "IDLE"

    site.update("state=drain", "reason=a person looks at the fan")
    for word, status in ((healthy, 0), (few, 1)):
        assert site.prolog(ONLY, word).returncode == status
        state, reason = site.node()
        assert state == "IDLE+DRAIN"
        assert reason.startswith("a person looks at the fan")


def test_a_check_that_hangs_and_a_slurm_that_is_away_take_less_than_ten_seconds(
    site: Site, evidence: Callable[[str, Record | None], str], tmp_path: Path
) -> None:
    stuck = tmp_path / "stuck"
    stuck.write_text(
        "#!/bin/sh\ncase $3 in checks) sleep 60 ;; esac\nexec " + shlex.quote(sys.executable) + ' "$@"\n'
    )
    stuck.chmod(0o755)
    hangs = site.prolog(python=str(stuck))
    assert (hangs.returncode, "the checks gave no report" in hangs.stderr) == (0, True)
    asleep = tmp_path / "asleep"
    asleep.write_text("#!/bin/sh\nsleep 60\n")
    asleep.chmod(0o755)
    away = site.prolog(ONLY, evidence("few", LOW), scontrol=str(asleep))
    assert (away.returncode, "scontrol does not drain it" in away.stderr) == (2, True)


def test_wrong_words_are_said_and_drain_nothing(site: Site) -> None:
    done = site.prolog("--gpu=8x")
    assert (done.returncode, "does not take the words of" in done.stderr) == (64, True)
    assert site.node()[0] == "IDLE"
    assert "no interpreter" in site.prolog(python="/nowhere/python").stderr


def test_as_health_check_program_slurmd_drains_its_own_node(
    site: Site, evidence: Callable[[str, Record | None], str]
) -> None:
    """slurmd gives no variable of ours: the script beside it has the site's file in its first line."""
    wrapper = site.folder / "health"
    conf = site.conf(ONLY, evidence("few", LOW))
    wrapper.write_text(
        f"#!/bin/sh\nPREFLIGHT_CONF={shlex.quote(str(conf))} exec {shlex.quote(str(PROLOG))}\n"
    )
    wrapper.chmod(0o755)
    with site.box.slurm_conf.open("a") as file:
        file.write(f"HealthCheckProgram={wrapper}\nHealthCheckInterval=2\nHealthCheckNodeState=ANY\n")
    site.launcher.slurm("scontrol", "reconfigure")
    wait_until(lambda: "DRAIN" in site.node()[0], "the drain", 60)
    assert site.node()[1].startswith("preflight: host.nofile: Max open files 64")
