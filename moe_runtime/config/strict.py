"""What every block of the configuration is made of: a strict model, names, and the largest numbers."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

#: Native code behind the fields has no unbounded integers.
MAX_COUNT = 2**31 - 1
MAX_BYTES = 2**40
#: Elements of one token: 1 GiB in float32.
MAX_ITEM_ELEMENTS = 2**28
MAX_THREADS = 1024
MAX_SECONDS = 30 * 24 * 3600

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]


class StrictModel(BaseModel):
    """Base of every configuration block: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
