"""Layers are added to a runtime that runs, and removed from it."""

from __future__ import annotations

import pickle
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from moe_runtime.config.load import load_config
from moe_runtime.errors import ConfigError, StartError
from moe_runtime.launch.build import build_router
from moe_runtime.launch.in_process import InProcessSession
from moe_runtime.launch.packing import plan_hosts
from moe_runtime.launch.plans import plan_runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from moe_runtime.config.load import LoadedConfig
    from moe_runtime.launch.served import Session
    from moe_runtime.ray_backend.cluster import Cluster
    from moe_runtime.ray_backend.session import RaySession

    OnProgress = Callable[[int, int], None]
    Change = Callable[[LoadedConfig], LoadedConfig]


def config_of(session: Session) -> LoadedConfig:
    """The configuration that a runtime has now.

    Raises:
        StartError: If it is not known, as of a runtime that was deployed, or its controller does not answer.
    """
    if isinstance(session, InProcessSession):
        return session.loaded
    return _unpacked(_on_ray(session).source())


def grown(loaded: LoadedConfig, layers: Mapping[str, Any]) -> LoadedConfig:
    """A configuration with some more layers; itself where it has all of them.

    Raises:
        ConfigError: If the layers cannot work, or one has the name of another one.
    """
    # What was left out stays so: it may have other defaults where it is written out.
    data = loaded.config.model_dump(exclude_unset=True)
    known = loaded.config.layers
    wanted = replace(loaded, config=load_config({**data, "layers": {**data["layers"], **layers}}).config)
    for name in layers:
        if name in known and wanted.config.layers[name] != known[name]:
            raise ConfigError(f"layers.{name}: expected a name that no layer of the runtime has, found another one's")
    return loaded if set(layers) <= set(known) else wanted


def shrunk(loaded: LoadedConfig, names: Iterable[str]) -> LoadedConfig:
    """A configuration without some layers; itself where it has none of them.

    Raises:
        ConfigError: If another layer needs one of them.
    """
    gone = {*names}
    if gone.isdisjoint(loaded.config.layers):
        return loaded
    data = loaded.config.model_dump(exclude_unset=True)
    layers = {name: block for name, block in data["layers"].items() if name not in gone}
    return replace(loaded, config=load_config({**data, "layers": layers}).config)


def add_layers(
    session: Session, layers: Mapping[str, Any], *, cluster: Cluster | None, on_progress: OnProgress | None
) -> None:
    """Have a runtime serve some more layers; see ``Runtime.add_layers``."""
    _change(session, partial(grown, layers=layers), cluster=cluster, on_progress=on_progress)


def remove_layers(session: Session, names: Iterable[str], *, cluster: Cluster | None) -> None:
    """Have a runtime serve some layers no longer; see ``Runtime.remove_layers``."""
    gone = frozenset(names)
    known = config_of(session).config.layers
    unknown = sorted(gone.difference(known))
    if unknown:
        raise ConfigError(
            f"expected layers of the runtime, which has {', '.join(known) or 'none'}, found {', '.join(unknown)}"
        )
    # From here on one that is not there was removed by this, in a call whose answer got lost, or by somebody else.
    _change(session, partial(shrunk, names=gone), cluster=cluster, on_progress=None)


def _change(session: Session, change: Change, *, cluster: Cluster | None, on_progress: OnProgress | None) -> None:
    if isinstance(session, InProcessSession):
        _change_in_process(session, change, on_progress)
        return
    if cluster is None:
        raise StartError("expected a connected cluster, found none")
    while not _change_on_ray(_on_ray(session), change, cluster=cluster, on_progress=on_progress):
        # Somebody else has changed it meanwhile; that is to stay.
        continue


def _change_in_process(session: InProcessSession, change: Change, on_progress: OnProgress | None) -> None:
    with session.changing:
        wanted = change(session.loaded)
        if wanted is session.loaded:
            return
        recipe = build_router(wanted)
        hosts = plan_hosts(wanted.config, recipe.layers, gpus_available=torch.cuda.is_available())
        session.change(wanted, recipe, hosts, on_progress=on_progress)


def _change_on_ray(session: RaySession, change: Change, *, cluster: Cluster, on_progress: OnProgress | None) -> bool:
    """Whether it was done; not if the runtime was changed meanwhile."""
    # Not before: Ray reads how to authenticate when it is imported.
    from moe_runtime.ray_backend.roll import ChangedMeanwhileError

    source = session.source()
    loaded = _unpacked(source)
    wanted = change(loaded)
    if wanted is loaded:
        return True
    plan = plan_runtime(wanted.config, build_router(wanted), cluster=cluster, detach=True, source=wanted)
    try:
        session.upgrade(plan, on_progress=on_progress, instead_of=source)
    except ChangedMeanwhileError:
        return False
    return True


def _on_ray(session: Session) -> RaySession:
    ray_session: RaySession = session  # type: ignore[assignment]  # there is no other one
    return ray_session


def _unpacked(source: bytes) -> LoadedConfig:
    if not source:
        raise StartError(
            "expected a runtime whose configuration is known, found one that was deployed; `moe-runtime upgrade` "
            "changes it"
        )
    loaded: LoadedConfig = pickle.loads(source)  # nosec B301  # from the controller, by Ray
    return loaded
