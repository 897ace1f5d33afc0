"""The life of a child process, with children of a few lines; no SGLang."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from callers import connects

from slime.engine.groups import group_exists
from slime.engine.kinds import why_not_over_nodes
from slime.engine.ports import EnginePorts, bind_when_free
from slime.engine.process import ChildProcess, EngineDied, EngineProcess, seconds_until_missed
from slime.engine.router import RouterProcess
from slime.engine.spec import EngineSpec, NodePlacement
from tools.drills.faults import inflict, memory_groups

REPOSITORY = Path(__file__).resolve().parents[2]


def child(tmp_path: Path, code: str, *, token: str = "secret") -> ChildProcess:
    process = ChildProcess("engine x", tmp_path / "x.log")
    process.launch([sys.executable, "-u", "-c", code], dict(os.environ) | {"PYTHONPATH": str(REPOSITORY)}, token)
    return process


def wait(process: ChildProcess, *, timeout: float = 120.0, ready=lambda: False) -> float:
    return process.wait(ready, timeout=timeout, phase=lambda: "thinking", report=lambda line: None)


def test_a_child_that_ends_early_is_reported_with_its_last_lines(tmp_path):
    process = child(tmp_path, "print('reading weights'); raise SystemExit('no such file: model.safetensors')")
    with pytest.raises(EngineDied, match=r"engine x exited with 1; its log .*x.log ends\n  reading weights\n  no such file"):
        wait(process)
    process.stop()


def test_a_child_that_never_serves_is_a_time_out_with_its_phase(tmp_path):
    process = child(tmp_path, "import time; print('still here'); time.sleep(600)")
    try:
        wait(process, ready=lambda: "still here" in process.log_path.read_text())
        with pytest.raises(TimeoutError, match=r"not ready after \d+ s \(phase: thinking; expected .*its log .*\n  still here"):
            wait(process, timeout=0.0)
    finally:
        process.stop()
    assert not group_exists(process.pid)


def test_stop_ends_grandchildren_that_ignore_sigterm(tmp_path, monkeypatch):
    monkeypatch.setattr("slime.engine.process.TERMINATE_SECONDS", 0.5)
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); time.sleep(600)"
    process = child(tmp_path, f"import subprocess, sys; subprocess.Popen([sys.executable, '-u', '-c', {stubborn!r}]).wait()")
    wait(process, ready=lambda: "up" in process.log_path.read_text())
    process.stop()
    assert not group_exists(process.pid)
    process.stop()  # a second call is harmless


def test_the_token_arrives_on_stdin_and_the_log_is_private(tmp_path):
    process = child(tmp_path, "from slime.engine.serve import read_token; print('got', read_token()[::-1])", token="abc123")
    with pytest.raises(EngineDied, match="got 321cba"):
        wait(process)
    assert process.log_path.stat().st_mode & 0o777 == 0o600
    process.stop()


def test_a_server_ends_when_its_parent_is_killed(tmp_path):
    """The parent dies without a chance to clean up; the open pipe is what tells the server."""
    server = (
        "import os, time; from slime.engine.serve import read_token, stop_with_parent; "
        "read_token(); stop_with_parent(); print(os.getpid()); time.sleep(600)"
    )
    parent = (
        "import os, pathlib, sys, time\n"
        "from slime.engine.process import ChildProcess\n"
        f"p = ChildProcess('x', pathlib.Path({str(tmp_path / 'server.log')!r}))\n"
        f"p.launch([sys.executable, '-u', '-c', {server!r}], dict(os.environ), 't')\n"
        "print(p.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    env = dict(os.environ) | {"PYTHONPATH": str(REPOSITORY)}
    running = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, env=env, text=True)
    group = int(running.stdout.readline())
    deadline = time.monotonic() + 120
    while not (tmp_path / "server.log").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert group_exists(group)
    running.kill()
    running.wait()
    while group_exists(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not group_exists(group)


def engine(tmp_path: Path, **changes) -> EngineProcess:
    values = {
        "model": "default", "role": "regular", "engine_id": 0, "gpu_offset": 0, "num_gpus": 1, "num_nodes": 1,
        "tp_size": 1, "pp_size": 1, "dp_size": 1, "ep_size": 1, "model_path": str(tmp_path), "update_weights": True,
        "needs_offload": True, "random_seed": 1,
    } | changes  # fmt: skip
    return EngineProcess(EngineSpec(**values), device_kind="host", token="t", log_path=tmp_path / "e.log")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "has no config.json; --hf-checkpoint must be a local Hugging Face folder"),
        ({"settings": {"max_running_request": 3}}, "has no such option; nearest: --sglang-max-running-requests"),
        ({"num_nodes": 2}, "spans 2 nodes"),
        ({"pp_size": 2}, "pipeline parallel size 2; a CPU engine has tensor parallelism only"),
    ],
)
def test_what_cannot_start_is_refused_before_a_process_exists(tmp_path, changes, message):
    if "settings" in changes:
        (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    process = engine(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        process.start()
    assert not process.is_alive()
    process.stop()


def test_a_cpu_engine_over_nodes_needs_an_interface_and_a_processor_that_reduces_over_one(tmp_path):
    over_two = replace(engine(tmp_path).spec, num_nodes=2, num_gpus=2, tp_size=2)
    plain, amx = "x86_64 fpu avx512f", "x86_64 fpu avx512f amx_tile"
    assert why_not_over_nodes(over_two, "eth0", processor=plain) is None
    assert why_not_over_nodes(over_two, None, processor=plain) == (
        "engine default-regular-0 spans 2 nodes, and GLOO_SOCKET_IFNAME is not set: set it to the interface between them "
        "(SOCKET_IFNAME)"
    )
    assert "reduces in one machine's shared memory" in why_not_over_nodes(over_two, "eth0", processor=amx)
    assert "(aarch64)" in why_not_over_nodes(over_two, "eth0", processor="aarch64 fp asimd")
    assert why_not_over_nodes(replace(over_two, num_nodes=1), None, processor=amx) is None


def test_an_engine_without_a_token_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs the run's token"):
        EngineProcess(engine(tmp_path).spec, device_kind="host", token="", log_path=tmp_path / "e.log")


def test_an_address_of_another_machine_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot bind 203.0.113.7.*is it an address of this machine"):
        EngineProcess(
            engine(tmp_path).spec,
            device_kind="host",
            token="t",
            log_path=tmp_path / "e.log",
            place=NodePlacement(0, "203.0.113.7", 0),
        )


def test_a_prefill_engine_is_away_for_as_many_heartbeats_as_decode_engines_allow():
    assert seconds_until_missed({}) == 2 * 5.0 + 1
    own = {"SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": "1", "SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE": "3"}
    assert seconds_until_missed(own) == 3 * 2.0 + 1, "SGLang asks every 2 s at the most"


def test_a_port_whose_server_is_ending_is_taken_once_nobody_listens_there():
    """With a connection that the system still keeps, as after every server that closed first."""
    with socket.create_server(("127.0.0.1", 0)) as old:
        port = old.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} on 127.0.0.1, which a server of this run had, cannot"):
            bind_when_free("127.0.0.1", port, patience=0.2)
        caller = socket.create_connection(("127.0.0.1", port))
        accepted, _ = old.accept()
        accepted.close()  # first: this side keeps the connection in TIME_WAIT
        caller.close()
        threading.Timer(0.3, old.close).start()
        with bind_when_free("127.0.0.1", port, patience=60.0), socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", port))
            server.listen()  # what the new server does while the port is still held for it


LISTENS = """
import socket, sys, time
kept = [socket.create_server(("0.0.0.0", int(port)), reuse_port=False) for port in sys.argv[1:]]
print("up", flush=True)
time.sleep(600)
"""


def test_a_gpu_engines_ports_that_ask_for_no_secret_are_kept_to_the_runs_nodes(tmp_path):
    """A prefill engine on a node of two; what it serves over HTTP asks for the token itself."""
    told: list[str] = []
    place = NodePlacement(0, "127.0.0.2", 0, peers=("127.0.0.2", "127.0.0.3"))
    values = {**vars(engine(tmp_path).spec), "role": "prefill"}
    process = EngineProcess(
        EngineSpec(**values), device_kind="cuda", token="t", log_path=tmp_path / "e.log", place=place, detail=told.append
    )
    process._book.release()
    # Free at every address; the block from dist_init on holds no other of them.
    free = [socket.create_server(("0.0.0.0", 0)) for _ in range(4)]
    open_ones = sorted(one.getsockname()[1] for one in free)
    for one in free:
        one.close()
    http, bootstrap, nccl, dist_init = open_ones
    process.ports = EnginePorts(http, nccl, dist_init, bootstrap)
    try:
        process.child.launch([sys.executable, "-u", "-c", LISTENS, *map(str, open_ones)], dict(os.environ), "t")
        wait(process.child, ready=lambda: "up" in process.child.log_path.read_text())
        process.keep_to_the_run()
        assert told == ["engine default-prefill-0: 3 sockets are kept to the nodes of the run"]
        reached = {
            source: [port for port in open_ones if connects(("127.0.0.1", port), source=source)]
            for source in ("127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.9")
        }
        assert reached == dict.fromkeys(("127.0.0.1", "127.0.0.2", "127.0.0.3"), open_ones) | {"127.0.0.9": [http]}
    finally:
        process.stop()


def test_an_engine_in_the_place_of_a_lost_one_has_its_address_and_leaves_its_log(tmp_path):
    first = engine(tmp_path)
    first.child.log_path.write_text("the last words of the lost one")
    first._book.release()
    second = EngineProcess(first.spec, device_kind="host", token="t", log_path=first.child.log_path, ports=first.ports)
    try:
        second._take_over()
        assert second.url == first.url and second.dist_init_addr == first.dist_init_addr
        assert sorted(second._book.held) == sorted({first.ports.http, first.ports.nccl, first.ports.dist_init})
        assert (tmp_path / f"{first.child.log_path.name}.lost").read_text() == "the last words of the lost one"
    finally:
        second.stop()


ROUTER = """
import http.server, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.headers["Authorization"] == "Bearer t" else 401)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""


