"""The configuration of what a runtime shows of itself: metrics and logs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from moe_runtime.config.hosts import is_loopback
from moe_runtime.config.strict import StrictModel
from moe_runtime.logs import LogFormat, LogLevel, LogSettings

if TYPE_CHECKING:
    from moe_runtime.config.security import SecurityConfig


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
        "the address is not a loopback address, unless `security` has no tokens and is `insecure`.",
    )

    @property
    def is_public(self) -> bool:
        """Whether others than this machine reach the metrics."""
        return self.address is not None and not is_loopback(self.address.rpartition(":")[0])

    def needs_token(self, security: SecurityConfig) -> bool:
        """Whether a scrape has to show a token."""
        if self.address is None or self.token is not None:
            return self.address is not None and self.token is True
        return self.is_public and not (security.insecure and security.tokens is None)

    def check(self, security: SecurityConfig) -> None:
        """Check that nobody reads the metrics whom nobody has let in.

        Raises:
            ValueError: If others than this machine could, or scrapes have to show a token and there are none.
        """
        if self.needs_token(security) and security.tokens is None:
            raise ValueError(
                f"metrics.token: expected a file of tokens at security.tokens, since scrapes of {self.address} have to "
                "show one, found none"
            )
        if self.is_public and self.token is False and not security.insecure:
            raise ValueError(f"metrics.token: expected true where others reach {self.address}, found false")

    @field_validator("address")
    @classmethod
    def _host_and_port(cls, address: str | None) -> str | None:
        if address is None:
            return None
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise ValueError(f"expected HOST:PORT with a port of 0 to 65535, found {address!r}")
        return address


class LoggingConfig(StrictModel):
    """What the processes of a runtime write to their logs."""

    format: LogFormat = Field("human", description="Lines for people, or one JSON object per line.")
    level: LogLevel = Field("warning", description="The least that is logged; requests are followed at `debug`.")

    @property
    def settings(self) -> LogSettings:
        """The same for processes that know no configuration."""
        return LogSettings(self.format, self.level)
