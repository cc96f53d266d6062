"""The report accounts for every assignment of a request, whatever else was in its batches."""

from __future__ import annotations

import numpy as np
import torch

from fakes.service import FakeTransport, endpoint, make_layer, table_of, tokens_of
from moe_runtime.config.models import CapacityConfig, OnFailureConfig
from moe_runtime.service.batch import Batch
from moe_runtime.service.engine import RouterEngine
from moe_runtime.service.report import BatchLedger, PartReport, empty_report, merge_parts
from moe_runtime.service.requests import LayerRequest
from moe_runtime.wire.messages import DROPPED_CAPACITY, DROPPED_FAILURE, SERVED, Report, Timings

# Four tokens, top-2 of three experts: expert 0 is the first choice of all and holds three; expert 2 fails.
LOGITS = torch.log(torch.tensor([[6.0, 3, 1], [6, 1, 3], [6, 3, 1], [6, 1, 3]]))


def finished_batch() -> BatchLedger:
    layer = make_layer(
        3, k=2, capacity=CapacityConfig(factor=1.125, min=1), on_failure=OnFailureConfig(order=("drop",))
    )
    transport = FakeTransport()
    engine = RouterEngine({"layer": layer}, transport)
    engine.set_table(table_of(7, 10, 11, 12))
    transport.refusing.add(endpoint(12))
    engine.submit(Batch("layer", tokens_of(4), gate_input=LOGITS))
    for _, request in transport.sent:
        transport.answer(request)
    (result,) = engine.poll(0.0)
    return BatchLedger(result, layer)


def test_each_request_gets_the_outcomes_of_its_own_rows() -> None:
    ledger = finished_batch()
    first = ledger.part(first_row=0, last_row=2, queue_s=0.5, return_routing=True)
    second = ledger.part(first_row=2, last_row=4, queue_s=0.0, return_routing=True)
    assert first.token_ids is not None
    assert first.expert_ids is not None
    assert first.outcomes is not None
    assert first.expert_weights is not None
    assert first.token_ids.tolist() == [0, 0, 1, 1]
    assert first.expert_ids.tolist() == [0, 1, 0, 2]
    assert first.outcomes.tolist() == [SERVED, SERVED, SERVED, DROPPED_FAILURE]
    np.testing.assert_allclose(first.expert_weights, [2 / 3, 1 / 3, 2 / 3, 0.0], atol=1e-6)
    assert (first.num_assignments, first.num_served, first.num_dropped_failure) == (4, 3, 1)
    assert first.timings.queue_ms == 500.0
    assert first.batch_tokens == (4,)
    assert first.table_version == 7
    assert first.warnings == ("expert expert-2: its queue is full",)
    assert second.token_ids is not None
    assert second.outcomes is not None
    assert second.token_ids.tolist() == [0, 0, 1, 1]
    assert second.outcomes.tolist() == [SERVED, SERVED, DROPPED_CAPACITY, DROPPED_FAILURE]
    assert second.num_dropped_capacity == 1


def test_routing_is_left_out_unless_it_was_asked_for() -> None:
    report = finished_batch().part(first_row=0, last_row=1, queue_s=0.0, return_routing=False)
    assert report.token_ids is None
    assert report.expert_ids is None
    assert report.expert_weights is None
    assert report.outcomes is None
    assert report.num_assignments == 2
    assert report.warnings == ()


def part(start: int, rows: int, **changes: object) -> PartReport:
    fields = {
        "request_id": "",
        "layer": "layer",
        "table_version": start,
        "num_tokens": rows,
        "num_assignments": rows,
        "num_served": rows,
        "num_dropped_capacity": 0,
        "num_dropped_failure": 0,
        "num_rerouted": 1,
        "batch_tokens": (rows + 1,),
        "timings": Timings(queue_ms=1.0, gate_ms=2.0, experts_ms=3.0, combine_ms=4.0),
        "warnings": ("slow",),
        "token_ids": np.arange(rows),
        "expert_ids": np.zeros(rows, np.int64),
        "expert_weights": np.ones(rows, np.float32),
        "outcomes": np.zeros(rows, np.uint8),
    }
    return PartReport(start, Report(**{**fields, **changes}))


def test_the_parts_of_a_split_request_add_up() -> None:
    report = merge_parts("r", [part(0, 3), part(3, 2)], total_s=0.02, warnings=("odd option",))
    assert (report.request_id, report.num_tokens, report.num_served, report.num_rerouted) == ("r", 5, 5, 2)
    assert report.batch_tokens == (4, 3)
    assert report.table_version == 3
    assert report.timings == Timings(queue_ms=2.0, gate_ms=4.0, experts_ms=6.0, combine_ms=8.0, total_ms=20.0)
    assert report.warnings == ("odd option", "slow")
    assert report.token_ids is not None
    assert report.token_ids.tolist() == [0, 1, 2, 3, 4]


def test_parts_without_routing_merge_into_a_report_without_routing() -> None:
    bare = {"token_ids": None, "expert_ids": None, "expert_weights": None, "outcomes": None}
    report = merge_parts("r", [part(0, 1, **bare), part(1, 1, **bare)], total_s=0.0)
    assert report.token_ids is None
    assert report.num_tokens == 2


def test_a_request_without_rows_has_an_empty_report() -> None:
    asked = LayerRequest("r", "layer", torch.zeros(0, 3), return_routing=True)
    report = empty_report(asked, table_version=4, warnings=("w",))
    assert (report.num_tokens, report.num_assignments, report.table_version) == (0, 0, 4)
    assert report.token_ids is not None
    assert report.token_ids.shape == (0,)
    assert report.shared_weights is None
    assert empty_report(LayerRequest("r", "layer", torch.zeros(0, 3)), table_version=0, warnings=()).token_ids is None


def test_the_empty_report_of_a_layer_with_shared_experts_has_their_weights_if_the_routing_was_asked_for() -> None:
    asked = LayerRequest("r", "layer", torch.zeros(0, 3), return_routing=True)
    report = empty_report(asked, table_version=4, warnings=(), num_shared=2)
    assert report.shared_weights is not None
    assert (report.shared_weights.shape, report.shared_weights.dtype) == ((0, 2), np.float32)
    bare = empty_report(LayerRequest("r", "layer", torch.zeros(0, 3)), table_version=4, warnings=(), num_shared=2)
    assert bare.shared_weights is None
