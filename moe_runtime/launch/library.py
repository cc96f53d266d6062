"""A runtime's layers as a library uses them: the program routes its own tokens, and gets the experts' rows."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal, NoReturn

import torch

from moe_runtime.errors import (
    InvalidRequestError,
    MoERuntimeError,
    StartError,
    UnavailableError,
    UnknownLayerError,
)
from moe_runtime.launch.called_rows import RowsAsked
from moe_runtime.launch.calling_engine import POLL_S, CallingEngine
from moe_runtime.launch.completion import Completion, Unanswered

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from types import TracebackType

    from torch import Tensor

    from moe_runtime.launch.served import Runtime
    from moe_runtime.service.layer import RoutedLayer

_MAX_UNDER_WAY = 2
#: How long a layer that was added may take to be known here.
_NEW_LAYER_S = 2.0

OnExpertFailure = Literal["wait", "drop"]


class LayerCaller:
    """Layers of a runtime, for a program that chooses the experts of its tokens itself.

    One engine in this process routes for all of them, with one message per host that a call touches. Calls may come
    from any thread, and are served one after the other. Belongs to the process that made it.
    """

    def __init__(
        self,
        runtime: Runtime,
        layers: Collection[str] | None = None,
        *,
        on_failure: OnExpertFailure = "wait",
        patience_s: float | None = None,
    ) -> None:
        """Join the runtime, and wait until its hosts let this process in.

        Args:
            runtime: The runtime.
            layers: Names of the layers; all that it has, or will have, when None.
            on_failure: What becomes of rows that no expert answers: ``wait`` asks again, by a newer table where one
                comes, until ``patience_s`` is over, or an expert has answered badly twice in a row; ``drop`` leaves
                zeros, counts them, and warns once.
            patience_s: How long a call waits for experts that fail; ``start_timeout_s`` of the runtime when None.

        Raises:
            UnknownLayerError: If the runtime has no layer of such a name.
            UnavailableError: If the runtime has ended, or does not let this process in.
            StartError: If the runtime's controller does not answer.
        """
        if on_failure not in ("wait", "drop"):
            raise InvalidRequestError(f"on_failure: expected wait or drop, found {on_failure!r}")
        self._runtime = runtime
        self._only = None if layers is None else frozenset(layers)
        self._start_timeout_s = runtime.start_timeout_s
        self._completion = Completion(
            waits=on_failure == "wait", patience_s=self._start_timeout_s if patience_s is None else patience_s
        )
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._counts: dict[str, list[int]] = {}
        self._is_closed = self._is_broken = False
        self._calling: CallingEngine | None = self._join()
        unknown = sorted((self._only or frozenset()).difference(self._calling.layers))
        if unknown:
            self.close()
            raise UnknownLayerError(f"expected layers of the runtime, found {', '.join(unknown)}")

    @property
    def num_dropped(self) -> int:
        """Rows that no expert answered, and that are zeros therefore."""
        return self._completion.num_dropped

    @property
    def num_retried(self) -> int:
        """Rows that were asked for again."""
        return self._completion.num_retried

    @property
    def layers(self) -> Mapping[str, RoutedLayer]:
        """The layers by name, as they are now."""
        calling = self._calling
        return {} if calling is None else calling.layers

    def rows(self, layer: str, tokens: Tensor, expert_ids: Tensor) -> Tensor:
        """What each token's experts answer, without weights.

        Args:
            layer: Name of the layer.
            tokens: ``(num_tokens, *item_shape)`` in the layer's dtype, on the CPU; not changed meanwhile.
            expert_ids: Int64 ``(num_tokens, k)``, on the CPU.

        Returns:
            ``(num_tokens * k, *out_shape)`` in the layer's dtype, by token, then by choice.

        Raises:
            UnknownLayerError: If there is no such layer, or it is removed meanwhile.
            InvalidRequestError: If the tensors are not what the layer expects, or are too many.
            ExpertError: If an expert raises or gives what cannot be used, and does so again; or if it has not answered
                when ``patience_s`` was over.
            UnavailableError: If the runtime has ended, or this was closed.
        """
        with self._lock:
            calling = self._open()
            try:
                rows = self._rows(calling, layer, tokens, expert_ids)
            except UnknownLayerError:
                # Parts of a call to a layer that was removed may be under way; they are nothing to the next call.
                self._is_broken = calling.engine.num_in_flight > 0
                raise
            except MoERuntimeError:
                raise
            except BaseException:
                # It may have been interrupted in the middle of anything: the next call starts afresh.
                self._is_broken = True
                raise
        calling.rest()
        return rows

    def counts(self) -> Mapping[str, list[int]]:
        """Rows that each expert has answered, by layer, in the order of the experts."""
        calling = self._calling
        return _added(self._counts, {} if calling is None else _counted(calling))

    def close(self) -> None:
        """Leave the runtime, which goes on. Waits for a call that is under way. Safe to call twice."""
        with self._lock:
            self._is_closed = True
            self._leave()

    def __enter__(self) -> LayerCaller:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise InvalidRequestError(
            "LayerCaller: expected to stay in the process that made it, found an attempt to copy or pickle it; make "
            "one where it is used"
        )

    def _join(self) -> CallingEngine:
        return CallingEngine(
            self._runtime.join(), lock=self._lock, only=self._only, start_timeout_s=self._start_timeout_s
        )

    def _leave(self) -> None:
        calling, self._calling = self._calling, None
        if calling is not None:
            self._counts = _added(self._counts, _counted(calling))
            calling.close()

    def _open(self) -> CallingEngine:
        if os.getpid() != self._pid:
            raise UnavailableError(
                f"LayerCaller: expected to be used by process {self._pid}, which made it, found a fork of it, process "
                f"{os.getpid()}; make one there"
            )
        if self._is_closed:
            raise UnavailableError("LayerCaller: expected an open one, found that it was closed")
        if self._is_broken:
            self._leave()
            self._is_broken = False
        if self._calling is None:
            try:
                self._calling = self._join()
            except StartError as exc:
                raise UnavailableError(str(exc)) from exc
        return self._calling

    def _rows(self, calling: CallingEngine, layer: str, tokens: Tensor, expert_ids: Tensor) -> Tensor:
        asked = RowsAsked.of(self._layer(calling, layer), tokens, expert_ids)
        if not asked.num_rows:
            return torch.empty((0, *asked.layer.out_shape), dtype=asked.layer.dtype)
        if not asked.fits_one_batch:
            return self._rows_of_parts(calling, asked)
        asked.check_size(calling.engine.table)
        result = calling.serve(asked.batch())
        # Autograd and in-place operations refuse tensors that were made in inference mode, except within it.
        is_foreign = result.outputs.is_inference() and not torch.is_inference_mode_enabled()
        rows = result.outputs.clone() if is_foreign else result.outputs
        if result.failures is not None:
            self._completion.complete(calling, [Unanswered(asked, result, rows)])
        return rows

    def _rows_of_parts(self, calling: CallingEngine, asked: RowsAsked) -> Tensor:
        rows = torch.empty((asked.num_rows, *asked.layer.out_shape), dtype=asked.layer.dtype)
        waiting, start = deque(asked.parts()), 0
        under_way: dict[int, tuple[RowsAsked, Tensor]] = {}
        unanswered = []
        while waiting or under_way:
            while waiting and len(under_way) < _MAX_UNDER_WAY:
                part = waiting.popleft()
                under_way[calling.submit(part.batch())] = part, rows[start : start + part.num_rows]
                start += part.num_rows
            for result in calling.poll(POLL_S):
                part, place = under_way.pop(result.batch_id)
                place.copy_(result.outputs)
                if result.failures is not None:
                    unanswered.append(Unanswered(part, result, place))
        self._completion.complete(calling, unanswered)
        return rows

    def _layer(self, calling: CallingEngine, name: str) -> RoutedLayer:
        layer = calling.layers.get(name)
        until = time.monotonic() + _NEW_LAYER_S
        while layer is None and (self._only is None or name in self._only) and time.monotonic() < until:
            # It may have been added just now.
            calling.await_table(newer_than=calling.engine.table.version, until=until)
            layer = calling.layers.get(name)
        if layer is None:
            known = ", ".join(sorted(calling.layers)) or "none"
            raise UnknownLayerError(f"expected one of the layers {known}, found {name!r}")
        return layer


def _counted(calling: CallingEngine) -> dict[str, list[int]]:
    stats = calling.engine.lineup.stats
    return {name: [expert.num_served for expert in layer.experts] for name, layer in stats.items()}


def _added(counts: Mapping[str, list[int]], more: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Sums by layer and expert."""
    return {
        name: [sum(pair) for pair in zip_longest(counts.get(name, ()), more.get(name, ()), fillvalue=0)]
        for name in {**counts, **more}
    }
