"""The audit of a run finds what is open and what leaks, in processes made for that; on whole runs it is in tests/e2e."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.audit import sockets

ROOT = Path(__file__).resolve().parents[2]
# An HTTP server that gives a page to everybody, one that asks for a secret, a Unix socket for its user and one without modes
# (abstract), a store of torch's, a gRPC server that asks, and one that takes a connection and says nothing.
SERVER = """
import os, socket, sys, threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import torch.distributed as dist


class Open(BaseHTTPRequestHandler):
    def do_GET(self):
        allowed = self.server.open or self.headers["Authorization"] == f"Bearer {sys.argv[-1]}"
        self.send_response(200 if allowed and self.path == "/metrics" else 404 if allowed else 401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


folder = Path(sys.argv[1])
for name, is_open in (("open", True), ("asks", False)):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Open)
    server.open = is_open
    threading.Thread(target=server.serve_forever, daemon=True).start()
kept = []
for address in (str(folder / "own.sock"), "\\0audit-" + str(os.getpid())):
    one = socket.socket(socket.AF_UNIX)
    one.bind(address)
    one.listen()
    kept.append(one)
os.chmod(folder / "own.sock", 0o600)
silent = socket.create_server(("127.0.0.1", 0))
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
store.set("a", "1")


class Asks(grpc.ServerInterceptor):
    def intercept_service(self, going_on, details):
        def refuse(request, context):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no")

        return grpc.unary_unary_rpc_method_handler(refuse)


calls = grpc.server(ThreadPoolExecutor(2), interceptors=[Asks()])
calls.add_insecure_port("127.0.0.1:0")
calls.start()
print("up", flush=True)
sys.stdin.read()
"""
SECRET = "s3cret-of-this-test"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    folder = tmp_path_factory.mktemp("audit")
    folder.chmod(0o755)
    (folder / "server.py").write_text(SERVER)
    (folder / "notes.txt").write_text(f"the key is {SECRET}")
    (folder / "everybodys").touch()
    (folder / "everybodys").chmod(0o666)
    environment = os.environ | {"A_KEY": SECRET}
    server = subprocess.Popen(
        [sys.executable, str(folder / "server.py"), str(folder), SECRET],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout.readline() == "up\n"
        code = (
            "import json, pathlib, sys; from tools.audit.__main__ import audit\n"
            f"found = audit([{server.pid}], [pathlib.Path({str(folder)!r})], passed={{'the key': {SECRET!r}}}, outside=None)\n"
            "print(json.dumps(found.to_json()))"
        )
        asked = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
        assert asked.returncode == 0, asked.stderr
        yield json.loads(asked.stdout) | {"folder": str(folder), "pid": server.pid}
    finally:
        server.stdin.close()
        server.wait(20)


def test_every_kind_of_listener_is_told_with_what_it_gives(found: dict):
    told = sorted((row["kind"], row["protocol"], row["verdict"], row["gives"]) for row in found["rows"])
    other_user = os.geteuid() == 0
    assert told == sorted(
        [
            ("tcp", "", "silent", []),
            ("tcp", "HTTP", "OPEN", ["/metrics"]),
            ("tcp", "HTTP", "asks", []),
            ("tcp", "gRPC", "asks", []),
            ("tcp", "torch store", "OPEN", ["1 keys"]),
            ("unix", "", "closed" if other_user else "silent", []),
            ("unix", "", "silent", []),
        ]
    )
    open_ones = {(row["kind"], row["protocol"]) for row in found["unexplained"]}
    assert {("tcp", "HTTP"), ("tcp", "torch store"), ("tcp", ""), ("unix", "")} <= open_ones and not found["clean"]
    assert all(row["who"] == "server.py" and row["pids"] == [found["pid"]] for row in found["rows"])


def test_a_secret_is_found_where_others_read_it_and_told_by_its_name(found: dict):
    """In the arguments and in a file; in the environment a secret of the user's belongs."""
    assert sorted(leak["where"] for leak in found["leaks"]) == [
        f"{found['folder']}/notes.txt", f"arguments of server.py ({found['pid']})"
    ]  # fmt: skip
    assert {leak["secret"] for leak in found["leaks"]} == {"the key"}
    assert SECRET not in json.dumps({name: found[name] for name in ("rows", "leaks", "secrets", "writable", "shared")})


def test_what_everybody_may_write_is_named_where_everybody_gets_there(found: dict):
    reachable = all(parent.stat().st_mode & 0o001 for parent in Path(found["folder"]).parents)
    assert found["writable"] == ([f"{found['folder']}/everybodys"] if reachable else [])


def test_a_folder_without_a_run_is_told(tmp_path: Path):
    asked = subprocess.run([sys.executable, "-m", "tools.audit", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    told = f"audit: {tmp_path} has no .slime-owner: no run works there; give the launcher's BASE_DIR or process id\n"
    assert (asked.returncode, asked.stderr) == (2, told)


def test_a_secret_to_look_for_that_is_not_set_is_told_by_its_name(tmp_path: Path):
    command = [sys.executable, "-m", "tools.audit", str(tmp_path), "--passed", "NOBODYS_KEY"]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert asked.returncode == 2 and "--passed NOBODYS_KEY: no such variable here; set it to" in asked.stderr


@pytest.mark.parametrize("title", ["ray::TrainActor", "ray::TrainActor.train", "ray::TrainActor.train (of a group)"])
def test_an_actor_has_one_name_whatever_it_does(title: str):
    """Ray's title of an actor has the method behind it while one runs."""
    actor = subprocess.Popen(["bash", "-c", f"exec -a '{title}' cat"], stdin=subprocess.PIPE)
    try:
        while not (named := Path(f"/proc/{actor.pid}/cmdline").read_text()).startswith("ray"):
            time.sleep(0.01)
        assert named == f"{title}\0" and sockets.who(actor.pid) == "ray::TrainActor"
    finally:
        actor.communicate()
