"""Changes to the files of checkpoints that transformers has saved."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    """Rewrite the tensors of a checkpoint that is one file."""
    file = folder / "model.safetensors"
    save_file(dict(change(load_file(file))), file, metadata={"format": "pt"})


def change_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON object."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def quantise_to_fp8(folder: Path, *, block: int = 8) -> None:
    """Quantise the projections of a checkpoint in square blocks, as DeepSeek-V3's is (https://arxiv.org/abs/2412.19437)."""

    def quantised(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            if not key.endswith("proj.weight"):
                found[key] = tensor
                continue
            blocks = tensor.float().unflatten(1, (-1, block)).unflatten(0, (-1, block))
            scales = blocks.abs().amax(dim=(1, 3)) / torch.finfo(torch.float8_e4m3fn).max
            scaled = blocks / scales[:, None, :, None]
            found[key] = scaled.reshape(tensor.shape).to(torch.float8_e4m3fn)
            found[f"{key}_scale_inv"] = scales
        return found

    change_tensors(folder, quantised)
    settings = {"quant_method": "fp8", "weight_block_size": [block, block], "activation_scheme": "dynamic"}
    change_json(folder / "config.json", quantization_config=settings)


def quantise_to_mxfp4(folder: Path) -> None:
    """Replace the experts of a gpt-oss checkpoint by random ones: blocks of 32 4-bit numbers with one exponent each."""
    drawn = torch.Generator().manual_seed(1)

    def quantised(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {key: tensor for key, tensor in tensors.items() if not key.endswith(("gate_up_proj", "down_proj"))}
        for key in tensors.keys() - found.keys():
            num_experts, in_features, out_features = tensors[key].shape
            grid = (num_experts, out_features, in_features // 32)
            found[f"{key}_blocks"] = torch.randint(0, 256, (*grid, 16), dtype=torch.uint8, generator=drawn)
            found[f"{key}_scales"] = torch.randint(120, 126, grid, dtype=torch.uint8, generator=drawn)
        return found

    change_tensors(folder, quantised)
    change_json(folder / "config.json", quantization_config={"quant_method": "mxfp4"})
