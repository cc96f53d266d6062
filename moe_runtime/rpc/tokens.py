"""The tokens of those who may call a router: their file, and whose token a caller shows."""

from __future__ import annotations

import datetime
import hashlib
import hmac
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from moe_runtime.config.mistakes import describe_mistakes
from moe_runtime.config.security import Scope, TokenConfig
from moe_runtime.errors import ConfigError, PermissionDeniedError, UnauthenticatedError
from moe_runtime.rpc.reloading import Reloaded, read_private

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

_TO_SCRAPE: tuple[Scope, ...] = ("admin", "metrics")


@dataclass(frozen=True)
class Token:
    """A token, known by its hash.

    Attributes:
        name: Who has it.
        digest: Its SHA-256.
        scopes: What it is good for.
        expires: Its last day, in UTC; None is never.
    """

    name: str
    digest: bytes = field(repr=False)
    scopes: frozenset[Scope]
    expires: datetime.date | None = None


class TokenFile:
    """The tokens in a file, as it is now. Thread-safe.

    Args:
        path: The YAML or JSON file.
        now: Tells the time in seconds.
        today: Tells the day, in UTC.

    Raises:
        ConfigError: If the file cannot be used; the message shows nothing of its content.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        now: Callable[[], float] = time.monotonic,
        today: Callable[[], datetime.date] = lambda: datetime.datetime.now(datetime.UTC).date(),
    ) -> None:
        file = Path(path).expanduser()
        self._tokens = Reloaded([file], lambda: read_tokens(file), now=now)
        self._today = today

    def authenticate(self, shown: str | None) -> Token:
        """The token that a caller shows.

        Raises:
            UnauthenticatedError: If it shows none, one that is not in the file, or one that has expired.
        """
        if not shown:
            raise UnauthenticatedError("expected a token, as metadata `authorization: Bearer TOKEN`, found none")
        # Tokens are ASCII; what is not may be any bytes, and equals none.
        digest = hashlib.sha256(shown.encode(errors="backslashreplace")).digest()
        found: Token | None = None
        # Against all, each in constant time: how long it takes says nothing of any of them.
        for token in self._tokens.current():
            found = token if hmac.compare_digest(token.digest, digest) else found
        if found is None:
            raise UnauthenticatedError("expected a token that this router knows, found another")
        if found.expires is not None and self._today() > found.expires:
            raise UnauthenticatedError(f"the token of {found.name} expired after {found.expires}; ask for another")
        return found

    def authorize(self, shown: str | None, *, any_of: Collection[Scope]) -> Token:
        """The token that a caller shows, if it is good for what the caller wants.

        Raises:
            UnauthenticatedError: As ``authenticate`` does.
            PermissionDeniedError: If it has none of the scopes.
        """
        token = self.authenticate(shown)
        if token.scopes.isdisjoint(any_of):
            raise PermissionDeniedError(
                f"expected a token with scope {' or '.join(sorted(any_of))}, "
                f"found that of {token.name} with {', '.join(sorted(token.scopes))}"
            )
        return token

    def lets_scrape(self, shown: str | None) -> bool:
        """Whether a token is good for reading metrics."""
        try:
            self.authorize(shown, any_of=_TO_SCRAPE)
        except (UnauthenticatedError, PermissionDeniedError):
            return False
        return True


def read_tokens(path: Path) -> tuple[Token, ...]:
    """The tokens in a file.

    Raises:
        ConfigError: If others than its owner can read it, or it is no list of tokens; one line per mistake, which
            shows nothing of the content.
    """
    entries = _entries(path)
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: expected a list of tokens, each with name, token or sha256, and scopes")
    mistakes: list[str] = []
    tokens = [token for i, entry in enumerate(entries) if (token := _token(entry, i, mistakes)) is not None]
    for what in ("name", "digest"):
        if not mistakes and len({getattr(token, what) for token in tokens}) < len(tokens):
            mistakes.append(f"expected each {'name' if what == 'name' else 'token'} once, found one twice")
    if mistakes:
        raise ConfigError("\n".join(f"{path}: {mistake}" for mistake in mistakes))
    return tuple(tokens)


def _entries(path: Path) -> object:
    # Only routers come here, which have PyYAML.
    from moe_runtime.config.yaml_file import parse_yaml

    try:
        return parse_yaml(read_private(path).decode(), origin=path.name)
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: expected UTF-8 text, found other bytes at offset {exc.start}") from None
    except ConfigError as exc:
        if exc.__cause__ is None or isinstance(exc.__cause__, OSError):
            raise
        # What a parser says may quote a token.
        raise ConfigError(f"{path}: expected a YAML or JSON document, found something else") from None


def _token(entry: object, index: int, mistakes: list[str]) -> Token | None:
    try:
        config = TokenConfig.model_validate(entry)
    except ValidationError as exc:
        # Never the input: it may be the token.
        mistakes += describe_mistakes(exc, model=TokenConfig, at=str(index), shows_values=False)
        return None
    text = config.sha256 or hashlib.sha256((config.token or "").encode()).hexdigest()
    return Token(config.name, bytes.fromhex(text), frozenset(config.scopes), config.expires)
