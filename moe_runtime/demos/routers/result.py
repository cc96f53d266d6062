"""What the demo found out, and whether that is what it promises."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moe_runtime.demos.errors import DemoError
from moe_runtime.routing.metrics import drop_rate, max_over_mean

if TYPE_CHECKING:
    from pathlib import Path

#: The largest difference from the experts in one process that is put down to rounding.
MAX_DIFFERENCE = 1e-5
#: The accuracy that all experts together must reach.
MIN_ACCURACY = 0.96
#: The policy that the others are held against.
BASELINE = "dense"


@dataclass(frozen=True)
class PolicyResult:
    """How one policy did.

    Attributes:
        name: Its kind, and what is special.
        loads: Assignments that each expert was asked for.
        num_dropped: Assignments that found no place.
        num_unserved: Images that no expert answered.
        agreement: Share of the images that get the same digit as with all experts; one without an answer never does.
        mean_difference: Mean absolute difference of the logits from those with all experts.
        accuracy: Share of the images that get their digit; one without an answer never does.
        max_difference: Largest absolute difference from what the reported experts and weights come to in one process.
        rolling_s: Seconds from the policy before to this one.
    """

    name: str
    loads: tuple[int, ...]
    num_dropped: int
    num_unserved: int
    agreement: float
    mean_difference: float
    accuracy: float
    max_difference: float
    rolling_s: float

    @property
    def max_over_mean(self) -> float:
        """Load of the busiest expert over that of the mean one."""
        return max_over_mean(self.loads)

    @property
    def dropped_share(self) -> float:
        """Share of the assignments that found no place."""
        return drop_rate(num_dropped=self.num_dropped, num_requested=sum(self.loads))


@dataclass(frozen=True)
class RoutersResult:
    """The outcome of one run.

    Attributes:
        policies: In the order in which they were served.
        experts: Names of the experts, in the order of ``loads``.
        num_images: Held-out images, all in one request.
        pids: Process ids of the experts' hosts, the same for every policy.
        training_s: Seconds that training took; None where the layer was in the cache.
        seconds: How long everything took.
    """

    policies: tuple[PolicyResult, ...]
    experts: tuple[str, ...]
    num_images: int
    pids: tuple[int, ...]
    training_s: float | None
    seconds: float

    def check(self) -> None:
        """Hold the outcome against the demo's promises.

        Raises:
            DemoError: If a policy's answers are not what its experts and weights come to, or all experts together are
                wrong too often.
        """
        # Written so that NaN fails.
        wrong = [policy for policy in self.policies if not policy.max_difference <= MAX_DIFFERENCE]
        if wrong:
            raise DemoError(
                f"{wrong[0].name}: expected answers within {MAX_DIFFERENCE:g} of what its experts and weights come to "
                f"in one process, found a difference of {wrong[0].max_difference:.3g}"
            )
        (dense,) = (policy for policy in self.policies if policy.name == BASELINE)
        if not dense.accuracy >= MIN_ACCURACY:
            raise DemoError(
                f"expected an accuracy of at least {MIN_ACCURACY:.0%} with all experts, found {dense.accuracy:.2%}"
            )

    def write_json(self, path: Path) -> None:
        """Write everything to a file as one JSON object."""
        policies = [_with_shares(policy) for policy in self.policies]
        path.write_text(json.dumps({**asdict(self), "policies": policies}, indent=2) + "\n")


def _with_shares(policy: PolicyResult) -> dict[str, Any]:
    return {**asdict(policy), "max_over_mean": policy.max_over_mean, "dropped_share": policy.dropped_share}
