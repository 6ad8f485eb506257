"""The process that touches the machine, so that nothing that hangs can hang its parent. File system and network.

    python -P checks/worker.py        one JSON request a line on stdin, one JSON answer a line on stdout

A read of a dead NFS mount, of a sysfs file whose driver is stuck, or of a FIFO never returns, and a thread that waits
in the kernel cannot be ended: it would keep the interpreter from exiting. A process can be left behind. So this one
does what may hang, and its parent (`checks.evidence`) waits with a deadline, then kills it and starts another. It is
started by its path and imports nothing of ours: 20 ms, and no trouble with what else lies in the working folder.

A request is {"op": "read", "args": [...]}; an answer is {"value": ...} or {"problem": ..., "detail": ...}.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import re
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

MOST_BYTES = 4 << 20
"""No file that is read here is longer; a device file in its place has no end."""

Answer = dict[str, Any]


def read(path: str) -> str:
    """The file's text; bytes that are not UTF-8 survive as surrogates."""
    parts: list[bytes] = []
    with open(path, "rb", buffering=0) as file:
        # In small parts: /proc/sys answers one large read with ENOMEM (fs/proc/proc_sysctl.c wants it in one piece).
        while sum(map(len, parts)) < MOST_BYTES and (part := file.read(65536)):
            parts.append(part)
    return b"".join(parts).decode(errors="surrogateescape")


def start(path: str) -> str:
    """The file's first bytes in hex: PCI configuration space, of which an ordinary user may read 64."""
    with open(path, "rb") as file:
        return file.read(64).hex()


def listing(path: str) -> list[str]:
    return sorted(os.listdir(path))


def link(path: str, root: str) -> str:
    """Where a link of sysfs leads, seen from the root folder."""
    inside = os.path.realpath(root).rstrip("/")
    return os.path.realpath(path, strict=True).removeprefix(inside)


def statvfs(path: str) -> dict[str, int]:
    found = os.statvfs(path)
    return {
        "size": found.f_blocks * found.f_frsize,
        "free": found.f_bavail * found.f_frsize,
        "inodes": found.f_files,
        "inodes_free": found.f_favail,
    }


def written(folder: str) -> float:
    """Seconds to write, sync, read back and remove a small file."""
    began = time.monotonic()
    content = os.urandom(4096)
    handle, name = tempfile.mkstemp(prefix=".check-", dir=folder)
    try:
        with os.fdopen(handle, "r+b") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            if file.read() != content:
                raise OSError(f"{folder}: what was read back is not what was written")
    finally:
        os.unlink(name)
    return time.monotonic() - began


def resolve(name: str) -> list[str]:
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return sorted({str(address[4][0]) for address in found})


def connect(host: str, port: str) -> float:
    """Milliseconds until a connection is accepted. The parent's deadline ends a longer wait."""
    began = time.monotonic()
    with socket.create_connection((host, int(port))):
        return round((time.monotonic() - began) * 1000, 3)


def ipv4(interface: str) -> str:
    """The interface's first IPv4 address, by ioctl SIOCGIFADDR (linux/sockios.h)."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("256s", interface.encode()[:15])
        answer = fcntl.ioctl(any_socket.fileno(), 0x8915, request)
    return socket.inet_ntoa(answer[20:24])


def clock() -> dict[str, int]:
    """adjtimex(2) without changing anything: whether something keeps the clock right, and its estimated error in µs.

    struct timex (linux/timex.h): modes, offset, freq, maxerror, esterror, status, …
    """
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(512)
    state = libc.adjtimex(buffer)
    if state < 0:
        raise OSError(ctypes.get_errno(), "adjtimex")
    _, _, _, _, most, estimated, status = struct.unpack_from("iiqqqqi", buffer)
    return {"state": state, "status": status, "max_error_us": most, "estimated_error_us": estimated}


def monotonic(_what: str) -> float:
    """Seconds of a clock that nobody sets, between two samples of something."""
    return time.monotonic()


def user() -> int:
    return os.geteuid()


def python() -> str:
    return sys.version.split()[0]


def environment(*prefixes: str) -> dict[str, str]:
    """Variables whose names begin so; what may be a secret is not told (`masked`)."""
    return {
        name: masked(name, value) for name, value in sorted(os.environ.items()) if name.startswith(prefixes)
    }


SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|COOKIE|AUTH|JWT", re.IGNORECASE)


def masked(name: str, value: str) -> str:
    """`***` for a name that means a secret; a password inside an address is taken out of any value."""
    return "***" if SECRET.search(name) else re.sub(r"(://[^/@\s:]*):[^/@\s]+@", r"\1:***@", value)


def packages(*names: str) -> dict[str, str | None]:
    """Versions of installed Python packages, without importing them."""
    found: dict[str, str | None] = dict.fromkeys(names)
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


# --- NVML -------------------------------------------------------------------------------------------------


class Unsupported(Exception):
    """The library that asks is older than the question."""


def nvml(function: str, *args: Any) -> Any:
    """One NVML call, by name. `nvmlDevice…` takes a GPU's index first; structures come back as dictionaries."""
    import pynvml

    global _nvml_started
    if not _nvml_started:
        pynvml.nvmlInit()
        _nvml_started = True
    arguments = list(args)
    if function.startswith("nvmlDevice") and function != "nvmlDeviceGetCount":
        arguments[0] = pynvml.nvmlDeviceGetHandleByIndex(int(arguments[0]))
    if function == "nvmlDeviceGetGpuFabricInfoV":
        answer = pynvml.c_nvmlGpuFabricInfoV_t()
        pynvml.nvmlDeviceGetGpuFabricInfoV(arguments[0], ctypes.byref(answer))
        return plain(answer)
    if not hasattr(pynvml, function):
        raise Unsupported(f"this nvidia-ml-py has no {function}")
    if function == "nvmlDeviceGetSramEccErrorStatus":
        status = pynvml.c_nvmlEccSramErrorStatus_v1_t()
        pynvml.nvmlDeviceGetSramEccErrorStatus(arguments[0], ctypes.byref(status))
        return plain(status)
    if function == "nvmlDeviceGetMemoryInfo":
        # Version 2 tells what the driver keeps for itself apart from what is used.
        arguments.append(pynvml.nvmlMemory_v2)
    return plain(getattr(pynvml, function)(*arguments))


