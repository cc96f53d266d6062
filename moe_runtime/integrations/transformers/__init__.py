"""Models of transformers whose experts live in actors: ``import moe_runtime.integrations.transformers as moe_hf``."""

from moe_runtime.experts.checkpoints.requirement import check_transformers

check_transformers()

# Below the check, which explains what a failing import would not.
from moe_runtime.integrations.transformers.adopting import adopt  # noqa: E402
from moe_runtime.integrations.transformers.entry import close, config, experts, load, use  # noqa: E402
from moe_runtime.integrations.transformers.looking import ActorView, ExpertsView, ExpertView, LayerView  # noqa: E402
from moe_runtime.integrations.transformers.upcycling import Upcycling, upcycle  # noqa: E402
from moe_runtime.integrations.transformers.using import make_known  # noqa: E402

__all__ = [
    "ActorView",
    "ExpertView",
    "ExpertsView",
    "LayerView",
    "Upcycling",
    "adopt",
    "close",
    "config",
    "experts",
    "load",
    "upcycle",
    "use",
]

make_known()
