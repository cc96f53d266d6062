"""What is left is found: a process, a socket, a segment, a descriptor; and memory that grows is told from noise."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_runtime.chaos.footprint import MAX_KEPT_FILES, FootprintMeter, Sample, Traces, find_leaks, growth_of
from moe_runtime.chaos.processes import is_marked, marked, marked_pids, open_files, resident_bytes
from moe_runtime.transport.ipc_folder import default_ipc_folder, prepare_ipc_folder

RUN = "run-of-test-chaos-footprint"
SILENT = "import sys; print(); sys.stdin.read()"


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the run, which ends when its input does."""
    with (
        marked(RUN),
        subprocess.Popen([sys.executable, "-uc", SILENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None
        # It runs: between fork and exec it would be this process's image still.
        process.stdout.readline()
        yield process


def test_a_process_that_was_started_under_the_mark_is_of_the_run(child: subprocess.Popen[bytes]):
    assert is_marked(child.pid, RUN)
    assert not is_marked(child.pid, RUN[:-1])
    assert not is_marked(os.getpid(), RUN)
    assert marked_pids(RUN) == {child.pid}


def test_a_process_that_is_left_is_a_leak(child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moe_runtime.chaos.footprint._GONE_WITHIN_S", 0.0)
    (leak,) = find_leaks(Traces.now(), run_id=RUN, pids=())
    assert leak.startswith(f"process {child.pid} is left: {sys.executable}")


def test_a_socket_of_a_process_of_the_run_is_a_leak():
    folder = default_ipc_folder()
    prepare_ipc_folder(folder)
    path = folder / "4194304-00000000c4a05.ipc"
    path.touch()
    try:
        assert find_leaks(Traces.now(), run_id=RUN, pids=(4194304,)) == (f"socket {path} is left",)
        assert find_leaks(Traces.now(), run_id=RUN, pids=(419430,)) == ()
    finally:
        path.unlink()


def test_a_segment_that_nobody_has_mapped_is_a_leak():
    before = Traces.now()
    path = Path("/dev/shm/chaos-test-segment")
    path.touch()
    try:
        assert find_leaks(before, run_id=RUN, pids=()) == (f"segment {path} is left",)
    finally:
        path.unlink()


def test_memory_files_and_too_many_descriptors_are_leaks():
    before = Traces.now()
    descriptors = [os.memfd_create("moe_runtime")]
    try:
        (leak,) = find_leaks(before, run_id=RUN, pids=())
        assert leak.startswith(f"descriptor {descriptors[0]} is left open on /memfd:moe_runtime")
        descriptors += [os.open("/dev/null", os.O_RDONLY) for _ in range(MAX_KEPT_FILES)]
        assert any("more descriptors are open" in leak for leak in find_leaks(before, run_id=RUN, pids=()))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def test_a_process_that_is_gone_holds_nothing(child: subprocess.Popen[bytes]):
    assert (resident_bytes(child.pid) or 0) > 0
    assert 0 in (open_files(child.pid) or {})
    child.communicate()
    assert resident_bytes(child.pid) is None
    assert open_files(child.pid) is None
    assert not is_marked(child.pid, RUN)


def samples(rss_mib: list[float], num_files: list[int] | None = None) -> list[Sample]:
    """Ten seconds apart."""
    files = num_files or [50] * len(rss_mib)
    return [Sample(10.0 * i, rss, Counter(socket=n)) for i, (rss, n) in enumerate(zip(rss_mib, files, strict=True))]


def test_memory_that_grows_all_the_time_is_a_leak():
    growth = growth_of("router 0", 7, samples([300.0 + 2 * i for i in range(61)]))
    assert growth.slope_mib_per_min == pytest.approx(12.0)
    assert growth.growth_mib == pytest.approx(114.0)
    assert growth.mistakes == ("router 0, pid 7: its memory grew by 114 MiB at 12.0 MiB per minute",)


def test_memory_that_grows_while_a_process_warms_up_is_none():
    growth = growth_of("router 0", 7, samples([100.0, 200.0, 300.0, *[310.0] * 58]))
    assert growth.slope_mib_per_min == pytest.approx(0.0, abs=1e-9)
    assert growth.mistakes == ()


def test_a_process_that_lived_for_a_minute_is_not_judged():
    growth = growth_of("router 0", 7, samples([100.0, 200.0, 300.0, 400.0, 500.0, 600.0]))
    assert growth.slope_mib_per_min is None
    assert growth.mistakes == ()


def test_descriptors_that_add_up_are_a_leak():
    growth = growth_of("router 1", 8, samples([300.0] * 61, [50 + i for i in range(61)]))
    assert growth.more_files == 30
    assert growth.mistakes == ("router 1, pid 8: 30 more open descriptors than before: 30 socket",)


def test_descriptors_that_come_and_go_are_none():
    growth = growth_of("router 1", 8, samples([300.0] * 61, [50 + 60 * (i % 4) // 3 for i in range(61)]))
    assert growth.mistakes == ()


def test_descriptors_are_told_apart_by_what_they_are_open_on():
    meter = FootprintMeter()
    with open("/dev/null") as null, socket.socket(), socket.socket():
        meter.sample("clients", os.getpid(), at_s=0.0)
        assert null.fileno() > 0
    (samples_of_this,) = meter._samples.values()
    assert samples_of_this[0].files["socket"] >= 2
    assert samples_of_this[0].files["/dev/null"] >= 1
