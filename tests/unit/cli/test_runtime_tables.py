from __future__ import annotations

import io

from rich.console import Console

from moe_runtime.cli.serving import print_welcome
from moe_runtime.cli.status_tables import runtime_tables

HOST = {"host_id": "group:m/0/0", "state": "ready", "node": "10.0.0.1/abc", "pid": 77, "num_restarts": 2}
REPLICA = {
    "replica_id": "l/e0/0", "state": "ready", "node": "10.0.0.1/abc", "device": "cpu", "pid": 77,
    "weights_version": "seed:0",
}  # fmt: skip
LAYER = {
    "item_shape": [4], "out_shape": [4], "dtype": "float32", "policy": "caller",
    "experts": [{"name": "e0", "shared": False, "replicas": [REPLICA]}],
}  # fmt: skip


def shown(*renderables):
    console = Console(file=io.StringIO(), width=160)
    for each in renderables:
        console.print(each)
    return console.file.getvalue()


def test_a_runtime_without_routers_shows_hosts_programs_and_layers():
    callers = [{"node": "10.0.0.1/abc", "pid": 99, "oldest_table_version": 5}]
    text = shown(*runtime_tables({"name": "lib", "hosts": [HOST], "callers": callers, "layers": {"l": LAYER}}))
    for part in (
        "runtime lib",
        "group:m/0/0",
        "pid 99",
        "v5",
        "layer l: [4] → [4] float32, caller",
        "e0",
        "cpu pid 77",
    ):
        assert part in text


def test_the_welcome_of_a_runtime_without_routers_names_no_address(tmp_path):
    console = Console(file=io.StringIO(), width=160)
    print_welcome((), layers=[], console=console, last=("stop", "Ctrl-C"), config=tmp_path / "c.yaml")
    assert console.file.getvalue() == ("serving no layer yet to programs that use it as a library\n  stop:    Ctrl-C\n")
