"""A layer as an expert asks it: finds its routers, checks what they serve, and calls them in time."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_runtime.errors import (
    DeadlineExceededError,
    InnerLayerError,
    InvalidRequestError,
    MoERuntimeError,
    NonFiniteError,
    RequestTooLargeError,
    UnauthenticatedError,
    UnavailableError,
)
from moe_runtime.experts.deadline import time_left_s
from moe_runtime.launch.nested.tally import InnerTally, total_loss
from moe_runtime.rpc.client import MoEClient
from moe_runtime.rpc.retries import RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from moe_runtime.launch.nested.options import AccessOptions

_LOG = logging.getLogger(__name__)

#: The answer has to be back, through this host, before the outer attempt is given up.
_USABLE_TIME = 0.9
#: Where nobody has said how long an answer is awaited.
_DEFAULT_TIMEOUT_S = 10.0
#: Once all routers were tried. Few: the outer layer has another replica, another expert or the residual.
_MORE_ATTEMPTS = 3
#: What the request's own rows are to blame for: the host finds out which.
_OF_ROWS = (NonFiniteError, RequestTooLargeError)


@dataclass(frozen=True)
class AskedLayer:
    """Which layer an expert asks, and what it expects of it.

    Attributes:
        name: The layer's.
        where: How messages name it.
        in_shape: Of its input rows.
        out_shape: Of its output rows.
    """

    name: str
    where: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]

    def mistake_in(self, description: dict[str, Any], *, dtype: str) -> str | None:
        """What is wrong with the layer that a router describes; None where it is the one that is expected."""
        layers = description.get("layers", {})
        layer = layers.get(self.name)
        if layer is None:
            return f"expected a layer {self.name}, found {', '.join(sorted(layers)) or 'none'}"
        expected = {"item_shape": [*self.in_shape], "out_shape": [*self.out_shape], "dtype": dtype}
        for key, value in expected.items():
            if layer.get(key) != value:
                return f"{key}: expected {value}, found {layer.get(key)}"
        width, found = math.prod(self.in_shape), layer.get("gate_features")
        if found != width:
            return f"gate_features: expected {width}, since the gate is given the rows and nothing else, found {found}"
        # A router of an older version does not say.
        if layer.get("batch_coupled", False):
            return (
                f"allow_batch_coupled: expected true in the layer's configuration, found false: its policy, "
                f"{layer.get('policy')}, lets the rows of a batch change each other's answers, and rows of several "
                "requests share a call"
            )
        return None


class LayerCalls:
    """Calls of one layer. Used by one thread, its host's; ``counts`` and ``close`` may be called from any.

    Routers that cannot be reached are looked for again, so that those that have come back elsewhere are found.

    Args:
        layer: Which.
        access: How its routers are called.
        find_routers: Finds their addresses; raises ``MoERuntimeError`` where it cannot.
        now: Seconds.
    """

    def __init__(
        self,
        layer: AskedLayer,
        access: AccessOptions,
        *,
        find_routers: Callable[[], Sequence[str]],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._layer = layer
        self._access = access
        self._find_routers = find_routers
        self._now = now
        self._tally = InnerTally(layer.where, now=now)
        self._client: MoEClient | None = None
        self._addresses: tuple[str, ...] = ()
        self._is_checked = False
        self._is_closed = False

    def counts(self) -> dict[str, int]:
        """See ``InnerTally``."""
        return self._tally.counts()

    def close(self) -> None:
        """End the call that is under way, and make no other. Safe to call twice."""
        self._is_closed = True
        client = self._client
        if client is not None:
            client.close()

    def forward(self, rows: Tensor) -> Tensor:
        """The layer's answer, ``(num_rows, *out_shape)``, on the device of the rows.

        Raises:
            InvalidRequestError: If it is for its rows that the request is refused.
            InnerLayerError: If there is no answer in time, for whatever other reason, or one that holds nothing but
                residuals, since the layer's experts failed.
        """
        deadline = self._now() + self._timeout_s()
        try:
            result = self._ask(rows, deadline)
        except _OF_ROWS:
            raise
        except InnerLayerError as exc:
            self._tally.failed(exc.__cause__ or exc)
            raise
        except MoERuntimeError as exc:
            self._tally.failed(exc)
            raise InnerLayerError(f"{self._layer.where}: {type(exc).__name__}: {exc}") from exc
        self._tally.answered(result.report)
        loss = total_loss(result.report)
        if loss is not None:
            raise InnerLayerError(f"{self._layer.where}: {loss}")
        outputs: Tensor = result.outputs
        return outputs

    def _timeout_s(self) -> float:
        left_s = time_left_s()
        usable_s = _DEFAULT_TIMEOUT_S if left_s is None else _USABLE_TIME * left_s
        return usable_s if self._access.timeout_ms is None else min(usable_s, self._access.timeout_ms / 1e3)

    def _ask(self, rows: Tensor, deadline: float) -> Any:
        while True:
            client = self._client or self._connect()
            try:
                self._check(client, rows, deadline)
                return client.forward(rows, layer=self._layer.name, timeout_s=self._left_s(deadline))
            except UnavailableError:
                if not self._moved():
                    raise
                _LOG.info("%s: its routers are at other addresses now", self._layer.where)
            except UnauthenticatedError:
                # A token that was rotated is in its file by now, for the next call.
                self._forget()
                raise
            except InvalidRequestError:
                # An upgrade may have made another layer of it.
                self._is_checked = False
                raise

    def _check(self, client: MoEClient, rows: Tensor, deadline: float) -> None:
        if self._is_checked:
            return
        description = client.describe(timeout_s=self._left_s(deadline))
        mistake = self._layer.mistake_in(description, dtype=str(rows.dtype).removeprefix("torch."))
        if mistake is not None:
            raise InnerLayerError(f"{self._layer.where}: {mistake}")
        self._is_checked = True

    def _left_s(self, deadline: float) -> float:
        left_s = deadline - self._now()
        if left_s <= 0:
            raise DeadlineExceededError("the time of the outer layer's attempt is over")
        return left_s

    def _connect(self) -> MoEClient:
        return self._use(tuple(self._find_routers()))

    def _moved(self) -> bool:
        """Whether the routers are at other addresses than those that do not answer; then those are used."""
        found = tuple(self._find_routers())
        if set(found) == set(self._addresses):
            return False
        self._forget()
        self._use(found)
        return True

    def _use(self, addresses: tuple[str, ...]) -> MoEClient:
        if self._is_closed or not addresses:
            raise UnavailableError("its host stops" if self._is_closed else "no router has started yet")
        access = self._access
        try:
            client = MoEClient(
                addresses,
                token=access.read_token(),
                tls=access.client_tls(),
                insecure=access.insecure,
                retry_policy=RetryPolicy(max_attempts=len(addresses) + _MORE_ATTEMPTS),
            )
        except InvalidRequestError as exc:
            raise InnerLayerError(f"{self._layer.where}: {exc}") from exc
        self._client, self._addresses, self._is_checked = client, addresses, False
        return client

    def _forget(self) -> None:
        client, self._client, self._is_checked = self._client, None, False
        if client is not None:
            client.close()
