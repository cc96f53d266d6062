"""What a transport counts: messages that went their way, and each way in which one did not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TransportCounters:
    """Messages since the transport opened. Every message that is not delivered increments one of these.

    Attributes:
        num_sent: Handed over for sending.
        num_received: Delivered to the caller.
        num_malformed: Bytes that were not a message of the data plane.
        num_refused: Meant for, or sent by, another incarnation.
        num_unexpected: Replies to a ticket that nobody waits for here: answered already, or never sent.
        num_discarded: Replies to a router that is gone or does not drain its queue.
        num_full: Requests refused because the queue to their host was full.
        num_lost: Connections that ended by themselves, or never came about.
        num_shared: Messages whose rows lay in shared memory.
        num_unshared: Messages whose rows could have lain there, had there been room.
        num_near: Messages sent through a Unix socket of their router and host, not through ZeroMQ.
        num_strangers: Connections that were not let in, because of their key.
    """

    num_sent: int = 0
    num_received: int = 0
    num_malformed: int = 0
    num_refused: int = 0
    num_unexpected: int = 0
    num_discarded: int = 0
    num_full: int = 0
    num_lost: int = 0
    num_shared: int = 0
    num_unshared: int = 0
    num_near: int = 0
    num_strangers: int = 0
