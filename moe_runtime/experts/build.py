"""From a spec to an expert that is ready to serve: module, weights, and a trial run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import torch

from moe_runtime.config.load import is_uri
from moe_runtime.errors import PlugInError, WeightsError
from moe_runtime.experts.golden_probe import GoldenProbe
from moe_runtime.experts.outputs import output_mistake
from moe_runtime.experts.protocol import DistantExpert, StoredExpert
from moe_runtime.experts.remote_files import check_uri
from moe_runtime.experts.spec import build_module, contract_of, raised_by_kind
from moe_runtime.experts.view import resolve_view
from moe_runtime.experts.weights import check_fit, load_into, load_weights
from moe_runtime.experts.weights_store import WeightsStore

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moe_runtime.experts.protocol import ExpertContract
    from moe_runtime.experts.spec import ExpertSpec
    from moe_runtime.experts.view import View
    from moe_runtime.experts.weights import Weights


@dataclass(frozen=True)
class LoadedExpert:
    """An expert that was built, loaded and tried.

    Attributes:
        spec: What it was built from.
        module: In eval mode, on its device, in the layer's dtype.
        contract: The shapes of its rows.
        view: What it sees of a full row.
        weights_version: sha256 of its weight file, or ``seed:<n>``; of a distant or a stored expert what it says.
        probe: What it must answer to a few rows for as long as it is fit, on its device: that of its weight file, or
            what it answered when it was tried; None if nobody knows.
    """

    spec: ExpertSpec
    module: nn.Module
    contract: ExpertContract
    view: View
    weights_version: str
    probe: GoldenProbe | None = None


def build_expert(
    spec: ExpertSpec, *, device: str | torch.device = "cpu", store: WeightsStore | None = None
) -> LoadedExpert:
    """The expert of a spec, with its weights, on a device, after two rows went through it as a trial.

    The initial parameters depend on the spec's seed, layer and name alone, not on the device; torch's global
    generator is left as it was.

    Args:
        spec: What to build.
        device: Where it computes.
        store: Gives the weight file; without one, paths of this machine and addresses work.

    Raises:
        ConfigError: If the kind, its options, the view or the shapes do not work.
        PlugInError: If the kind's plug-in is broken, or its module does not keep its contract.
        WeightsError: If the weight file is missing, corrupt, or does not fit the module, or if the module does not
            answer the file's golden probe as it must.
    """
    device = torch.device(device)
    module = initial_module(spec)
    contract = contract_of(module, spec)
    if isinstance(module, DistantExpert):
        view = resolve_view(spec.item_shape, spec.view)
        return LoadedExpert(spec, module, contract, view, module.weights_version)
    weights = None if spec.weights is None else _load(module, spec, contract, store or WeightsStore())
    module.to(device)
    version = _initial_version(module, spec) if weights is None else weights.sha256
    expert = LoadedExpert(spec, module, contract, resolve_view(spec.item_shape, spec.view), version)
    tried = _try_out(expert, device)
    if weights is None or weights.probe is None:
        return replace(expert, probe=tried)
    probe = weights.probe.to(device)
    mistake = probe.mistake(module)
    if mistake is not None:
        raise _placed(WeightsError(mistake), spec)
    return replace(expert, probe=probe)


def check_weights(spec: ExpertSpec) -> str:
    """The ``weights_version`` that the expert of a spec will have, after its file was checked and compared.

    For a check before anything starts: the module's own parameters are not allocated. What is behind an address is
    not fetched, so that its version is only known if a manifest lists it, and is "unknown" otherwise.

    Raises:
        ConfigError: If the kind, its options, the view or the shapes do not work.
        PlugInError: If the kind's plug-in is broken.
        WeightsError: If the weight file is missing, corrupt, or does not fit the module.
    """
    with torch.device("meta"):
        module = build_module(spec)
    _check_may_have_weights(module, spec)
    if isinstance(module, DistantExpert):
        return module.weights_version
    if spec.weights is None:
        return _initial_version(module, spec)
    try:
        if is_uri(spec.weights):
            return check_uri(spec.weights) or "unknown"
        weights = load_weights(spec.weights)
        check_fit(module.to(spec.torch_dtype), weights.tensors)
        if weights.probe is not None:
            weights.probe.check_fit(contract_of(module, spec), spec.torch_dtype)
    except WeightsError as exc:
        raise _placed(exc, spec) from exc
    return weights.sha256


def initial_module(spec: ExpertSpec) -> nn.Module:
    """The expert's module as its seed or its store gives it: on the CPU, in the layer's dtype, in eval mode.

    Raises:
        ConfigError: If the kind, its options, the view or the shapes do not work.
        PlugInError: If the kind's plug-in is broken.
        WeightsError: If the expert's store lacks its weights, or ``weights`` are given for a kind without.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # Not torch.manual_seed: that would seed the GPUs' generators too, and nothing restores those.
        torch.default_generator.manual_seed(_stream_seed(spec))
        module = build_module(spec).to(spec.torch_dtype).eval()
    _check_may_have_weights(module, spec)
    if isinstance(module, StoredExpert):
        try:
            module.load()
        except WeightsError as exc:
            raise WeightsError(f"{spec.where}: {exc}") from exc
    return module


