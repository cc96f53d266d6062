"""The hosts of a lab are what the other tests take them for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.host import Host, LabError, Traffic
from cluster.lab import Lab, sweep
from cluster.served import eventually

DIE_WITH_A_LAB = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from cluster.lab import Lab
with Lab(num_hosts=1) as lab:
    print(lab.shared.parent, lab.hosts[0].in_network(["ip", "-brief", "address"]).count("198.18"), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def hosts(lab: Lab) -> tuple[Host, ...]:
    return lab.hosts


def knock(guest: Host, key: Path, host: Host, *, within_s: int = 15) -> subprocess.CompletedProcess[str]:
    """Log in from one host to another."""
    options = ["-o", "StrictHostKeyChecking=no", "-o", "LogLevel=ERROR", "-o", f"ConnectTimeout={within_s}"]
    return guest.run(["ssh", *options, "-i", str(key), host.name, "hostname"], check=False)


def test_hosts_log_in_to_each_other_by_name(lab: Lab, hosts: tuple[Host, ...]) -> None:
    assert knock(hosts[3], lab.key, hosts[1]).stdout == "h2\n"


def test_a_host_has_a_process_table_and_a_disk_of_its_own(lab: Lab, hosts: tuple[Host, ...]) -> None:
    sleeper = hosts[2].start(["sleep", "1234"])
    hosts[2].run(["sh", "-c", "echo here > /tmp/mark; echo here > ~/mark"])
    try:
        # It is ``nsenter`` and ``env`` before it is what was asked for.
        eventually(lambda: "sleep 1234" in hosts[2].pids().values(), within_s=10)
        assert "sleep 1234" not in hosts[3].pids().values()
        assert hosts[3].run(["ls", "/tmp/mark", "/root/mark"], check=False).returncode != 0
        assert hosts[2].run(["touch", "/usr/mark"], check=False).returncode != 0
    finally:
        sleeper.kill()
        sleeper.communicate()
    hosts[2].run(["sh", "-c", f"echo shared > {lab.shared}/mark"])
    assert hosts[3].run(["cat", f"{lab.shared}/mark"]).stdout == "shared\n"


def test_what_crosses_a_link_is_counted_by_peer_and_port(lab: Lab, hosts: tuple[Host, ...]) -> None:
    _, _, server, client = hosts

    def links() -> tuple[Traffic, ...]:
        return (
            server.link_bytes(peer=client, ports=(22, 22)),
            server.link_bytes(peer=hosts[1]),
            server.link_bytes(ports=(23, 99)),
        )

    before = links()
    knock(client, lab.key, server)
    after = links()
    assert after[0].sent_bytes - before[0].sent_bytes > 1000
    assert after[0].received_bytes - before[0].received_bytes > 1000
    assert after[1:] == before[1:]


def test_a_host_that_is_cut_off_is_silent_until_it_is_healed(lab: Lab, hosts: tuple[Host, ...]) -> None:
    hosts[3].cut()
    assert "timed out" in (refused := knock(hosts[2], lab.key, hosts[3], within_s=1).stderr) or "No route" in refused
    assert hosts[3].run(["hostname"]).stdout == "h4\n"
    hosts[3].heal()
    assert knock(hosts[2], lab.key, hosts[3]).stdout == "h4\n"


@pytest.mark.usefixtures("lab")
def test_power_off_ends_every_process_and_a_boot_finds_the_disk_as_it_was() -> None:
    with Lab(num_hosts=1) as own:
        (host,) = own.hosts
        host.run(["sh", "-c", "echo kept > ~/mark; echo lost > /tmp/mark"])
        sleeper = host.start(["sleep", "1234"])
        host.power_off()
        assert sleeper.wait(timeout=10) != 0
        sleeper.communicate()
        assert not host.is_on
        assert host.pids() == {}
        with pytest.raises(LabError, match="h1 is off"):
            host.run(["true"])
        host.boot()
        assert host.run(["sh", "-c", "cat ~/mark; ls /tmp | grep mark || true"]).stdout == "kept\n"
    assert not own.shared.exists()


@pytest.mark.usefixtures("lab")
def test_a_killed_test_leaves_nothing_but_a_folder_which_the_next_one_sweeps() -> None:
    tests = str(Path(__file__).parents[1])
    died = subprocess.run([sys.executable, "-c", DIE_WITH_A_LAB, tests], capture_output=True, text=True, check=False)
    assert died.returncode == -signal.SIGKILL
    folder = Path(died.stdout.split()[0])
    assert died.stdout.split()[1] == "1"
    sweep()
    assert not folder.exists()

    def is_left() -> bool:
        return any(p.name.isdecimal() and str(folder) in command_line(p) for p in Path("/proc").iterdir())

    eventually(lambda: not is_left(), within_s=10)


def command_line(process: Path) -> str:
    try:
        return os.fsdecode((process / "cmdline").read_bytes())
    except OSError:
        return ""
