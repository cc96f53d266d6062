"""Trains gate and experts together, in one process, with the functions that the router routes by."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from moe_runtime.demos.digits.recipe import LAYER
from moe_runtime.experts.build import initial_module
from moe_runtime.experts.view import resolve_view
from moe_runtime.routing.capacity import admit
from moe_runtime.routing.combine import combine
from moe_runtime.routing.gate import GateShape
from moe_runtime.routing.gates import build_gate
from moe_runtime.routing.losses import load_balancing_loss
from moe_runtime.routing.plan import plan_dispatch
from moe_runtime.routing.policies.build import build_policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from moe_runtime.demos.digits.data import Images
    from moe_runtime.demos.digits.recipe import Recipe
    from moe_runtime.routing.assignments import Assignments


class DigitsLayer(nn.Module):
    """The layer in one process, differentiable: the router's routing around the actors' experts.

    Args:
        recipe: Its configuration, and the seed that it is initialised from.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        specs = recipe.expert_specs()
        self.config = recipe.config.layers[LAYER]
        self.names = [spec.name for spec in specs]
        self.views = [resolve_view(spec.item_shape, spec.view) for spec in specs]
        self.experts = nn.ModuleList(initial_module(spec) for spec in specs)
        self.gate = build_gate(self.config.gate, GateShape(self.config.item_shape[0], len(specs)), seed=recipe.seed)
        self.policy = build_policy(self.config.policy, num_experts=len(specs))

    def expert_logits(self, pixels: Tensor) -> Tensor:
        """What every expert makes of every image: ``(num_images, 64)`` to ``(num_experts, num_images, 10)``."""
        return torch.stack([expert(view.apply(pixels)) for expert, view in zip(self.experts, self.views, strict=True)])

    def combine(self, pixels: Tensor, expert_logits: Tensor, assignments: Assignments) -> Tensor:
        """The layer's own logits, ``(num_images, 10)``; full experts drop the rest, as in the router.

        Args:
            pixels: The batch, ``(num_images, 64)``.
            expert_logits: Of every expert, ``(num_experts, num_images, 10)``.
            assignments: Which of them the gate asks for.
        """
        plan = plan_dispatch(admit(assignments, self.config.capacity))
        return combine(
            pixels,
            expert_logits[plan.expert_ids, plan.token_ids],
            plan,
            residual=self.config.residual or "none",
            weight_on=self.config.weight_on,
        ).outputs


def train(recipe: Recipe, images: Images, *, on_epoch: Callable[[int], None]) -> DigitsLayer:
    """The recipe's layer, trained on the images, in eval mode.

    The loss is the cross-entropy of the combined logits, plus that of each expert's own, plus the
    load-balancing loss. Expert dropout hides some experts from the gate, image by image. Thus every expert
    can stand alone, and a token loses little when one of its experts is full or dead.

    Args:
        recipe: What to train, and how.
        images: The training images.
        on_epoch: Called after each epoch with the number of epochs done.

    Returns:
        The layer; the same recipe gives the same weights on the same machine.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    layer = DigitsLayer(recipe).train()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    steps_per_epoch = -(-len(images) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.learning_rate, total_steps=recipe.num_epochs * steps_per_epoch
    )
    with _one_thread():
        for epoch in range(recipe.num_epochs):
            for batch in torch.split(torch.randperm(len(images), generator=generator), recipe.batch_size):
                loss = _loss(layer, recipe, images.pixels[batch], digits=images.digits[batch], generator=generator)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
            on_epoch(epoch + 1)
    return layer.eval()


def hide_experts(
    num_images: int, num_experts: int, *, probability: float, min_kept: int, generator: torch.Generator
) -> Tensor:
    """Which experts the gate must not choose: bool ``(num_images, num_experts)``.

    Each is hidden with the probability, but ``min_kept`` experts per image never are.
    """
    draws = torch.rand(num_images, num_experts, generator=generator)
    kept = draws.topk(min_kept, dim=1).indices
    return (draws < probability).scatter(1, kept, False)


def _loss(layer: DigitsLayer, recipe: Recipe, pixels: Tensor, *, digits: Tensor, generator: torch.Generator) -> Tensor:
    router_logits = layer.gate(pixels, generator)
    hidden = hide_experts(
        len(pixels),
        len(layer.experts),
        probability=recipe.expert_dropout,
        min_kept=layer.policy.max_k,
        generator=generator,
    )
    # The lowest number, not -inf: the gradient of a softmax is NaN there.
    visible_logits = router_logits.masked_fill(hidden, torch.finfo(router_logits.dtype).min)
    expert_logits = layer.expert_logits(pixels)
    logits = layer.combine(pixels, expert_logits, layer.policy.assign(visible_logits))
    together = F.cross_entropy(logits, digits, label_smoothing=recipe.label_smoothing)
    alone = F.cross_entropy(
        expert_logits.flatten(0, 1), digits.repeat(len(layer.experts)), label_smoothing=recipe.label_smoothing
    )
    balance = load_balancing_loss(router_logits, layer.policy.assign(router_logits))
    return together + recipe.alone_coefficient * alone + recipe.balance_coefficient * balance


@contextmanager
def _one_thread() -> Iterator[None]:
    """Products this small gain nothing from a second thread, and one alone gives the same sums on any machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
