"""The text of a capture, however it was saved: encodings, line ends, colours, and logs as JSON. Pure."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

TERMINAL = re.compile(r"\x1b\[[\d;]*m")
"""Colours, as `dmesg --color=always` prints them between `NVRM:` and what follows."""

SPACE = re.compile(r"\s*")
LOG_AS_JSON = re.compile(r'\s*\{\s*"dmesg"\s*:|\s*\{[^{}]*"(?:MESSAGE|_TRANSPORT)"\s*:')
"""`dmesg --json` (util-linux 2.38, sys-utils/dmesg.c, print_record: pri, time, msg) and `journalctl -k -o json` or
`-o json-pretty` (systemd, src/shared/logs-show.c, output_json: one object for each entry, MESSAGE among its fields)."""


def decoded(data: bytes) -> str:
    """The text with plain line ends; a log as JSON as the lines that it was made of.

    Windows PowerShell's `ssh node dmesg > file` writes UTF-16 with a byte order mark; bytes that are not UTF-8 (a
    Latin-1 locale) stay what they are.

    Raises:
        ValueError: JSON that breaks off; the line says so.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = data.decode("utf-16", errors="replace")
    else:
        text = data.decode(errors="surrogateescape")
    text = TERMINAL.sub("", text.removeprefix("\ufeff").replace("\r\n", "\n"))
    return "".join(f"{row}\n" for row in _log_rows(text)) if LOG_AS_JSON.match(text) else text


def _log_rows(text: str) -> Iterator[str]:
    for entry in _objects(text):
        if isinstance(entry.get("dmesg"), list):
            for record in entry["dmesg"]:
                yield f"[{record.get('time', 0.0):12.6f}] {record.get('msg', '')}"
        elif "kernel" in (entry.get("_TRANSPORT"), entry.get("SYSLOG_IDENTIFIER")):
            message = entry.get("MESSAGE", "")
            # What is not UTF-8 is an array of bytes there (systemd, Journal Export Formats).
            said = bytes(message).decode(errors="replace") if isinstance(message, list) else str(message)
            yield f"kernel: {said}"


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """One JSON object after another."""
    decoder, at, end = json.JSONDecoder(), 0, len(text.rstrip())
    while at < end:
        at += len(SPACE.match(text, at)[0])  # type: ignore[index]
        try:
            entry, at = decoder.raw_decode(text, at)
        except ValueError:
            raise ValueError(f"a log as JSON that breaks off at character {at}") from None
        if isinstance(entry, dict):
            yield entry
