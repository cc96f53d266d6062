"""One expert host: experts from their specs, and the loop that serves them in a thread of its own."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import threading
from typing import TYPE_CHECKING

import torch

from moe_runtime.errors import MoERuntimeError, PlugInError, StartError
from moe_runtime.experts.build import build_expert
from moe_runtime.experts.host import ExpertHost
from moe_runtime.experts.registry import check_plug_ins
from moe_runtime.launch.host_memory import check_memory, is_out_of_memory, out_of_memory, resident_bytes
from moe_runtime.launch.nested.kinds import LayerExpert, MoEExpert, register_nested_kinds
from moe_runtime.ray_backend.plan import HostHealth, HostReport
from moe_runtime.service.host_loop import HostLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from moe_runtime.experts.build import LoadedExpert
    from moe_runtime.experts.weights_store import WeightsStore
    from moe_runtime.launch.recipes import HostSpec
    from moe_runtime.service.ports import HostTransport

_LOG = logging.getLogger(__name__)


class ExpertProcess:
    """Serves the experts of one host. ``start`` is called once; the others from any thread."""

    def __init__(
        self,
        spec: HostSpec,
        *,
        open_transport: Callable[[], HostTransport],
        num_threads: int | None,
        owns_process: bool = False,
        store: WeightsStore | None = None,
        node: str = "local",
        find_routers: Callable[[], Sequence[str]] | None = None,
    ) -> None:
        """Keep what to serve.

        Args:
            spec: The experts and their device.
            open_transport: Makes the host's end of the data plane.
            num_threads: Torch threads of the whole process; None leaves them as they are.
            owns_process: Whether nothing but this host lives in the process, so that what is there once it has
                started is there to stay.
            store: Gives the weight files; without one, paths of this machine and addresses work.
            node: How messages name the node.
            find_routers: Finds the routers of its runtime, for experts that are layers of it; needed for those alone.
        """
        self._node = node
        self._find_routers = find_routers
        self._layer_experts: dict[str, LayerExpert] = {}
        self._owns_process = owns_process
        self._spec = spec
        self._store = store
        self._open_transport = open_transport
        self._num_threads = num_threads
        self._transport: HostTransport | None = None
        self._host: ExpertHost | None = None
        self._loop: HostLoop | None = None
        self._thread: threading.Thread | None = None
        self._reason = "it was not started"

    def start(self) -> HostReport:
        """Build the experts, listen, and serve.

        Raises:
            PlugInError: If this node lacks a plug-in, or has another version of it.
            ConfigError: If an expert cannot be built.
            StartError: If the experts do not fit into memory, or nothing can be bound.
        """
        register_nested_kinds()
        check_plug_ins(self._spec.plug_ins)
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        device = torch.device("cuda", 0) if self._spec.device == "cuda" else torch.device("cpu")
        experts = self._build(device)
        self._transport = transport = self._open_transport()
        self._host = ExpertHost(experts, device=device)
        self._loop = HostLoop(self._host, transport)
        self._thread = threading.Thread(
            target=self._serve,
            args=(self._loop, transport, torch.get_num_threads()),
            name=f"moe-host-{self._spec.host_id}",
            daemon=True,
        )
        self._thread.start()
        if self._owns_process:
            # A collection that looks at all of torch would hold up the answers for a tenth of a second or more.
            gc.collect()
            gc.freeze()
        return HostReport(
            endpoint=transport.endpoint,
            device=str(device),
            num_threads=torch.get_num_threads(),
            weights_versions={replica_id: expert.weights_version for replica_id, expert in experts.items()},
        )

    def admit(self, public_keys: Collection[str]) -> None:
        """Let routers with these keys connect from other nodes, and no others.

        Raises:
            StartError: If it was never started.
            TransportError: If a key is malformed.
        """
        if self._transport is None:
            raise StartError(f"expert host {self._spec.host_id}: {self._reason}")
        self._transport.admit(public_keys)

    def health(self) -> HostHealth:
        """How it is. Never waits for an expert."""
        host, loop, rss_bytes = self._host, self._loop, resident_bytes()
        if host is None or loop is None:
            return HostHealth(rss_bytes=rss_bytes)
        return HostHealth(
            busy_s=loop.busy_s,
            rss_bytes=rss_bytes,
            unfit=host.unfit,
            num_faults=host.num_faults(),
            num_requests=loop.num_requests,
            num_waiting=loop.num_waiting,
            inner={replica_id: expert.counts() for replica_id, expert in self._layer_experts.items()},
        )

    def join(self) -> str:
        """Wait until serving has ended, and say why.

        Raises:
            StartError: If it was never started.
        """
        if self._thread is None:
            raise StartError(f"expert host {self._spec.host_id}: {self._reason}")
        self._thread.join()
        return self._reason

    def stop(self) -> None:
        """Stop after the run that is under way, and stop listening; calls of other layers end. Safe to call twice."""
        if self._loop is not None and self._thread is not None:
            self._loop.stop()
            # Whoever waited for this host has left it: what it asks of others need not be waited for.
            for expert in self._layer_experts.values():
                expert.close()
            self._thread.join()

    def _build(self, device: torch.device) -> dict[str, LoadedExpert]:
        """The experts by replica id, if there is memory for them."""
        try:
            check_memory(self._spec, node=self._node)
            experts = {
                hosted.replica_id: build_expert(hosted.spec, device=device, store=self._store)
                for hosted in self._spec.experts
            }
        except (MoERuntimeError, MemoryError, RuntimeError) as exc:
            if is_out_of_memory(exc):
                raise out_of_memory(self._spec, node=self._node, error=exc) from exc
            raise
        except KeyboardInterrupt as exc:
            # Whoever presses Ctrl-C interrupts the main thread; in another, it is a plug-in's own.
            if threading.current_thread() is threading.main_thread():
                raise
            raise PlugInError(f"expert host {self._spec.host_id}: building its experts raised {exc!r}") from exc
        self._connect(experts)
        return experts

    def _connect(self, experts: Mapping[str, LoadedExpert]) -> None:
        """Tell the experts that are layers of this runtime where its routers are."""
        modules = {replica_id: expert.module for replica_id, expert in experts.items()}
        self._layer_experts = {
            replica_id: module for replica_id, module in modules.items() if isinstance(module, LayerExpert)
        }
        for module in self._layer_experts.values():
            if isinstance(module, MoEExpert) and self._find_routers is not None:
                module.connect(self._find_routers)

    def _serve(self, loop: HostLoop, transport: HostTransport, num_threads: int) -> None:
        # OpenMP keeps the number per thread; products of another thread would have other last bits.
        torch.set_num_threads(num_threads)
        if self._owns_process:
            _let_senders_finish()
        try:
            loop.run()
            self._reason = "it was stopped"
        except BaseException as exc:
            # Nothing above this thread would tell, whatever it was.
            _LOG.exception("expert host %s: its loop failed", self._spec.host_id)
            self._reason = f"its loop failed: {type(exc).__name__}: {exc}"
        finally:
            transport.close()


def _let_senders_finish() -> None:
    """Have Linux never interrupt another process to wake this thread.

    A router that sends to several hosts of a busy node would stand still after the first message, while that host
    computes; so would the others.
    """
    # A container may forbid it.
    with contextlib.suppress(OSError):
        if hasattr(os, "SCHED_BATCH") and os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
