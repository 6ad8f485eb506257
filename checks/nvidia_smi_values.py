"""Single values in the text of `nvidia-smi`, as records of an answer of NVML. Pure."""

from __future__ import annotations

import re
from typing import Any

from checks.evidence import Record, key_of
from checks.reading import NOT_A_VALUE

UNSUPPORTED = re.compile(r"N/A|Not Supported|deprecated", re.IGNORECASE)
"""Of what stands for a value, what means that there is none; the rest means that it could not be had."""


def put(found: dict[str, Record], record: Record, function: str, *args: Any) -> None:
    found[key_of("nvml", [function, *args])] = record


def value_of(text: str | None, kind: Any) -> Record:
    if text is None:
        return {"problem": "not recorded", "detail": "not in this output of nvidia-smi"}
    if "is lost" in text:
        return {"problem": "error", "detail": text, "nvml": 15}
    if "requires reset" in text:  # [GPU requires reset]: NVML_ERROR_RESET_REQUIRED
        return {"problem": "error", "detail": text, "nvml": 16}
    if NOT_A_VALUE.fullmatch(text):
        problem = "unsupported" if UNSUPPORTED.search(text) else "error"
        problem = "not permitted" if "Permission" in text else problem
        return {"problem": problem, "detail": f"nvidia-smi says {text}"}
    try:
        return {"value": kind(text)}
    except (ValueError, KeyError, IndexError):
        return {"problem": "error", "detail": f"nvidia-smi says {text!r}"}


def listed(*records: Record) -> Record:
    return next(
        (one for one in records if "value" not in one), {"value": [one.get("value") for one in records]}
    )


def members(**records: Record) -> Record:
    broken = next((one for one in records.values() if "value" not in one), None)
    return broken or {"value": {name: one["value"] for name, one in records.items()}}


def first_number(text: str) -> int:
    return int(text.split()[0])


def mebibytes(text: str) -> int:
    return int(text.removesuffix("MiB")) << 20


def lanes(text: str) -> int:
    return int(text.removesuffix("x"))


def enabled(text: str) -> int:
    return {"Enabled": 1, "Disabled": 0}[text]


def yes(text: str) -> int:
    return {"Yes": 1, "No": 0}[text]


def cuda_number(text: str) -> int:
    major, minor = text.split(".")
    return int(major) * 1000 + int(minor) * 10
