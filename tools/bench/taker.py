"""In the place of an engine that is updated: each of its ranks copies what it is given into tensors of its own.

A rank opens its payload as SGLang's does (CUDA IPC handles; on a CPU the bytes in the request). SGLang's loader does more: it
looks every name up, and cuts, fuses and converts.
"""

from __future__ import annotations

import base64
import json
import multiprocessing
import pickle
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection

import torch
from torch import Tensor


def take(ready: Connection, ranks: int) -> None:
    """A process that answers as an engine of so many ranks; its port goes to `ready`."""
    fork = multiprocessing.get_context("fork")  # nothing of a device is open here
    ends = []
    for _ in range(ranks):
        here, there = fork.Pipe()
        fork.Process(target=_take_rank, args=(there, [*ends, here]), daemon=True).start()
        there.close()
        ends.append(here)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            for end, text in zip(ends, body["serialized_named_tensors"], strict=True):
                end.send_bytes(text.encode())
            failed = [why for end in ends if (why := end.recv())]
            answer = json.dumps({"success": not failed, "message": "; ".join(failed)}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    ready.send(server.server_port)
    server.serve_forever()


def _take_rank(orders: Connection, others: list[Connection]) -> None:
    for end in others:  # of the engine, which this process would keep open
        end.close()
    torch.set_num_threads(1)
    own: dict[str, Tensor] = {}
    while True:
        try:
            text = orders.recv_bytes()
        except EOFError:  # the engine has ended
            return
        try:
            load_bucket(base64.b64decode(text), own)
            orders.send("")
        except Exception as error:  # whoever posted is told, and goes on or not
            orders.send(f"{type(error).__name__}: {error}")


def load_bucket(payload: bytes, own: dict[str, Tensor]) -> None:
    """Copies a bucket's tensors into `own`, on the device where they lie, and returns when they are there."""
    bucket = pickle.loads(payload)
    flat = bucket["flattened_tensor"]
    for meta in bucket["metadata"]:
        found = flat[meta.start_idx : meta.end_idx].view(meta.dtype).view(meta.shape)
        if meta.name not in own:
            own[meta.name] = torch.empty_like(found)
        own[meta.name].copy_(found)
    flat[:1].cpu()  # behind the copies, on the same device
