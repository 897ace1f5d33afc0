"""Opening and closing an update against servers of both kinds: older SGLang knows no sessions, from 0.5.21 on it insists."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from slime.engine.client import EngineClient, EngineError, sync


class Server:
    """Keeps the version that it is told. sessions: None knows none; else whether one is open."""

    def __init__(self, sessions: bool | None):
        outer = self
        self.open, self.version, self.posts = sessions, "default", []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self._answer(200, {"weight_version": outer.version})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.posts.append(self.path)
                if self.path == "/update_weight_version":
                    outer.version = body["new_version"]
                    return self._answer(200, {})
                if outer.open is None:
                    return self._answer(404, {"detail": "Not Found"})
                begins = self.path == "/begin_weight_update"
                allowed = begins is not outer.open
                outer.open = begins if allowed else outer.open
                self._answer(200 if allowed else 400, {"message": "as told"})

            def _answer(self, status: int, body: dict) -> None:
                answer = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.client = EngineClient(f"http://127.0.0.1:{self.server.server_port}", "token")


@pytest.mark.parametrize("sessions", [None, False, True], ids=["knows none", "none is open", "one was broken off"])
def test_an_update_has_a_session_where_the_version_has_them(sessions):
    server = Server(sessions)
    sync(server.client.begin_weight_update(7))
    assert server.version == "incomplete:7" and server.open in (None, True)
    sync(server.client.end_weight_update(7))
    assert server.version == "7" and not server.open
    begins = server.posts.count("/begin_weight_update")
    assert begins == (2 if sessions else 1), "one that was broken off is closed first"


def test_an_update_that_was_not_begun_is_not_ended():
    server = Server(False)
    with pytest.raises(EngineError, match="is at weights 'default', not in the middle of an update to 7"):
        sync(server.client.end_weight_update(7))
    assert server.posts == []
