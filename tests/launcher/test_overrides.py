"""Words of a command line: what arrives is what the shell passed, and only a plain comma makes a sweep."""

from __future__ import annotations

import pytest

from launcher.overrides import Override, as_word, expand, last_of_each, parse_words, refuse_sweep
from launcher.settings import split_at_commas
from launcher.spec import UserError


def every_key_sweeps(key: str) -> bool:
    return True


def no_key_sweeps(key: str) -> bool:
    return False


@pytest.mark.parametrize(
    "value", ["/a b/ü [x]=(y)", "", "a=b=c", " leading", "$HOME", "${x}", "#1", "a\nb", "'"]
)
def test_a_value_arrives_as_the_shell_passed_it(value: str) -> None:
    words = parse_words([f"args.data={value}"])
    assert words == [Override("args.data", value)]
    assert expand(words, every_key_sweeps) == [words]


@pytest.mark.parametrize(
    ("text", "elements"),
    [
        ("1e-4,3e-4", ["1e-4", "3e-4"]),
        ("n[1,3],n7", ["n[1,3]", "n7"]),
        ("f(a,b)", ["f(a,b)"]),
        ("a),b", ["a)", "b"]),
        ('"a, b",c', ["a, b", "c"]),
        ("'a, b'", ["a, b"]),
        ('"a "quoted", word"', ['a "quoted', 'word"']),
        ("'a \"quoted\", word'", ['a "quoted", word']),
        ("it's, ok", ["it's", "ok"]),
        ('"never closed, b', ['"never closed', "b"]),
        ("a,", ["a", ""]),
        ("", [""]),
    ],
)
def test_commas_separate_outside_brackets_and_quotes(text: str, elements: list[str]) -> None:
    assert split_at_commas(text) == elements


def test_a_sweep_is_every_combination_the_last_word_changing_fastest() -> None:
    words = parse_words(["args.lr=1e-4,3e-4", "nodes=1,2"])
    points = [[override.value for override in point] for point in expand(words, every_key_sweeps)]
    assert points == [["1e-4", "1"], ["1e-4", "2"], ["3e-4", "1"], ["3e-4", "2"]]


def test_a_comma_in_a_key_that_does_not_sweep_is_part_of_the_value() -> None:
    words = parse_words(["env.NCCL_IB_HCA=mlx5_0,mlx5_1"])
    assert expand(words, no_key_sweeps) == [words]
    refuse_sweep(words, no_key_sweeps)


def test_nothing_between_two_commas_is_a_mistake() -> None:
    with pytest.raises(UserError, match=r"^args.lr=1,,2: there is nothing between two commas"):
        expand(parse_words(["args.lr=1,,2"]), every_key_sweeps)


def test_a_command_for_one_job_refuses_a_sweep_and_says_how_to_keep_the_comma() -> None:
    with pytest.raises(UserError, match=r"^args.lr=1,2: the comma makes a sweep.* quotes inside"):
        refuse_sweep(parse_words(["args.lr=1,2"]), every_key_sweeps)


def test_of_a_key_given_twice_the_last_one_counts() -> None:
    assert last_of_each(parse_words(["nodes=1,2", "time=5", "nodes=4"])) == [
        Override("nodes", "4"),
        Override("time", "5"),
    ]


@pytest.mark.parametrize(
    "value", ["plain", "a, b", "'a', b", '"a", b', "x[1,2]", '"quoted"', "it's, ok", "", 'it\'s "x", b']
)
def test_a_value_written_as_a_word_is_read_back_as_the_same_value(value: str) -> None:
    word = as_word(Override("args.note", value), every_key_sweeps)
    assert expand(parse_words([word]), every_key_sweeps) == [[Override("args.note", value)]]


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("nodes", "'nodes' is not a key=value word; write nodes=VALUE"),
        ("--nodes", "'--nodes' is not a key=value word; write nodes=VALUE"),
        ("=4", "'=4': a key is wanted before the ="),
        ("args.data=/\udcff", "args.data=/\\udcff: this is not UTF-8 text"),
    ],
)
def test_a_word_that_is_none_is_named(word: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_words([word])
    assert str(caught.value) == line


def test_a_long_value_is_cut_in_a_message() -> None:
    assert len(str(Override("args.data", "x" * 10_000))) < 100
    assert "\n" not in str(Override("args.data", "two\nlines"))
