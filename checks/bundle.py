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

from checks.evidence import Record
from checks.expectations import FABRICS, Expectations
from checks.worker import masked

FORMAT = "evidence of checks"
VERSION = 1
MOST_BYTES = 256 << 20


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


def read(path: Path) -> Bundle:
    """Raises BundleError for whatever is wrong."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}") from None
    if data[:2] == b"\x1f\x8b":
        try:
            unpacked = zlib.decompressobj(wbits=31)
            data = unpacked.decompress(data, MOST_BYTES)
            if not unpacked.eof:
                raise BundleError(f"{path}: cut short: {len(data)} bytes, then the file ends")
        except zlib.error as error:
            raise BundleError(f"{path}: damaged: {error}") from None
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise BundleError(f"{path}: not a bundle: it is not text") from None
    return _loads(text, str(path))


def is_bundle(path: Path) -> bool:
    """Whether a file begins like a bundle, be it whole or not."""
    with open(path, "rb") as file:
        start = file.read(2)
    return start == b"\x1f\x8b" or start[:1] == b"{"


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
