"""The demo's input: scikit-learn's 1,797 real images of handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.demos.errors import DemoError

#: Classes, and so the logits of every expert.
NUM_DIGITS = 10
_DARKEST = 16.0


@dataclass(frozen=True)
class Images:
    """Images and what they show.

    Attributes:
        pixels: float32 in [0, 1], ``(num_images, 64)``.
        digits: int64 in [0, 10), ``(num_images,)``.
    """

    pixels: Tensor
    digits: Tensor

    def __len__(self) -> int:
        return int(self.digits.shape[0])


@dataclass(frozen=True)
class DigitsData:
    """The images in two parts; each digit has the same share of both."""

    training: Images
    held_out: Images


def load_digits(*, seed: int, held_out_share: float) -> DigitsData:
    """The images, split at random but in the same way for the same seed.

    The data set (https://archive.ics.uci.edu/dataset/80) lies inside scikit-learn; nothing is downloaded.

    Args:
        seed: Of the split and of the order of the images.
        held_out_share: Share of each digit's images that is held out, rounded.

    Raises:
        DemoError: If scikit-learn is not installed.
    """
    try:
        from sklearn import datasets  # not a dependency of the runtime
    except ImportError as exc:
        raise DemoError(
            "the images are a part of scikit-learn, which is not installed: pip install 'moe-runtime[demo]'"
        ) from exc
    pixels, labels = datasets.load_digits(return_X_y=True)
    images = Images(torch.from_numpy(pixels).float() / _DARKEST, torch.from_numpy(labels).long())
    return split_by_digit(images, seed=seed, held_out_share=held_out_share)


def split_by_digit(images: Images, *, seed: int, held_out_share: float) -> DigitsData:
    """Hold out the same share of each digit; both parts come in random order."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(images), generator=generator)
    is_held_out = torch.zeros(len(images), dtype=torch.bool)
    for digit in range(NUM_DIGITS):
        of_digit = shuffled[images.digits[shuffled] == digit]
        is_held_out[of_digit[: round(held_out_share * len(of_digit))]] = True
    return DigitsData(
        training=_take(images, shuffled[~is_held_out[shuffled]]),
        held_out=_take(images, shuffled[is_held_out[shuffled]]),
    )


def _take(images: Images, indices: Tensor) -> Images:
    return Images(images.pixels[indices], images.digits[indices])
