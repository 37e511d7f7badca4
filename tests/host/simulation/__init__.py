"""The scheduler in a world that can be replayed: an echo device, clients, faults, and searches for what breaks it.

`docs/testing.md` says how each oracle works. `python -m simulation --help`, run in the folder above this one, looks for
failing seeds and makes them small.
"""

from .echo_device import NAN, POISON, VOCAB_SIZE, EchoDevice, EchoStore, TornCopyError, next_token, reference_output
from .world import Result, Simulation

__all__ = [
    "NAN",
    "POISON",
    "VOCAB_SIZE",
    "EchoDevice",
    "EchoStore",
    "Result",
    "Simulation",
    "TornCopyError",
    "next_token",
    "reference_output",
]
