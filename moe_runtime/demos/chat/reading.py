"""What the integration tells of a model's experts, as the chat shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_runtime.demos.chat.loads import Actor, Loads, Reading

if TYPE_CHECKING:
    from moe_runtime.integrations.transformers import ExpertsView


def reading_of(view: ExpertsView) -> Reading:
    """Loads by layer, and the actors that serve an expert, in the order of their experts."""
    loads = Loads({layer.module: tuple(expert.num_assignments for expert in layer.experts) for layer in view.layers})
    actors: dict[tuple[str, int], Actor] = {}
    places: dict[tuple[str, int], set[int]] = {}
    for layer in view.layers:
        for expert in layer.experts:
            for actor in expert.actors:
                process = (actor.node, actor.pid or 0)
                places.setdefault(process, set()).add(expert.expert)
                actors[process] = Actor(
                    pid=actor.pid or 0,
                    state=actor.state,
                    num_restarts=actor.num_restarts,
                    experts=tuple(sorted(places[process])),
                )
    return Reading(loads, tuple(actors.values()), view.num_retried)
