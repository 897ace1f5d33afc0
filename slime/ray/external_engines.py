"""Engines that somebody else runs: what each says of itself, and whether it is still there. Never started, never stopped."""

from __future__ import annotations

import json
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

from slime.config.external import engine_url
from slime.engine.client import EngineClient, EngineError, sync
from slime.engine.spec import EngineSpec
from slime.engine.versions import OLDEST, capabilities, release_key, translate

T = TypeVar("T")

_LOOK_SECONDS = 10.0
SETTINGS = ("speculative_algorithm", "enable_eplb", "ep_num_redundant_experts", "enable_return_routed_experts")
"""What of an engine's options decides which weights it takes and what it answers."""
THEIRS = ("enable_metrics", "mem_fraction_static", "pp_size", "dp_size", "ep_size", "tp_size", "trust_remote_code")
"""Options that may differ: how an engine is cut, and how much memory it takes, is its own affair."""
PRECISIONS = ("auto", "bfloat16", "float32")


@dataclass(frozen=True)
class External:
    spec: EngineSpec
    url: str
    bootstrap_port: int | None
    version: str


def ask_all(
    addresses: Sequence[str], token: str, *, model: str, model_path: str, asked: Mapping[str, object], broadcasts: bool
) -> list[External]:
    """In the order of the flag. model: the name that they go by. asked: --sglang-* options, which each has to have been started
    with. broadcasts: they are to join a group for weights. Raises ValueError for one that does not answer, or that cannot
    serve a model in training."""
    found: list[External] = []
    offset = 0
    for number, address in enumerate(addresses):
        url = engine_url(address)
        info = _info(url, token)
        found.append(_external(number, url, info, offset=offset, model=model, model_path=model_path))
        _compare(url, found[-1].version, info, asked)
        if broadcasts:
            _joins(url, found[-1].spec.pp_size)
        offset += found[-1].spec.num_gpus
    roles = {one.spec.role for one in found}
    if roles & {"prefill", "decode"} and roles != {"prefill", "decode"}:
        told = ", ".join(f"{one.url} {one.spec.role}" for one in found)
        raise ValueError(
            f"--rollout-external-engine-addrs: {told}; one router takes regular engines, or prefill and decode engines: "
            "name one kind"
        )
    return found


def _ask(url: str, token: str, call: Callable[[EngineClient], Awaitable[T]]) -> T:
    async def once() -> T:
        client = EngineClient(url, token)
        try:
            return await call(client)
        finally:
            await client.close()

    return sync(once())


def _info(url: str, token: str) -> Mapping[str, object]:
    try:
        return _ask(url, token, EngineClient.server_info)
    except EngineError as error:
        hint = "give the run its key in SLIME_ENGINE_TOKEN" if error.status == 401 else "start it first, or correct the address"
        raise ValueError(f"external engine {url} cannot be asked what it is ({error}); {hint}") from None
    except ValueError as error:  # no JSON
        raise ValueError(
            f"external engine {url} cannot be asked what it is (/server_info: {error}); start it first, or correct the address"
        ) from None


def _external(number: int, url: str, info: Mapping[str, object], *, offset: int, model: str, model_path: str) -> External:
    if silent := [name for name in ("version", "tp_size") if not info.get(name)]:
        raise ValueError(
            f"external engine {url} tells no {' and no '.join(silent)} in /server_info; name one that SGLang serves"
        )
    version = str(info["version"])
    if release_key(version) < release_key(OLDEST):
        raise ValueError(
            f"external engine {url} is sglang {version}; the oldest that takes weights here is {OLDEST}; start it with "
            "that or a newer one"
        )
    mode = str(info.get("disaggregation_mode") or "null")
    role = mode if mode in ("prefill", "decode") else "regular"
    tp, pp = int(info["tp_size"]), int(info.get("pp_size") or 1)  # type: ignore[call-overload]
    dtype = str(info.get("dtype") or "auto")
    if dtype not in PRECISIONS:
        raise ValueError(
            f"external engine {url} serves in {dtype}, and the trainer computes in bf16; start it with --dtype bfloat16"
        )
    spec = EngineSpec(
        model=model,
        role=role,
        engine_id=number,
        gpu_offset=offset,
        num_gpus=tp * pp,
        num_nodes=int(info.get("nnodes") or 1),  # type: ignore[call-overload]
        tp_size=tp,
        pp_size=pp,
        dp_size=int(info.get("attn_dp_size") or info.get("dp_size") or 1),  # type: ignore[call-overload]
        ep_size=int(info.get("ep_size") or 1),  # type: ignore[call-overload]
        model_path=str(info.get("model_path") or model_path),
        update_weights=True,
        needs_offload=False,
        random_seed=int(info.get("random_seed") or 0),  # type: ignore[call-overload]
        settings={name: info[name] for name in SETTINGS if info.get(name)},
    )
    port = info.get("disaggregation_bootstrap_port") if role == "prefill" else None
    return External(spec, url, None if port is None else int(port), version)  # type: ignore[call-overload]


def _joins(url: str, pp_size: int) -> None:
    # SGLang joins as rank_offset + tp_rank in every pipeline stage: two stages would be one rank of the group.
    if pp_size > 1:
        raise ValueError(
            f"external engine {url} has pp_size {pp_size}, and SGLang joins a broadcast of weights by tensor-parallel rank "
            "alone, so its stages would take the same place; add --update-weight-transport disk, or start it with pp_size 1"
        )


def _compare(url: str, version: str, info: Mapping[str, object], asked: Mapping[str, object]) -> None:
    """Options of the run that the engine knows and was started without."""
    wanted = translate(asked, capabilities(version)).settings
    others = [
        f"{name} {info[name]!r}, not {value!r}"
        for name, value in sorted(wanted.items())
        if name in info and name not in THEIRS and not _is_said_by(value, info[name])
    ]
    if others:
        raise ValueError(
            f"external engine {url} was started with {'; '.join(others)}: start it with the run's --sglang-* options, or leave "
            "them out here"
        )


def _is_said_by(text: object, value: object) -> bool:
    """Whether a flag's text (True for one without) means what the engine has."""
    words = str(text).lower()
    if isinstance(value, bool):
        return words in (("true", "1", "") if value else ("false", "0"))
    try:
        if isinstance(value, int | float):
            return float(words) == value
        if isinstance(value, list | dict):
            return words.split() == [str(one).lower() for one in value] or json.loads(str(text)) == value
    except ValueError:
        return False
    return words == str(value).lower()


def absent(url: str, token: str) -> str | None:
    """Why an engine does not answer; None where it does, or is only busy."""
    try:
        _ask(url, token, lambda client: client.call("GET", "/health", timeout=_LOOK_SECONDS))
    except EngineError as error:
        return None if error.status in (503, 429) else str(error)
    return None


def node_of(url: str, own: str) -> str:
    """Address of an engine's machine; `own` where it is this one."""
    host = str(urlsplit(url).hostname)
    address = socket.gethostbyname(host) if ":" not in host else host
    return own if address.startswith("127.") or address == "::1" else address
