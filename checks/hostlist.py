"""Slurm's notation for many nodes: `n[001-128,130],gpu7`. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

_PIECE = re.compile(r"([^\[\],]*)\[([^\]]*)\]([^\[\],]*)|([^\[\],]+)")


def folded(names: Iterable[str]) -> str:
    """`n1, n2, n3, n7` as `n[1-3,7]`: names that differ in their last number, in the order of that number."""
    groups: dict[tuple[str, str, int], set[int]] = {}
    for name in names:
        match = re.fullmatch(r"(.*?)(\d+)(\D*)", name)
        prefix, number, suffix = match.groups() if match else (name, "", "")
        # n1 and n001 are different nodes; so the width of a number with leading zeros is part of its group.
        width = len(number) if number.startswith("0") or not number else 0
        groups.setdefault((prefix, suffix, width), set()).add(int(number) if number else -1)
    return ",".join(_fold(*key, numbers) for key, numbers in sorted(_merged(groups).items()))


def _merged(groups: dict[tuple[str, str, int], set[int]]) -> dict[tuple[str, str, int], set[int]]:
    """n008, n009 and n010 are one group: a number as wide as the padded ones belongs to them."""
    merged: dict[tuple[str, str, int], set[int]] = {key: set(numbers) for key, numbers in groups.items()}
    for (prefix, suffix, width), numbers in groups.items():
        if width and (prefix, suffix, 0) in merged:
            fitting = {number for number in merged[(prefix, suffix, 0)] if len(str(number)) == width}
            merged[(prefix, suffix, width)] = numbers | fitting
            merged[(prefix, suffix, 0)] -= fitting
    return {key: numbers for key, numbers in merged.items() if numbers}


def _fold(prefix: str, suffix: str, width: int, numbers: set[int]) -> str:
    if numbers == {-1}:
        return prefix
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    texts = [
        f"{first:0{width}d}" if first == last else f"{first:0{width}d}-{last:0{width}d}"
        for first, last in ranges
    ]
    inside = ",".join(texts)
    return f"{prefix}{inside}{suffix}" if len(numbers) == 1 else f"{prefix}[{inside}]{suffix}"


def expanded(text: str) -> list[str]:
    """`n[1-3,7]` as `n1, n2, n3, n7`. Raises ValueError for what is no list of nodes."""
    found: list[str] = []
    place = 0
    while place < len(text):
        match = _PIECE.match(text, place)
        if match is None or match.end() == place:
            raise ValueError(f"not a list of nodes: {text!r}")
        place = match.end()
        if match[4]:
            found.append(match[4])
        else:
            for part in match[2].split(","):
                first, dash, last = part.partition("-")
                if not first.isdigit() or (dash and not last.isdigit()):
                    raise ValueError(f"not a list of nodes: {text!r}")
                numbers = range(int(first), int(last or first) + 1)
                found += [f"{match[1]}{number:0{len(first)}d}{match[3]}" for number in numbers]
        if place < len(text):
            if text[place] != ",":
                raise ValueError(f"not a list of nodes: {text!r}")
            place += 1
    return found