def _initial_version(module: nn.Module, spec: ExpertSpec) -> str:
    return module.stored_version if isinstance(module, StoredExpert) else f"seed:{spec.seed}"


def _check_may_have_weights(module: nn.Module, spec: ExpertSpec) -> None:
    if spec.weights is None or not isinstance(module, DistantExpert | StoredExpert):
        return
    owner = "rows another layer computes" if isinstance(module, DistantExpert) else "options name its weights"
    raise WeightsError(
        f"{spec.where}.weights: expected none for kind {spec.kind!r}, whose {owner}, found {spec.weights}"
    )


def _stream_seed(spec: ExpertSpec) -> int:
    # Experts that start equal would get equal gradients and stay equal.
    digest = hashlib.sha256(f"{spec.seed}/{spec.layer}/{spec.name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _load(module: nn.Module, spec: ExpertSpec, contract: ExpertContract, store: WeightsStore) -> Weights:
    try:
        weights = load_weights(store.fetch(str(spec.weights)))
        load_into(module, weights.tensors)
        if weights.probe is not None:
            weights.probe.check_fit(contract, spec.torch_dtype)
    except WeightsError as exc:
        raise _placed(exc, spec) from exc
    return replace(weights, tensors={})


def _placed(error: WeightsError, spec: ExpertSpec) -> WeightsError:
    prefix = f"{spec.where}.weights: "
    lines = (line if str(spec.weights) in line else f"{spec.weights}: {line}" for line in str(error).splitlines())
    return WeightsError("\n".join(prefix + line for line in lines))


def _try_out(expert: LoadedExpert, device: torch.device) -> GoldenProbe:
    """What the expert answers to two rows, once it has kept its contract twice."""
    spec, contract = expert.spec, expert.contract
    size = 2 * prod(contract.in_shape)
    # Not zeros: they would hide a dropout that is still on.
    rows = torch.linspace(-1, 1, size).reshape(2, *contract.in_shape).to(device, spec.torch_dtype)
    given = rows.clone()
    try:
        with torch.inference_mode():
            outputs, again = expert.module(given), expert.module(given)
            mistake = output_mistake(outputs, num_rows=2, contract=contract, dtype=spec.torch_dtype)
            if mistake is None:
                mistake = _impurity(given, rows, outputs, again)
    except (Exception, SystemExit) as exc:
        raise raised_by_kind(f"a trial run of kind {spec.kind!r} in {spec.dtype} on {device}", spec, exc) from exc
    if mistake is not None:
        raise PlugInError(f"{spec.where}: a trial run of kind {spec.kind!r} broke its contract: {mistake}")
    # A copy: an output may lie in the module's parameters.
    return GoldenProbe(rows, outputs.clone())


def _impurity(given: Tensor, rows: Tensor, outputs: Tensor, again: Tensor) -> str | None:
    if not torch.equal(given, rows):
        return "expected forward to leave its input as it was, found it changed"
    # Close, not equal: some GPU kernels add in an order that varies.
    if not torch.allclose(outputs.float(), again.float(), rtol=1e-2, atol=1e-3, equal_nan=True):
        return "expected the same rows to give the same outputs in eval mode, found others the second time"
    return None
