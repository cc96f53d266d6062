from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from moe_runtime.bench.machine import describe_machine
from moe_runtime.bench.render import show_rows
from moe_runtime.bench.results import Row, write_json
from moe_runtime.bench.sampling import Sample

ROW = Row(
    "exchange",
    {"rows": 16},
    "zmq echo",
    ours=Sample((1.0, 2.0, 3.0)),
    theirs=Sample((4.0, 4.0, 4.0)),
    figures={"p99_ms": 2.5},
)


def test_the_ratio_is_our_median_over_the_peers():
    assert ROW.ratio == 0.5


def test_json_holds_the_machine_and_the_rows_as_promised(tmp_path: Path):
    path = tmp_path / "out.json"
    write_json(path, machine={"cores": 2}, rows=[ROW])
    written = json.loads(path.read_text())
    assert written["machine"] == {"cores": 2}
    assert written["rows"] == [
        {
            "suite": "exchange",
            "case": {"rows": 16},
            "ours_ms": 2.0,
            "ours_spread_ms": [1.0, 3.0],
            "peer": "zmq echo",
            "peer_ms": 4.0,
            "peer_spread_ms": [4.0, 4.0],
            "ratio": 0.5,
            "figures": {"p99_ms": 2.5},
        }
    ]


def test_the_machine_is_told_with_its_versions():
    machine = describe_machine()
    assert machine["cores"] >= 1
    assert {"os", "python", "torch", "ray", "pyzmq", "memory_gb"} <= machine.keys()


def test_the_table_shows_case_medians_and_ratio():
    out = io.StringIO()
    show_rows(Console(file=out, width=120), [ROW])
    assert "zmq echo" in out.getvalue()
    assert "0.50" in out.getvalue()
    assert "16" in out.getvalue()
