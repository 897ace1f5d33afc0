"""Options with which SGLang starts and then does something else than a rollout asks of it, or takes away what it needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from slime.config.engine_sizes import EngineSizes
from slime.config.rules.engines import engines_of

if TYPE_CHECKING:
    from slime.config.rules.book import Values

OTHER_SERVERS = {
    "skip_tokenizer_init": "answers without text, which graders read",
    "is_embedding": "serves embeddings and generates nothing",
    "grpc_mode": "is asked by gRPC, and a rollout asks by HTTP",
    "smg_grpc_mode": "is asked by gRPC, and a rollout asks by HTTP",
    "delete_ckpt_after_loading": "removes the folder that it was started from, which other engines and the trainer read",
}
"""Switches -> what an engine with it does."""
OF_OTHERS = {
    "ssl_keyfile": "answers encrypted requests alone, and a rollout sends plain ones",
    "ssl_certfile": "answers encrypted requests alone, and a rollout sends plain ones",
    "lora_paths": "serves adapters, which are not trained here",
}
JSON_OBJECTS = ("model_loader_extra_config", "default_chat_template_kwargs")
ABOVE_ZERO = ("watchdog_timeout", "soft_watchdog_timeout", "dist_timeout")
"""Seconds."""


def answers(v: Values) -> None:
    for engine in engines_of(v):
        for name, does in OTHER_SERVERS.items():
            v.require(not engine.on(name), f"{engine.where}: an engine with {name} {does}; remove it")
        for name, does in OF_OTHERS.items():
            v.require(not engine.settings.get(name), f"{engine.where}: an engine with {name} {does}; remove it")
        _sampling(v, engine)
        for name in JSON_OBJECTS:
            said = engine.settings.get(name)
            v.require(
                said is None or _is_object(said),
                f'{engine.where}: {name} {said!s:.60} is no JSON object, which SGLang reads it as; write it like {{"a": 1}}',
            )
        for name in ABOVE_ZERO:
            said = engine.number(name)
            v.require(said is None or said > 0, f"{engine.where}: {name} {said} is no time; give seconds above 0")


def _sampling(v: Values, engine: EngineSizes) -> None:
    """Whatever bends the draw (min_p, a repetition penalty, ...) is unknown to the trainer's log-probs."""
    said = engine.text("preferred_sampling_params")
    v.require(
        said is None or said.strip() in ("", "{}"),
        f"{engine.where}: preferred_sampling_params {said!s:.60} changes how tokens are drawn, and the trainer knows nothing "
        "of it; remove it, and use --rollout-temperature, --rollout-top-p and --rollout-top-k",
    )


def _is_object(said: object) -> bool:
    if isinstance(said, Mapping):
        return True
    try:
        return isinstance(json.loads(str(said)), dict)
    except ValueError:
        return False
