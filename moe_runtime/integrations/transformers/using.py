"""The name ``moe_runtime`` among transformers' implementations of experts, and what it means at the moment."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from moe_runtime.errors import UnsupportedModelError
from moe_runtime.experts.checkpoints.internals import experts_implementation, register_experts, wrap_from_pretrained
from moe_runtime.integrations.transformers.loading import BUILDING, load_model
from moe_runtime.integrations.transformers.refusals import IMPLEMENTATION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn
    from transformers import PreTrainedModel

    from moe_runtime.integrations.transformers.placement import Placement
    from moe_runtime.integrations.transformers.providing import Provider

_WHAT_TO_DO = (
    "load it inside `with moe_runtime.integrations.transformers.use(runtime):`, in the same thread, or by that "
    "module's load(path)"
)


@dataclass(frozen=True)
class _Use:
    provider: Provider
    placement: Placement


#: Of this thread: threads that load models at the same time do not meet.
_USED: ContextVar[_Use | None] = ContextVar("moe_runtime_use", default=None)


@contextmanager
def used(provider: Provider, placement: Placement) -> Iterator[None]:
    """Within it, and in this thread, models whose ``experts_implementation`` is ours get their experts from there."""
    token = _USED.set(_Use(provider, placement))
    try:
        yield
    finally:
        _USED.reset(token)


def make_known() -> None:
    """Tell transformers of our name, and look at every model that it loads from then on; once per process."""
    register_experts(IMPLEMENTATION, _unbound)
    wrap_from_pretrained(_load)


def _load(build: Callable[..., Any], model_class: type[PreTrainedModel], path: Any, options: dict[str, Any]) -> Any:
    if not _is_asked_for(options):
        with BUILDING:
            return build(path, **options)
    use = _USED.get()
    if use is None:
        raise UnsupportedModelError(
            f"experts_implementation: expected {IMPLEMENTATION!r} only where a runtime is used, found it for "
            f"{model_class.__name__} outside of that; {_WHAT_TO_DO}"
        )
    return load_model(build, model_class, path, options=options, provider=use.provider, placement=use.placement)


def _is_asked_for(options: dict[str, Any]) -> bool:
    wanted = options.get("experts_implementation")
    if wanted is not None:
        return IMPLEMENTATION in (wanted.values() if isinstance(wanted, dict) else (wanted,))
    # A configuration that belongs to a model of ours says so too.
    return experts_implementation(options.get("config")) == IMPLEMENTATION


def _unbound(module: nn.Module, *_args: object) -> NoReturn:
    """Stands for the experts of a model that were given the name, and no actors.

    Raises:
        UnsupportedModelError: Always.
    """
    raise UnsupportedModelError(
        f"{type(module).__name__}: expected experts that live in actors, found a model that was built or set to "
        f"experts_implementation {IMPLEMENTATION!r} without any; {_WHAT_TO_DO}, or give it to its adopt(model, runtime)"
    )
