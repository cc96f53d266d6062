from __future__ import annotations

import gc
import os
import pickle
import queue
from dataclasses import replace

import pytest
import torch

from moe_runtime.config.load import load_config
from moe_runtime.errors import PlugInError, StartError
from moe_runtime.launch.build import build_layers
from moe_runtime.launch.expert_process import ExpertProcess
from moe_runtime.launch.factories import ExpertProcessFactory
from moe_runtime.launch.packing import plan_hosts
from moe_runtime.ray_backend.plan import Location
from moe_runtime.transport.in_process import InProcessNetwork


@pytest.fixture
def spec():
    data = {"layers": {"l": {"item_shape": [4], "experts": [{"kind": "identity", "count": 2}], "experts_per_actor": 2}}}
    loaded = load_config(data)
    (spec,) = plan_hosts(loaded.config, build_layers(loaded), gpus_available=False)
    return spec


def process_of(spec):
    return ExpertProcess(spec, open_transport=InProcessNetwork().host_transport, num_threads=None)


def test_a_started_host_reports_its_endpoint_device_and_versions(spec):
    process = process_of(spec)
    report = process.start()
    assert (report.device, report.num_threads) == ("cpu", torch.get_num_threads())
    assert report.weights_versions == {"l/identity-0/0": "seed:0", "l/identity-1/0": "seed:0"}
    assert report.endpoint.incarnation > 0
    process.stop()
    assert process.join() == "it was stopped"


def test_stopping_twice_is_harmless_and_so_is_stopping_what_never_started(spec):
    process_of(spec).stop()
    process = process_of(spec)
    process.start()
    process.stop()
    process.stop()


def test_a_host_that_was_not_started_cannot_be_joined(spec):
    with pytest.raises(StartError, match="not started"):
        process_of(spec).join()


def test_a_node_that_lacks_a_plug_in_names_it_before_anything_is_built(spec):
    process = process_of(replace(spec, plug_ins=("moe-runtime-nowhere",)))
    with pytest.raises(PlugInError, match="moe-runtime-nowhere"):
        process.start()


def test_a_loop_that_fails_ends_the_host_with_the_reason(spec):
    class Broken:
        def __init__(self, transport):
            self.endpoint = transport.endpoint
            self.close = transport.close

        def receive(self, timeout_s):
            raise OSError("the socket is gone")

        def wake(self):
            pass

    network = InProcessNetwork()
    process = ExpertProcess(spec, open_transport=lambda: Broken(network.host_transport()), num_threads=None)
    process.start()
    assert process.join() == "its loop failed: OSError: the socket is gone"


def test_a_host_alone_in_its_process_spares_the_collector_what_it_started_with(spec):
    open_transport = InProcessNetwork().host_transport
    process = ExpertProcess(spec, open_transport=open_transport, num_threads=None, owns_process=True)
    process.start()
    num_frozen = gc.get_freeze_count()
    gc.unfreeze()
    process.stop()
    assert num_frozen > 0


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="a policy of Linux")
@pytest.mark.parametrize(("owns_process", "policy"), [(True, "SCHED_BATCH"), (False, "SCHED_OTHER")])
def test_a_host_alone_in_its_process_interrupts_nobody_who_sends_to_it(spec, owns_process, policy):
    found = queue.SimpleQueue()

    def open_transport():
        transport = InProcessNetwork().host_transport()
        receive = transport.receive
        transport.receive = lambda timeout_s: found.put(os.sched_getscheduler(0)) or receive(timeout_s)
        return transport

    process = ExpertProcess(spec, open_transport=open_transport, num_threads=None, owns_process=owns_process)
    process.start()
    try:
        assert found.get(timeout=10) == getattr(os, policy)
    finally:
        process.stop()


def test_a_host_in_somebody_s_process_leaves_the_collector_alone(spec):
    gc.unfreeze()
    process = process_of(spec)
    process.start()
    process.stop()
    assert gc.get_freeze_count() == 0


def test_a_factory_survives_pickling_and_makes_a_host_on_zeromq(spec):
    factory = pickle.loads(pickle.dumps(ExpertProcessFactory(spec)))
    process = factory(Location("node-1", "127.0.0.1", num_cores=1, pid=1), num_threads=torch.get_num_threads())
    endpoint = process.start().endpoint
    process.stop()
    assert endpoint.node == "node-1"
    assert endpoint.local.startswith("ipc://")
    assert endpoint.remote.startswith("tcp://")
