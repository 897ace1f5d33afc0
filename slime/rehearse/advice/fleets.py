"""Fleets of engines on so many GPUs, made of the run's own groups: their sizes change, and what a rank is given stays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from slime.config import Config
from slime.config.engine_sizes import SIZE_NAMES, merged
from slime.model.hf_config import HfConfig
from slime.rehearse.advice.variants import Group, groups_of

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
PER_RANK = ("max_running_requests", "chunked_prefill_size")
"""Options that SGLang shares among the attention ranks of an engine."""
ATTENTION_DP = {"enable_dp_attention": True, "enable_dp_lm_head": True, "moe_dense_tp_size": 1}
WITHOUT_DP = {
    "enable_dp_attention": False,
    "enable_dp_lm_head": False,
    "moe_dense_tp_size": None,
    "moe_a2a_backend": None,
    "deepep_mode": None,
}


@dataclass(frozen=True)
class Fleet:
    groups: tuple[Group, ...]

    def said(self) -> str:
        words = []
        for group in self.groups:
            sizes = [f"TP {group.gpus}"]
            sizes += [f"{name.removesuffix('_size').upper()} {value}" for name, value in _shown(group)]
            words.append(f"{group.engines} {group.role} x {group.gpus} GPUs ({', '.join(sizes)})")
        return " + ".join(words)


def _shown(group: Group) -> list[tuple[str, object]]:
    return [(name, group.overrides[name]) for name in ("dp_size", "ep_size") if group.overrides.get(name, 1) != 1]


def fleets(config: Config, hf: HfConfig, gpus: int, *, per_node: int, apart: bool) -> Iterator[Fleet]:
    """apart: prefill and decode have engines of their own, as the run has them; else regular ones."""
    own = groups_of(config)
    by_role = {group.role: group for group in own}
    flags = dict(config.engine.sglang)
    for size in (size for size in SIZES if gpus % size == 0 and (size <= per_node or size % per_node == 0)):
        count = gpus // size
        for attention_dp in _ways(flags, own, hf, size):
            for experts in _expert_ways(hf, size, attention_dp):
                if not apart:
                    base = by_role.get("regular") or by_role.get("decode") or own[0]
                    yield Fleet((_group(base, "regular", count, size, flags, attention_dp, experts),))
                    continue
                for prefill in sorted({1, count // 4, count // 2} - {0, count}):
                    numbers = (("prefill", prefill), ("decode", count - prefill))
                    yield Fleet(
                        tuple(_group(by_role[role], role, n, size, flags, attention_dp, experts) for role, n in numbers)
                    )


def _ways(flags: dict, own: tuple[Group, ...], hf: HfConfig, size: int) -> list[bool]:
    """Attention data parallelism or not: as the run asks; else both where latent attention has one key/value head, which tensor
    parallelism would repeat."""
    if size == 1 or not (hf.is_mla and hf.num_experts):
        return [False]
    asked = any(_on(merged(flags, group.overrides).get("enable_dp_attention")) for group in own)
    return [True] if asked else [False, True]


def _expert_ways(hf: HfConfig, size: int, attention_dp: bool) -> list[bool]:
    if not hf.num_experts or size == 1:
        return [False]
    return [True] if attention_dp else [True, False]


def _on(value: object) -> bool:
    return str(value).lower() in ("true", "1")


def _group(base: Group, role: str, count: int, size: int, flags: dict, attention_dp: bool, experts: bool) -> Group:
    before = merged(flags, base.overrides)
    old_dp = _whole(before, "dp") if _on(before.get("enable_dp_attention")) else 1
    dp, overrides = size if attention_dp else 1, dict(base.overrides)
    if role == "regular" and str(before.get("deepep_mode")) == "low_latency":
        overrides["deepep_mode"] = "auto"  # it also reads prompts, which take the normal dispatch
    if before.get("dp_size") is not None or attention_dp:
        overrides["dp_size"] = dp
    if _whole(before, "ep") > 1 or experts:
        overrides["ep_size"] = size if experts else 1
    if attention_dp:
        overrides |= {name: value for name, value in ATTENTION_DP.items() if str(before.get(name)) != str(value)}
    else:
        overrides |= {name: value for name, value in WITHOUT_DP.items() if name in before}
    if dp != old_dp:
        for name in PER_RANK:
            said = str(before.get(name, ""))
            if said.isdecimal():
                overrides[name] = max(int(said) * dp // old_dp, dp)
    return Group(role, count, size, overrides)


def _whole(settings: dict, size: str) -> int:
    said = next((str(settings[name]) for name in SIZE_NAMES[size] if settings.get(name) is not None), "1")
    return int(said) if said.isdecimal() else 1
