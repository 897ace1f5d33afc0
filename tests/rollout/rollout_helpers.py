"""Configs made of named values, and a router of twenty lines that speaks /generate over real HTTP."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from slime.config import Config
from slime.config.config import section_of


def make_config(**values) -> Config:
    """A Config whose named fields have these values, whatever section they are in."""
    config = Config()
    for name, value in values.items():
        section = section_of()[name]
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


@dataclass
class FakeRouter:
    """Answers /generate with what `answer(text, payload)` says: (response text, finish type[, more of meta_info]), or an int
    for an HTTP error.

    A POST without input_ids gets `answer(path, payload)` as it is.
    """

    tokenizer: object
    answer: Callable = None
    requests: list = field(default_factory=list)
    workers: list = field(default_factory=list)
    """Addresses that it lists beside its own."""
    aborted: threading.Event = field(default_factory=threading.Event)
    server: ThreadingHTTPServer = None

    def start(self) -> FakeRouter:
        router = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args) -> None:
                pass

            def reply(self, value: object, status: int = 200) -> None:
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                try:
                    self.wfile.write(body)
                except BrokenPipeError:  # the rollout gave up waiting, as it does when it fails
                    pass

            def do_GET(self) -> None:
                self.reply({"workers": [{"url": url} for url in (router.url, *router.workers)]})

            def do_POST(self) -> None:
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
                if self.path == "/abort_request":
                    router.aborted.set()
                    return self.reply({})
                router.requests.append((payload, dict(self.headers)))
                if "input_ids" not in payload:
                    outcome = router.answer(self.path, payload)
                    return self.reply({"error": "made to fail"}, outcome) if isinstance(outcome, int) else self.reply(outcome)
                outcome = router.answer(router.tokenizer.decode(payload["input_ids"]), payload)
                if isinstance(outcome, int):
                    return self.reply({"error": "made to fail"}, outcome)
                self.reply(router.generated(*outcome))

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def generated(self, text: str, finish: str, meta: dict | None = None) -> dict:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        by_token = finish == "stop" and ids and ids[-1] in self.tokenizer.all_special_ids
        return {
            "text": text,
            "meta_info": {
                "output_token_logprobs": [[-0.5 - i / 8, token, None] for i, token in enumerate(ids)],
                "finish_reason": {"type": finish} | ({"matched": ids[-1]} if by_token else {}),
                "weight_version": "3",
                "prompt_tokens": 10,
                "cached_tokens": 4,
                **(meta or {}),
            },
        }


def sum_in(text: str) -> int:
    a, b = re.search(r"(\d+) plus (\d+)", text).groups()
    return int(a) + int(b)
