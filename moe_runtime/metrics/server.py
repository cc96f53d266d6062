"""Serves a router's metrics over HTTP, in threads of its own."""

from __future__ import annotations

import logging
import socket
import socketserver
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder

from moe_runtime.errors import StartError

if TYPE_CHECKING:
    from collections.abc import Callable

    from prometheus_client.registry import Collector

    #: Whether the bearer token of a scrape, or none, lets it in.
    Authorize = Callable[[str | None], bool]

_LOG = logging.getLogger(__name__)

PATH = "/metrics"
_MAX_SCRAPES = 8
#: A scraper that has not sent its request by then is let go.
_READ_TIMEOUT_S = 5.0
_STOP_TIMEOUT_S = 2.0


class MetricsServer:
    """One port, one path, ``GET`` only.

    Args:
        collector: Collects the metrics; those of the process are added.
        address: ``HOST:PORT`` to bind; port 0 is any.
        authorize: Is given the request's bearer token, or None, and says whether it may scrape; all may without.
    """

    def __init__(self, collector: Collector, *, address: str, authorize: Authorize | None = None) -> None:
        self._address = address
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(collector)
        ProcessCollector(registry=self._registry)
        self._authorize = authorize
        self._collecting = threading.Lock()
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> str:
        """Bind and serve; once.

        Returns:
            The address, ``HOST:PORT``, with the port that was bound.

        Raises:
            StartError: If the address cannot be bound.
        """
        host, _, port = self._address.rpartition(":")
        try:
            self._server = _Server((host.strip("[]"), int(port)), self)
        except (OSError, OverflowError, UnicodeError) as exc:
            raise StartError(
                f"metrics.address: expected to bind {self._address}, found it taken or not an address of this machine"
            ) from exc
        self._thread = threading.Thread(target=self._server.serve_forever, name="moe-metrics", daemon=True)
        self._thread.start()
        return f"{host}:{self._server.server_address[1]}"

    def stop(self) -> None:
        """Stop serving. Safe to call twice."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join(_STOP_TIMEOUT_S)

    def allows(self, token: str | None) -> bool:
        """Whether a scrape with this bearer token, or without one, is let in."""
        return self._authorize is None or self._authorize(token)

    def page(self, accept: str) -> tuple[bytes, str]:
        """The metrics in the best format that the scraper accepts, and the content type."""
        encode, content_type = choose_encoder(accept)
        with self._collecting:
            return encode(self._registry), content_type


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, place: tuple[str, int], metrics: MetricsServer) -> None:
        self.metrics = metrics
        self._free = threading.BoundedSemaphore(_MAX_SCRAPES)
        self.address_family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
        super().__init__(place, _Handler)

    def server_bind(self) -> None:
        # HTTPServer's own asks the name service for the host's name, which may take seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        _LOG.debug("a scrape from %s broke off", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "moe-runtime"
    sys_version = ""
    timeout = _READ_TIMEOUT_S

    def do_GET(self) -> None:
        metrics = self.server.metrics
        if self.path.partition("?")[0] != PATH:
            self._answer(HTTPStatus.NOT_FOUND, f"expected {PATH}\n".encode())
        elif not metrics.allows(self._token()):
            self._answer(HTTPStatus.UNAUTHORIZED, b"expected a bearer token with the scope metrics\n")
        else:
            content, content_type = metrics.page(self.headers.get("Accept", ""))
            self._answer(HTTPStatus.OK, content, content_type)

    def log_message(self, format: str, *args: Any) -> None:
        _LOG.debug(format, *args)

    def _token(self) -> str | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        return token.strip() if scheme.lower() == "bearer" else None

    def _answer(self, status: HTTPStatus, content: bytes, content_type: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        if status is HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        self.wfile.write(content)
