"""Traffic that is held: nobody asks, not even who was let go a moment ago."""

from __future__ import annotations

import asyncio

import numpy as np

from moe_runtime.chaos.lag import Lag
from moe_runtime.chaos.layer import LayerWeights
from moe_runtime.chaos.ledger import Ledger
from moe_runtime.chaos.load import Load
from moe_runtime.chaos.reference import Reference


async def test_who_was_let_go_and_held_again_before_running_does_not_ask() -> None:
    eye, zeros = np.eye(2, dtype=np.float32), np.zeros((1, 2), np.float32)
    weights = LayerWeights(gate=eye, up=eye[None], up_bias=zeros, down=eye[None], down_bias=zeros)
    load = Load(["127.0.0.1:1"], seed=0, ledger=Ledger(), reference=Reference(weights), lag=Lag())
    load.hold()
    waiting = asyncio.create_task(load.may_ask())
    await asyncio.sleep(0)
    load.release()
    load.hold()
    for _ in range(3):
        await asyncio.sleep(0)
    assert not waiting.done()
    load.release()
    await waiting
    await load.close()
