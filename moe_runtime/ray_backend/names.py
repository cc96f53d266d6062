"""How the actors of a runtime are called on its cluster."""

from __future__ import annotations

NAMESPACE = "moe_runtime"


def controller_name(runtime: str) -> str:
    """Name of a runtime's controller."""
    return f"{runtime}/controller"


def expert_name(runtime: str, host_id: str) -> str:
    """Name of an expert actor."""
    return f"{runtime}/expert/{host_id}"


def router_name(runtime: str, index: int) -> str:
    """Name of a router actor."""
    return f"{runtime}/router/{index}"


def depot_name(runtime: str, deployment: str) -> str:
    """Name of the actor that serves a deployment's files."""
    return f"{runtime}/depot/{deployment}"


def belongs_to(actor_name: str, runtime: str) -> bool:
    """Whether an actor is one of a runtime's; a runtime's name holds no slash."""
    return actor_name.startswith(f"{runtime}/")
