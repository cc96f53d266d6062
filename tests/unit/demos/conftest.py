from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moe_runtime.demos.digits import artifacts
from moe_runtime.demos.digits.data import DigitsData, load_digits
from moe_runtime.demos.digits.recipe import DEFAULT_RECIPE, LAYER, Recipe
from moe_runtime.demos.digits.reference import Reference
from moe_runtime.demos.digits.result import DigitsResult
from moe_runtime.demos.digits.summary import Preparation, ServedExpert, served_experts, summarise
from moe_runtime.demos.digits.traffic import Load, Traffic, send
from moe_runtime.demos.digits.training import DigitsLayer, train
from moe_runtime.launch.runtime import serve
from moe_runtime.rpc.client import MoEClient


@pytest.fixture(scope="session")
def short_recipe() -> Recipe:
    """The demo's recipe with fewer epochs: some seconds of training, and still more than 96 %."""
    return replace(DEFAULT_RECIPE, num_epochs=15)


@pytest.fixture(scope="session")
def data(short_recipe: Recipe) -> DigitsData:
    return load_digits(seed=short_recipe.seed, held_out_share=short_recipe.held_out_share)


@pytest.fixture(scope="session")
def trained(short_recipe: Recipe, data: DigitsData) -> DigitsLayer:
    return train(short_recipe, data.training, on_epoch=lambda _: None)


@pytest.fixture(scope="session")
def folder(short_recipe: Recipe, trained: DigitsLayer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained layer as files, ready to be served."""
    folder = tmp_path_factory.mktemp("digits") / "saved"
    artifacts.save(trained, short_recipe, folder)
    return folder


@pytest.fixture(scope="session")
def load() -> Load:
    return Load(num_rounds=2)


@pytest.fixture(scope="session")
def served(folder: Path, data: DigitsData, load: Load) -> tuple[Traffic, tuple[ServedExpert, ...]]:
    """Real answers, from experts and a router that are threads of this process."""
    config_path = folder / artifacts.CONFIG_NAME
    with serve(config_path, ray=False, address="127.0.0.1:0") as runtime, MoEClient(runtime.address) as client:
        before = client.status()
        traffic = send(client, data.held_out.pixels, layer=LAYER, load=load)
        return traffic, served_experts(client.describe(), before=before, after=client.status())


@pytest.fixture(scope="session")
def traffic(served: tuple[Traffic, tuple[ServedExpert, ...]]) -> Traffic:
    return served[0]


@pytest.fixture(scope="session")
def reference(trained: DigitsLayer, data: DigitsData) -> Reference:
    return Reference(trained, data.held_out)


@pytest.fixture(scope="session")
def result(
    served: tuple[Traffic, tuple[ServedExpert, ...]], load: Load, reference: Reference, folder: Path
) -> DigitsResult:
    traffic, experts = served
    preparation = Preparation(folder / artifacts.CONFIG_NAME, training_s=None, starting_s=1.5)
    return summarise(traffic, load=load, reference=reference, experts=experts, preparation=preparation)
