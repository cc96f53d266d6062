"""Who watches its node ends when the node was given up, and only then."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from moe_runtime.ray_backend.node_watch import NodeWatch, RayView

MAX_QUESTIONS = 8


class Story:
    """What the cluster shows at each look and says at each question; the watch is stopped at its end."""

    def __init__(self, looks: list[bool], answers: list[bool | None]) -> None:
        self._looks: Iterator[bool] = iter(looks)
        self._answers = iter(answers)
        self.num_asked = 0
        self.num_ended = 0
        self._watch = NodeWatch(self, end=self._end, look_every_s=0.0)
        self._watch.run()

    def is_reached(self) -> bool:
        look = next(self._looks, None)
        if look is None:
            self._watch.stop()
        return look is not False

    def counts_us(self) -> bool | None:
        self.num_asked += 1
        answer = next(self._answers, None)
        if self.num_asked > MAX_QUESTIONS:
            self._watch.stop()
        return answer

    def _end(self) -> None:
        self.num_ended += 1


def test_node_that_reaches_its_cluster_asks_nothing() -> None:
    story = Story([True] * 5, [])
    assert (story.num_asked, story.num_ended) == (0, 0)


def test_node_that_was_given_up_while_it_was_cut_off_ends_as_soon_as_it_is_told() -> None:
    story = Story([True, False, True], [False])
    assert (story.num_asked, story.num_ended) == (1, 1)


def test_node_goes_on_for_as_long_as_nobody_answers() -> None:
    story = Story([True, False], [None] * 5)
    assert story.num_ended == 0


def test_node_that_still_counts_asks_once_for_each_gap() -> None:
    story = Story([False, True, True, False, True, True], [True, True])
    assert (story.num_asked, story.num_ended) == (2, 0)


def test_question_without_an_answer_is_asked_again_although_the_head_is_reached() -> None:
    story = Story([False], [None, None, False])
    assert (story.num_asked, story.num_ended) == (3, 1)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_head_is_reached_where_it_listens_and_only_there(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host.strip("[]"), 0), family=family) as listener:
        view = RayView(f"{host}:{listener.getsockname()[1]}", "0" * 56)
        assert view.is_reached()
    assert not view.is_reached()
