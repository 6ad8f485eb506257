"""Arguments that recipes share which measure over sizes. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.lib.arguments import ArgumentError, argument

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}


@dataclass(frozen=True, kw_only=True)
class SizeArgs:
    """Which sizes, how often, on what."""

    smallest: str = argument("4K", "smallest size: bytes, or with K, M, G (powers of 1024)")
    largest: str = argument("64M", "largest size")
    factor: int = argument(4, "each size is so many times the one before", minimum=2)
    trials: int = argument(5, "trials of each measurement; the median counts, the spread is shown", minimum=2)
    budget: float = argument(0.2, "seconds of a trial; short calls are repeated so long", above=0)
    device: str = argument("auto", "auto is the GPU where there is one", ("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        if parse_size("smallest", self.smallest) > parse_size("largest", self.largest):
            raise ArgumentError("smallest", self.smallest, f"wants at most largest={self.largest}")

    @property
    def sizes(self) -> list[int]:
        """Bytes, rising; the largest is among them."""
        found, size = [], parse_size("smallest", self.smallest)
        last = parse_size("largest", self.largest)
        while size < last:
            found.append(size)
            size *= self.factor
        return [*found, last]


def parse_size(key: str, text: str) -> int:
    """Bytes of "4K", "64M" or "1000". Raises ArgumentError for the argument `key`."""
    word = text.strip().lower().removesuffix("ib").removesuffix("b")
    number, unit = (word[:-1], word[-1:]) if word[-1:] in ("k", "m", "g") else (word, "")
    if not number.isdecimal() or not int(number):
        raise ArgumentError(key, text, "wants bytes such as 65536, 64K, 16M or 1G")
    return int(number) * _UNITS[unit]
