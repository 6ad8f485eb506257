"""The words of the command line: `key=value`, and the sweeps in them. Pure.

A value is everything after the first `=`, as the shell delivered it: no quoting rules of our own, so that
`args.data="/a b/ü [x]=(y)"` arrives unchanged. The one exception makes sweeps possible: in a key that takes
one plain value, a comma outside brackets separates values to try, and quotes inside the word (`args.note='"a,
b"'`) protect it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launcher.settings import split_at_commas
from launcher.spec import UserError


@dataclass(frozen=True)
class Override:
    """One word of the command line."""

    key: str
    value: str

    def __str__(self) -> str:
        """The word for a one-line message; a long value is cut, an unprintable one escaped."""
        value = self.value if len(self.value) <= 80 else self.value[:77] + "..."
        return f"{self.key}={value if value.isprintable() else ascii(value)[1:-1]}"


def parse_words(words: Sequence[str]) -> list[Override]:
    """The words in the order typed. Raises UserError for one that is not `key=value` or not text."""
    return [_parse_word(word) for word in words]


def _parse_word(word: str) -> Override:
    key, equals, value = word.partition("=")
    override = Override(key, value)
    try:
        word.encode()
    except UnicodeEncodeError:
        raise UserError(f"{ascii(word)[1:-1]}: this is not UTF-8 text") from None
    if not equals:
        hint = f"; write {key.lstrip('-')}=VALUE" if key.strip("-") else ""
        raise UserError(f"{word!r} is not a key=value word{hint}")
    if not key or key != key.strip() or not key.isprintable():
        raise UserError(f"{str(override)!r}: a key is wanted before the =")
    return override


def last_of_each(overrides: Sequence[Override]) -> list[Override]:
    """One word per key: of a key given twice the last one counts, so that a script can append."""
    return list({override.key: override for override in overrides}.values())


def expand(overrides: Sequence[Override], sweeps: Callable[[str], bool]) -> list[list[Override]]:
    """Every combination of the values that the words name, the last word changing fastest.

    `sweeps` tells whether a comma in the value of this key makes a sweep.
    Raises UserError where there is nothing between two commas.
    """
    axes = [_values(override) if sweeps(override.key) else [override] for override in overrides]
    return [list(point) for point in itertools.product(*axes)]


def _values(override: Override) -> list[Override]:
    elements = split_at_commas(override.value)
    if len(elements) > 1 and "" in elements:
        raise UserError(f"{override}: there is nothing between two commas of this sweep")
    return [Override(override.key, element) for element in elements]


def as_word(override: Override, sweeps: Callable[[str], bool]) -> str:
    """The word that is read back as this one value, quoted inside where it would otherwise be a sweep.

    Raises UserError for the rare value that no quotes can protect.
    """
    if not sweeps(override.key):
        return f"{override.key}={override.value}"
    for quote in ("", '"', "'"):
        value = f"{quote}{override.value}{quote}"
        if split_at_commas(value) == [override.value]:
            return f"{override.key}={value}"
    raise UserError(f"{override}: commas after both kinds of quotes cannot be part of one value")


def refuse_sweep(overrides: Sequence[Override], sweeps: Callable[[str], bool]) -> None:
    """Raise UserError for the first word that is a sweep: a command that shows or renders takes one job."""
    for override in overrides:
        if sweeps(override.key) and len(_values(override)) > 1:
            raise UserError(
                f"{override}: the comma makes a sweep, and here one job is wanted; "
                "quotes inside the word protect it"
            )
