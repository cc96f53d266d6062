"""Every error that the runtime raises on purpose.

::

    MoERuntimeError
    ├── ConfigError (ValueError)          a configuration that cannot work
    │   ├── PlugInError                   a plug-in is missing, of another version, or broken
    │   ├── UnsupportedModelError         a Hugging Face model whose experts cannot live in actors
    │   └── WeightsError                  a weight file is missing, corrupt or does not fit
    ├── InvalidRequestError (ValueError)  the request is wrong and will stay wrong
    │   ├── UnknownLayerError
    │   ├── ShapeError
    │   ├── DTypeError
    │   ├── NonFiniteError
    │   ├── RequestTooLargeError
    │   ├── StreamRequiredError           the answer exceeds one message: use the streaming method
    │   └── ProtocolError                 bytes that are not a message of this protocol
    ├── ProtocolVersionError              the peer speaks another major version
    ├── OverloadedError                   a queue is full; ``retry_after_ms`` says when to try again
    ├── DeadlineExceededError             the deadline passed before the answer was ready
    ├── RequestCancelledError             the caller withdrew the request
    ├── UnavailableError                  no router can be reached, or it is draining
    ├── UnauthenticatedError              the router does not know the caller: no token, or not one of its own
    ├── PermissionDeniedError             the router knows the caller and does not let it do this
    ├── ExpertError                       an expert raised or answered with the wrong rows
    │   ├── InnerLayerError               an expert that is a layer itself got nothing from it
    │   └── PoisonedRequestError          expert hosts died of this request, twice
    ├── TransportError                    a message could not be sent to an expert host
    ├── StartError                        the runtime, or a part of it, did not start
    │   ├── PlacementError                the cluster lacks what an actor asks for
    │   └── AlreadyRunningError           a runtime of this name is already there
    └── InternalError                     a defect in the router; its log has the details
"""


class MoERuntimeError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(MoERuntimeError, ValueError):
    """A configuration that cannot work: says which key, what was expected and what was found."""


class PlugInError(ConfigError):
    """An expert plug-in is missing, has another version than the configuration asks for, or cannot load."""


class UnsupportedModelError(ConfigError):
    """A Hugging Face model without experts, with experts that cannot live in actors, or used as it cannot be."""


class WeightsError(ConfigError):
    """A weight file is missing, corrupt, or holds tensors that do not fit the module."""


class InvalidRequestError(MoERuntimeError, ValueError):
    """A request that is wrong and will stay wrong when it is sent again."""


class UnknownLayerError(InvalidRequestError):
    """The router serves no layer of the requested name."""


class ShapeError(InvalidRequestError):
    """A tensor's shape differs from what the layer or the plan expects."""


class DTypeError(InvalidRequestError):
    """A tensor's dtype differs from the layer's."""


class NonFiniteError(InvalidRequestError):
    """An input holds NaN or an infinity, and the layer does not allow them."""


class RequestTooLargeError(InvalidRequestError):
    """A request exceeds a limit of the router."""


class StreamRequiredError(InvalidRequestError):
    """The answer would not fit one message; the streaming method carries it."""


class ProtocolError(InvalidRequestError):
    """Bytes that are not a well-formed message of this protocol."""


class ProtocolVersionError(MoERuntimeError):
    """The peer speaks a major version of the protocol that this side does not."""


class OverloadedError(MoERuntimeError):
    """A queue is full.

    Attributes:
        retry_after_ms: When it is worth trying again, in milliseconds from now.
    """

    def __init__(self, message: str, retry_after_ms: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class DeadlineExceededError(MoERuntimeError):
    """The request's deadline passed before its answer was ready."""


class RequestCancelledError(MoERuntimeError):
    """The caller withdrew the request."""


class UnavailableError(MoERuntimeError):
    """No router could be reached, or the one that was is draining."""


class UnauthenticatedError(MoERuntimeError):
    """The caller shows no token that the router knows, or one that has expired."""


class PermissionDeniedError(MoERuntimeError):
    """The caller's token is known, and does not have the scope that the call needs."""


class ExpertError(MoERuntimeError):
    """An expert raised, or answered with rows of the wrong number, shape, dtype or with non-finite values."""


class InnerLayerError(ExpertError):
    """An expert that is a layer itself got no answer from it, or nothing but residuals, since its experts failed.

    The message has the reason. Raised in expert hosts.
    """


class PoisonedRequestError(ExpertError):
    """Two expert hosts died in a row while they worked on this request; it is not tried again."""


class TransportError(MoERuntimeError):
    """A message could not be handed to an expert host."""


class StartError(MoERuntimeError):
    """The runtime, or a part of it, did not start."""


class PlacementError(StartError):
    """The cluster does not have the resources that an actor asks for; the message names the unmet demand."""


class AlreadyRunningError(StartError):
    """A runtime of this name is already running on the cluster."""


class InternalError(MoERuntimeError):
    """A defect in the router. The caller gets no internals; the router's log has the details."""
