import subprocess
import sys
from pathlib import Path

import pytest

import moe_runtime

CONFIG = """
name: small
layers:
  demo:
    item_shape: [8]
    experts: [{kind: feed_forward, count: 2}, {kind: identity}]
"""


def moe_runtime_command(*arguments: object, before: str = "") -> subprocess.CompletedProcess[str]:
    code = f"import sys\n{before}\nfrom moe_runtime.cli import main\nmain()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_version_is_the_packages() -> None:
    assert moe_runtime_command("--version").stdout.strip() == f"moe-runtime {moe_runtime.__version__}"


def test_help_lists_the_commands_without_loading_torch_ray_or_grpc() -> None:
    leave = (
        "import atexit\natexit.register(lambda: print('loaded:', sorted({'torch', 'ray', 'grpc'} & set(sys.modules))))"
    )
    result = moe_runtime_command("--help", before=leave)
    for command in ("serve", "validate", "status", "demo"):
        assert command in result.stdout
    assert "loaded: []" in result.stdout


def test_the_client_alone_says_in_one_line_what_to_install() -> None:
    result = moe_runtime_command("--help", before="sys.modules['ray'] = sys.modules['typer'] = None")
    assert result.returncode == 1
    assert result.stderr == (
        "moe-runtime: this is the client alone (no ray, typer); "
        "for the command line: pip install 'moe-runtime[runtime]'\n"
    )


def test_validate_shows_what_a_configuration_would_serve(tmp_path: Path) -> None:
    result = moe_runtime_command("validate", write(tmp_path, CONFIG))
    assert result.returncode == 0, result.stderr
    assert "config.yaml: valid" in result.stdout
    assert "small: 1 router, from 127.0.0.1:50051" in result.stdout


def test_validate_shows_every_mistake_in_a_line_of_its_own(tmp_path: Path) -> None:
    config = CONFIG.replace("kind: identity", "kind: identity, optoins: {}").replace("name:", "nam:")
    result = moe_runtime_command("validate", write(tmp_path, config))
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "error: config.yaml: layers.demo.experts.1.optoins: unknown key; did you mean options?",
        "error: config.yaml: nam: unknown key; did you mean name?",
    ]


def test_validate_finds_what_only_building_an_expert_shows(tmp_path: Path) -> None:
    result = moe_runtime_command("validate", write(tmp_path, CONFIG.replace("kind: identity", "kind: identty")))
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert line.startswith("error: config.yaml: layers.demo.experts.1")
    assert "identity" in line


def test_debug_shows_the_traceback_of_an_error(tmp_path: Path) -> None:
    result = moe_runtime_command("--debug", "validate", tmp_path / "none.yaml")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert result.stderr.rstrip().endswith("there is no such file")


def test_status_of_nobody_is_one_friendly_line(unused_tcp_port: int) -> None:
    address = f"127.0.0.1:{unused_tcp_port}"
    result = moe_runtime_command("status", "--address", address)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: nothing serves at {address}: start it with ")
    assert len(result.stderr.splitlines()) == 1


def test_status_of_something_that_is_no_address_is_one_line() -> None:
    result = moe_runtime_command("status", "--address", "nonsense")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [("serve",), ("serve", "a", "b"), ("walk",), ("status", "--timeout-s", "0")])
def test_a_wrong_use_of_a_command_exits_2(arguments: tuple[str, ...]) -> None:
    assert moe_runtime_command(*arguments).returncode == 2


def test_detach_without_ray_is_told_in_flags(tmp_path: Path) -> None:
    result = moe_runtime_command("serve", write(tmp_path, CONFIG), "--no-ray", "--detach")
    assert result.returncode == 1
    assert result.stderr == (
        "error: --detach: expected Ray, found --no-ray: threads of this process cannot outlive it\n"
    )


def test_stop_without_a_cluster_names_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    result = moe_runtime_command("stop", "small")
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert "give --ray-address" in line
