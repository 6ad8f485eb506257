"""How NCCL, Gloo and UCX read the lists of interfaces and devices that people write. Pure.

NCCL: `src/misc/utils.cc` (parseStringList, matchIfList) and `src/os/linux.cc` (ncclOsFindInterfaces) of NCCL 2.30.
One leading `^` inverts the whole list, one leading `=` makes the whole list exact, otherwise every element is a
prefix: `mlx5_1` is mlx5_1 and mlx5_10 too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Element:
    """One element of a list: a name or prefix, and the port where one is named."""

    name: str
    port: int | None = None


@dataclass(frozen=True)
class Selector:
    """A value of NCCL_SOCKET_IFNAME or NCCL_IB_HCA."""

    elements: tuple[Element, ...]
    inverted: bool = False
    exact: bool = False

    def matches(self, name: str, port: int | None = None) -> bool:
        """Whether NCCL takes this interface or port. An empty list takes everything."""
        listed = not self.elements or any(self._is(element, name, port) for element in self.elements)
        return listed != self.inverted

    def elements_without_match(self, names: Iterable[tuple[str, int | None]]) -> list[str]:
        """The elements that stand for nothing that is here; none for an inverted list, where that is harmless."""
        known = list(names)
        return (
            []
            if self.inverted
            else [
                element.name if element.port is None else f"{element.name}:{element.port}"
                for element in self.elements
                if not any(self._is(element, name, port) for name, port in known)
            ]
        )

    def _is(self, element: Element, name: str, port: int | None) -> bool:
        named = name == element.name if self.exact else name.startswith(element.name)
        return named and (element.port is None or port is None or element.port == port)


def nccl_selector(value: str) -> Selector:
    """Read a list as NCCL does: `^` before `=`, ports after a colon, empty elements skipped."""
    inverted = value.startswith("^")
    value = value.removeprefix("^") if inverted else value
    exact = value.startswith("=")
    value = value.removeprefix("=") if exact else value
    elements = []
    for word in value.split(","):
        name, _, rest = word.partition(":")
        port = rest.partition(":")[0]
        if name:
            elements.append(Element(name, int(port) if port.isdecimal() else None))
    return Selector(tuple(elements), inverted, exact)


def exact_names(value: str) -> list[str]:
    """The elements of GLOO_SOCKET_IFNAME or UCX_NET_DEVICES: exact names with commas between them."""
    return [word for word in (word.strip() for word in value.split(",")) if word]
