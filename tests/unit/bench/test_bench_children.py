from __future__ import annotations

import os
from multiprocessing.connection import Connection

import numpy as np
import pytest

from moe_runtime.bench.bare.echo import echo_fleet
from moe_runtime.bench.children import Child
from moe_runtime.bench.errors import BenchError


def double(connection: Connection, offset: int) -> None:
    while True:
        (number,) = connection.recv()
        connection.send(2 * number + offset)


def stop_at_once(_: Connection) -> None:
    os._exit(3)


def test_a_child_answers_and_ends_with_its_with():
    with Child(double, 1) as child:
        assert child.ask(20) == 41
        pid = child.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_child_that_has_ended_is_an_error_and_no_hang():
    with Child(stop_at_once) as child, pytest.raises(BenchError, match="ended early"):
        child.ask("anything")


def test_a_child_that_is_late_is_an_error():
    with Child(double, 0) as child, pytest.raises(BenchError, match="has not answered"):
        child.answer(timeout_s=0.0)


def test_the_echo_processes_send_everything_back():
    parts = [np.ones((3, 4), np.float32), np.empty((0, 4), np.float32)]
    with echo_fleet(2) as echo:
        echo.exchange(parts)
        echo.exchange(parts)
