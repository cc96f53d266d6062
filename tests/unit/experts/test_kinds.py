"""The built-in kinds: what they compute, which shapes they take, and that they learn and stay pure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from moe_runtime.errors import ConfigError
from moe_runtime.experts.build import initial_module
from moe_runtime.experts.kinds.conv import Conv, ConvOptions
from moe_runtime.experts.kinds.feed_forward import FeedForward, FeedForwardOptions, SwiGLU, SwiGLUOptions
from moe_runtime.experts.kinds.recurrent import Recurrent, RecurrentOptions
from moe_runtime.experts.kinds.transformer import EncoderBlock, Transformer, TransformerOptions
from moe_runtime.experts.kinds.zero_computation import Constant, ConstantOptions, Zero, ZeroOptions
from moe_runtime.experts.registry import BUILT_IN_KINDS
from moe_runtime.experts.spec import ExpertSpec, expert_contract

#: kind, input shape, options, output shape
CASES: list[tuple[str, tuple[int, ...], dict[str, Any], tuple[int, ...]]] = [
    ("feed_forward", (64,), {}, (64,)),
    ("feed_forward", (64,), {"out_features": 10, "activation": "gelu", "bias": False}, (10,)),
    ("feed_forward", (5, 8), {"out_features": 3}, (5, 3)),
    ("swiglu", (64,), {"hidden_features": 16}, (64,)),
    ("swiglu", (5, 8), {"out_features": 3}, (5, 3)),
    ("conv", (1, 8, 8), {"out_features": 10}, (10,)),
    ("conv", (3, 9, 7), {"kernel_sizes": [5], "pool": 3, "channels": 4, "out_features": 2}, (2,)),
    ("conv", (3, 9, 7), {"kernel_sizes": [3, 1]}, (3, 9, 7)),
    ("recurrent", (8, 8), {"out_features": 10}, (10,)),
    ("recurrent", (8, 3), {"cell": "lstm", "num_layers": 2, "hidden_features": 6}, (8, 3)),
    ("transformer", (8, 8), {"out_features": 10}, (10,)),
    ("transformer", (8, 3), {"num_layers": 2, "hidden_size": 12, "num_heads": 3}, (8, 3)),
    ("identity", (4, 2), {}, (4, 2)),
    ("zero", (4, 2), {}, (4, 2)),
    ("zero", (4, 2), {"out_shape": [10]}, (10,)),
    ("constant", (4, 2), {}, (4, 2)),
    ("constant", (4, 2), {"out_shape": [10]}, (10,)),
    ("constant", (4, 2), {"mix_input": True}, (4, 2)),
]

every_case = pytest.mark.parametrize(
    ("kind", "in_shape", "options", "out_shape"), CASES, ids=[f"{case[0]}-{case[3]}" for case in CASES]
)


def make_spec(kind: str, in_shape: tuple[int, ...], options: dict[str, Any]) -> ExpertSpec:
    return ExpertSpec("toy", 0, "toy-0", kind, in_shape, options=options)


def random_rows(num_rows: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(num_rows, *shape, generator=torch.Generator().manual_seed(1))


def test_every_built_in_kind_has_a_case() -> None:
    # An expert of a checkpoint needs one: test_checkpoint_kind.py.
    assert {case[0] for case in CASES} | {"transformers"} == set(BUILT_IN_KINDS)


def test_every_option_and_every_kind_is_described() -> None:
    for kind in BUILT_IN_KINDS.values():
        assert kind.options.__doc__, kind.name
        for name, field in kind.options.model_fields.items():
            assert field.description, f"{kind.name}.{name}"


@every_case
def test_output_has_the_shape_of_the_contract(
    kind: str, in_shape: tuple[int, ...], options: dict[str, Any], out_shape: tuple[int, ...]
) -> None:
    spec = make_spec(kind, in_shape, options)
    contract = expert_contract(spec)
    assert (contract.in_shape, contract.out_shape) == (in_shape, out_shape)
    assert initial_module(spec)(random_rows(3, in_shape)).shape == (3, *out_shape)


@every_case
def test_row_gives_the_same_output_alone_as_among_others(
    kind: str, in_shape: tuple[int, ...], options: dict[str, Any], out_shape: tuple[int, ...]
) -> None:
    module, rows = initial_module(make_spec(kind, in_shape, options)), random_rows(4, in_shape)
    with torch.inference_mode():
        alone = torch.cat([module(rows[i : i + 1]) for i in range(4)])
        torch.testing.assert_close(module(rows), alone, rtol=1e-5, atol=1e-6)


@every_case
def test_every_parameter_gets_a_gradient(
    kind: str, in_shape: tuple[int, ...], options: dict[str, Any], out_shape: tuple[int, ...]
) -> None:
    module = initial_module(make_spec(kind, in_shape, options)).train()
    outputs = module(random_rows(16, in_shape))
    if any(True for _ in module.parameters()):
        (outputs - 1).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@every_case
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_every_kind_runs_in_every_dtype(
    kind: str, in_shape: tuple[int, ...], options: dict[str, Any], out_shape: tuple[int, ...], dtype: str
) -> None:
    torch_dtype = getattr(torch, dtype)
    module = initial_module(make_spec(kind, in_shape, options)).to(torch_dtype)
    with torch.inference_mode():
        outputs = module(random_rows(3, in_shape).to(torch_dtype))
    assert (outputs.dtype, outputs.shape) == (torch_dtype, (3, *out_shape))


def set_parameters(module: nn.Module, values: dict[str, list[Any]]) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.tensor(values[name]))


def test_feed_forward_clips_at_zero_between_its_linear_layers() -> None:
    module = FeedForward((1,), FeedForwardOptions(hidden_features=2))
    set_parameters(
        module,
        {"up.weight": [[1.0], [-1.0]], "up.bias": [0.0, 1.0], "down.weight": [[2.0, 10.0]], "down.bias": [0.5]},
    )
    # x = 3: hidden (3, -2 -> 0); x = -1: hidden (-1 -> 0, 2).
    torch.testing.assert_close(module(torch.tensor([[3.0], [-1.0]])), torch.tensor([[6.5], [20.5]]))


def test_swiglu_multiplies_the_silu_of_one_projection_by_another() -> None:
    module = SwiGLU((1,), SwiGLUOptions(hidden_features=1))
    set_parameters(module, {"gate.weight": [[1.0]], "up.weight": [[3.0]], "down.weight": [[2.0]]})
    # x = 1: silu(1) = 0.7310586, times 3, times 2.
    torch.testing.assert_close(module(torch.tensor([[1.0]])), torch.tensor([[4.3863516]]))


def test_conv_pools_the_largest_rectified_pixel() -> None:
    module = Conv((1, 2, 2), ConvOptions(channels=1, kernel_sizes=[1], out_features=1))
    set_parameters(
        module,
        {
            "convolutions.0.weight": [[[[2.0]]]],
            "convolutions.0.bias": [1.0],
            "head.1.weight": [[10.0]],
            "head.1.bias": [0.0],
        },
    )
    images = torch.tensor([[[[1.0, 4.0], [-3.0, 0.0]]], [[[-5.0, -1.0], [-1.0, -2.0]]]])
    # 2 * 4 + 1 = 9 in the first image; nothing above zero in the second.
    torch.testing.assert_close(module(images), torch.tensor([[90.0], [0.0]]))


def test_conv_that_pools_the_image_away_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"pooling by 2 after each of 4 convolutions .* 8x8 image"):
        Conv((1, 8, 8), ConvOptions(kernel_sizes=[3, 3, 3, 3], out_features=10))


def test_recurrent_reads_the_last_state_of_a_gru() -> None:
    module = Recurrent((3, 2), RecurrentOptions(hidden_features=4, out_features=5))
    rows, state = random_rows(2, (3, 2)), torch.zeros(2, 4)
    gru = module.recurrence
    for step in range(3):
        given = linear(rows[:, step], gru.weight_ih_l0, gru.bias_ih_l0).chunk(3, dim=1)
        kept = linear(state, gru.weight_hh_l0, gru.bias_hh_l0).chunk(3, dim=1)
        reset, update = torch.sigmoid(given[0] + kept[0]), torch.sigmoid(given[1] + kept[1])
        state = (1 - update) * torch.tanh(given[2] + reset * kept[2]) + update * state
    torch.testing.assert_close(module(rows), module.head(state))


def test_recurrent_without_out_features_reads_every_step_in_order() -> None:
    module = Recurrent((3, 2), RecurrentOptions(cell="lstm"))
    rows = random_rows(1, (3, 2))
    changed = rows.clone()
    changed[:, 2] += 1
    # The last step cannot change what was read before it.
    torch.testing.assert_close(module(rows)[:, :2], module(changed)[:, :2])
    assert not torch.allclose(module(rows)[:, 2], module(changed)[:, 2])


def test_encoder_block_equals_torchs_pre_norm_encoder_layer() -> None:
    block = EncoderBlock(8, num_heads=2, feed_forward_features=16)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    names = {
        "self_attn.in_proj_weight": "query_key_value.weight",
        "self_attn.in_proj_bias": "query_key_value.bias",
        "self_attn.out_proj.weight": "attention_out.weight",
        "self_attn.out_proj.bias": "attention_out.bias",
        "linear1.weight": "up.weight",
        "linear1.bias": "up.bias",
        "linear2.weight": "down.weight",
        "linear2.bias": "down.bias",
        "norm1.weight": "attention_norm.weight",
        "norm1.bias": "attention_norm.bias",
        "norm2.weight": "feed_forward_norm.weight",
        "norm2.bias": "feed_forward_norm.bias",
    }
    block.load_state_dict({names[name]: tensor for name, tensor in layer.state_dict().items()})
    rows = random_rows(3, (5, 8))
    torch.testing.assert_close(block(rows), layer(rows))


def test_transformer_tells_the_order_of_steps() -> None:
    module = Transformer((4, 3), TransformerOptions(out_features=2))
    rows = random_rows(1, (4, 3))
    assert not torch.allclose(module(rows), module(rows.flip(1)))


def test_identity_gives_the_rows_and_zero_gives_zeros() -> None:
    rows = random_rows(2, (3,))
    assert initial_module(make_spec("identity", (3,), {}))(rows) is rows
    assert torch.equal(Zero((3,), ZeroOptions(out_shape=[2]))(rows), torch.zeros(2, 2))


def test_constant_of_moe_plus_plus_mixes_the_row_and_the_value_by_a_learned_softmax_of_the_row() -> None:
    module = Constant((2,), ConstantOptions(mix_input=True))
    set_parameters(module, {"value": [10.0, 20.0], "mix.weight": [[1.0, 0.0], [0.0, 0.0]]})
    # Logits (0, 0) and (ln 3, 0): shares (1/2, 1/2) and (3/4, 1/4).
    rows = torch.tensor([[0.0, 2.0], [1.0986123, 4.0]])
    expected = torch.tensor([[5.0, 11.0], [0.75 * 1.0986123 + 2.5, 8.0]])
    torch.testing.assert_close(module(rows), expected)


def test_constant_that_mixes_the_input_into_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"with mix_input, expected the input's shape \[3\], found \[2\]"):
        Constant((3,), ConstantOptions(mix_input=True, out_shape=[2]))


def test_constant_gives_its_value_for_every_row() -> None:
    module = Constant((3,), ConstantOptions(out_shape=[2]))
    set_parameters(module, {"value": [1.5, -2.0]})
    assert torch.equal(module(random_rows(2, (3,))), torch.tensor([[1.5, -2.0], [1.5, -2.0]]))


@pytest.mark.parametrize(
    ("kind", "dims"),
    [("conv", "(channels, height, width)"), ("recurrent", "(steps, features)"), ("transformer", "(steps, features)")],
)
def test_flat_item_for_a_kind_with_structure_points_to_the_view(kind: str, dims: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expert_contract(make_spec(kind, (64,), {"out_features": 10}))
    assert f"expected an input of shape {dims}, found [64]; `view:" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "shape", "options", "cost"),
    [
        ("feed_forward", (64,), {"hidden_features": 128, "out_features": 10}, 64 * 128 + 128 * 10),
        ("swiglu", (64,), {"hidden_features": 128}, 3 * 64 * 128),
        ("conv", (1, 8, 8), {"kernel_sizes": [3], "channels": 4, "out_features": 10}, 9 * 4 * 64 + 4 * 16 * 10),
        ("recurrent", (8, 5), {"hidden_features": 6, "out_features": 10}, 8 * 3 * 6 * (5 + 6) + 60),
        ("identity", (64,), {}, 0),
    ],
)
def test_cost_counts_the_multiply_adds_of_one_row(
    kind: str, shape: tuple[int, ...], options: dict[str, Any], cost: float
) -> None:
    assert expert_contract(make_spec(kind, shape, options)).cost_per_row == cost
