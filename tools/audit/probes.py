"""What a listener says to a stranger: who reaches it, in which protocol it speaks, and what it gives without the secret.

Each listener is asked by a process that has become another user, first without a secret and then with a wrong one. Protocols
are told apart by what comes back: ZeroMQ greets, HTTP answers a GET, gRPC HTTP/2's preface, torch's store a ping.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tools.audit.sockets import Listener

NOBODY = 65534
_SECONDS = 2.0
_PATIENCE = 6.0
"""Of a first answer, and of a call: servers of a run that works may take seconds."""
_TOGETHER = 128
"""Listeners that are asked at the same time: most of them wait for bytes that never come."""
_CLONE_NEWNET = 0x40000000
_NO_SECRETS = (None, "a-secret-that-nobody-has-drawn")
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # preface, empty SETTINGS
_HTTP2_SETTINGS = 4
_ZEROMQ = b"\xff\0\0\0\0\0\0\0"
# torch/csrc/distributed/c10d: VALIDATE with its magic number, PING with a number of ours, GETNUMKEYS.
_STORE_PING = b"\0" + struct.pack("=I", 0x3C85F7CE) + b"\x0d" + struct.pack("=I", 20261)
_STORE_COUNT = b"\7"

HTTP_PATHS = (
    "/", "/health", "/metrics", "/model_info", "/server_info", "/workers", "/route", "/v1/models", "/openapi.json",
    "/api/version", "/api/jobs/", "/api/v0/tasks", "/api/v0/nodes", "/nodes?view=summary", "/logical/actors",
    "/api/cluster_status", "/api/job_agent/jobs/", "/api/packages/gcs/x", "/events", "/worker/traceback",
)  # fmt: skip
"""Reading only: what would change something is behind the same check as what is here."""
GRPC_METHODS = (
    "ray.rpc.NodeInfoGcsService/GetAllNodeInfo", "ray.rpc.InternalKVGcsService/InternalKVKeys",
    "ray.rpc.JobInfoGcsService/GetAllJobInfo", "ray.rpc.NodeManagerService/GetNodeStats",
    "ray.rpc.ObjectManagerService/FreeObjects", "ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "ray.rpc.ReporterService/GetTraceback", "ray.rpc.ReporterService/HealthCheck", "ray.rpc.LogService/ListLogs",
    "ray.rpc.RayletDriver/KVList", "ray.rpc.RayletDriver/ClusterInfo", "ray.rpc.events.EventAggregatorService/AddEvents",
    "grpc.health.v1.Health/Check",
)  # fmt: skip


@dataclass(frozen=True)
class Stranger:
    """Who asks. network: a process in whose network namespace it stands, `source`: the address that it comes from."""

    uid: int | None = None
    network: int | None = None
    source: str | None = None


@dataclass(frozen=True)
class Answer:
    listener: Listener
    verdict: str
    """unreachable, closed (by file modes), asks (for a secret), silent (took the connection and said nothing), or OPEN."""
    protocol: str = ""
    gives: tuple[str, ...] = ()
    """Paths and methods that answered without the secret."""


def ask_all(found: Sequence[Listener], stranger: Stranger, *, node: str, only_reach: bool = False) -> list[Answer]:
    """Every listener's answer. node: the address at which one that listens everywhere is called.

    Runs in a process of its own, which can become somebody else. only_reach: whether a connection is taken, and no more.
    """
    # Before the process changes its user: another one may not read this environment, and grpc imports the second as it answers.
    import datetime  # noqa: F401

    import grpc  # noqa: F401

    def work() -> list[dict]:
        become(stranger)
        with ThreadPoolExecutor(_TOGETHER) as pool:
            answers = list(pool.map(lambda one: ask(one, node=node, source=stranger.source, only_reach=only_reach), found))
        return [{"verdict": a.verdict, "protocol": a.protocol, "gives": list(a.gives)} for a in answers]

    said = in_a_child(work)
    return [Answer(one, row["verdict"], row["protocol"], tuple(row["gives"])) for one, row in zip(found, said, strict=True)]


def ask(one: Listener, *, node: str, source: str | None = None, only_reach: bool = False) -> Answer:
    if one.kind == "udp":
        return Answer(one, "silent", "udp")
    try:
        first = _connect(one, node, source)
    except PermissionError:
        return Answer(one, "closed")
    except OSError:
        return Answer(one, "unreachable")
    with first:
        if only_reach:
            return Answer(one, "silent")
        heard = _said_to_a_get(first)
    try:
        return _in_its_protocol(one, heard, lambda: _connect(one, node, source), node)
    except OSError as error:  # it was there a moment ago
        return Answer(one, "unreachable", type(error).__name__)


def _in_its_protocol(one: Listener, heard: bytes, call: Callable[[], socket.socket], node: str) -> Answer:
    """heard: what came back for a GET of HTTP/1.1."""
    if heard.startswith(_ZEROMQ):
        return Answer(one, "OPEN", "ZeroMQ", ("takes messages",))
    if _status(heard) is not None:
        answered = {(path, secret): _http(call, path, secret) or 0 for path in HTTP_PATHS for secret in _NO_SECRETS}
        gives = dict.fromkeys(path for (path, _), status in answered.items() if 200 <= status < 300)
        if len(gives) == len(HTTP_PATHS):  # it answers whatever it is asked
            gives = {"any path": None}
        return Answer(one, "OPEN" if gives else "asks", "HTTP", tuple(gives))
    if _is_http2(heard) or _speaks_http2(call):
        return _grpc(one, node)
    with call() as store:
        store.sendall(_STORE_PING)
        if _heard(store)[:4] == struct.pack("=I", 20261):
            store.sendall(_STORE_COUNT)
            (keys,) = struct.unpack("=q", _heard(store)[:8].ljust(8, b"\0"))
            return Answer(one, "OPEN", "torch store", (f"{keys} keys",))
    return Answer(one, "silent")


def _connect(one: Listener, node: str, source: str | None) -> socket.socket:
    """Raises OSError where nobody is reached."""
    if one.kind == "unix":
        caller = socket.socket(socket.AF_UNIX)
        target: object = "\0" + one.address[1:] if one.address.startswith("@") else one.address
    else:
        host = node if one.is_everywhere else one.address
        caller = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        target = (host, one.port)
        if source is not None and ":" not in host:
            caller.bind((source, 0))
    caller.settimeout(_SECONDS)
    try:
        caller.connect(target)
    except OSError:
        caller.close()
        raise
    return caller


def _heard(caller: socket.socket) -> bytes:
    """What comes within the patience; b"" for nothing or the end."""
    try:
        return caller.recv(65536)
    except OSError:
        return b""


def _http(call: Callable[[], socket.socket], path: str, secret: str | None) -> int | None:
    """The status; None where none came."""
    with call() as caller:
        return _status(_said_to_a_get(caller, path, secret))


def _said_to_a_get(caller: socket.socket, path: str = "/", secret: str | None = None) -> bytes:
    authorization = f"Authorization: Bearer {secret}\r\n" if secret else ""
    caller.settimeout(_PATIENCE)
    try:
        caller.sendall(f"GET {path} HTTP/1.1\r\nHost: audit\r\n{authorization}Connection: close\r\n\r\n".encode())
    except OSError:
        return b""
    return _heard(caller)


def _status(answer: bytes) -> int | None:
    return int(answer[9:12]) if answer.startswith(b"HTTP/1.") and answer[9:12].isdigit() else None


def _speaks_http2(call: Callable[[], socket.socket]) -> bool:
    with call() as caller:
        caller.sendall(_HTTP2)
        return _is_http2(_heard(caller))


def _is_http2(answer: bytes) -> bool:
    """Whether it begins with SETTINGS, which are of six bytes each."""
    return len(answer) >= 9 and answer[3] == _HTTP2_SETTINGS and int.from_bytes(answer[:3], "big") % 6 == 0


def _grpc(one: Listener, node: str) -> Answer:
    import grpc

    host = node if one.is_everywhere else one.address
    target = f"unix:{one.address}" if one.kind == "unix" else f"[{host}]:{one.port}" if ":" in host else f"{host}:{one.port}"
    gives: dict[str, None] = {}
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        for method in GRPC_METHODS:
            for secret in _NO_SECRETS:
                metadata = [("authorization", f"Bearer {secret}")] if secret else []
                call = channel.unary_unary(f"/{method}", request_serializer=bytes, response_deserializer=bytes)
                try:
                    call(b"", timeout=_PATIENCE, metadata=metadata)
                except grpc.RpcError as refusal:
                    refused = (
                        grpc.StatusCode.UNAUTHENTICATED,
                        grpc.StatusCode.PERMISSION_DENIED,
                        grpc.StatusCode.UNIMPLEMENTED,
                    )
                    if refusal.code() not in refused:
                        gives[f"{method} ({refusal.code().name})"] = None
                else:
                    gives[method] = None
    return Answer(one, "OPEN" if gives else "asks", "gRPC", tuple(gives))


# ------------------------------------------------------------------------------------------ being somebody else


def become(stranger: Stranger) -> None:
    """This process stands in that network, as that user, from now on."""
    if stranger.network is not None:
        with open(f"/proc/{stranger.network}/ns/net") as network:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(network.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"the network of process {stranger.network} cannot be entered")
    if stranger.uid is not None:
        os.setgroups([])
        os.setgid(stranger.uid)
        os.setuid(stranger.uid)


def in_a_child(work: Callable[[], object]) -> object:
    """What `work` returns, from a fork of this process: its user and its network are its own. Raises RuntimeError."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            try:
                said = {"said": work()}
            except Exception as error:
                said = {"broke": f"{type(error).__name__}: {error}"}
            with os.fdopen(writer, "w") as out:
                json.dump(said, out)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    said = json.loads(text or '{"broke": "it ended without a word"}')
    if "broke" in said:
        raise RuntimeError(f"the process that asks as a stranger failed: {said['broke']}")
    return said["said"]


def node_address(network: int | None = None) -> str:
    """The address that this machine (or the network of that process) calls others from; loopback where there is none."""

    def work() -> str:
        become(Stranger(network=network))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as caller:
            try:
                caller.connect(("198.51.100.1", 9))  # sends nothing
            except OSError:
                return "127.0.0.1"
            return caller.getsockname()[0]

    return str(in_a_child(work))
