"""The same answers computed in one process, to hold the served ones against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_runtime.errors import InternalError
from moe_runtime.wire.messages import SERVED

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.demos.digits.data import Images
    from moe_runtime.demos.digits.traffic import Answer
    from moe_runtime.demos.digits.training import DigitsLayer
    from moe_runtime.wire.messages import Report


class Reference:
    """What gate and experts make of the images, each image and expert once.

    Args:
        layer: The layer as it was loaded from its files, in eval mode.
        images: The images that requests ask about.
    """

    @torch.inference_mode()
    def __init__(self, layer: DigitsLayer, images: Images) -> None:
        self._images = images
        self._expert_logits = layer.expert_logits(images.pixels)
        self._probabilities = layer.gate(images.pixels).softmax(dim=1)

    @property
    def num_images(self) -> int:
        """Images that requests may ask about."""
        return len(self._images)

    def expert_accuracies(self) -> list[float]:
        """Share of the images that each expert gets right when it is alone."""
        right = self._expert_logits.argmax(dim=2) == self._images.digits
        return right.double().mean(dim=1).tolist()

    def num_right(self, answer: Answer) -> int:
        """Images of an answer whose highest logit is that of their digit."""
        return int((answer.result.outputs.argmax(dim=1) == self._images.digits[answer.image_ids]).sum())

    def difference(self, answer: Answer) -> float:
        """Largest absolute difference between an answer and what its own served assignments come to here.

        Which assignments were served depends on the batch, so the report says it; what they are worth does
        not: outputs and weights (normalised before drops) are computed from the saved files.
        """
        image_ids, report = answer.image_ids, answer.result.report
        token_ids, expert_ids, served = _routing(report)
        scores = self._probabilities[image_ids[token_ids], expert_ids]
        totals = torch.zeros(len(image_ids)).index_add(0, token_ids, scores)
        weights = torch.where(served, scores / totals[token_ids], 0.0)
        rows = weights[:, None] * self._expert_logits[expert_ids, image_ids[token_ids]]
        expected = torch.zeros(len(image_ids), rows.shape[1]).index_add(0, token_ids, rows)
        return float((answer.result.outputs - expected).abs().max())


def _routing(report: Report) -> tuple[Tensor, Tensor, Tensor]:
    """Token and expert of every assignment, int64, and whether it was served, bool."""
    if report.token_ids is None or report.expert_ids is None or report.outcomes is None:
        raise InternalError(f"request {report.request_id}: expected its routing in the report, found none")
    outcomes = torch.tensor(report.outcomes)
    return torch.tensor(report.token_ids), torch.tensor(report.expert_ids), outcomes == SERVED
