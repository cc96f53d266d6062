"""CURVE on the sockets between nodes: key pairs, and the handler that lets only known routers in."""

from __future__ import annotations

import contextlib
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import zmq
from zmq.utils import z85

from moe_runtime.errors import TransportError

if TYPE_CHECKING:
    from collections.abc import Collection

Encryption = Literal["curve", "none"]

_KEY_BYTES = 32
_ZAP_ADDRESS = "inproc://zeromq.zap.01"
_ZAP_VERSION = b"1.0"
#: Frames of a ZAP request by CURVE: version, request id, domain, address, identity, mechanism, key.
_NUM_ZAP_FRAMES = 7


@dataclass(frozen=True)
class KeyPair:
    """A process's keys, in Z85 of 40 characters; the secret one never leaves the process.

    Attributes:
        public: What peers must know.
        secret: Not shown by ``repr``.
    """

    public: str
    secret: str = field(repr=False)


def make_key_pair() -> KeyPair:
    """A new key pair; each process makes its own when it starts."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


def check_public_key(key: str) -> bytes:
    """A public key as bytes of Z85.

    Raises:
        TransportError: If it is not one.
    """
    try:
        decoded = z85.decode(key)
    except (KeyError, ValueError, struct.error) as exc:
        raise TransportError(f"public key {key!r:.60}: expected 40 characters of Z85") from exc
    if len(decoded) != _KEY_BYTES:
        raise TransportError(f"public key {key!r:.60}: expected {_KEY_BYTES} bytes in Z85, found {len(decoded)}")
    return key.encode()


def secure_listener(socket: zmq.Socket[bytes], keys: KeyPair) -> None:
    """Make the addresses that a socket binds from now on speak CURVE; those bound before stay as they are."""
    socket.set(zmq.CURVE_SERVER, 1)
    socket.set(zmq.CURVE_SECRETKEY, keys.secret.encode())
    socket.set(zmq.ZAP_DOMAIN, b"moe_runtime")
    # Without a handler nobody is let in, instead of everybody.
    socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)


def secure_connection(socket: zmq.Socket[bytes], keys: KeyPair, *, host_key: str) -> None:
    """Make a socket that has yet to connect speak CURVE to the host that owns a public key, and to no other.

    Raises:
        TransportError: If the host's key is malformed.
    """
    socket.set(zmq.CURVE_SERVERKEY, check_public_key(host_key))
    socket.set(zmq.CURVE_PUBLICKEY, keys.public.encode())
    socket.set(zmq.CURVE_SECRETKEY, keys.secret.encode())


class Doorkeeper:
    """Answers ZeroMQ's question whether a router may come in (https://rfc.zeromq.org/spec/27/).

    CURVE alone admits whoever knows the host's public key, which is no secret. The owner of ``socket`` polls it
    and calls ``answer_waiting``; only ``admit`` may be called from other threads.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Take the door of a context; to be made before its sockets listen."""
        self._admitted: frozenset[bytes] = frozenset()
        self.socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.socket.set(zmq.LINGER, 0)
        self.socket.bind(_ZAP_ADDRESS)

    def admit(self, public_keys: Collection[str]) -> None:
        """Let routers with these keys in from now on, and no others; who is inside stays. Thread-safe.

        Raises:
            TransportError: If a key is malformed; then nothing changes.
        """
        decoded = (z85.decode(check_public_key(key)) for key in public_keys)
        # One assignment, so that the owner's thread sees the old set or the new one.
        self._admitted = frozenset(decoded)

    def answer_waiting(self) -> int:
        """Answer the questions that have arrived; gives how many strangers were refused."""
        num_refused = 0
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return num_refused
            admitted = self._admits(frames)
            num_refused += not admitted
            status = [b"200", b"OK"] if admitted else [b"400", b"unknown key"]
            with contextlib.suppress(zmq.Again):
                self.socket.send_multipart([_ZAP_VERSION, frames[1], *status, b"", b""], zmq.DONTWAIT)

    def close(self) -> None:
        """Let nobody in any more."""
        self.socket.close()

    def _admits(self, frames: list[bytes]) -> bool:
        return len(frames) == _NUM_ZAP_FRAMES and frames[5] == b"CURVE" and frames[6] in self._admitted
