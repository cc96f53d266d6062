from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_runtime.demos.digits.data import DigitsData, Images
from moe_runtime.demos.digits.recipe import Recipe
from moe_runtime.demos.digits.training import DigitsLayer, hide_experts, train


def first(images: Images, num_images: int) -> Images:
    return Images(images.pixels[:num_images], images.digits[:num_images])


@pytest.mark.parametrize("probability", [0.0, 0.4, 1.0])
def test_expert_dropout_leaves_every_image_as_many_experts_as_it_needs(probability: float) -> None:
    hidden = hide_experts(200, 5, probability=probability, min_kept=2, generator=torch.Generator().manual_seed(0))

    num_visible = (~hidden).sum(dim=1)
    assert num_visible.min() >= 2
    if probability == 0.0:
        assert num_visible.min() == 5
    if probability == 1.0:
        assert num_visible.max() == 2


def test_expert_dropout_favours_no_expert() -> None:
    hidden = hide_experts(20_000, 5, probability=0.5, min_kept=2, generator=torch.Generator().manual_seed(0))

    torch.testing.assert_close(hidden.float().mean(dim=0), hidden.float().mean().expand(5), atol=0.02, rtol=0)


def test_the_trained_layer_is_accurate_and_so_is_every_expert_alone(trained: DigitsLayer, data: DigitsData) -> None:
    pixels, digits = data.held_out.pixels, data.held_out.digits
    with torch.inference_mode():
        expert_logits = trained.expert_logits(pixels)
        logits = trained.combine(pixels, expert_logits, trained.policy.assign(trained.gate(pixels)))

    assert (logits.argmax(dim=1) == digits).float().mean() >= 0.96
    assert (expert_logits.argmax(dim=2) == digits).float().mean(dim=1).min() >= 0.90


def test_training_spreads_the_images_over_all_experts(trained: DigitsLayer, data: DigitsData) -> None:
    assignments = trained.policy.assign(trained.gate(data.held_out.pixels))
    shares = torch.bincount(assignments.expert_ids, minlength=5) / len(assignments.expert_ids)

    assert shares.min() > 0.1
    assert shares.max() < 0.35


def test_the_same_recipe_gives_the_same_weights(short_recipe: Recipe, data: DigitsData) -> None:
    recipe = replace(short_recipe, num_epochs=1)
    some = first(data.training, 200)
    layer, again = (train(recipe, some, on_epoch=lambda _: None).state_dict() for _ in range(2))

    assert layer.keys() == again.keys()
    assert all(torch.equal(layer[name], again[name]) for name in layer)


def test_training_tells_every_epoch_and_gives_back_the_threads(short_recipe: Recipe, data: DigitsData) -> None:
    num_threads = torch.get_num_threads()
    epochs: list[int] = []

    layer = train(replace(short_recipe, num_epochs=3), first(data.training, 130), on_epoch=epochs.append)

    assert epochs == [1, 2, 3]
    assert not layer.training
    assert torch.get_num_threads() == num_threads
