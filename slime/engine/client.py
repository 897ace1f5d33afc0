"""Talking to one engine: generation, pauses, weight updates, memory. Each call has a time-out and says what the server said."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import threading
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from functools import lru_cache
from typing import Any, TypeVar

import httpx

from slime.compat.sglang.answers import ENCLOSED, LABEL
from slime.engine.payload import LOAD_FORMAT
from slime.types.weight_bucket import TensorMeta

T = TypeVar("T")

GENERATE_SECONDS = 14400.0
CONTROL_SECONDS = 120.0
UPDATE_SECONDS = 1800.0
# What an engine can give back on its own (SGLang's names).
MEMORY_TAGS = ("weights", "kv_cache", "cuda_graph")
INCOMPLETE = "incomplete:"
"""prefix of the version that an engine reports between its first bucket and the end of the update"""

RETURN_KEPT_WORDS = "return_top_p_token_ids"
"""Of a request's custom_params: the words that top-p and top-k left are to be told."""
_UNKNOWN_TO_ROUTERS = ("return_routed_experts", "return_indexer_topk", "routed_experts_start_len", "return_sampling_mask")


class EngineError(RuntimeError):
    """An engine refused a call or did not answer; the message holds the address, the status and the server's text."""

    def __init__(self, message: str, status: int | None = None, retry_after: float | None = None):
        """retry_after: seconds after which the server wants to be asked again, where it says so."""
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


class EngineGone(EngineError):
    """Nobody is at the address, or the connection broke."""


def text_of(response: httpx.Response) -> str:
    """The server's explanation, without its JSON packing."""
    try:
        body = response.json()
    except ValueError:
        return response.text.strip()[:2000]
    for _ in range(2):
        if isinstance(body, dict):
            body = next((body[key] for key in ("error", "message", "detail") if body.get(key)), body)
    return str(body)[:2000]


def _retry_after(response: httpx.Response) -> float | None:
    """The header's seconds; a date is not read, since clocks of nodes differ."""
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else None


