"""The configuration of what a runtime shows of itself: metrics and logs."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from moe_runtime.config.hosts import is_loopback
from moe_runtime.config.models import StrictModel
from moe_runtime.logs import LogFormat, LogLevel, LogSettings


class MetricsConfig(StrictModel):
    """Metrics for Prometheus, at `http://ADDRESS/metrics` of each router."""

    address: str | None = Field(
        None,
        description="HOST:PORT, such as `127.0.0.1:9464`; replica i of the routers on a node takes port + i; port 0 is "
        "any; none when null.",
    )
    hottest_experts: int = Field(
        20, ge=1, le=1024, description="Experts per layer with series of their own; the rest is summed as `other`."
    )
    token: bool | None = Field(
        None,
        description="Whether a scrape has to show a bearer token with the scope `metrics`; when null, it has to where "
        "the address is not a loopback address.",
    )

    @property
    def needs_token(self) -> bool:
        """Whether a scrape has to show a token."""
        if self.token is not None:
            return self.token
        return self.address is not None and not _is_loopback(self.address)

    @field_validator("address")
    @classmethod
    def _host_and_port(cls, address: str | None) -> str | None:
        if address is None:
            return None
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise ValueError(f"expected HOST:PORT with a port of 0 to 65535, found {address!r}")
        return address

    @model_validator(mode="after")
    def _token_beyond_this_machine(self) -> MetricsConfig:
        if self.address is not None and not self.needs_token and not _is_loopback(self.address):
            raise ValueError(f"token: expected true where others reach {self.address}, found false")
        return self


class LoggingConfig(StrictModel):
    """What the processes of a runtime write to their logs."""

    format: LogFormat = Field("human", description="Lines for people, or one JSON object per line.")
    level: LogLevel = Field("warning", description="The least that is logged; requests are followed at `debug`.")

    @property
    def settings(self) -> LogSettings:
        """The same for processes that know no configuration."""
        return LogSettings(self.format, self.level)


def _is_loopback(address: str) -> bool:
    return is_loopback(address.rpartition(":")[0])
