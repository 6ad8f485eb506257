"""Arguments of recipes: a frozen dataclass is the interface, `key=value` words on a command line fill it.

Standard library only: the launcher reads these classes on the login node and in shell completion, where
importing torch would cost seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import os
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from recipes.lib.model_sizes import SIZES

T = TypeVar("T")
A = TypeVar("A")


class ArgumentError(ValueError):
    """A wrong argument, as one line that begins with the key: `steps=abc: wants a whole number (int)`."""

    def __init__(self, key: str, value: object, problem: str) -> None:
        self.key = key
        self.value = value
        self.problem = problem
        super().__init__(f"{key}={_shown(value)}: {problem}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Rank 0 sends this error to the others; the default would call __init__ with the message alone.
        return ArgumentError, (self.key, self.value, self.problem), {"args": self.args}


class UnknownArgument(ArgumentError):
    """A key that the recipe does not have."""

    def __init__(self, key: str, value: object, owner: str, known: Sequence[str]) -> None:
        nearest = nearest_name(key, known)
        hint = f"nearest: {nearest}" if nearest else f"it has: {', '.join(known)}"
        super().__init__(key, value, f"{owner} has no such argument; {hint}")


class UnassignedWord(ArgumentError):
    """A word on the command line without an equals sign: `--steps 20`, `resume`."""

    def __init__(self, word: str, known: Sequence[str]) -> None:
        wanted = nearest_name(word, known) or "key"
        super().__init__(word, None, "")
        self.problem = f"arguments are key=value words; wants {wanted}=VALUE"
        self.args = (f"{word}: {self.problem}",)


@dataclass(frozen=True)
class Argument:
    """One argument as the help table, the launcher's validation and shell completion see it."""

    name: str
    kind: Any
    """The annotation, resolved: `int`, `str | None`, `list[int]` …"""
    default: Any
    help: str
    choices: tuple[str, ...] | None
    minimum: float | None
    above: float | None
    maximum: float | None

    @property
    def kind_text(self) -> str:
        """The annotation as a person writes it."""
        return self.kind.__name__ if isinstance(self.kind, type) else str(self.kind)


def argument(
    default: T,
    help: str,
    choices: Sequence[str] | None = None,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
) -> T:
    """A dataclass field with its default, its help line and what values it takes.

    `minimum` and `maximum` are inclusive, `above` is not. A list as default is copied for every instance.
    """
    metadata = {
        "help": help,
        "choices": tuple(choices) if choices is not None else None,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
    }
    if isinstance(default, list):
        copies: Any = dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
        return typing.cast(T, copies)
    return dataclasses.field(default=default, metadata=metadata)


def arguments_of(cls: type[Any]) -> dict[str, Argument]:
    """Every argument of `cls` by name, in the order of declaration, inherited ones first."""
    hints = typing.get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        if "help" not in field.metadata:
            raise TypeError(f"{cls.__name__}.{field.name} is not declared with argument(default, help)")
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        found[field.name] = Argument(
            name=field.name, kind=hints[field.name], default=default, **field.metadata
        )
    return found


def convert(cls: type[Any], values: Mapping[str, object]) -> dict[str, Any]:
    """Typed and checked values for the keys in `values`, and for those only; the result is plain JSON data.

    Takes raw text from a shell and typed values from YAML alike. What counts as a value of a field:

    - `str`: the text unchanged, whatever it looks like. A typed number is refused: YAML lost its spelling.
    - `int`: `200`, `1_000`, `1e3`; not `2.5`, not `true`.   `float`: any finite number.
    - `bool`: true/false, yes/no, 1/0.   `X | None`: `null`, or an X.
    - `list[X]`: JSON (`[1, 2]`) or words with commas (`1,2`); an empty text is an empty list.

    Raises ArgumentError for a key that `cls` does not have or a value that the field does not take.
    """
    known = arguments_of(cls)
    converted = {}
    for key, value in values.items():
        if key not in known:
            raise UnknownArgument(key, value, cls.__name__, list(known))
        converted[key] = _checked(known[key], value)
    return converted


def with_overrides(cls: type[Any], *layers: Mapping[str, object]) -> dict[str, Any]:
    """The complete arguments of `cls`: its defaults, then each layer over the ones before it.

    Raises ArgumentError as `convert` does, and whatever ArgumentError the class's own `__post_init__` raises.
    """
    given: dict[str, Any] = {}
    for layer in layers:
        given.update(convert(cls, layer))
    return dataclasses.asdict(cls(**given))


