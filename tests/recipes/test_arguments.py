"""Arguments: what a person types becomes typed values, or one line that says what is wrong."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, dataclass
from typing import Any

import pytest

from recipes.lib.arguments import (
    ArgumentError,
    TrainArgs,
    argument,
    arguments_of,
    convert,
    help_text,
    parse,
    parse_or_exit,
    with_overrides,
)
from recipes.lib.model_sizes import SIZES


@dataclass(frozen=True, kw_only=True)
class Everything:
    text: str = argument("", "any text")
    whole: int = argument(1, "a whole number", minimum=-5, maximum=10**9)
    number: float = argument(0.5, "a number", above=0)
    flag: bool = argument(False, "yes or no")
    maybe: int | None = argument(None, "a number or null")
    maybe_text: str | None = argument(None, "a text or null")
    numbers: list[int] = argument([1], "whole numbers", minimum=0)
    words: list[str] = argument([], "words", choices=("left", "right"))
    strategy: str = argument("full_shard", "which way", choices=("full_shard", "shard_grad_op"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        " two  words ",
        "[1, 2]",
        "a=b=c",
        "größer/日本",
        "123",
        "1e3",
        "null",
        "true",
        "'quoted'",
        "line\nbreak",
        "#x",
    ],
)
def test_a_text_arrives_unchanged(text: str) -> None:
    assert parse(Everything, [f"text={text}"]).text == text
    assert convert(Everything, {"text": text}) == {"text": text}


@pytest.mark.parametrize(
    ("key", "given", "wanted"),
    [
        ("whole", "200", 200),
        ("whole", "-3", -3),
        ("whole", "1_000", 1000),
        ("whole", "1e3", 1000),
        ("whole", 1000.0, 1000),
        ("number", "1e-4", 1e-4),
        ("number", "3", 3.0),
        ("number", 3, 3.0),
        ("flag", "true", True),
        ("flag", "YES", True),
        ("flag", "1", True),
        ("flag", "no", False),
        ("flag", "0", False),
        ("flag", True, True),
        ("maybe", "null", None),
        ("maybe", None, None),
        ("maybe", "7", 7),
        ("maybe_text", "null", None),
        ("maybe_text", "seven", "seven"),
        ("numbers", "[1, 2]", [1, 2]),
        ("numbers", "1,2", [1, 2]),
        ("numbers", "", []),
        ("numbers", [1, "2"], [1, 2]),
        ("words", "[left, right]", ["left", "right"]),
        ("words", '["left"]', ["left"]),
        ("strategy", "shard_grad_op", "shard_grad_op"),
    ],
)
def test_a_value_is_converted_to_the_fields_type(key: str, given: object, wanted: object) -> None:
    value = convert(Everything, {key: given})[key]
    assert value == wanted
    assert type(value) is type(wanted)


@pytest.mark.parametrize(
    ("key", "given", "problem"),
    [
        ("whole", "2.5", "wants a whole number (int)"),
        ("whole", "abc", "wants a whole number (int)"),
        ("whole", "", "wants a whole number (int)"),
        ("whole", True, "wants a whole number (int)"),
        ("whole", "1e300", "wants a whole number (int)"),
        ("whole", None, "wants a whole number (int)"),
        ("whole", "-6", "wants -5 or more"),
        ("whole", "1e10", "wants 1e+09 or less"),
        ("number", "0", "wants more than 0"),
        ("number", "fast", "wants a finite number (float)"),
        ("number", "nan", "wants a finite number (float)"),
        ("number", "inf", "wants a finite number (float)"),
        ("number", True, "wants a finite number (float)"),
        ("flag", "maybe", "wants true or false (bool)"),
        ("flag", 2, "wants true or false (bool)"),
        ("text", 123, "in YAML, put quotes around it"),
        ("maybe", "seven", "wants a whole number (int)"),
        ("numbers", "1,x", "wants a whole number (int)"),
        ("numbers", "[1, 2", "wants a list"),
        ("numbers", 3, "wants a list"),
        ("numbers", "1,-2", "wants 0 or more"),
        ("words", "lefft", "nearest: left"),
        ("strategy", "full-shard", "nearest: full_shard"),
        ("strategy", "zzz", "wants one of full_shard, shard_grad_op"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_that_begins_with_its_key(
    key: str, given: object, problem: str
) -> None:
    with pytest.raises(ArgumentError) as caught:
        convert(Everything, {key: given})
    line = str(caught.value)
    assert line.startswith(f"{key}=")
    assert problem in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("stepz=3", "nearest: steps"),
        ("args.steps=3", "nearest: steps"),
        ("--steps=3", "nearest: steps"),
        ("--batch-size=3", "nearest: batch_size"),
        ("activation=full", "nearest: activation_checkpointing"),
        ("learning_rate=3", "it has: model, init_from, data"),
        ("--steps", "wants steps=VALUE"),
        ("resume", "wants resume=VALUE"),
    ],
)
def test_a_wrong_word_is_answered_with_the_nearest_right_one(word: str, hint: str) -> None:
    with pytest.raises(ArgumentError, match=hint):
        parse(TrainArgs, [word])


def test_a_long_or_unprintable_value_still_makes_one_short_line() -> None:
    for value in ("x" * 1000, "a\nb", "\x1b[31m"):
        with pytest.raises(ArgumentError) as caught:
            parse(TrainArgs, [f"steps={value}"])
        assert len(str(caught.value)) < 150
        assert str(caught.value).isprintable()


def test_of_a_key_given_twice_the_last_counts() -> None:
    assert parse(TrainArgs, ["steps=5", "lr=1", "steps=6"]).steps == 6


def test_all_values_survive_the_way_through_json_words() -> None:
    """The launcher keeps arguments as JSON and starts the recipe with `key=value` words made of it."""
    values = with_overrides(
        Everything,
        {"text": "ä b", "numbers": [3, 4], "words": "left,right", "flag": "yes"},
        {"maybe": "7", "number": "1e-4"},
    )
    kept: dict[str, Any] = json.loads(json.dumps(values))
    assert kept == values
    words = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in kept.items()]
    assert asdict(parse(Everything, words)) == values


def test_overrides_are_complete_and_later_layers_win() -> None:
    values = with_overrides(TrainArgs, {"steps": 10, "lr": "1e-2"}, {"steps": "11"})
    assert list(values) == list(arguments_of(TrainArgs))
    assert (values["steps"], values["lr"], values["batch_size"]) == (11, 0.01, 8)


def test_a_list_default_is_not_shared_between_instances() -> None:
    Everything().numbers.append(9)
    assert Everything().numbers == [1]
    assert arguments_of(Everything)["numbers"].default == [1]


def test_arguments_cannot_be_changed_after_parsing() -> None:
    with pytest.raises(FrozenInstanceError):
        TrainArgs().steps = 3  # type: ignore[misc]


def test_help_lists_every_argument_with_its_default_and_exits_with_success(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(TrainArgs, ["steps=3", "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert printed.strip() == help_text(TrainArgs)
    for known in arguments_of(TrainArgs).values():
        assert f"  {known.name}=" in printed
        assert known.help in printed
    assert "tiny | small | smollm2_135m" in printed


@pytest.mark.parametrize(("rank", "lines"), [(None, 1), ("0", 1), ("3", 0)])
def test_a_recipe_fails_with_status_2_and_one_line_from_rank_0(
    rank: str | None, lines: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as caught:
        parse_or_exit(TrainArgs, ["steps=0"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines() == ["error: steps=0: wants 1 or more"][:lines]


def test_an_error_survives_being_sent_to_another_rank() -> None:
    with pytest.raises(ArgumentError) as caught:
        parse(TrainArgs, ["stepz=3"])
    copy = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(copy, ArgumentError)
    assert (str(copy), copy.key, copy.value) == (str(caught.value), "stepz", "3")


def test_a_field_without_help_is_a_mistake_of_the_recipes_author() -> None:
    @dataclass(frozen=True)
    class Bare:
        steps: int = 3

    with pytest.raises(TypeError, match=r"Bare\.steps"):
        arguments_of(Bare)


def test_the_vocabulary_follows_the_request_then_the_model_then_the_tokenizer() -> None:
    assert TrainArgs(vocab_size=5000).vocabulary_rows(4096) == 5000
    assert TrainArgs(model="llama_8b").vocabulary_rows(4096) == 128_256
    assert TrainArgs(model="tiny").vocabulary_rows(4096) == 4096
    with pytest.raises(ArgumentError, match="vocab_size=100: wants 4096 or more"):
        TrainArgs(vocab_size=100).vocabulary_rows(4096)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("smollm2_135m", 134.5), ("llama_1b", 1235.8), ("llama_8b", 8030.3), ("llama_70b", 70_553.7)],
)
def test_a_published_size_has_the_published_number_of_parameters(name: str, millions: float) -> None:
    size = SIZES[name]
    attention = 2 * size.width * size.head_dim * (size.heads + size.kv_heads)
    layer = attention + 3 * size.width * size.ffn_width + 2 * size.width
    embeddings = size.vocab_size * size.width * (1 if size.tied else 2)
    assert (size.layers * layer + embeddings + size.width) / 1e6 == pytest.approx(millions, abs=0.05)


def test_the_launcher_can_read_arguments_without_importing_torch() -> None:
    script = "import sys, recipes.lib.arguments; print(*{'torch', 'numpy', 'omegaconf'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == ""
