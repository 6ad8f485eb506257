"""Evidence in one file: what a node answered, to be judged anywhere. File system.

Gzipped JSON: {"format": …, "version": 1, "sha256": …, "body": {"node", "taken", "expected", "records"}}. The checksum
is of the body as it stands in the file, so a bundle that was cut or edited says so.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import time
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from checks.capture_text import LOG_AS_JSON
from checks.evidence import Record
from checks.expectations import FABRICS, Expectations
from checks.reading import counted
from checks.worker import masked

FORMAT = "evidence of checks"
VERSION = 1
MOST_BYTES = 256 << 20
START_BYTES = 4096
GZIPPED = b"\x1f\x8b"


class BundleError(ValueError):
    """One line: which file, and what is wrong with it."""


@dataclass(frozen=True)
class Bundle:
    node: str
    taken: float
    """Unix seconds."""
    expected: Expectations
    records: Mapping[str, Record]


def make(node: str, expected: Expectations, records: Mapping[str, Record]) -> Bundle:
    return Bundle(
        node, round(time.time(), 3), expected, {key: _without_secrets(key, records[key]) for key in records}
    )


def _without_secrets(key: str, record: Record) -> Record:
    """A second net under the worker's own: nothing that means a secret goes into a file."""
    value = record.get("value")
    if key.startswith("environment ") and isinstance(value, dict):
        return {**record, "value": {name: masked(name, str(text)) for name, text in value.items()}}
    return record


def write(bundle: Bundle, path: Path) -> None:
    text = dumps(bundle)
    data = text.encode()
    # No name and no time in the header: equal evidence gives equal files.
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def dumps(bundle: Bundle) -> str:
    body = json.dumps(
        {
            "node": bundle.node,
            "taken": bundle.taken,
            "expected": asdict(bundle.expected),
            "records": bundle.records,
        },
        indent=1,
        sort_keys=True,
    )
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f'{{"format": "{FORMAT}", "version": {VERSION}, "sha256": "{digest}", "body":\n{body}}}\n'


def contents(path: Path) -> bytes:
    """Of a gzipped file what is in it. Raises BundleError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}") from None
    if data[:2] != GZIPPED:
        return data
    try:
        unpacked = zlib.decompressobj(wbits=31)
        data = unpacked.decompress(data, MOST_BYTES)
    except zlib.error as error:
        raise BundleError(f"{path}: damaged: {error}") from None
    if not unpacked.eof:
        raise BundleError(f"{path}: cut short: {counted(len(data), 'byte')}, then the file ends")
    return data


def read(path: Path) -> Bundle:
    """Raises BundleError for whatever is wrong."""
    try:
        text = contents(path).decode()
    except UnicodeDecodeError:
        raise BundleError(f"{path}: not a bundle: it is not text") from None
    return _loads(text, str(path))


def is_bundle(path: Path) -> bool:
    """Whether a file begins like a bundle, be it whole or not; a log as JSON, or one that is gzipped, does not."""
    with open(path, "rb") as file:
        start = file.read(START_BYTES)
    if start[:2] == GZIPPED:
        try:
            start = zlib.decompressobj(wbits=31).decompress(start, START_BYTES)
        except zlib.error:
            return True  # damaged, as `read` says
    return start[:1] == b"{" and not LOG_AS_JSON.match(start.decode(errors="replace"))


def _loads(text: str, where: str) -> Bundle:
    try:
        whole = json.loads(text)
    except ValueError as error:
        raise BundleError(f"{where}: not a bundle, or cut short: {error}") from None
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise BundleError(f"{where}: not a bundle: no format {FORMAT!r}")
    if whole.get("version") != VERSION:
        raise BundleError(f"{where}: version {whole.get('version')!r}; this program reads version {VERSION}")
    body = text[text.index('"body":') + len('"body":') :].strip().removesuffix("}").strip()
    if hashlib.sha256(body.encode()).hexdigest() != whole.get("sha256"):
        raise BundleError(f"{where}: its checksum is wrong: cut or edited")
    return _body(whole["body"], where)


def _body(body: Any, where: str) -> Bundle:
    try:
        expected = body["expected"]
        known = {one.name for one in fields(Expectations)}
        unknown = set(expected) - known
        if unknown:
            raise BundleError(f"{where}: unknown expectation {min(unknown)}")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in expected.items()
        }
        strange = [name for name, value in values.items() if not _fits(name, value)]
        if strange:
            raise BundleError(f"{where}: expectation {strange[0]} is {values[strange[0]]!r}")
        records = body["records"]
        if not isinstance(records, dict) or not all(isinstance(record, dict) for record in records.values()):
            raise BundleError(f"{where}: its records are none")
        return Bundle(str(body["node"]), float(body["taken"]), Expectations(**values), records)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{where}: malformed: {type(error).__name__}: {error}") from None


def _fits(name: str, value: Any) -> bool:
    default = getattr(Expectations(), name)
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(isinstance(one, str) for one in value)
    if isinstance(default, bool):
        return isinstance(value, bool)
    if value is None or name not in ("gpus", "rails"):
        return value is None or (isinstance(value, str) and (name != "fabric" or value in FABRICS))
    return isinstance(value, int) and not isinstance(value, bool)
