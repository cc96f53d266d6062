"""The kind ``transformers``: one expert of one layer of a Hugging Face checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field
from torch import Tensor, nn

from moe_runtime.config.strict import StrictModel
from moe_runtime.errors import ConfigError, WeightsError
from moe_runtime.experts.protocol import ExpertContract, ExpertKind

if TYPE_CHECKING:
    from moe_runtime.experts.checkpoints.checkpoint import Checkpoint


class CheckpointOptions(StrictModel):
    """One expert of a Hugging Face checkpoint, computed as transformers does; its tensors alone are read."""

    checkpoint: str = Field(description="Folder of the checkpoint: config.json and safetensors files.")
    module: str = Field(
        description="Path of the model's module that holds the experts, such as `model.layers.0.mlp.experts`."
    )
    expert: int = Field(ge=0, description="Place of the expert in that module.")
    architecture: str | None = Field(
        None, description="Class of transformers that the path is of; the checkpoint's first when not given."
    )
    version: str | None = Field(
        None, description="Stands for the weights that are meant; a checkpoint with others is refused when it is read."
    )


class CheckpointExpert(nn.Module):
    """An expert of a checkpoint, on the meta device until it is loaded.

    Args:
        checkpoint: Holds it.
        options: Say which one it is.
    """

    def __init__(self, checkpoint: Checkpoint, options: CheckpointOptions) -> None:
        super().__init__()
        layer = checkpoint.layer(options.module)
        if options.expert >= layer.num_experts:
            raise ConfigError(
                f"expected one of the {layer.num_experts} experts of {options.module}, from 0, found {options.expert}"
            )
        self.expert: Any = checkpoint.bare_expert(options.module)
        weights = sum(parameter.numel() for parameter in self.expert.parameters())
        shape = (layer.hidden_size,)
        self.contract = ExpertContract(in_shape=shape, out_shape=shape, cost_per_row=float(weights))
        self.stored_version = checkpoint.version
        self._checkpoint = checkpoint
        self._options = options

    def load(self) -> None:
        """Read the parameters, in the dtypes that they have by now.

        Raises:
            WeightsError: If a tensor is missing, broken or of another shape, or the files are not those that are meant.
        """
        wanted = self._options.version
        if wanted not in (None, self.stored_version):
            raise WeightsError(
                f"{self._checkpoint.folder}: expected the files of version {wanted}, found {self.stored_version}: they "
                "have changed since the layer was configured; put them back, or load the model anew"
            )
        self._checkpoint.load_expert(self.expert, self._options.module, self._options.expert)

    def forward(self, rows: Tensor) -> Tensor:
        """``(N, H)`` to ``(N, H)``, not weighted."""
        outputs: Tensor = self.expert(rows)
        return outputs


def _build(in_shape: tuple[int, ...], options: CheckpointOptions) -> CheckpointExpert:
    # transformers takes seconds to import: only who has such an expert waits for it.
    from moe_runtime.experts.checkpoints.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(options.checkpoint, architecture=options.architecture)
    expert = CheckpointExpert(checkpoint, options)
    if in_shape != expert.contract.in_shape:
        raise ConfigError(
            f"expected rows of shape {list(expert.contract.in_shape)}, the hidden size of {options.module}, "
            f"found {list(in_shape)}"
        )
    return expert


TRANSFORMERS = ExpertKind("transformers", CheckpointOptions, _build)
