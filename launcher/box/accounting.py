"""slurmdbd and its MariaDB, so that `sacct` answers. Both belong to one box and end with it."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from launcher.box import processes
from launcher.box.config import Layout
from launcher.box.packages import Packages
from launcher.box.processes import Daemon, DaemonFailed

_START_TIMEOUT_SECONDS = 60


def start(layout: Layout, packages: Packages) -> None:
    """Start the database and slurmdbd and enter the cluster there. Raises DaemonFailed with the reason."""
    folder, conf = layout.state_dir, layout.slurm_conf
    (folder / "database").mkdir()
    database = Daemon(_mariadbd(layout, packages), folder / "log" / "mariadbd.log")
    processes.start([database], packages, conf)
    _wait_for_socket(_database_socket(layout), database)
    slurmdbd = Daemon((str(packages.program("slurmdbd")),), folder / "log" / "slurmdbd.log")
    # The client library finds the database's socket by this variable; Slurm has no setting for it.
    processes.start([slurmdbd], packages, conf, {"MYSQL_UNIX_PORT": str(_database_socket(layout))})
    _enter_cluster(layout, slurmdbd)


def slurmdbd_conf(layout: Layout, packages: Packages) -> str:
    """slurmdbd.conf, which slurmdbd looks for beside slurm.conf. Pure."""
    folder = layout.state_dir
    settings: dict[str, object] = {
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={layout.munge_socket}",
        "DbdHost": "localhost",
        "DbdAddr": "127.0.0.1",
        "DbdPort": layout.accounting_port,
        "SlurmUser": layout.user,
        "PluginDir": packages.plugin_dir,
        "StorageType": "accounting_storage/mysql",
        "StorageHost": "localhost",
        "StorageUser": layout.user,
        "StorageLoc": "slurm",
        "LogFile": folder / "log" / "slurmdbd.log",
        "PidFile": folder / "run" / "slurmdbd.pid",
        "DebugLevel": "info",
    }
    return "".join(f"{key}={value}\n" for key, value in settings.items())


def _mariadbd(layout: Layout, packages: Packages) -> tuple[str, ...]:
    share = packages.root / "usr/share/mysql"
    data = layout.state_dir / "database"
    return (
        *("setsid", "--fork", str(packages.program("mariadbd"))),
        "--no-defaults",
        f"--user={layout.user}",
        f"--datadir={data}",
        f"--tmpdir={data}",
        f"--socket={_database_socket(layout)}",
        f"--pid-file={layout.state_dir / 'run' / 'mariadbd.pid'}",
        f"--log-error={layout.state_dir / 'log' / 'mariadbd.log'}",
        f"--lc-messages-dir={share}",
        f"--character-sets-dir={share / 'charsets'}",
        # No users and no network: the socket lies in a folder that only this user may enter.
        "--skip-grant-tables",
        "--skip-networking",
        # It holds some hundred jobs for some hours: small, and without waiting for the disk.
        "--innodb-buffer-pool-size=16M",
        "--innodb-log-file-size=8M",
        "--innodb-flush-log-at-trx-commit=0",
        "--innodb-flush-method=nosync",
        "--key-buffer-size=1M",
        "--aria-pagecache-buffer-size=1M",
        "--performance-schema=OFF",
    )


def _database_socket(layout: Layout) -> Path:
    return layout.state_dir / "run" / "mariadb"


def _wait_for_socket(path: Path, daemon: Daemon) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_SECONDS
    while True:
        with socket.socket(socket.AF_UNIX) as client:
            if client.connect_ex(str(path)) == 0:
                return
        if time.monotonic() > deadline:
            raise DaemonFailed(processes.last_line(daemon.log) or "mariadbd does not answer")
        time.sleep(0.05)


def _enter_cluster(layout: Layout, slurmdbd: Daemon) -> None:
    """slurmctld stores nothing about a cluster that slurmdbd does not know."""
    deadline = time.monotonic() + _START_TIMEOUT_SECONDS
    sacctmgr = str(layout.bin_dir / "sacctmgr")
    command = [sacctmgr, "--immediate", "add", "cluster", layout.cluster]
    while processes.ask(command) is None:
        said = processes.last_line(slurmdbd.log)
        if "fatal:" in said or time.monotonic() > deadline:
            raise DaemonFailed(f"slurmdbd: {said or 'does not answer'}")
        time.sleep(0.1)
