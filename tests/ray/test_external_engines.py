"""What engines that already run say of themselves, asked over HTTP, and which of them a run refuses."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from slime.ray.external_engines import External, absent, ask_all

KEY = "key"
INFO = {
    "version": "0.5.23", "tp_size": 4, "pp_size": 1, "ep_size": 2, "dp_size": 1, "nnodes": 1, "dtype": "auto",
    "model_path": "/models/m", "random_seed": 7, "disaggregation_mode": "null", "disaggregation_bootstrap_port": 8998,
    "attention_backend": "fa3", "page_size": 64, "mem_fraction_static": 0.8, "speculative_algorithm": None, "enable_eplb": True,
    "cuda_graph_bs_decode": [1, 2, 4], "json_model_override_args": "{}", "preferred_sampling_params": {"top_k": 2},
    "speculative_accept_threshold_acc": 0.5, "ep_num_redundant_experts": 0,
}  # fmt: skip


class Fake:
    """Answers as an engine that was started with these options; health: the status of /health."""

    def __init__(self, **options: object):
        self.answer = json.dumps(INFO | options).encode()
        self.health = 200
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = {"/server_info": (200, fake.answer), "/health": (fake.health, b"")}
                status, body = known.get(self.path, (404, b"no such page"))
                if self.headers["Authorization"] != f"Bearer {KEY}":
                    status, body = 401, b'{"error": "Unauthorized"}'
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def start() -> Iterator[Callable[..., Fake]]:
    fakes: list[Fake] = []

    def one(**options: object) -> Fake:
        fakes.append(Fake(**options))
        return fakes[-1]

    yield one
    for fake in fakes:
        fake.stop()


def asked(*fakes: Fake, key: str = KEY, broadcasts: bool = True, **options: object) -> list[External]:
    addresses = [fake.address for fake in fakes]
    return ask_all(addresses, key, model="m", model_path="/m", asked=options, broadcasts=broadcasts)


def test_an_engine_is_what_it_says(start) -> None:
    first, second = asked(start(), start(tp_size=2, attn_dp_size=2, speculative_algorithm="EAGLE", pp_size=None))
    assert (first.spec.tp_size, first.spec.ep_size, first.spec.random_seed, first.spec.role) == (4, 2, 7, "regular")
    assert first.spec.model_path == "/models/m" and first.bootstrap_port is None and first.version == "0.5.23"
    assert [(one.spec.engine_id, one.spec.gpu_offset, one.spec.num_gpus) for one in (first, second)] == [(0, 0, 4), (1, 4, 2)]
    assert first.spec.settings == {"enable_eplb": True}, "what decides which weights it takes"
    assert second.spec.settings == {"enable_eplb": True, "speculative_algorithm": "EAGLE"} and second.spec.dp_size == 2
    assert first.spec.update_weights and not first.spec.needs_offload


def test_roles_that_one_router_takes(start) -> None:
    prefill, decode, regular = start(disaggregation_mode="prefill"), start(disaggregation_mode="decode"), start()
    found = asked(decode, prefill)
    assert [(one.spec.role, one.bootstrap_port) for one in found] == [("decode", None), ("prefill", 8998)]
    for mixed in ((prefill,), (decode, regular), (prefill, decode, regular)):
        with pytest.raises(ValueError, match="one router takes regular engines, or prefill and decode engines: name one kind"):
            asked(*mixed)


REFUSED = {
    "float16": ({"dtype": "float16"}, "serves in float16, and the trainer computes in bf16; start it with --dtype bfloat16"),
    "too old": ({"version": "0.5.9"}, "is sglang 0.5.9; the oldest that takes weights here is 0.5.15.post1"),
    "stages in a broadcast": ({"pp_size": 2}, "has pp_size 2, and SGLang joins a broadcast of weights by tensor-parallel rank"),
    "no sizes": ({"tp_size": None}, "tells no tp_size"),
    "no version": ({"version": None}, "tells no version"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_engine_that_cannot_serve_what_is_trained_is_refused_by_its_address(name: str, start) -> None:
    options, message = REFUSED[name]
    fake = start(**options)
    with pytest.raises(ValueError, match=rf"external engine http://{fake.address} .*{message}"):
        asked(start(), fake)


def test_stages_load_from_files(start) -> None:
    (found,) = asked(start(pp_size=2), broadcasts=False)
    assert (found.spec.pp_size, found.spec.num_gpus) == (2, 8)


def test_one_that_is_not_there_or_is_no_engine_or_wants_another_key(start) -> None:
    fake = start()
    with pytest.raises(ValueError, match=rf"{fake.address} cannot be asked .* give the run its key in SLIME_ENGINE_TOKEN"):
        asked(fake, key="other")
    fake.answer = b"<html>welcome</html>"
    with pytest.raises(ValueError, match=rf"{fake.address} cannot be asked .*start it first, or correct the address"):
        asked(fake)
    fake.stop()
    with pytest.raises(ValueError, match=rf"{fake.address} cannot be asked .*start it first, or correct the address"):
        asked(fake)


SAME = {
    "old name of an option": {"cuda_graph_bs": "1 2 4"},
    "a number": {"page_size": "64", "speculative_accept_threshold_acc": "0.50"},
    "on": {"enable_eplb": True},
    "on by a word": {"enable_eplb": "1"},
    "a mapping": {"preferred_sampling_params": '{"top_k":  2}', "json_model_override_args": "{}"},
    "nothing": {"speculative_algorithm": "none"},
    "how it is cut, and its memory": {
        "tp_size": "8",
        "mem_fraction_static": "0.5",
        "enable_dp_attention": True,
        "dp_size": "4",
    },
    "what it does not tell": {"no_such_option": "1"},
}
OTHER = {
    "a word": ({"attention_backend": "triton"}, "attention_backend 'fa3', not 'triton'"),
    "a number": ({"page_size": "1"}, "page_size 64, not '1'"),
    "a list": ({"cuda_graph_bs": "1 2"}, r"cuda_graph_bs_decode \[1, 2, 4\], not '1 2'"),
    "off": ({"enable_eplb": False}, "enable_eplb True, not False"),
    "several": ({"page_size": "1", "enable_eplb": "false"}, "enable_eplb True, not 'false'; page_size 64, not '1'"),
}


@pytest.mark.parametrize("name", SAME)
def test_an_option_of_the_run_that_the_engine_has(name: str, start) -> None:
    assert len(asked(start(), **SAME[name])) == 1


@pytest.mark.parametrize("name", OTHER)
def test_an_option_of_the_run_that_the_engine_was_started_without(name: str, start) -> None:
    options, message = OTHER[name]
    with pytest.raises(ValueError, match=f"was started with {message}: start it with the run's --sglang-"):
        asked(start(), **options)


def test_health_says_why_an_engine_does_not_answer(start) -> None:
    fake = start()
    url = f"http://{fake.address}"
    assert absent(url, KEY) is None and "401" in str(absent(url, "other"))
    fake.health = 503
    assert absent(url, KEY) is None, "busy"
    fake.health = 500
    assert "answered 500" in str(absent(url, KEY))
    fake.stop()
    assert "gone or not reachable" in str(absent(url, KEY))