class HttpClient:
    """One address and the run's token ("" sends none); no proxy from the environment: engines are on the cluster's own network.

    Connections belong to an event loop, so each loop that uses the client gets its own pool. `close` closes this loop's.
    """

    def __init__(self, url: str, token: str, *, connections: int = 1024):
        self.url, self._token = url.rstrip("/"), token
        self._limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._pools: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = weakref.WeakKeyDictionary()

    def _client(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        if loop not in self._pools:
            headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
            told = {"headers": headers, "limits": self._limits, "trust_env": False}
            # Where nothing is encrypted, the certificates would be read for nothing: 15 ms a client, in every weight sync.
            self._pools[loop] = httpx.AsyncClient(base_url=self.url, verify=self.url.startswith("https:"), **told)
        return self._pools[loop]

    async def close(self) -> None:
        pool = self._pools.pop(asyncio.get_running_loop(), None)
        if pool is not None:
            await pool.aclose()

    async def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout: float,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """The answer if its status is 2xx. Raises EngineError with the server's text, or with the transport's error."""
        limit = httpx.Timeout(timeout, connect=min(timeout, 10.0), pool=timeout)
        try:
            response = await self._client().request(method, path, json=body, headers=headers, timeout=limit)
        except httpx.TimeoutException as error:
            raise EngineError(f"{method} {self.url}{path}: no answer within {timeout:.0f} s ({type(error).__name__})") from None
        except httpx.TransportError as error:
            raise EngineGone(
                f"{method} {self.url}{path}: {type(error).__name__} {error}; the server is gone or not reachable"
            ) from None
        if not response.is_success:
            hint = "; the token is not this run's" if response.status_code == 401 else ""
            raise EngineError(
                f"{method} {self.url}{path} answered {response.status_code}: {text_of(response)}{hint}",
                response.status_code,
                _retry_after(response),
            )
        return response


class EngineClient(HttpClient):
    """The control and generation calls of one engine. `sync(client.method(...))` runs one from plain code."""

    _version: str | None = None

    async def health(self, *, timeout: float = 10.0) -> None:
        """Raises EngineError unless the engine generates a token (or is busy doing so)."""
        await self.call("GET", "/health_generate", timeout=timeout)

    async def server_info(self) -> dict[str, Any]:
        return (await self.call("GET", "/server_info", timeout=CONTROL_SECONDS)).json()

    async def sglang_version(self) -> str:
        if self._version is None:
            self._version = str((await self.server_info())["version"])
        return self._version

    async def generate(self, payload: Mapping[str, Any], *, timeout: float = GENERATE_SECONDS) -> dict[str, Any]:
        return (await self.call("POST", "/generate", payload, timeout=timeout)).json()

    # ---- pauses ----

    async def pause_generation(self, mode: str = "retract") -> None:
        """retract: running requests give up their cache and wait. in_place: they keep it. abort: they end."""
        await self.call("POST", "/pause_generation", {"mode": mode}, timeout=CONTROL_SECONDS)

    async def continue_generation(self) -> None:
        await self.call("POST", "/continue_generation", {}, timeout=CONTROL_SECONDS)

    async def abort_all(self) -> None:
        await self.call("POST", "/abort_request", {"abort_all": True}, timeout=CONTROL_SECONDS)

    async def flush_cache(self, *, patience: float = 60.0) -> None:
        """Forget cached prefixes, which belong to the old weights. Retried while requests are still leaving the engine."""
        deadline = asyncio.get_running_loop().time() + patience
        while True:
            try:
                await self.call("POST", "/flush_cache", timeout=CONTROL_SECONDS)
                return
            except EngineError as error:
                if error.status != 400:
                    raise
                if asyncio.get_running_loop().time() > deadline:
                    raise EngineError(f"{error} (asked again for {patience:.0f} s)", error.status) from None
            await asyncio.sleep(0.5)

    # ---- weights ----

    async def weight_version(self) -> str:
        """What the engine's weights are: the version of the last complete update, or `incomplete:<version>` during one.

        An engine that never got an update reports what it was started with ("default").
        """
        return str((await self.call("GET", "/model_info", timeout=CONTROL_SECONDS)).json()["weight_version"])

    async def begin_weight_update(self, version: str | int) -> None:
        """Open an update; the engine reports `incomplete:<version>` from here on. Pause it before, or it serves a mixture.

        One that was broken off is closed first.
        """
        try:
            await self._session("begin")
        except EngineError as error:
            if error.status != 400:
                raise
            await self._session("end")
            await self._session("begin")
        await self._stamp(f"{INCOMPLETE}{version}")

    async def update_weights_from_tensor(
        self, payloads: Sequence[bytes], *, load_format: str | None = LOAD_FORMAT, timeout: float = UPDATE_SECONDS
    ) -> None:
        """One bucket: one payload per tensor-parallel rank. Raises EngineError unless all of it was loaded."""
        body = {
            "serialized_named_tensors": [base64.b64encode(payload).decode() for payload in payloads],
            "load_format": load_format,
            "flush_cache": False,
        }
        await self._successful("/update_weights_from_tensor", body, timeout)

    async def update_weights_from_disk(self, folder: str, *, timeout: float = UPDATE_SECONDS) -> None:
        """All weights of a checkpoint in the serving format, target and draft; every rank reads it."""
        await self._successful("/update_weights_from_disk", {"model_path": folder, "flush_cache": False}, timeout)

    async def init_weights_group(
        self, *, address: str, port: int, first_rank: int, world_size: int, group: str, backend: str, timeout: float
    ) -> None:
        """The engine's ranks join a group for weights, from `first_rank` on; rank 0 is a trainer's. Returns when all have."""
        body = {
            "master_address": address,
            "master_port": port,
            "rank_offset": first_rank,
            "world_size": world_size,
            "group_name": group,
            "backend": backend,
        }
        await self._successful("/init_weights_update_group", body, timeout)

    async def update_weights_from_group(self, group: str, metas: Sequence[TensorMeta], *, timeout: float) -> None:
        """One bucket that rank 0 of the group broadcasts, tensors without a gap between them. Raises EngineError unless every
        rank loaded all of it."""
        body = {
            "names": [meta.name for meta in metas],
            "dtypes": [meta.dtype for meta in metas],
            "shapes": [list(meta.shape) for meta in metas],
            "group_name": group,
            "load_format": LOAD_FORMAT,
            "flush_cache": False,
        }
        await self._successful("/update_weights_from_distributed", body, timeout)

    async def _successful(self, path: str, body: Mapping[str, Any], timeout: float) -> None:
        answer = (await self.call("POST", path, body, timeout=timeout)).json()
        if not answer.get("success", False):
            raise EngineError(f"{self.url}{path}: {answer.get('message')}")

    async def end_weight_update(self, version: str | int) -> None:
        """Close the update and stamp its version. Raises EngineError if the engine was not updating to this version."""
        found = await self.weight_version()
        if found != f"{INCOMPLETE}{version}":
            raise EngineError(
                f"{self.url} is at weights {found!r}, not in the middle of an update to {version!r}; "
                "call begin_weight_update first"
            )
        await self._session("end")
        await self._stamp(str(version))

    async def _session(self, step: str) -> None:
        """`begin` or `end` of an update, where the engine's version has such sessions; older ones do not know the address."""
        try:
            await self.call("POST", f"/{step}_weight_update", {}, timeout=CONTROL_SECONDS)
        except EngineError as error:
            if error.status != 404:
                raise

    async def _stamp(self, version: str) -> None:
        """Set the version without touching requests: paused ones continue after the update, each token with its version."""
        body = {"new_version": version, "abort_all_requests": False}
        await self.call("POST", "/update_weight_version", body, timeout=CONTROL_SECONDS)

    async def weights_checksums(self) -> list[dict[str, str]]:
        """Per rank: the engine's own name of each parameter -> a checksum of what it holds (SGLang's /weights_checker).

        A draft model's names begin with `draft.`; block FP8 is hashed as the numbers that it stands for. Where attention is
        data-parallel every rank tells of all, so each is there several times.
        """
        answer = (await self.call("POST", "/weights_checker", {"action": "checksum"}, timeout=UPDATE_SECONDS)).json()
        if not answer.get("ranks"):
            raise EngineError(f"{self.url} gave no checksums of its weights: {answer.get('message')}")
        return [rank["checksums"] for rank in answer["ranks"]]

    async def weights_by_name(self, name: str, *, rows: int = 100) -> Any:
        body = {"name": name, "truncate_size": rows}
        return (await self.call("POST", "/get_weights_by_name", body, timeout=CONTROL_SECONDS)).json()

    # ---- memory ----

    async def release_memory(self, tags: Sequence[str] | None = None) -> None:
        """Give device memory back; the engine must be idle. Released weights are gone: send them again after resuming."""
        await self.call("POST", "/release_memory_occupation", {"tags": list(tags)} if tags else {}, timeout=CONTROL_SECONDS)

    async def resume_memory(self, tags: Sequence[str] | None = None) -> None:
        await self.call("POST", "/resume_memory_occupation", {"tags": list(tags)} if tags else {}, timeout=CONTROL_SECONDS)


def labelled(payload: Mapping[str, Any]) -> Mapping[str, Any]:
    """A request as the router hands it on whole: what it does not know of becomes a label, which our engines read."""
    unknown = {name: value for name, value in payload.items() if name in _UNKNOWN_TO_ROUTERS}
    params = payload.get("sampling_params") or {}
    custom = params.get("custom_params") if isinstance(params, Mapping) else None
    if custom and custom.get(RETURN_KEPT_WORDS):
        unknown["return_sampling_mask"] = True
    if not any(unknown.values()):
        return payload
    known = {name: value for name, value in payload.items() if name not in unknown}
    return known | {"custom_labels": {**(payload.get("custom_labels") or {}), LABEL: json.dumps(unknown)}}


def opened(answer: Any) -> Any:
    """An answer through the router, with what a prefill engine has enclosed in its log-probs as `prompt_...` of meta_info."""
    meta_info = answer.get("meta_info") if isinstance(answer, dict) else None
    entries = (meta_info or {}).get("input_token_logprobs") or []
    enclosed = [entry for entry in entries if isinstance(entry, dict) and ENCLOSED in entry]
    if enclosed:
        meta_info["input_token_logprobs"] = [entry for entry in entries if entry not in enclosed]
        meta_info.update({f"prompt_{name}": value for name, value in enclosed[0][ENCLOSED].items()})
    return answer


class RouterClient(HttpClient):
    """Generation through a router, which picks the engine (a prefill and a decode engine in PD mode)."""

    async def generate(
        self, payload: Mapping[str, Any], *, routing_key: str | None = None, timeout: float = GENERATE_SECONDS
    ) -> dict[str, Any]:
        """routing_key: requests with the same key go to the same engine under a hashing policy."""
        headers = {"X-SMG-Routing-Key": routing_key} if routing_key is not None else None
        response = await self.call("POST", "/generate", labelled(payload), timeout=timeout, headers=headers)
        return opened(response.json())

    async def workers(self) -> list[dict[str, Any]]:
        return (await self.call("GET", "/workers", timeout=CONTROL_SECONDS)).json()["workers"]


@lru_cache(maxsize=1)
def _loop_of(process: int) -> asyncio.AbstractEventLoop:
    """process: a forked child has the parent's loop without the thread that runs it."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="engine-client", daemon=True).start()
    return loop


def sync_later(call: Coroutine[Any, Any, T]) -> Future[T]:
    """Begin one client call from plain code, on a loop in a thread of its own (connections live on between calls)."""
    return asyncio.run_coroutine_threadsafe(call, _loop_of(os.getpid()))


def sync(call: Coroutine[Any, Any, T]) -> T:
    """Run one client call from plain code."""
    return sync_later(call).result()
