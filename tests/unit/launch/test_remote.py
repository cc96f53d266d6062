"""The submitting machine's side, with a head that is a folder of this machine and runs real commands."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_runtime.errors import StartError
from moe_runtime.launch.bundle import collect_bundle
from moe_runtime.launch.bundle_store import BundleStore
from moe_runtime.launch.remote import run_on_head, ship_bundle

CONFIG = """
name: small
layers:
  l:
    item_shape: [8]
    experts:
      - {kind: feed_forward, count: 2, weights: "w/e{i}.safetensors"}
"""


class FolderMachine:
    """A machine whose home is a folder; runs commands in bash, with the programs of its ``bin`` first."""

    def __init__(self, home: Path) -> None:
        self.name = "head"
        self.home = home
        self.sent: list[str] = []
        (home / "bin").mkdir(parents=True)

    def run(self, command: str, *, on_line: Callable[[str], None] | None = None) -> int:
        environment = {"HOME": str(self.home), "PATH": f"{self.home}/bin:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", "-c", command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for line in done.stdout.splitlines():
            if on_line is not None:
                on_line(line)
        return done.returncode

    def output(self, command: str) -> list[str]:
        lines: list[str] = []
        assert self.run(command, on_line=lines.append) == 0, lines
        return lines

    def send(self, folder: Path, target: str) -> None:
        self.sent += sorted(path.name for path in folder.iterdir())
        shutil.copytree(folder, target.replace("~", str(self.home)), dirs_exist_ok=True)

    def installs(self, script: str) -> None:
        program = self.home / "bin" / "moe-runtime"
        program.write_text(f"#!/bin/bash\n{script}\n")
        program.chmod(0o755)


@pytest.fixture
def head(tmp_path: Path) -> FolderMachine:
    return FolderMachine(tmp_path / "head")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "c" / "w").mkdir(parents=True)
    for i, content in enumerate((b"zero", b"one")):
        (tmp_path / "c" / "w" / f"e{i}.safetensors").write_bytes(content)
    path = tmp_path / "c" / "config.yaml"
    path.write_text(CONFIG)
    return path


def test_a_shipped_bundle_is_stored_on_the_head_as_it_is_here(config: Path, head: FolderMachine) -> None:
    bundle = collect_bundle(config)
    assert ship_bundle(bundle, config.parent, head) == bundle.num_bytes
    home = head.home / ".moe_runtime"
    stored = BundleStore(home).store(home / "bundles" / f"{bundle.id}.bundle.json")
    assert stored.bundle == bundle
    assert (stored.folder / "w/e1.safetensors").read_bytes() == b"one"
    assert home.stat().st_mode & 0o777 == 0o700


def test_files_that_the_head_has_are_not_sent_again(config: Path, head: FolderMachine) -> None:
    ship_bundle(collect_bundle(config), config.parent, head)
    assert ship_bundle(collect_bundle(config), config.parent, head) == 0
    (config.parent / "w" / "e1.safetensors").write_bytes(b"two")
    head.sent.clear()
    changed = collect_bundle(config)
    assert ship_bundle(changed, config.parent, head) == 3
    sha256 = next(file.sha256 for file in changed.files if file.path == "w/e1.safetensors")
    assert head.sent == [sha256, f"{changed.id}.bundle.json"]


def test_the_head_is_told_what_to_do_and_its_steps_and_outcome_come_back(head: FolderMachine) -> None:
    head.installs("""
        echo banner; echo 'step: checked 3 nodes'; printf '{"args": "%s", "term": "%s"}\\n' "$*" "$TERM" """)
    steps: list[str] = []
    outcome = run_on_head(head, ["deploy", "~/x", "a b;c"], on_step=steps.append)
    assert outcome == {"args": f"deploy {head.home}/x a b;c --ray-address auto --json", "term": "dumb"}
    assert steps == ["checked 3 nodes"]


def test_the_errors_of_the_head_are_raised_here(head: FolderMachine) -> None:
    head.installs("echo noise; echo 'error: one' >&2; echo 'error: two'; exit 1")
    with pytest.raises(StartError, match=r"^one\ntwo$"):
        run_on_head(head, ["deploy"], on_step=lambda _line: None)


def test_a_head_that_says_nothing_we_know_is_quoted(head: FolderMachine) -> None:
    head.installs("echo Segmentation fault; exit 139")
    expected = r"^head: expected an outcome of `moe-runtime deploy .*`, it ended with 139: Segmentation fault$"
    with pytest.raises(StartError, match=expected):
        run_on_head(head, ["deploy"], on_step=lambda _line: None)


def test_an_outcome_is_one_line_of_json(head: FolderMachine) -> None:
    document = json.dumps({"addresses": ["10.0.0.1:50051"]})
    head.installs(f"echo '{document}'")
    assert run_on_head(head, ["deploy"], on_step=lambda _line: None) == json.loads(document)
