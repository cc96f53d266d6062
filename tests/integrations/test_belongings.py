"""What experts hold is given back once, by the process that has it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from contextlib import ExitStack

import pytest

from moe_runtime.integrations.transformers.belongings import Belongings


class Owner:
    pass


def counted():
    stack, times = ExitStack(), []
    stack.callback(lambda: times.append(threading.current_thread()))
    return Belongings(stack), times


def test_they_are_given_back_once():
    belongings, times = counted()
    assert not belongings.is_given_back
    belongings.give_back()
    belongings.give_back()
    assert belongings.is_given_back
    assert len(times) == 1


def test_they_are_given_back_aside_when_their_owner_is_forgotten():
    belongings, times = counted()
    owner = Owner()
    belongings.give_back_with(owner)
    del owner
    gc.collect()
    for thread in threading.enumerate():
        if thread.name == "moe-runtime-give-back":
            thread.join()
    assert len(times) == 1
    assert times[0] is not threading.main_thread()


@pytest.mark.timeout(240)  # a process of its own imports transformers
def test_they_are_given_back_at_the_end_of_the_process_that_has_them_and_not_by_its_forks():
    program = """
import os, sys
from contextlib import ExitStack
from moe_runtime.integrations.transformers.belongings import Belongings
stack = ExitStack()
stack.callback(print, "given back")
belongings = Belongings(stack)
child = os.fork()
if child == 0:
    belongings.give_back()
    sys.stdout.flush()
    os._exit(0)
os.waitpid(child, 0)
print("end", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=os.environ,
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    assert done.stdout.split("\n") == ["end", "given back", ""]
