from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moe_runtime.launch.runtime import serve
from moe_runtime.logs import LogIdentity, LogSettings, install
from moe_runtime.rpc.client import MoEClient

LOG = logging.getLogger("moe_runtime.test")
IDENTITY = LogIdentity("router", "digits", "10.0.0.1/ab", pid=7)


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What is logged; the process's logging is as it was afterwards."""
    root, package = logging.getLogger(), logging.getLogger("moe_runtime")
    handlers, level = list(root.handlers), package.level
    yield io.StringIO()
    root.handlers[:] = handlers
    package.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_json_line_says_when_who_and_about_what(stream: io.StringIO) -> None:
    install(LogSettings("json", "info"), IDENTITY, stream=stream)
    LOG.info("dispatched %d rows", 4, extra={"request_ids": ("a", "b"), "layer": "l", "expert": "conv-0"})
    [line] = lines(stream)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line == {
        "level": "info",
        "logger": "moe_runtime.test",
        "message": "dispatched 4 rows",
        "node": "10.0.0.1/ab",
        "pid": 7,
        "role": "router",
        "runtime": "digits",
        "request_ids": ["a", "b"],
        "layer": "l",
        "expert": "conv-0",
    }


def test_an_exception_is_one_field_of_one_line(stream: io.StringIO) -> None:
    install(LogSettings("json"), IDENTITY, stream=stream)
    try:
        raise KeyError("a\nb")
    except KeyError:
        LOG.exception("it failed\nbadly")
    [line] = lines(stream)
    assert line["message"] == "it failed\nbadly"
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("KeyError: 'a\\nb'")


def test_what_is_not_json_is_written_as_its_text(stream: io.StringIO) -> None:
    install(LogSettings("json"), IDENTITY, stream=stream)
    LOG.warning("odd", extra={"shape": torch.Size([2, 3]), "kind": KeyError})
    assert lines(stream)[0]["kind"] == "<class 'KeyError'>"


def test_a_human_line_ends_with_what_it_is_about(stream: io.StringIO) -> None:
    install(LogSettings("human"), IDENTITY, stream=stream)
    LOG.warning("late", extra={"request_ids": ["a", "b"], "layer": "l"})
    assert stream.getvalue().endswith(" WARNING moe_runtime.test: late request_ids=a,b layer=l\n")


def test_what_is_below_the_level_is_not_logged_and_others_are_heard_from_warning_on(stream: io.StringIO) -> None:
    install(LogSettings("json", "info"), IDENTITY, stream=stream)
    LOG.debug("no")
    LOG.info("yes")
    logging.getLogger("somebody.else").info("no")
    logging.getLogger("somebody.else").warning("yes")
    assert [line["message"] for line in lines(stream)] == ["yes", "yes"]


def test_installing_again_replaces_what_was_installed(stream: io.StringIO) -> None:
    install(LogSettings("human"), IDENTITY, stream=stream)
    install(LogSettings("json"), IDENTITY, stream=stream)
    LOG.warning("once")
    assert [line["message"] for line in lines(stream)] == ["once"]


def test_a_request_is_followed_from_its_call_to_its_experts_and_back(stream: io.StringIO) -> None:
    experts = [{"kind": "identity", "name": "same"}, {"kind": "zero", "name": "none", "options": {"out_shape": [4]}}]
    config = {"layers": {"l": {"item_shape": [4], "experts": experts}}, "router": {"address": "127.0.0.1:0"}}
    with serve(config, ray=False) as runtime, MoEClient(runtime.address) as client:
        install(LogSettings("json", "debug"), IDENTITY, stream=stream)
        request_id = client.forward(torch.ones(3, 4), layer="l", timeout_s=20.0).report.request_id
    mine = [line for line in lines(stream) if request_id in (line.get("request_id"), *line.get("request_ids", ()))]
    loggers = [line["logger"].removeprefix("moe_runtime.") for line in mine]
    assert loggers[0] == "rpc.handlers"
    assert loggers.count("service.host_loop") == 2
    assert sorted(expert for line in mine for expert in line.get("expert", ())) == ["l/none/0", "l/same/0"]
    [ended] = [line for line in mine if line["message"] == "request ended"]
    assert ended["outcome"] == "answered"
    assert ended["took_ms"] > 0


def test_nothing_is_formatted_for_a_request_at_the_usual_level(stream: io.StringIO) -> None:
    config = {
        "layers": {"l": {"item_shape": [4], "experts": [{"kind": "identity", "count": 2}]}},
        "router": {"address": "127.0.0.1:0"},
    }
    made = []
    factory = logging.getLogRecordFactory()

    def count(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made.append(args)
        return factory(*args, **kwargs)

    with serve(config, ray=False) as runtime, MoEClient(runtime.address) as client:
        install(LogSettings("json", "warning"), IDENTITY, stream=stream)
        logging.setLogRecordFactory(count)
        try:
            client.forward(torch.ones(3, 4), layer="l", timeout_s=20.0)
        finally:
            logging.setLogRecordFactory(factory)
    assert [args for args in made if args[0].startswith("moe_runtime")] == []
