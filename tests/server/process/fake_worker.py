"""An engine's process that computes nothing: it says the integers. Run by tests; the model's name is its behaviour.

python fake_worker.py DESCRIPTOR
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from typing import Any

from jaxserve.config import EngineLimits, ModelConfig
from jaxserve.errors import CheckpointError, EngineDeadError
from jaxserve.metrics import EngineMetrics
from jaxserve.types import Delta, EngineStats
from jaxserve_server import wire
from jaxserve_server.engine_worker import Link

MODEL = ModelConfig(
    **{"architecture": "fake", "vocab_size": 256, "hidden_size": 8, "intermediate_size": 8, "max_position": 64},
    **{"num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 8},
)
LIMITS = EngineLimits(
    **{"max_model_len": 64, "block_size": 16, "max_num_seqs": 4, "max_num_batched_tokens": 16, "num_blocks": 9},
    **{"max_num_queued_reqs": 8, "max_blocks_per_row": 4, "kv_dtype": "float32", "token_buckets": (16,)},
    **{"q_tile": 16, "kv_tile": 16},
)


class Fake:
    def __init__(self, sock: socket.socket) -> None:
        self.link, self.sock = Link(sock), sock
        self.metrics = EngineMetrics(max_model_len=64, cache_info={"block_size": "16"})
        self.open: dict[int, wire.Add] = {}
        self.mode = ""

    def stats(self) -> list[Any]:
        num = len(self.open)
        return wire.pack_stats(EngineStats(num, 0, 8, 8, 0, 5, 0, 0.25 if num else 0.0))

    def snapshot(self, call: int | None) -> None:
        self.link.send(wire.Snapshot(call, self.stats(), self.metrics.state()))

    def run(self) -> None:
        for message in self.link.messages():
            match message:
                case wire.Start():
                    self.start(message)
                case wire.Add():
                    self.add(message)
                case wire.Abort():
                    self.open.pop(message.number, None)
                case wire.Refresh() if self.mode != "mute":
                    self.metrics.generation_tokens += 1
                    self.snapshot(message.call)
                case wire.ResetPrefixCache():
                    self.link.send(wire.PrefixCacheReset(message.call, 7))
                case wire.Stop():
                    os._exit(0)
        os._exit(1)

    def start(self, message: wire.Start) -> None:
        self.mode = message.model
        if self.mode == "dies":
            os._exit(3)
        if self.mode == "no checkpoint":
            self.link.send(wire.Failed(wire.pack_error(CheckpointError("The folder is empty. Give another."))))
            self.link.flush()
            os._exit(1)
        self.link.send(wire.ModelRead("/model", MODEL, {"top_k": 3}))
        self.link.send(wire.Ready(LIMITS, "print", self.stats(), self.metrics.state()))

    def add(self, message: wire.Add) -> None:
        if self.mode == "garbage":
            self.sock.sendall(b"\x05\0\0\0hello")
        elif self.mode == "fails":
            self.link.send(wire.Failed(wire.pack_error(EngineDeadError("The device failed 3 steps in a row."))))
        elif self.mode != "mute":
            self.open[message.number] = message
            threading.Thread(target=self.count, args=(message,), daemon=True).start()

    def count(self, message: wire.Add) -> None:
        for i in range(message.params.max_tokens or 10**9):
            if message.number not in self.open:
                return
            reason = "length" if i + 1 == message.params.max_tokens else None
            if reason:
                del self.open[message.number]
            delta = Delta((i % 256,), finish_reason=reason)
            self.link.send(wire.Step([wire.pack_item(message.number, delta)], self.stats()))
            time.sleep(0.001)


if __name__ == "__main__":
    Fake(socket.socket(fileno=int(sys.argv[1]))).run()
