"""Weight files and their manifest: what is refused, and that nothing half-written is left."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from moe_runtime.errors import WeightsError
from moe_runtime.experts.weights import check_fit, load_into, load_weights, save_weights, verify, write_manifest

TENSORS = {"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "expert-0.safetensors"


def test_saved_tensors_come_back_with_their_metadata_and_hash(path: Path) -> None:
    sha256 = save_weights(path, TENSORS, {"kind": "feed_forward"})
    weights = load_weights(path)
    assert {name: tensor.tolist() for name, tensor in weights.tensors.items()} == {"weight": [[1, 2]], "bias": [3]}
    assert weights.metadata == {"kind": "feed_forward"}
    assert weights.sha256 == sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_same_tensors_give_the_same_file(tmp_path: Path) -> None:
    assert save_weights(tmp_path / "a", TENSORS) == save_weights(tmp_path / "b", dict(reversed(TENSORS.items())))


def test_tensors_that_share_memory_or_are_transposed_are_saved(path: Path) -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    save_weights(path, {"matrix": matrix, "tied": matrix, "transposed": matrix.T})
    assert torch.equal(load_weights(path).tensors["transposed"], matrix.T)


def test_failed_save_leaves_the_old_file_and_nothing_else(path: Path) -> None:
    before = save_weights(path, TENSORS)
    with pytest.raises(TypeError):
        save_weights(path, TENSORS, {"step": 3})  # type: ignore[dict-item]  # metadata has to be text
    assert verify(path) == before
    assert list(path.parent.iterdir()) == [path]


def test_manifest_lists_the_hash_of_every_file(path: Path) -> None:
    sha256 = save_weights(path, TENSORS)
    manifest = write_manifest(path.parent)
    assert json.loads(manifest.read_text()) == {
        "format": 1,
        "files": {"expert-0.safetensors": {"sha256": sha256, "num_bytes": path.stat().st_size}},
    }
    assert verify(path) == sha256


def test_manifest_of_named_files_leaves_the_others_unchecked(path: Path) -> None:
    save_weights(path, TENSORS)
    other = path.with_name("other.safetensors")
    save_weights(other, TENSORS)
    write_manifest(path.parent, [path.name])
    sha256 = save_weights(other, {"bias": TENSORS["bias"]})
    assert verify(other) == sha256


def test_file_that_differs_from_the_manifest_is_refused(path: Path) -> None:
    save_weights(path, TENSORS)
    write_manifest(path.parent)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"expected sha256 \w{64} from manifest\.json, found \w{64}; the file is"):
        load_weights(path)


def test_missing_file_is_told_with_its_path(path: Path) -> None:
    with pytest.raises(WeightsError, match=r"expert-0\.safetensors: expected a weight file, found none"):
        load_weights(path)
    with pytest.raises(WeightsError, match="found none"):
        write_manifest(path.parent, [path.name])


def test_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="expected a readable weight file"):
        load_weights(tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 64])
def test_file_that_is_no_safetensors_file_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="expected a safetensors file"):
        load_weights(path)


def test_truncated_file_is_refused(path: Path) -> None:
    save_weights(path, TENSORS)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="expected a safetensors file"):
        load_weights(path)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"format": 1}', '{"format": 1, "files": {"expert-0.safetensors": 3}}']
)
def test_malformed_manifest_is_refused(path: Path, text: str) -> None:
    save_weights(path, TENSORS)
    (path.parent / "manifest.json").write_text(text)
    with pytest.raises(WeightsError, match=r"manifest\.json: expected a manifest of weight files"):
        verify(path)


def test_manifest_of_another_format_is_refused(path: Path) -> None:
    save_weights(path, TENSORS)
    (path.parent / "manifest.json").write_text('{"format": 2, "files": {}}')
    with pytest.raises(WeightsError, match="expected format 1, found 2"):
        verify(path)


def test_tensors_are_copied_into_the_module() -> None:
    module = nn.Linear(2, 1)
    load_into(module, TENSORS)
    assert (module.weight.tolist(), module.bias.tolist()) == ([[1, 2]], [3])


def test_every_tensor_that_does_not_fit_has_its_line_and_the_module_stays_as_it_was() -> None:
    module = nn.Linear(2, 1)
    before = module.weight.clone()
    with pytest.raises(WeightsError) as caught:
        load_into(module, {"weight": torch.zeros(2, 2), "extra": torch.zeros(1)})
    assert str(caught.value).splitlines() == [
        "expected the tensor 'bias', found none",
        "weight: expected shape [1, 2], found [2, 2]",
        "found the tensor 'extra', which the module does not have",
    ]
    assert torch.equal(module.weight, before)


def test_other_dtype_is_refused_even_on_the_meta_device() -> None:
    with pytest.raises(WeightsError, match=r"bias: expected dtype torch\.float32, found torch\.float64; convert"):
        check_fit(nn.Linear(2, 1, device="meta"), {**TENSORS, "bias": torch.zeros(1, dtype=torch.float64)})
