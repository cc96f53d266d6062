from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_runtime.cli.log_wishes import LogWishes
from moe_runtime.logs import LogSettings

CONFIG = """
router: {address: "127.0.0.1:0"}
logging: {format: human, level: debug}
layers:
  l: {item_shape: [4], experts: [{kind: identity, count: 2}]}
"""


@pytest.mark.parametrize(
    ("wishes", "settings"),
    [
        (LogWishes(), LogSettings("human", "info")),
        (LogWishes("json"), LogSettings("json", "info")),
        (LogWishes(debug=True), LogSettings("human", "debug")),
    ],
)
def test_the_command_line_goes_before_the_configuration(wishes: LogWishes, settings: LogSettings) -> None:
    assert wishes.over(LogSettings("human", "info")) == settings


@pytest.mark.timeout(120)
def test_served_in_one_process_the_command_logs_requests_as_json(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG, encoding="utf-8")
    program = "from moe_runtime.cli import main; main()"
    command = [sys.executable, "-c", program, "--log-format", "json", "serve", "--no-ray", str(tmp_path / "c.yaml")]
    call = """
import sys
import numpy, moe_runtime
with moe_runtime.MoEClient(sys.argv[1]) as client:
    print(client.forward(numpy.ones((2, 4), "float32"), layer="l").report.request_id)
"""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("serving l at "))
        called = [sys.executable, "-c", call, line.split()[-1]]
        request_id = subprocess.run(called, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    lines = [json.loads(line) for line in errors.splitlines()]
    mine = [line for line in lines if request_id in (line.get("request_id"), *line.get("request_ids", ()))]
    assert {"moe_runtime.rpc.handlers", "moe_runtime.service.host_loop"} <= {line["logger"] for line in mine}
    assert {(line["role"], line["runtime"]) for line in mine} == {("command", "default")}
