import io
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_runtime.cli import main


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


@pytest.fixture(autouse=True)
def _nothing_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("MOE_RUNTIME_HOME", str(tmp_path / "state"))
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("command", [("deploy", "c.yaml"), ("teardown", "default")])
def test_two_clusters_at_once_are_refused(command: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command, "--cluster", "f.yaml", "--ray-address", "auto") == 1
    assert capsys.readouterr().err == "error: expected --cluster or --ray-address, found both: f.yaml and auto\n"


@pytest.mark.parametrize("command", [("deploy", "c.yaml"), ("teardown", "default")])
def test_without_a_cluster_the_ways_to_name_one_are_told(
    command: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*command) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: expected the address of a Ray cluster, found none; set RAY_ADDRESS, or give")


def test_a_ray_clients_server_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("deploy", "c.yaml", "--ray-address", "ray://head:10001") == 1
    assert "run this on the head, or give --cluster" in capsys.readouterr().err


def test_a_cluster_file_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("cluster", "down", str(tmp_path / "none.yaml"), "--yes") == 1
    assert f"error: {tmp_path}/none.yaml: expected a `ray up` file that Ray accepts" in capsys.readouterr().err


def test_down_asks_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    assert run("cluster", "down", str(tmp_path / "none.yaml")) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("Stop Ray, and every runtime, on all machines of ")
    assert "error" not in captured.err
