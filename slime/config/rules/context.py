"""The context of the engines, which holds a prompt and its response, and what is asked of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from slime.config.engine_groups import EngineGroup, SglangModel
from slime.config.hf_config import HfConfig

if TYPE_CHECKING:
    from slime.config.rules.book import Values


def engine_context(v: Values) -> None:
    """What is asked of an engine fits its context, which holds prompt and response."""
    known = [found for model in v["groups"] if model.update_weights for found in _contexts(v, model)]
    if not known:
        return
    context, source = min(known)
    fact = f"the engines' context is {context} ({source})"
    for flag, length in _context_limits(v):
        v.require(length <= context, f"{flag} {length} is more than an engine can hold: {fact}; pass at most {context}")
    for flag, length, limit in _response_limits(v):
        capped = limit is not None and limit <= context
        # One sentence where a data set has the rollout's length.
        told = length == v["rollout_max_response_len"] and flag != "--rollout-max-response-len"
        v.require(
            told or length is None or capped or length < context,
            f"{flag} {length} leaves no room for a prompt: {fact}; pass less, or --rollout-max-context-len {context}, "
            "which shortens the response of a long prompt",
        )
    for (prompt_flag, prompt), (flag, response, limit) in zip(_prompt_limits(v), _response_limits(v), strict=True):
        if limit is not None or prompt is None or response is None or response >= context:
            continue
        v.require(
            prompt + response <= context,
            f"{prompt_flag} {prompt} and {flag} {response} are {prompt + response} "
            f"tokens together: {fact}; lower one, or pass --rollout-max-context-len {context}, which shortens the response of "
            "a long prompt",
        )


def _contexts(v: Values, model: SglangModel) -> Iterator[tuple[int, str]]:
    """(tokens, where that is said) per group of the model; nothing where only SGLang can tell."""
    for group in model.server_groups:
        if group.num_engines == 0:
            continue
        said = group.overrides.get("context_length", v["sglang"].get("context_length"))
        tokens = _whole_number(said) if said is not None else _context_of_config(v, model, group)
        if tokens is not None:
            yield tokens, "--sglang-context-length" if said is not None else "config.json of the served model"


_SUFFIXES = {"k": 10**3, "M": 10**6, "Ki": 2**10, "Mi": 2**20}


def _whole_number(text: object) -> int | None:
    """SGLang takes `32k` and `32Ki` too; what it would refuse is left to it."""
    digits = str(text).rstrip("kKMi")
    factor = _SUFFIXES.get(str(text)[len(digits) :], 1)
    return int(digits) * factor if digits.isdecimal() else None


def _context_of_config(v: Values, model: SglangModel, group: EngineGroup) -> int | None:
    """As SGLang derives it: the trained positions, stretched by a rope scaling that does not name them itself."""
    return context_of_config(v) if group.overrides.get("model_path", model.model_path) == v["hf_checkpoint"] else None


def context_of_config(v: Values) -> int | None:
    """Positions of the trained model; None where nobody says."""
    raw = v.facts.hf_config
    if raw is None:
        return None
    hf = HfConfig(raw)
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    plain = "original_max_position_embeddings" in scaling or scaling.get("rope_type") == "llama3"
    positions = hf.get("max_position_embeddings")
    return None if positions is None else int(positions * (1 if plain else scaling.get("factor") or 1))


def _context_limits(v: Values) -> Iterator[tuple[str, int]]:
    if v["rollout_max_context_len"] is not None:
        yield "--rollout-max-context-len", v["rollout_max_context_len"]
    for one in v["datasets"]:
        if one.max_context_len not in (None, v["rollout_max_context_len"]):
            yield f"evaluation {one.name}: max_context_len", one.max_context_len


def _prompt_limits(v: Values) -> Iterator[tuple[str, int | None]]:
    """(what it is called, tokens of a prompt), as many as _response_limits has."""
    yield "--rollout-max-prompt-len", v["rollout_max_prompt_len"]
    for one in v["datasets"]:
        yield f"evaluation {one.name}: max_prompt_len", one.max_prompt_len


def _response_limits(v: Values) -> Iterator[tuple[str, int | None, int | None]]:
    """(what it is called, tokens of a response, tokens of prompt and response together)."""
    yield "--rollout-max-response-len", v["rollout_max_response_len"], v["rollout_max_context_len"]
    for one in v["datasets"]:
        yield f"evaluation {one.name}: max_response_len", one.max_response_len, one.max_context_len
