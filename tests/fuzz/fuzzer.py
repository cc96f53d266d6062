"""Fuzzes one target, guided by coverage: ``python tests/fuzz/fuzzer.py TARGET FOLDER [libFuzzer options]``.

Ends with code 0 after the runs or the time that the options ask for; anything else is a finding: an error that is
not the border's own, an input that takes more than ``-timeout`` seconds, or one that takes too much memory. The
input is left in FOLDER. Atheris (https://github.com/google/atheris) is libFuzzer for Python.
"""

from __future__ import annotations

import random
import resource
import sys
from pathlib import Path
from typing import Any

import atheris
import msgpack

sys.path.insert(0, str(Path(__file__).parents[1]))

_INSTRUMENTED = ("moe_runtime.wire", "moe_runtime.transport", "moe_runtime.rpc", "moe_runtime.service", "fuzz.targets")
with atheris.instrument_imports(include=[*_INSTRUMENTED]):
    from fuzz.targets import TARGETS, seeds

#: What one input may make the process grow by, and all of them together: far above what they are themselves.
MAX_GROWTH_KIB = 32 << 10
MAX_TOTAL_GROWTH_KIB = 256 << 10
#: Inputs after which everything that is made once is there.
_WARM_UP = 2000
_ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 255, 2**31, 2**32, 2**62, 2**63 - 1, 2**64 - 1, -(2**63), 0.5, -0.0, float("nan"),
    float("inf"), "", "float32", "x" * 300, b"", bytes(24), [], [0], [2**62, 4], {}, {"dtype": "float32"},
)  # fmt: skip


def main() -> None:
    """Fuzz until the options say to stop; does not return."""
    name, folder, *options = sys.argv[1:]
    target = TARGETS[name]()
    corpus = Path(folder, "corpus")
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds(name)):
        (corpus / f"seed-{number}").write_bytes(seed)
    guard = _MemoryGuard()

    def test_one_input(data: bytes) -> None:
        target(data)
        guard.check(data)

    ours = [f"-artifact_prefix={folder}/", "-timeout=10", "-print_final_stats=1"]
    arguments = [sys.argv[0], *ours, *options, str(corpus)]
    atheris.Setup(arguments, test_one_input, custom_mutator=_mutate)
    atheris.Fuzz()


class _MemoryGuard:
    """Watches the most memory that the process ever held, which one bad allocation is enough to raise."""

    def __init__(self) -> None:
        self._num_inputs = 0
        self._first = self._last = 0

    def check(self, data: bytes) -> None:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self._num_inputs += 1
        if self._num_inputs == _WARM_UP:
            self._first = most
        if self._num_inputs > _WARM_UP and (
            most - self._last > MAX_GROWTH_KIB or most - self._first > MAX_TOTAL_GROWTH_KIB
        ):
            raise MemoryError(f"{len(data)} bytes of input: memory went from {self._last} to {most} KiB")
        self._last = most


def _mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Half of the time a message with one value replaced, so that what is behind the framing is reached as well."""
    random_ = random.Random(seed)
    if random_.random() < 0.5:
        for start in (1, 3):
            try:
                message = msgpack.unpackb(data[start:], strict_map_key=False, max_ext_len=0)
            except Exception:
                continue
            if isinstance(message, list | dict):
                mutated = data[:start] + msgpack.packb(_with_odd_value(message, random_))
                return mutated[:max_size]
    return bytes(atheris.Mutate(data, max_size))


def _with_odd_value(message: Any, random_: random.Random) -> Any:
    if not isinstance(message, list | dict) or not message or random_.random() < 0.2:
        return random_.choice(_ODD_VALUES)
    if isinstance(message, list):
        at = random_.randrange(len(message))
        return [*message[:at], _with_odd_value(message[at], random_), *message[at + 1 :]]
    key = random_.choice([*message])
    what = random_.random()
    if what < 0.1:
        return {each: value for each, value in message.items() if each != key}
    if what < 0.2:
        return {**message, random_.choice(("surprise", "k", "mask", "seed", "data")): random_.choice(_ODD_VALUES)}
    return {**message, key: _with_odd_value(message[key], random_)}


if __name__ == "__main__":
    main()