def parse(cls: type[A], argv: Sequence[str]) -> A:
    """The arguments from `key=value` words; of a key given twice the last one counts: scripts append.

    `--help` prints the table of arguments and exits with status 0. Raises ArgumentError for everything else
    that is not a known key with a good value.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(cls))
        raise SystemExit(0)
    values: dict[str, object] = {}
    known = list(arguments_of(cls))
    for word in argv:
        key, equals, value = word.partition("=")
        if not equals:
            raise UnassignedWord(word, known)
        if key not in known:
            raise UnknownArgument(key, value, cls.__name__, known)
        values[key] = value
    return cls(**convert(cls, values))


def parse_or_exit(cls: type[A], argv: Sequence[str] | None = None) -> A:
    """`parse` for a recipe's entry point: a wrong argument is one line on stderr and exit status 2."""
    with one_line_errors():
        return parse(cls, sys.argv[1:] if argv is None else argv)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Make an ArgumentError one line on stderr and exit status 2 instead of a traceback.

    Every rank has the same arguments and the same error, so the line comes from rank 0 alone.
    """
    try:
        yield
    except ArgumentError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error  # the cause is for whoever records why the process ended


def help_text(cls: type[Any]) -> str:
    """The table that `--help` prints: one line per argument with its type, default and meaning."""
    rows = []
    for known in arguments_of(cls).values():
        default = known.default if isinstance(known.default, str) else json.dumps(known.default)
        choices = f" ({' | '.join(known.choices)})" if known.choices else ""
        rows.append((f"{known.name}={default}", known.kind_text, known.help + choices))
    left, middle = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = [f"  {word:<{left}}  {kind:<{middle}}  {meaning}" for word, kind, meaning in rows]
    return "\n".join([f"{cls.__name__}: arguments are key=value words; these are the defaults.", *lines])


@dataclass(frozen=True, kw_only=True)
class TrainArgs:
    """What every training recipe takes; a recipe's own dataclass inherits these and adds its few."""

    model: str = argument("tiny", "size of the model", tuple(SIZES))
    init_from: str = argument("", "folder of Hugging Face safetensors to start from; empty is random weights")
    data: str = argument(
        "stdlib", "stdlib, a folder of .txt/.md/.py/.jsonl files, or hf:NAME of a Hugging Face dataset"
    )
    sequence_length: int = argument(256, "tokens per sequence", minimum=1)
    batch_size: int = argument(8, "sequences per optimizer step, over all ranks together", minimum=1)
    microbatch_size: int = argument(
        0,
        "sequences per forward on one rank, the gradients accumulate; 0 is its whole share at once",
        minimum=0,
    )
    steps: int = argument(200, "optimizer steps in the whole run", minimum=1)
    lr: float = argument(0.0, "peak learning rate; 0 is the model's own", minimum=0)
    min_lr_ratio: float = argument(0.1, "last learning rate as a part of the peak", minimum=0, maximum=1)
    warmup_steps: int = argument(20, "steps in which the learning rate rises to its peak", minimum=0)
    weight_decay: float = argument(0.1, "AdamW's weight decay, on matrices only", minimum=0)
    clip_norm: float = argument(1.0, "largest norm of the gradient; 0 does not clip", minimum=0)
    seed: int = argument(0, "seed of the weights and of the order of the data", minimum=0)
    dtype: str = argument(
        "auto",
        "of the computation: auto is bfloat16 on a GPU, float32 on a CPU",
        ("auto", "float32", "bfloat16", "float64"),
    )
    activation_checkpointing: str = argument(
        "none",
        "recompute activations in the backward pass instead of keeping them",
        ("none", "full", "selective"),
    )
    compile: bool = argument(False, "torch.compile each transformer block")
    log_every: int = argument(1, "steps between two lines of metrics", minimum=1)
    save_every: int = argument(50, "steps between two checkpoints; 0: only at the end, -1: never", minimum=-1)
    keep: int = argument(3, "checkpoints that are kept: the newest so many", minimum=1)
    keep_every: int = argument(0, "keep those of every so many steps for good, too; 0: none", minimum=0)
    async_save: bool = argument(True, "write checkpoints in the background; false stops the steps meanwhile")
    vocab_size: int = argument(
        0, "rows of the embedding; 0 is the model's own, or for tiny and small the tokenizer's", minimum=0
    )
    device: str = argument("auto", "auto is the GPU where there is one", ("auto", "cpu", "cuda"))
    resume: bool = argument(
        True, "go on from the newest checkpoint of the run directory; false: refuse one that holds any"
    )

    def __post_init__(self) -> None:
        """Refuse a sequence that the model was not made for. Raises ArgumentError."""
        longest = SIZES[self.model].context
        if self.sequence_length > longest > 0:
            problem = f"model={self.model} was made for sequences of {longest:,} tokens at most"
            raise ArgumentError("sequence_length", self.sequence_length, problem)

    def check_ranks(self, ranks: int, ranks_per_node: int) -> None:
        """Refuse a number of ranks that a recipe cannot use; the launcher asks before it submits.

        Raises ArgumentError.
        """

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up: `lr`, or where that is 0 the one that suits the model."""
        return self.lr or SIZES[self.model].lr

    def vocabulary_rows(self, tokenizer_vocab_size: int) -> int:
        """Rows of the embedding: `vocab_size`, or where that is 0 the model's own, or the tokenizer's.

        Raises ArgumentError where the embedding would have fewer rows than the tokenizer has tokens: on a GPU
        that mistake shows as an assertion deep inside an index kernel.
        """
        rows = self.vocab_size or SIZES[self.model].vocab_size or tokenizer_vocab_size
        if rows < tokenizer_vocab_size:
            problem = f"wants {tokenizer_vocab_size} or more, the number of tokens that the tokenizer has"
            raise ArgumentError("vocab_size", rows, problem)
        return rows


def nearest_name(name: str, known: Sequence[str]) -> str | None:
    """The known name that `name` was probably meant to be; None where nothing is near."""
    bare = name.lstrip("-").removeprefix("args.").replace("-", "_").lower()
    by_lower_case = {each.lower(): each for each in known}
    nearest = (
        [bare] if bare in by_lower_case else difflib.get_close_matches(bare, by_lower_case, n=1, cutoff=0.6)
    ) or [each for each in by_lower_case if each.startswith(f"{bare}_")]
    return by_lower_case[nearest[0]] if nearest else None


def _checked(known: Argument, value: object) -> Any:
    typed = _typed(known.name, known.kind, value)
    for item in typed if isinstance(typed, list) else [typed]:
        _check_choice(known, item)
        _check_range(known, value, item)
    return typed


def _check_choice(known: Argument, item: Any) -> None:
    if known.choices is None or item is None or item in known.choices:
        return
    nearest = nearest_name(str(item), known.choices)
    hint = f"; nearest: {nearest}" if nearest else ""
    raise ArgumentError(known.name, item, f"wants one of {', '.join(known.choices)}{hint}")


def _check_range(known: Argument, value: object, item: Any) -> None:
    if isinstance(item, bool) or not isinstance(item, int | float):
        return
    if known.minimum is not None and item < known.minimum:
        raise ArgumentError(known.name, value, f"wants {known.minimum:g} or more")
    if known.above is not None and item <= known.above:
        raise ArgumentError(known.name, value, f"wants more than {known.above:g}")
    if known.maximum is not None and item > known.maximum:
        raise ArgumentError(known.name, value, f"wants {known.maximum:g} or less")


def _typed(key: str, kind: Any, value: object) -> Any:
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        (inner,) = (part for part in typing.get_args(kind) if part is not type(None))
        if value is None or value in ("null", "none", "None"):
            return None
        return _typed(key, inner, value)
    if origin is list:
        (inner,) = typing.get_args(kind)
        return [_typed(key, inner, item) for item in _items(key, value)]
    if kind is str:
        if not isinstance(value, str):
            raise ArgumentError(key, value, "wants text (str); in YAML, put quotes around it")
        return value
    if kind is bool:
        return _bool(key, value)
    if kind is int:
        return _int(key, value)
    if kind is float:
        return _float(key, value)
    raise TypeError(f"{key}: arguments of type {kind} are not supported")


def _items(key: str, value: object) -> Sequence[object]:
    if isinstance(value, list | tuple):
        return value
    if not isinstance(value, str):
        raise ArgumentError(key, value, "wants a list: [a, b] or a,b")
    if not value.lstrip().startswith("["):
        return [word.strip() for word in value.split(",")] if value.strip() else []
    try:
        items = json.loads(value)
    except json.JSONDecodeError:
        # A shell eats the quotes of ["a", "b"], so that [a, b] is what arrives.
        inner = value.strip().removeprefix("[").removesuffix("]")
        if not value.strip().endswith("]") or any(mark in inner for mark in '[]"'):
            raise ArgumentError(key, value, "wants a list: [a, b] or a,b") from None
        return [word.strip() for word in inner.split(",")]
    return typing.cast("list[object]", items)


_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")


def _bool(key: str, value: object) -> bool:
    word = str(value).lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ArgumentError(key, value, "wants true or false (bool)")


def _int(key: str, value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return int(value)
    try:
        number = _float(key, value)
    except ArgumentError:
        raise ArgumentError(key, value, "wants a whole number (int)") from None
    # 1e3 is a whole number, and the way people write large ones; a float holds each of them only up to 2**53.
    if not number.is_integer() or abs(number) > 2**53:
        raise ArgumentError(key, value, "wants a whole number (int)")
    return int(number)


def _float(key: str, value: object) -> float:
    number = math.nan
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            number = float(value)
    if not math.isfinite(number):
        raise ArgumentError(key, value, "wants a finite number (float)")
    return number


def _shown(value: object) -> str:
    """A value inside a one-line message: as it was written if that is short and printable."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if len(text) > 80:
        text = text[:77] + "..."
    return text if text.isprintable() else repr(text)
