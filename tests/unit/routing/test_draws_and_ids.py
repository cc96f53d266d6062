from __future__ import annotations

import pytest
import torch

from moe_runtime.routing.draws import uniform_draws
from moe_runtime.routing.hashing import ids_of_rows
from moe_runtime.routing.reference.draws import splitmix64, uniform


def test_draws_are_those_of_whole_numbers_in_python():
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 1234567])
    for stream in (0, 7):
        draws = uniform_draws(seeds[:, None], torch.arange(5), stream=stream)
        expected = [[uniform(seed, choice, stream=stream) for choice in range(5)] for seed in seeds.tolist()]
        assert draws.tolist() == expected
        assert uniform_draws(seeds, 3, stream=stream).tolist() == draws[:, 3].tolist()


def test_draws_are_uniform_and_streams_are_independent():
    seeds = torch.arange(20000)
    first, second = uniform_draws(seeds, 0, stream=0), uniform_draws(seeds, 0, stream=1)
    assert first.dtype == torch.float64
    assert first.min() >= 0.0
    assert first.max() < 1.0
    for draws in (first, second, (first + second) % 1.0, (first + uniform_draws(seeds, 1, stream=0)) % 1.0):
        shares = torch.histc(draws, bins=10, min=0.0, max=1.0) / 20000
        # Five standard deviations of a share of 0.1.
        assert (shares - 0.1).abs().max() < 0.011


def test_keys_of_neighbouring_rows_share_no_draws():
    # What the service makes of a request's seed: two steps of it are two of splitmix64's, but for whole turns.
    seeds = torch.arange(64) * 0x1E37_79B9_7F4A_7C15 + 42
    draws = uniform_draws(seeds[:, None], torch.arange(64), stream=1)
    assert draws.unique().numel() == 64 * 64


def test_an_id_is_a_hash_of_the_elements_bits():
    def signed(number):
        return (number + 2**63) % 2**64 - 2**63

    # 1.0 and -2.0 as whole numbers of 32 bits.
    words = [0x3F800000, 0xC0000000 - 2**32]
    total = signed(splitmix64(words[0], 0) + splitmix64(words[1], 1))
    assert ids_of_rows(torch.tensor([[1.0, -2.0]])).tolist() == [splitmix64(total, 0)]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8]
)
def test_equal_rows_have_equal_ids_and_others_have_others(dtype):
    rows = torch.arange(2000).reshape(500, 2, 2) % 251
    rows = torch.cat([rows.to(dtype), rows.flip(0).to(dtype)])
    ids = ids_of_rows(rows)
    assert torch.equal(ids[:500], ids[500:].flip(0))
    assert ids.unique().numel() == rows.unique(dim=0).shape[0]


def test_an_id_depends_on_nothing_but_its_row():
    # Wide enough that the rows are hashed in several parts.
    rows = torch.randn(700, 1000, generator=torch.Generator().manual_seed(0))
    ids = ids_of_rows(rows)
    assert ids.unique().numel() == 700
    assert ids_of_rows(rows[310:311]).tolist() == ids[310:311].tolist()
    assert torch.equal(ids_of_rows(rows.reshape(700, 10, 100)), ids)
    assert torch.equal(ids_of_rows(rows.t().contiguous().t()), ids)


def test_the_order_of_a_rows_elements_counts():
    ids = ids_of_rows(torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.0, -0.0], [-0.0, 0.0]]))
    assert ids.unique().numel() == 4


def test_no_rows_have_no_ids():
    ids = ids_of_rows(torch.zeros(0, 3))
    assert ids.shape == (0,)
    assert ids.dtype == torch.int64
