"""Moves the selection bias of experts while serving, by the loads of all routers: plain numbers, and no torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: How often routers are asked at least; what one has counted since the last time is lost with it.
_LONGEST_POLL_S = 1.0


@dataclass(frozen=True)
class BiasRule:
    """How the bias of one layer moves.

    Attributes:
        experts: Names of the experts that its policy routes to, in the order of the gate's rows.
        rate: By how much in one step.
        interval_s: Least time between two steps.
        min_assignments: A step is made of at least so many.
    """

    experts: tuple[str, ...]
    rate: float
    interval_s: float
    min_assignments: int


@dataclass(frozen=True)
class AskedCounts:
    """What one router process has been asked for since it started.

    Attributes:
        incarnation: Another one in every process.
        asked: Assignments by layer and name of the expert that was asked for, whatever became of them.
    """

    incarnation: int
    asked: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class LayerBias:
    """What serving has added to the bias of a layer's gate.

    Attributes:
        experts: Names of the experts, in the order of the gate's rows.
        values: The bias of each; their mean is 0.
        num_steps: Steps that led here.
        num_assignments: Assignments that these steps were made of.
        load_ratio: Largest over mean load of the last step; None before the first.
    """

    experts: tuple[str, ...]
    values: tuple[float, ...]
    num_steps: int = 0
    num_assignments: int = 0
    load_ratio: float | None = None

    @classmethod
    def at_zero(cls, experts: tuple[str, ...]) -> LayerBias:
        """The bias before any step."""
        return cls(experts, (0.0,) * len(experts))

    @property
    def largest(self) -> float:
        """The largest absolute value."""
        return max(map(abs, self.values))

    def stepped(self, counts: Sequence[int], *, rate: float) -> LayerBias:
        """The bias after one step: ``b += rate * sign(mean(counts) - counts)``, then ``b -= mean(b)``.

        As ``routing.expert_bias.update_bias`` (https://arxiv.org/abs/2408.15664, algorithm 1).

        Args:
            counts: Assignments that each expert was asked for since the last step, over all routers.
            rate: Size of the step.
        """
        total, num_experts = sum(counts), len(counts)
        # Whole numbers: a mean that is rounded would move experts that are at it.
        signs = ((total > count * num_experts) - (total < count * num_experts) for count in counts)
        moved = [value + rate * sign for value, sign in zip(self.values, signs, strict=True)]
        return LayerBias(
            self.experts,
            _centred(moved),
            num_steps=self.num_steps + 1,
            num_assignments=self.num_assignments + total,
            load_ratio=load_ratio(counts),
        )

    def carried_to(self, experts: tuple[str, ...]) -> LayerBias:
        """The same bias for other experts: those of a name keep theirs, and a new one begins at the mean."""
        known = dict(zip(self.experts, self.values, strict=True))
        values = _centred([known.get(expert, 0.0) for expert in experts])
        return LayerBias(experts, values, self.num_steps, self.num_assignments, self.load_ratio)

    def describe(self) -> dict[str, Any]:
        """As plain values; ``values`` in the order of the layer's experts."""
        return {
            "num_steps": self.num_steps,
            "num_assignments": self.num_assignments,
            "largest_bias": self.largest,
            "load_ratio": self.load_ratio,
            "values": list(self.values),
        }


class OnlineBias:
    """Keeps the biases of a runtime's layers and moves them. Owned by one thread, or one event loop."""

    def __init__(self) -> None:
        """Move nothing yet."""
        self._rules: dict[str, BiasRule] = {}
        self._biases: dict[str, LayerBias] = {}
        #: Since the last step of each layer, by the expert's name.
        self._asked: dict[str, Counter[str]] = {}
        self._stepped_at: dict[str, float] = {}
        self._last: dict[int, AskedCounts] = {}

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers whose bias moves."""
        return frozenset(self._rules)

    @property
    def biases(self) -> dict[str, LayerBias]:
        """The present bias of each of them."""
        return dict(self._biases)

    @property
    def poll_every_s(self) -> float:
        """How often routers should be asked for their counts."""
        return min([_LONGEST_POLL_S, *(rule.interval_s for rule in self._rules.values())])

    def adopt(self, biases: Mapping[str, LayerBias]) -> None:
        """Go on from what somebody else has come to."""
        self._biases = dict(biases)

    def follow(self, rules: Mapping[str, BiasRule]) -> None:
        """Move the layers of these rules from now on, and forget the others; experts of one name keep their bias."""
        for layer, rule in rules.items():
            bias = self._biases.get(layer) or LayerBias.at_zero(rule.experts)
            if bias.experts != rule.experts:
                bias = bias.carried_to(rule.experts)
                # Loads of other experts say nothing of these.
                self._asked.pop(layer, None)
                self._stepped_at.pop(layer, None)
            self._biases[layer] = bias
        for kept in (self._biases, self._asked, self._stepped_at):
            for layer in kept.keys() - rules.keys():
                del kept[layer]
        self._rules = dict(rules)

    def take(self, router: int, counts: AskedCounts) -> None:
        """Count what a router was asked for since it last said so; nothing is counted twice.

        What a router says first may have been counted before this object was made: it is where counting begins. A
        process that takes the place of one that was known has begun at 0.

        Args:
            router: Its place among the routers.
            counts: What its process says now.
        """
        before, self._last[router] = self._last.get(router), counts
        if before is None:
            return
        is_same = before.incarnation == counts.incarnation
        for layer in self._rules.keys() & counts.asked.keys():
            now = counts.asked[layer]
            # A layer that the process was not asked about before may have been counted by somebody else.
            known = before.asked.get(layer, now) if is_same else {}
            new = {expert: number - known.get(expert, 0) for expert, number in now.items()}
            self._asked.setdefault(layer, Counter()).update({e: number for e, number in new.items() if number > 0})

    def step(self, now: float) -> bool:
        """Step every layer that is due, by what was counted since its last step; whether any was."""
        due = [layer for layer in self._rules if self._is_due(layer, now)]
        for layer in due:
            self._biases[layer] = self._biases[layer].stepped(self._counts(layer), rate=self._rules[layer].rate)
            self._stepped_at[layer] = now
            self._asked[layer].clear()
        return bool(due)

    def describe(self) -> dict[str, Any]:
        """Per layer its bias, and what was counted since its last step, as plain values."""
        counts = {layer: self._counts(layer) for layer in self._rules}
        return {
            layer: {
                **self._biases[layer].describe(),
                "num_assignments_since": sum(counts[layer]),
                "load_ratio_since": load_ratio(counts[layer]),
            }
            for layer in self._rules
        }

    def _is_due(self, layer: str, now: float) -> bool:
        rule, stepped_at = self._rules[layer], self._stepped_at.setdefault(layer, now)
        return now - stepped_at >= rule.interval_s and sum(self._counts(layer)) >= rule.min_assignments

    def _counts(self, layer: str) -> list[int]:
        asked = self._asked.get(layer, Counter())
        return [asked[expert] for expert in self._rules[layer].experts]


def load_ratio(counts: Sequence[int]) -> float | None:
    """Largest over mean load; 1 is perfect balance; None where there is no load."""
    total = sum(counts)
    return max(counts) * len(counts) / total if total else None


def _centred(values: Sequence[float]) -> tuple[float, ...]:
    mean = sum(values) / len(values)
    return tuple(value - mean for value in values)
