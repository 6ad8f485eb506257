"""The nearest right word for a wrong one. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` was probably meant to be; None where nothing is near.

    Spelling counts, case and `-` for `_` do not: people type `Tasks-Per-Node`.
    """
    by_folded = {_folded(candidate): candidate for candidate in known}
    close = difflib.get_close_matches(_folded(word), by_folded, n=1, cutoff=0.6)
    # `offload` is spelled nothing like offload_optimizer, and is its beginning.
    close = close or [each for each in by_folded if each.startswith(f"{_folded(word)}_")]
    return by_folded[close[0]] if close else None


def did_you_mean(word: str, known: Iterable[str], *, prefix: str = "", suffix: str = "") -> str:
    """The end of a one-line error: `did you mean X?`, or what there is when nothing is near."""
    candidates = list(known)
    best = nearest(word, candidates)
    if best is not None:
        return f"did you mean {prefix}{best}{suffix}?"
    if not candidates:
        return "there is none"
    named = [prefix + candidate + suffix for candidate in candidates]
    more = ["..."] if len(named) > _MOST_LISTED else []
    return f"there is {', '.join(named[:_MOST_LISTED] + more)}"


_MOST_LISTED = 24


def _folded(word: str) -> str:
    return word.lower().replace("-", "_")