_nvml_started = False


def nvml_field(gpu: int, field: int, scopes: int) -> list[Answer]:
    """nvmlDeviceGetFieldValues of one field for the scopes 0, 1, … (NVLinks), each with an answer of its own."""
    import pynvml

    nvml("nvmlDeviceGetCount")
    handle = pynvml.nvmlDeviceGetHandleByIndex(gpu)
    values = pynvml.nvmlDeviceGetFieldValues(handle, [(field, scope) for scope in range(scopes)])
    return [_field(pynvml, value) for value in values]


def _field(pynvml: Any, value: Any) -> Answer:
    if value.nvmlReturn != pynvml.NVML_SUCCESS:
        return nvml_problem(value.nvmlReturn, f"field {value.fieldId}: {pynvml.NVMLError(value.nvmlReturn)}")
    # nvmlValue_t is a union, whose member valueType names (nvml.h, nvmlValueType_t).
    member = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")[value.valueType]
    return {"value": getattr(value.value, member)}


def nvml_problem(code: int, detail: str) -> Answer:
    return {"problem": _NVML_PROBLEMS.get(code, "error"), "detail": detail, "nvml": code}


def plain(value: Any) -> Any:
    """What JSON can hold of an answer of NVML."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")
    if isinstance(value, ctypes.Structure):
        return {name: plain(getattr(value, name)) for name, *_ in value._fields_}
    if isinstance(value, ctypes.Array | list | tuple):
        return [plain(one) for one in value]
    if hasattr(value, "__dict__"):
        return {name: plain(one) for name, one in vars(value).items()}
    return str(value)


# --- requests ---------------------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable[..., Any]] = {
    "read": read,
    "start": start,
    "list": listing,
    "link": link,
    "statvfs": statvfs,
    "written": written,
    "resolve": resolve,
    "connect": connect,
    "ipv4": ipv4,
    "clock": clock,
    "monotonic": monotonic,
    "user": user,
    "python": python,
    "environment": environment,
    "packages": packages,
    "nvml": nvml,
    "nvml_field": nvml_field,
}

# nvml.h, nvmlReturn_t: not supported and its kin; no permission; no library, no driver.
_NVML_PROBLEMS = {
    3: "unsupported",
    13: "unsupported",
    22: "unsupported",
    25: "unsupported",
    26: "unsupported",
    4: "not permitted",
    9: "missing",
    12: "missing",
    10: "timed out",
}


def answered(op: str, args: list[Any]) -> Answer:
    """The operation's value, or what stood in its way. Never raises."""
    try:
        return {"value": OPERATIONS[op](*args)}
    except (FileNotFoundError, NotADirectoryError) as error:
        return {"problem": "missing", "detail": f"{error.filename or args}"}
    except PermissionError as error:
        return {"problem": "not permitted", "detail": f"{error.filename or args}: {error.strerror}"}
    except OSError as error:
        return {"problem": "error", "detail": f"{args[0] if args else op}: {error.strerror or error}"}
    except Unsupported as error:
        return {"problem": "unsupported", "detail": str(error)}
    except ModuleNotFoundError as error:
        return {"problem": "missing", "detail": f"Python package {error.name}"}
    except Exception as error:  # noqa: BLE001 (reported to the parent, which makes it an Unread)
        code = getattr(error, "value", None)
        if type(error).__module__ == "pynvml" and isinstance(code, int):
            return nvml_problem(code, f"{args[0]}: {error}")
        return {"problem": "error", "detail": f"{op}: {type(error).__name__}: {error}"}


def main() -> None:
    for request in sys.stdin:
        asked = json.loads(request)
        print(json.dumps(answered(asked["op"], asked["args"])), flush=True)


if __name__ == "__main__":
    main()