def test_a_router_that_is_stopped_misses_its_check(tmp_path):
    router = RouterProcess([], token="t", log_path=tmp_path / "router.log")
    router._book.release()
    router.child.launch([sys.executable, "-c", ROUTER, str(router.port)], dict(os.environ), "t")
    try:
        deadline = time.monotonic() + 60
        while router.missed_check(5.0) is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert router.missed_check(5.0) is None
        os.kill(router.child.pid, signal.SIGSTOP)
        assert router.missed_check(0.5) == f"GET {router.url}/workers: ReadTimeout timed out"
        os.kill(router.child.pid, signal.SIGCONT)
        router.token = "another"
        assert router.missed_check(5.0) == f"GET {router.url}/workers: status 401"
    finally:
        router.stop()
    assert router.missed_check(0.5).startswith(f"GET {router.url}/workers: ConnectError")


MAPS = """
import mmap, os, sys, time
if os.fork() == 0:
    with open("{file}", "w+b") as shared:
        shared.truncate(4096)
        kept = mmap.mmap(shared.fileno(), 4096)
    print("mapped", flush=True)
    time.sleep(600)
time.sleep(600)
"""


# As SGLang does it: a scheduler that computes, and a first process that kills itself when the scheduler has ended.
HUNGRY = """
import os, signal, subprocess, sys, time
eats = "import sys; print('up', flush=True); sys.stdin.readline(); print(len(bytearray(b'x') * (1 << 26)))"
below = subprocess.Popen([sys.executable, "-c", eats], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
below.stdout.readline()
print("scheduler", below.pid, flush=True)
while not os.path.exists({go!r}):
    time.sleep(0.01)
below.stdin.write("\\n")
below.stdin.flush()
below.wait()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(memory_groups() is None or not os.access("/dev/kmsg", os.R_OK), reason="no cgroups or no kernel's log here")
@pytest.mark.parametrize("limited", [True, False])
def test_a_server_whose_scheduler_the_kernel_killed_for_memory_says_so(tmp_path, limited):
    go = tmp_path / "go"
    process = child(tmp_path, HUNGRY.format(go=str(go)))
    wait(process, ready=lambda: "scheduler " in process.log_path.read_text())
    process.note_group()
    scheduler = int(process.log_path.read_text().split()[1])
    undo = inflict("oom", scheduler, stop_seconds=0) if limited else lambda: None
    go.touch()
    with pytest.raises(EngineDied) as told:
        wait(process)
    process.stop()
    undo()
    why = f", because its process {scheduler} (python) was killed by the kernel, because memory had run out" if limited else ""
    assert str(told.value).startswith(f"engine x was killed by signal 9 (SIGKILL){why}; its log ")


@pytest.mark.parametrize("killed", [False, True])
def test_shared_memory_of_a_servers_children_goes_with_it_however_it_ends(tmp_path, killed):
    """SGLang's schedulers make such files, and are killed before they could remove them."""
    file = Path(f"/dev/shm/sglang_loads_test_{os.getpid()}.shm")
    process = child(tmp_path, MAPS.format(file=file))
    wait(process, ready=lambda: "mapped" in process.log_path.read_text())
    process.note_group()
    assert file.exists()
    if killed:
        os.killpg(process.pid, 9)
    process.stop()
    assert not file.exists()


def test_what_an_actor_that_was_killed_left_in_shared_memory_is_removed_by_its_successor(tmp_path):
    """Ray kills actors whose owner has died, together with their servers: nobody is left who knew the files."""
    file, of_a_user = (Path(f"/dev/shm/{name}_{os.getpid()}") for name in ("sglang_loads_left", "checkpoint"))
    of_a_user.touch()
    lost = child(tmp_path, MAPS.format(file=file))
    wait(lost, ready=lambda: "mapped" in lost.log_path.read_text())
    lost.note_group()
    os.killpg(lost.pid, 9)
    lost.popen.wait()
    shared_list = lost.log_path.with_suffix(".shared")
    assert file.exists() and shared_list.read_text() == f"{file}\n"
    shared_list.write_text(f"{file}\n{of_a_user}\n")
    successor = child(tmp_path, "print('up')")
    assert not file.exists() and not shared_list.exists()
    assert of_a_user.exists(), "nothing but SGLang's own is ever removed"
    of_a_user.unlink()
    successor.stop()
