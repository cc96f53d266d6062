"""The report of a reply to a map of plain values and back."""

from __future__ import annotations

from dataclasses import fields as dataclass_fields
from typing import TYPE_CHECKING, Any

from moe_runtime.errors import ProtocolError
from moe_runtime.wire.fields import MAX_NAME_CHARS, MAX_REQUEST_ID_CHARS
from moe_runtime.wire.messages import ROUTING_FIELDS, Report, Timings, WireTensor
from moe_runtime.wire.tensors import from_numpy, to_numpy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moe_runtime.wire.fields import Fields

COUNT_FIELDS = (
    "table_version",
    "num_tokens",
    "num_assignments",
    "num_served",
    "num_dropped_capacity",
    "num_dropped_failure",
    "num_rerouted",
    "num_hedged",
    "num_retried",
    "num_shared_served",
    "num_shared_dropped",
)
#: Counts of a layer with shared experts; left out where they are 0.
SHARED_COUNT_FIELDS = frozenset({"num_shared_served", "num_shared_dropped"})
#: Counts that came with a later minor version than the others, or may be left out.
NEWER_COUNT_FIELDS = SHARED_COUNT_FIELDS | {"num_retried"}
TIMING_FIELDS = tuple(f.name for f in dataclass_fields(Timings))
ROUTING_DTYPES = dict(zip(ROUTING_FIELDS, ("int64", "int64", "float32", "uint8"), strict=True))


def tensor_to_map(tensor: WireTensor) -> dict[str, Any]:
    """A tensor as the map that travels."""
    return {"dtype": tensor.dtype, "shape": list(tensor.shape), "data": tensor.data}


def report_to_map(report: Report) -> dict[str, Any]:
    """A report as the map that travels; the routing only where the report has it."""
    message: dict[str, Any] = {"request_id": report.request_id, "layer": report.layer}
    counts = {name: getattr(report, name) for name in COUNT_FIELDS}
    message |= {name: count for name, count in counts.items() if count or name not in SHARED_COUNT_FIELDS}
    message["batch_tokens"] = list(report.batch_tokens)
    message["timings"] = {name: getattr(report.timings, name) for name in TIMING_FIELDS}
    message["warnings"] = list(report.warnings)
    for name in (*ROUTING_FIELDS, "shared_weights"):
        array = getattr(report, name)
        if array is not None:
            message[name] = tensor_to_map(from_numpy(array))
    return message


def report_from_fields(report: Fields) -> Report:
    """The report that a reply's map holds.

    Raises:
        ProtocolError: If a field is missing or of another type, or the assignments do not add up.
    """
    timings = report.fields("timings")
    counts: dict[str, Any] = {
        name: report.integer(name) for name in COUNT_FIELDS if name not in NEWER_COUNT_FIELDS or report.has(name)
    }
    served_and_dropped = counts["num_served"] + counts["num_dropped_capacity"] + counts["num_dropped_failure"]
    if counts["num_assignments"] != served_and_dropped:
        raise ProtocolError(
            f"report: expected served and dropped to sum to the {counts['num_assignments']} assignments,"
            f" found {served_and_dropped}"
        )
    routing: dict[str, Any] = {name: _routing(report, name, counts["num_assignments"]) for name in ROUTING_FIELDS}
    read = Report(
        request_id=report.text("request_id", high=MAX_REQUEST_ID_CHARS),
        layer=report.text("layer", high=MAX_NAME_CHARS),
        **counts,
        batch_tokens=_list_of(int, report, "batch_tokens"),
        timings=Timings(**{name: timings.number(name) for name in TIMING_FIELDS}),
        warnings=_list_of(str, report, "warnings"),
        **routing,
        shared_weights=_shared_weights(report, counts["num_tokens"]),
    )
    timings.finish()
    report.finish()
    return read


def _list_of(kind: type, report: Fields, name: str) -> tuple[Any, ...]:
    values = report.list(name)
    if any(type(value) is not kind for value in values):
        raise ProtocolError(f"report.{name}: expected a list of {kind.__name__}, found other types in it")
    return tuple(values)


def _routing(report: Fields, name: str, num_assignments: int) -> NDArray[Any] | None:
    tensor = report.optional_tensor(name)
    if tensor is None:
        return None
    if tensor.dtype != ROUTING_DTYPES[name] or tensor.shape != (num_assignments,):
        raise ProtocolError(
            f"report.{name}: expected {ROUTING_DTYPES[name]} of shape ({num_assignments},),"
            f" found {tensor.dtype} of shape {tensor.shape}"
        )
    return to_numpy(tensor)


def _shared_weights(report: Fields, num_tokens: int) -> NDArray[Any] | None:
    tensor = report.optional_tensor("shared_weights")
    if tensor is None:
        return None
    if tensor.dtype != "float32" or len(tensor.shape) != 2 or tensor.shape[0] != num_tokens:
        raise ProtocolError(
            f"report.shared_weights: expected float32 of shape ({num_tokens}, num_shared),"
            f" found {tensor.dtype} of shape {tensor.shape}"
        )
    return to_numpy(tensor)
