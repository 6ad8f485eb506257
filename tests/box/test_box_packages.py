"""Fetching Slurm's packages when it does not go well. A stand-in for apt-get plays the archive."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from launcher.box import packages, paths
from launcher.box.paths import BoxUnavailable

APT_GET = """\
#!/bin/sh
for word; do case "$word" in update|install|download) action=$word ;; esac; done
echo "$action" >> {log}
case $action in
    install) echo 'Inst libthing (1)'; echo 'Inst adduser (1)' ;;
    download) {download} ;;
esac
"""
DPKG = '#!/bin/sh\nmkdir -p "$3/usr/sbin"; : > "$3/usr/sbin/$(basename "$2" .deb)"\n'


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs that stands before the system's on PATH; the cache is fresh."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "cache"))
    return folder


def put_archive(
    tools: Path, download: str = ": > slurmd-wlm.deb; for name; do last=$name; done; : > $last.deb"
) -> Path:
    """Install the stand-ins. Returns the file that lists what apt-get was asked to do."""
    log = tools / "log"
    for name, text in (("apt-get", APT_GET.format(log=log, download=download)), ("dpkg", DPKG)):
        (tools / name).write_text(text, "utf-8")
        (tools / name).chmod(0o755)
    return log


def test_a_host_without_apt_is_told_so(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(BoxUnavailable, match="a box needs apt-get to unpack Slurm"):
        packages.fetch(["slurmd"])


def test_a_failed_download_says_what_apt_said_and_can_be_repeated(tools: Path) -> None:
    put_archive(tools, download='echo "E: Failed to fetch thing  Could not connect" >&2; exit 100')
    with pytest.raises(
        BoxUnavailable, match="cannot fetch Slurm's packages: Failed to fetch thing  Could not connect"
    ):
        packages.fetch(["slurmd"])
    put_archive(tools)
    assert packages.fetch(["slurmd"]).program("slurmd").exists()


def test_a_download_that_was_cut_off_is_not_taken_for_a_whole_one(tools: Path) -> None:
    log = put_archive(tools)
    partial = paths.packages_root() / f"{packages._key(['slurmd'])}.partial" / "tree" / "usr" / "sbin"
    partial.mkdir(parents=True)
    (partial / "slurmd").write_text("half", "utf-8")
    assert packages.fetch(["slurmd"]).program("slurmd").read_bytes() == b""
    assert "download" in log.read_text("utf-8")


def test_many_at_once_download_once(tools: Path) -> None:
    log = put_archive(tools)
    threads = [threading.Thread(target=packages.fetch, args=(["slurmd"],)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.read_text("utf-8").split() == ["update", "install", "download"]


def test_of_what_slurm_depends_on_only_libraries_are_fetched(tools: Path) -> None:
    put_archive(tools, download='echo "$@" > asked; cp asked ' + str(tools) + "; : > slurmd-wlm.deb")
    packages.fetch(["slurmd"])
    assert (tools / "asked").read_text("utf-8").split()[-3:] == ["download", "slurmd", "libthing"]


def test_the_cache_may_lie_where_slurm_conf_cannot_point_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "my files, mostly"))
    folder = paths.state_dir("a" * 30)
    assert not set(" ,").intersection(str(folder))
    assert len(str(folder)) <= 72
    assert paths.packages_root().is_relative_to(folder.parents[1])


def test_a_long_cache_path_leaves_room_for_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / ("long" * 20)))
    assert len(str(paths.state_dir("default"))) <= 72
    assert paths.packages_root().is_relative_to(tmp_path)


def test_a_folder_that_somebody_else_prepared_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In /tmp anybody may make a link of the name first, and would then choose what runs as this user."""
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "a b"))
    folder = paths.root()
    folder.symlink_to(tmp_path)
    try:
        with pytest.raises(BoxUnavailable, match="is not yours"):
            paths.root()
    finally:
        folder.unlink()


def test_a_folder_without_permission_names_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(BoxUnavailable, match="set CACHE_DIR to a folder of your own"):
        paths.private_folder(paths.packages_root())
    assert paths.names() == []


@pytest.mark.parametrize("name", ["", "Upper", "a b", "../x", "x" * 31, "-x"])
def test_names_that_are_no_folder_are_refused(name: str) -> None:
    with pytest.raises(Exception, match="box name"):
        paths.check_name(name)
