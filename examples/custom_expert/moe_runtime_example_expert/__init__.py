"""Experts of kind ``fourier``: Fourier features, which make a linear layer a Gaussian-kernel machine."""

from __future__ import annotations

from math import pi, prod, sqrt

import torch
from pydantic import Field
from torch import Tensor, nn

from moe_runtime.config.strict import StrictModel
from moe_runtime.experts import ExpertContract, ExpertKind


class FourierOptions(StrictModel):
    """Cosines of projections of a row, random at first, then a linear layer."""

    out_features: int = Field(ge=1, description="Width of the output vector.")
    num_features: int = Field(128, ge=1, description="Cosines; more of them come nearer to the Gaussian kernel.")
    length_scale: float = Field(
        2.0, gt=0, description="Distance between rows at which the kernel has fallen to exp(-1/2)."
    )
    learn_frequencies: bool = Field(
        True, description="Whether training moves the frequencies; if not, it stays the Gaussian kernel."
    )


class FourierFeatures(nn.Module):
    """``linear(sqrt(2 / num_features) * cos(frequencies @ x + phases))``.

    At first, the features' dot products approximate ``exp(-|x - y|^2 / (2 length_scale^2))``, as in Rahimi and
    Recht, Random Features for Large-Scale Kernel Machines (https://papers.nips.cc/paper/3182).
    """

    def __init__(self, in_shape: tuple[int, ...], options: FourierOptions) -> None:
        super().__init__()
        in_features, num_features = prod(in_shape), options.num_features
        self.frequencies = nn.Parameter(
            torch.randn(num_features, in_features) / options.length_scale,
            requires_grad=options.learn_frequencies,
        )
        self.phases = nn.Parameter(2 * pi * torch.rand(num_features), requires_grad=options.learn_frequencies)
        self.linear = nn.Linear(num_features, options.out_features)
        self.contract = ExpertContract(
            in_shape=in_shape,
            out_shape=(options.out_features,),
            cost_per_row=num_features * (in_features + options.out_features),
        )

    def features(self, rows: Tensor) -> Tensor:
        """``(num_rows, *in_shape)`` to ``(num_rows, num_features)``."""
        angles = rows.flatten(1) @ self.frequencies.T + self.phases
        return torch.cos(angles) * sqrt(2 / self.phases.shape[0])

    def forward(self, rows: Tensor) -> Tensor:
        """``(num_rows, *in_shape)`` to ``(num_rows, out_features)``."""
        outputs: Tensor = self.linear(self.features(rows))
        return outputs


FOURIER = ExpertKind("fourier", FourierOptions, FourierFeatures)
