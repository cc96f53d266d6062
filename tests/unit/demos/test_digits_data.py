from __future__ import annotations

import sys

import pytest
import torch

from moe_runtime.demos.digits.data import DigitsData, Images, load_digits, split_by_digit
from moe_runtime.demos.errors import DemoError


def numbered_images(num_per_digit: int) -> Images:
    """Image i is filled with i, so that it can be told from the others."""
    digits = torch.arange(10).repeat_interleave(num_per_digit)
    return Images(torch.arange(len(digits)).float()[:, None].expand(-1, 64), digits)


def test_every_digit_has_the_same_share_of_the_held_out_images() -> None:
    split = split_by_digit(numbered_images(8), seed=0, held_out_share=0.25)

    assert torch.bincount(split.held_out.digits).tolist() == [2] * 10
    assert torch.bincount(split.training.digits).tolist() == [6] * 10


def test_no_image_is_in_both_parts_and_none_is_lost() -> None:
    split = split_by_digit(numbered_images(8), seed=0, held_out_share=0.25)

    numbers = torch.cat([split.training.pixels[:, 0], split.held_out.pixels[:, 0]])
    assert sorted(numbers.tolist()) == list(range(80))
    assert torch.equal(split.held_out.digits, split.held_out.pixels[:, 0].long() // 8)


def test_the_same_seed_gives_the_same_split_and_another_seed_another() -> None:
    images = numbered_images(8)
    first, again, other = (split_by_digit(images, seed=seed, held_out_share=0.25) for seed in (1, 1, 2))

    assert torch.equal(first.held_out.pixels, again.held_out.pixels)
    assert not torch.equal(first.held_out.pixels, other.held_out.pixels)


def test_the_real_images_are_scaled_to_between_0_and_1(data: DigitsData) -> None:
    assert len(data.training) + len(data.held_out) == 1797
    assert data.training.pixels.shape[1:] == (64,)
    assert data.training.pixels.dtype == torch.float32
    assert (data.training.pixels.min(), data.training.pixels.max()) == (0.0, 1.0)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)

    with pytest.raises(DemoError, match=r"pip install 'moe-runtime\[demo\]'"):
        load_digits(seed=0, held_out_share=0.25)
