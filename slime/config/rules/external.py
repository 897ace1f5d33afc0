"""Engines that somebody else runs (--rollout-external-engine-addrs)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slime.config.errors import ConfigError
from slime.config.external import engine_url

if TYPE_CHECKING:
    from slime.config.rules.book import Values

OTHERS = ("sglang_config", "prefill_num_servers", "colocate", "offload", "offload_rollout", "debug_train_only")
"""Flags about engines that the run starts."""


def external(v: Values) -> None:
    """They have GPUs of their own, and the sizes and roles with which they were started."""
    addresses = v["rollout_external_engine_addrs"]
    if addresses is None:
        return
    flag = "--rollout-external-engine-addrs"
    urls = []
    for address in addresses:
        try:
            urls.append(engine_url(address))
        except ConfigError as error:
            v.mistakes.append(str(error))
    twice = sorted({url for url in urls if urls.count(url) > 1})
    v.require(not twice, f"{flag} names {', '.join(twice)} twice; name each engine once")
    for name in OTHERS:
        v.require(
            not v[name],
            f"--{name.replace('_', '-')} is about engines that the run starts, and {flag} names some that already run; "
            "leave one out",
        )
    if "update_weight_local_checkpoint_dir" in v.given:
        v.notes.append(
            "--update-weight-local-checkpoint-dir changes nothing for external engines: `python3 -m "
            "slime.weights.follow` beside "
            "each of them is told its folder"
        )
    v.derive("rollout_num_gpus", 0, f"{flag}: those engines have GPUs of their own")
    v.undecided(
        "sizes, roles and memory of the external engines: each is asked when the run starts",
        ", ".join(addresses),
        decides=False,
    )
