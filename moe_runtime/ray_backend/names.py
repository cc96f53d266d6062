"""How the actors of a runtime are called on its cluster."""

from __future__ import annotations

NAMESPACE = "moe_runtime"


def controller_name(runtime: str) -> str:
    """Name of a runtime's controller."""
    return f"{runtime}/controller"


def expert_name(runtime: str, host_key: str) -> str:
    """Name of an expert actor; ``HostPlan.key`` tells two revisions of one host apart."""
    return f"{runtime}/expert/{host_key}"


def expert_key(actor_name: str, runtime: str) -> str | None:
    """The key of the host that an actor of this name is; None for any other actor."""
    prefix = expert_name(runtime, "")
    return actor_name.removeprefix(prefix) if actor_name.startswith(prefix) else None


def router_index(actor_name: str, runtime: str) -> int | None:
    """The index of the router that an actor of this name is; None for any other actor."""
    prefix = f"{runtime}/router/"
    return int(actor_name.removeprefix(prefix)) if actor_name.startswith(prefix) else None


def router_name(runtime: str, index: int) -> str:
    """Name of a router actor."""
    return f"{runtime}/router/{index}"


def depot_name(runtime: str, deployment: str) -> str:
    """Name of the actor that serves a deployment's files."""
    return f"{runtime}/depot/{deployment}"


def belongs_to(actor_name: str, runtime: str) -> bool:
    """Whether an actor is one of a runtime's; a runtime's name holds no slash."""
    return actor_name.startswith(f"{runtime}/")
