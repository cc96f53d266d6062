from __future__ import annotations

from dataclasses import fields, replace

import pytest

from moe_runtime.demos.digits.recipe import DEFAULT_RECIPE, LAYER, Recipe


def test_equal_recipes_have_the_same_key() -> None:
    assert Recipe().key == DEFAULT_RECIPE.key


@pytest.mark.parametrize("name", [field.name for field in fields(Recipe)])
def test_whatever_changes_the_weights_changes_the_key(name: str) -> None:
    value = getattr(DEFAULT_RECIPE, name)
    changed = replace(DEFAULT_RECIPE, **{name: value + " " if isinstance(value, str) else value + 1})

    assert changed.key != DEFAULT_RECIPE.key


def test_the_served_layer_has_five_kinds_of_experts_that_answer_with_ten_logits() -> None:
    layer = DEFAULT_RECIPE.config.layers[LAYER]

    assert [expert.kind for expert in layer.experts] == ["conv", "recurrent", "transformer", "feed_forward", "fourier"]
    assert {expert.options["out_features"] for expert in layer.experts} == {10}


def test_experts_are_specified_in_the_gates_order_without_weights() -> None:
    specs = DEFAULT_RECIPE.expert_specs()

    assert [spec.expert_id for spec in specs] == [0, 1, 2, 3, 4]
    assert {spec.weights for spec in specs} == {None}
