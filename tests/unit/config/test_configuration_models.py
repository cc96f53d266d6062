import subprocess
import sys

import pytest
from pydantic import ValidationError

from moe_runtime.config.models import CapacityConfig, LayerConfig
from moe_runtime.config.runtime import DataPlaneConfig, RuntimeConfig


def test_defaults_are_those_that_the_documentation_promises() -> None:
    config = RuntimeConfig.model_validate(
        {"layers": {"a": {"item_shape": [4], "experts": [{"kind": "x", "count": 3}]}}}
    )

    layer = config.layers["a"]
    assert (config.name, config.device, config.threads, config.start_timeout_s) == ("default", "auto", "auto", 60.0)
    assert (layer.dtype, layer.timeout_ms, layer.residual, layer.weight_on) == ("float32", 2000.0, None, "output")
    assert (layer.gate.kind, layer.policy.kind, layer.capacity.factor) == ("linear", "top_k", None)
    assert config.router.max_batch_tokens == 4096
    assert config.limits.default_timeout_s == 10.0


def test_count_is_expanded_in_the_number_of_experts() -> None:
    layer = LayerConfig.model_validate({"item_shape": [4], "experts": [{"kind": "x", "count": 3}, {"kind": "y"}]})
    assert layer.num_experts == 4


def test_a_configuration_does_not_change_after_it_was_checked() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        CapacityConfig().min = 3  # type: ignore[misc]


def test_the_models_load_without_yaml_torch_or_ray() -> None:
    check = (
        "import sys; import moe_runtime.config.runtime, moe_runtime.config.load; "
        "print(sorted({'yaml', 'torch', 'ray', 'zmq', 'typer'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wire_dtype": "float32", "dtype": "bfloat16"}, "with dtype bfloat16, expected one of"),
        ({"wire_dtype": "bfloat16", "exact": True}, "expected nothing in an exact layer, found bfloat16"),
        ({"wire_dtype": "float16", "weight_on": "input"}, "expected bfloat16, found float16"),
    ],
)
def test_a_wire_dtype_that_cannot_work_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LayerConfig.model_validate({"item_shape": [4], "experts": [{"kind": "x", "count": 3}], **changes})


def test_a_network_is_written_in_cidr_notation() -> None:
    assert DataPlaneConfig.model_validate({"network": "10.0.0.0/16"}).network == "10.0.0.0/16"
    with pytest.raises(ValidationError, match=r"expected a network such as 10\.0\.0\.0/16, found '10\.0\.0\.7/16'"):
        DataPlaneConfig.model_validate({"network": "10.0.0.7/16"})


def test_a_wire_dtype_may_name_the_layers_own_dtype_or_a_narrower_one() -> None:
    layer = {"item_shape": [4], "experts": [{"kind": "x", "count": 3}]}
    assert LayerConfig.model_validate({**layer, "wire_dtype": "float32", "exact": True}).wire_dtype == "float32"
    assert LayerConfig.model_validate({**layer, "wire_dtype": "bfloat16"}).wire_dtype == "bfloat16"
