"""What SGLang asserts about its own arguments while an engine starts, as far as the arguments alone decide it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slime.config.engine_sizes import EngineSizes
from slime.config.rules.context import context_of_config
from slime.config.rules.engine_model import served
from slime.config.rules.engines import engines_of

if TYPE_CHECKING:
    from slime.config.rules.book import Values

LONGER = "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"
"""With it SGLang takes a --sglang-context-length beyond the model's positions."""

ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mimo": "MiMoForCausalLM",
    "llama": "LlamaForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
}
"""model_type -> SGLang's class of the model that is trained for it."""


def arguments(v: Values) -> None:
    for engine in served(v):
        _formats(v, engine)
        _architecture(v, engine)
    for engine in engines_of(v):
        _chunks(v, engine)
        _shares(v, engine)
        _context(v, engine)


def _chunks(v: Values, engine: EngineSizes) -> None:
    """Prompts go in chunks of whole pages; attention data parallelism shares a chunk among its ranks."""
    chunk, page = engine.whole("chunked_prefill_size"), engine.whole("page_size")
    v.require(
        page is None or page >= 1, f"{engine.where}: page_size {page}; a page holds one token at least, so give 1 or more"
    )
    page = max(page or 1, 1)
    if engine.role == "decode" or chunk is None or chunk <= 0:
        return
    own = chunk // engine.dp
    v.require(
        own > 0 and own % page == 0,
        f"{engine.where}: chunked_prefill_size {chunk} over {engine.dp} attention ranks is {own} tokens, no multiple "
        "of page_size "
        f"{page}; give a multiple of {page * engine.dp}",
    )


def _shares(v: Values, engine: EngineSizes) -> None:
    running = engine.whole("max_running_requests")
    v.require(
        running is None or running >= engine.dp,
        f"{engine.where}: max_running_requests {running} over {engine.dp} attention ranks leaves a rank none; give at least "
        f"{engine.dp}",
    )
    v.require(
        not engine.on("enable_dp_lm_head") or engine.on("enable_dp_attention"),
        f"{engine.where}: enable_dp_lm_head needs enable_dp_attention; add it, or remove the option",
    )


def _formats(v: Values, engine: EngineSizes) -> None:
    """The trainer sends weights in the checkpoint's number format, and computes in bf16."""
    said, dtype = engine.text("quantization"), engine.text("dtype")
    held = v.hf.get("quantization_config") if v.hf is not None and v.facts.hf_config is not None else None
    own = held.get("quant_method") if isinstance(held, dict) else None
    v.require(
        said is None or v.hf is None or said == own,
        f"{engine.where}: quantization {said}, and the checkpoint that is served is {own or 'bf16'}, in which the trainer "
        "sends its weights; leave the option out, and give an FP8 checkpoint to serve FP8",
    )
    v.require(
        dtype not in ("half", "float16"),
        f"{engine.where}: dtype {dtype}, and the trainer computes in bf16; leave the option out",
    )
    stored = v.hf.get("dtype") or v.hf.get("torch_dtype") if v.hf is not None else None
    v.require(
        dtype != "auto" or stored not in ("float16", "float32"),
        f"{engine.where}: dtype auto serves {stored} of config.json in float16, and the trainer computes in bf16; leave the "
        "option out",
    )


def _architecture(v: Values, engine: EngineSizes) -> None:
    """SGLang chooses the model's class by `architectures`, the trainer by `model_type`."""
    kind, named = (v.hf.get(name) for name in ("model_type", "architectures")) if v.hf is not None else (None, None)
    wanted = ARCHITECTURES.get(str(kind))
    v.require(
        wanted is None or named is None or list(named)[:1] == [wanted],
        f"{engine.where}: architectures of config.json is {named!r:.60}, by which SGLang chooses the model's class, and "
        f"model_type {kind} is trained as {wanted}; correct the one that is wrong",
    )


def _context(v: Values, engine: EngineSizes) -> None:
    said = engine.whole("context_length")
    positions = context_of_config(v) if engine.model_path == str(v["hf_checkpoint"]) else None
    if said is None or positions is None or said <= positions:
        return
    what = f"{engine.where}: context_length {said} is above the model's {positions} positions"
    if v.env is None:
        v.undecided(what, "", f"pass at most {positions}, or set {LONGER}=1 in the job's environment")
        return
    allowed = v.env.get(LONGER, "").lower() in ("1", "true")
    v.require(allowed, f"{what}; pass at most {positions}, or set {LONGER}=1")
