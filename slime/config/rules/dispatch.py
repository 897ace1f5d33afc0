"""DeepEP: which ranks it serves, and whether its low-latency buffers hold what an engine sends at once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from slime.config.engine_sizes import EngineSizes
from slime.config.rules.engines import engines_of

if TYPE_CHECKING:
    from slime.config.rules.book import Values

MAX_RANKS = 160
"""DeepEP's dispatch configurations exist up to this many expert-parallel ranks."""
VARIABLE = "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"
DEFAULT_TOKENS = 128
"""Where the variable is not set (SGLang 0.5.12 to 0.5.23)."""
MOST_TOKENS = 1024
"""SGLang asserts it: DeepEP's low-latency kernels use 1024 as a mark of their own."""
GRAPH_BATCH = 8
"""Largest captured decode batch where cuda_graph_max_bs does not say, as the recipe's flags have it."""
CHUNK = 8192
"""chunked_prefill_size of SGLang on an 80 GB GPU where nothing is said."""
MODES = ("auto", "normal", "low_latency")


def uses_deepep(engine: EngineSizes) -> bool:
    return engine.text("moe_a2a_backend") == "deepep"


def low_latency(engine: EngineSizes) -> bool:
    """Does the engine make the low-latency buffers?"""
    return uses_deepep(engine) and (engine.text("deepep_mode") or "auto") != "normal"


def dispatch_tokens(env: dict | None) -> int | None:
    """Tokens of one rank that the low-latency buffers hold; None where the job's environment is not known or wrong."""
    if env is None:
        return None
    text = env.get(VARIABLE, str(DEFAULT_TOKENS))
    return int(text) if text.isdecimal() else None


def deepep(v: Values) -> None:
    for engine in engines_of(v):
        if uses_deepep(engine):
            _ranks(v, engine)
            _tokens(v, engine)
            continue
        v.require(
            engine.text("deepep_mode") is None,
            f"{engine.where}: deepep_mode {engine.text('deepep_mode')} without DeepEP; pass --sglang-moe-a2a-backend deepep",
        )


def variable(v: Values) -> None:
    """The variable itself, where some engine reads it."""
    if v.env is None or VARIABLE not in v.env or not any(low_latency(engine) for engine in engines_of(v)):
        return
    text = v.env[VARIABLE]
    v.require(
        text.isdecimal() and 1 <= int(text) <= MOST_TOKENS,
        f"{VARIABLE} is {text!r}; SGLang takes whole numbers from 1 to {MOST_TOKENS}: set it to what a decode step sends",
    )


def _ranks(v: Values, engine: EngineSizes) -> None:
    v.require(
        engine.ep <= MAX_RANKS,
        f"{engine.where}: DeepEP has no dispatch configuration for EP {engine.ep} (at most {MAX_RANKS} ranks); "
        "lower num_gpus_per_engine and ep_size: several engines instead of one large one",
        holds=f"{engine.where}: EP {engine.ep} is within DeepEP's {MAX_RANKS} ranks",
    )
    v.require(
        engine.ep > 1 or engine.tp == 1,
        f"{engine.where}: DeepEP with ep_size 1 has nobody to dispatch to; pass --sglang-ep-size {engine.tp}",
    )
    mode = engine.text("deepep_mode") or "auto"
    v.require(
        mode in MODES, f"{engine.where}: deepep_mode is one of {', '.join(sorted(MODES))}, got {mode!r}; write one of them"
    )
    v.require(
        mode != "normal" or engine.role != "decode" or engine.on("disable_cuda_graph"),
        f"{engine.where}: deepep_mode normal cannot be captured in CUDA graphs, which decode needs; use low_latency (or auto)",
    )


