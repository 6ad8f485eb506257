"""The board where agents meet: strangers, nonsense and agents that die cost their own node's report, no more."""

from __future__ import annotations

import errno
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from checks import active, rails
from checks.board import Board, run_round
from checks.expectations import Expectations
from checks.measured import Job
from tests.checks.active_nodes import node


class Agent:
    """A connection to the board that says what a test wants."""

    def __init__(self, board: Board, name: str = "", ranks: Any = 1, **more: Any) -> None:
        self.connection = socket.create_connection(("localhost", board.port), timeout=5)
        self.heard = self.connection.makefile()
        if name:
            self.say(token=board.token, node=name, ranks=ranks, **more)

    def say(self, **words: Any) -> None:
        self.send(json.dumps(words).encode() + b"\n")

    def send(self, text: bytes) -> None:
        self.connection.sendall(text)

    def next(self) -> Any:
        return json.loads(self.heard.readline() or "null")

    def hears_nothing(self) -> bool:
        """Whether the board hangs up without a word; where it has not read everything the kernel resets."""
        try:
            self.connection.shutdown(socket.SHUT_WR)
            return self.heard.readline() == ""
        except OSError as error:
            return error.errno in (errno.ECONNRESET, errno.ENOTCONN)


@pytest.fixture
def board() -> Iterator[Board]:
    one = Board([("n1", "n2")], "pair")
    yield one
    one.close()


def healthy_pair(board: Board) -> None:
    """Two agents that do everything right get their places, and are thanked for their results."""
    first, second = Agent(board, "n1", 2), Agent(board, "n2", 2)
    for agent in (first, second):
        assert agent.next() == {"kind": "pair", "group": ["n1", "n2"]}
    assert first.next() == {"lead": True, "size": 4}
    first.say(port=4711)
    assert first.next() == {"first": 0, "world": 4, "address": "localhost", "port": 4711}
    assert second.next()["first"] == 2
    for agent in (first, second):
        agent.say(result={"ranks": [{"pair": 1.0}]})
        assert agent.next() == {"thanks": True}
    assert sorted(board.results) == ["n1", "n2"]


@pytest.mark.parametrize(
    "hello",
    [
        b"", b"\n", b"hello\n", b"{\n", b"3\n", b"[]\n", b"null\n", b"\xff\xfe\n", b"x" * 10_000,
        b'{"token": "wrong"}\n', b'{"token": {"a": 1}, "node": "n1", "ranks": 1}\n',
    ],
)  # fmt: skip
def test_a_stranger_is_told_nothing_and_disturbs_nobody(board: Board, hello: bytes) -> None:
    stranger = Agent(board)
    stranger.send(hello)
    assert stranger.hears_nothing()
    healthy_pair(board)


@pytest.mark.parametrize(
    "words",
    [
        {"node": "n9"},
        {"node": ["n1"]},
        {"ranks": "many"},
        {"ranks": None},
        {"services": 3},
        {"services": [1]},
    ],
)
def test_an_agent_that_says_nonsense_of_itself_is_not_waited_on(board: Board, words: dict[str, Any]) -> None:
    Agent(board).say(**{"token": board.token, "node": "n1", "ranks": 1, **words})
    healthy_pair(board)


@pytest.mark.parametrize(
    "result", [None, 3, "x", [], [node()], {"ranks": 3}, {"ranks": "x"}, {"ranks": [None]}, {"ranks": ["x"]}]
)
def test_a_result_of_another_form_is_no_result(board: Board, result: Any) -> None:
    first, second = Agent(board, "n1"), Agent(board, "n2")
    first.say(result=result)
    assert {"thanks": True} not in [
        json.loads(line) for line in first.heard
    ]  # which ends: the board hangs up
    second.say(result=node())
    second.connection.shutdown(socket.SHUT_WR)
    assert {"thanks": True} in [json.loads(line) for line in second.heard]
    assert list(board.results) == ["n2"]


@pytest.mark.parametrize(
    "line", [b"nonsense\n", b"[1, 2]\n", b'{"port": "x"}\n', b'{"port": null}\n', b"\xff\n"]
)
def test_nonsense_between_hello_and_result_costs_the_result(board: Board, line: bytes) -> None:
    Agent(board, "n2")
    first = Agent(board, "n1")
    first.send(line)
    first.say(result=node())
    time.sleep(0.2)
    assert line == b"[1, 2]\n" or "n1" not in board.results


def test_what_no_agent_reports_ends_with_the_agents_and_what_hangs_at_the_deadline() -> None:
    def ends_at_once(nodes: Any, words: Any) -> list[subprocess.Popen[Any]]:
        return [subprocess.Popen(["false"])]

    def hangs(nodes: Any, words: Any) -> list[subprocess.Popen[Any]]:
        return [subprocess.Popen(["sleep", "300"])]

    for start, deadline, least in ((ends_at_once, 250.0, 0.0), (hangs, 1.5, 1.5)):
        began = time.monotonic()
        assert run_round([["n1"]], "whole", deadline, start, words={}, address="localhost") == {}
        assert least <= time.monotonic() - began < 50


def test_in_a_round_of_rails_each_is_told_where_the_other_listens() -> None:
    board = Board([("n1", "n2")], "rails")
    try:
        there = {"mlx5_0": {"port": 1, "rate": 400.0}}, {"mlx5_0": {"port": 2, "rate": None}}
        agents = [Agent(board, name, services=one) for name, one in zip(("n1", "n2"), there, strict=True)]
        assert [agent.next()["kind"] for agent in agents] == ["rails", "rails"]
        places = [agent.next() for agent in agents]
        assert [(one["partner"], one["first"], one["address"]) for one in places] == [
            ("n2", True, ""),
            ("n1", False, ""),
        ]
        assert [one["services"] for one in places] == [there[1], there[0]]
    finally:
        board.close()


@pytest.mark.parametrize(
    "record",
    [{}, {"ranks": []}, {"ranks": [{}]}, {"ranks": [{"pair": "fast"}]}, {"ranks": [{"trouble": 3}]},
     {"gpus": "x", "transport": 3, "rails": 3, "rdma": 3, "perftest": 3}],
)  # fmt: skip
def test_what_the_board_lets_through_is_judged_whatever_it_holds(record: dict[str, Any]) -> None:
    nodes, expected, job = (
        ("n1", "n2"),
        Expectations(gpus=2, fabric="infiniband"),
        Job(nodes=2, expects_rails=True),
    )
    records = {"n1": record, "n2": node()}
    results = active.judged(nodes, records, job, expected)
    assert active.needs_pairs(results, records, job, expected)
    assert isinstance(active.pair_figure(active.Pair("n1", "n2"), records), str)
    assert not {one.check for one in results["n1"] if one.verdict.value == "pass"} & {
        "burn.product",
        "net.rails",
    }
    assert rails.rails_of(record.get("rails"))