def _tokens(v: Values, engine: EngineSizes) -> None:
    mode = engine.text("deepep_mode") or "auto"
    if mode == "normal":
        return
    sent: list[tuple[int, str]] = []
    if engine.role != "prefill":
        sent += _decoded(engine)
    if mode == "low_latency" and engine.role != "decode":
        chunk = engine.whole("chunked_prefill_size") or CHUNK
        if chunk > 0:
            sent.append((chunk // engine.dp, f"chunks of {chunk:,} tokens over {engine.dp} ranks = {chunk // engine.dp:,}"))
        else:
            sent.append((MOST_TOKENS + 1, "chunked_prefill_size -1 sends whole prompts"))
    if not sent:
        return
    need, why = max(sent)
    limit = dispatch_tokens(v.env)
    if limit is None:
        v.undecided(
            f"{engine.where}: {VARIABLE} must be at least {need}, and the job's environment is not known here "
            "(SGLang's default: "
            f"{DEFAULT_TOKENS})",
            why,
            f"set {VARIABLE}={round_up(need)} in the launcher's environment",
            decides=need > DEFAULT_TOKENS,
        )
        return
    if "chunk" in why:
        fix = "use deepep_mode auto, which takes the normal dispatch for prompts"
    else:
        fix = ", or ".join(_ways_out(engine, need, limit))
    v.require(
        limit >= need,
        f"{engine.where}: {VARIABLE} is {limit}, below the largest {'chunk' if 'chunk' in why else 'decode batch'} of a rank "
        f"({why}), which DeepEP's buffer could not take; {fix}",
        holds=f"{engine.where}: {VARIABLE} {limit} covers the largest decode batch",
        values=why,
    )


def _ways_out(engine: EngineSizes, need: int, limit: int) -> Iterator[str]:
    """Each of them alone makes the buffers hold a decode step."""
    if need <= MOST_TOKENS:
        yield f"set {VARIABLE}={round_up(need)}"
    smaller = min(limit, MOST_TOKENS) // _draft_tokens(engine)
    if smaller:
        listed = " (without cuda_graph_bs)" if engine.text("cuda_graph_bs") else ""
        yield f"lower cuda_graph_max_bs to {smaller}{listed} and max_running_requests to {smaller * engine.dp}"
    elif need > MOST_TOKENS:
        yield f"draft at most {limit - 1} tokens"


def _draft_tokens(engine: EngineSizes) -> int:
    return (engine.whole("speculative_num_draft_tokens") or 1) if engine.text("speculative_algorithm") else 1


def _decoded(engine: EngineSizes) -> list[tuple[int, str]]:
    """Tokens that one rank sends in a decode step: of the largest captured graph, and of all requests that may run."""
    drafts = _draft_tokens(engine)
    listed = [int(size) for size in re.findall(r"\d+", engine.text("cuda_graph_bs") or "")]
    batch = max(listed, default=engine.whole("cuda_graph_max_bs") or GRAPH_BATCH)
    found = [(batch * drafts, f"cuda_graph_max_bs {batch} x draft tokens {drafts} = {batch * drafts}")]
    if running := engine.whole("max_running_requests"):
        own = -(-running // engine.dp)
        found.append(
            (own * drafts, f"max_running_requests {running} over {engine.dp} ranks x draft tokens {drafts} = {own * drafts}")
        )
    return found


def round_up(need: int) -> int:
    """To a power of two."""
    return 1 << max(0, (need - 1).bit_length())


def buffer_bytes(*, tokens: int, hidden: int, experts: int) -> int:
    """DeepEP's low-latency buffers of one rank: twice what is sent and what is received, by its get_low_latency_rdma_size_hint.

    A dispatched token has 16 bytes and the larger of bf16 values and FP8 values with one float32 scale per 128; a combined one
    is bf16. Marks of the experts (4 bytes each, twice) round up to 128 bytes.
    """
    dispatched = 16 + max(2 * hidden, hidden + hidden // 128 * 4)
    combined = 2 * hidden
    send = max(tokens * dispatched, experts * tokens * combined)
    receive = experts * tokens * max(dispatched, combined)
    total = 2 * (send + receive + 4 * experts)
    return (total + 127) // 128 * 128
