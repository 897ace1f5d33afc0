"""Does each engine fit the model that it serves? Experts, heads, FP8 blocks, attention kernels, drafts. Group by group."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slime.config.engine_sizes import DEFAULT_TRANSFER, EngineSizes, divisors
from slime.config.hf_config import HfConfig
from slime.config.rules.engines import engines_of

if TYPE_CHECKING:
    from slime.config.rules.book import Values

DSA_PAGE = 64
MOST_SELECTED = 2048
"""Keys of one query that SGLang's top-k kernels take (0.5.17 to 0.5.23)."""
PAGED_TREES = ("flashinfer", "fa3", "triton")
"""Attention of SGLang that drafts a tree into pages of more than one token."""
KV_DTYPES = {"bf16": "bf16", "bfloat16": "bf16", "auto": "auto"}
"""Spellings of one cache type."""
DRAFTS_ITSELF = ("EAGLE", "NEXTN")
"""Algorithms that take the model's own next-token-prediction layer where no draft model is named."""


def served(v: Values) -> list[EngineSizes]:
    """Engines of the trained model."""
    return [engine for engine in engines_of(v) if engine.model_path == str(v["hf_checkpoint"])]


def kv_dtype(engine: EngineSizes) -> str:
    text = engine.text("kv_cache_dtype") or "auto"
    return KV_DTYPES.get(text, text)


def fp8_block(hf: HfConfig) -> int:
    """Rows and columns of one FP8 block; 0 without block quantisation."""
    section = hf.get("quantization_config")
    block = section.get("weight_block_size") if isinstance(section, dict) else None
    return int(block[0]) if isinstance(block, list) and block and isinstance(block[0], int) else 0


def division(v: Values) -> None:
    """Experts and heads over the ranks of every engine."""
    hf = v.hf
    for engine in served(v):
        if hf is None:
            v.undecided(
                f"{engine.where}: experts, heads and FP8 blocks over its ranks; the model's config.json is not known here"
            )
            continue
        if hf.num_experts:
            v.require(
                hf.num_experts % engine.ep == 0,
                f"{engine.where}: {hf.num_experts} experts do not divide over ep_size {engine.ep}; choose ep_size among "
                f"{divisors(hf.num_experts, of=engine.tp)}",
            )
        else:
            v.require(
                engine.ep == 1,
                f"{engine.where}: ep_size {engine.ep}, but {hf.get('model_type')} has no experts; remove ep_size",
            )
        heads = hf.get("num_attention_heads") or 0
        v.require(
            heads % engine.attention_tp == 0,
            f"{engine.where}: {heads} heads do not divide over {engine.attention_tp} attention ranks (TP {engine.tp} "
            "/ attention "
            f"DP {engine.dp}); raise --sglang-dp-size or change the GPUs per engine",
        )
        kv_heads = hf.get("num_key_value_heads") or heads
        if not hf.is_mla and kv_heads:
            v.require(
                kv_heads % engine.attention_tp == 0 or engine.attention_tp % kv_heads == 0,
                f"{engine.where}: {kv_heads} key/value heads and {engine.attention_tp} attention ranks do not divide "
                "each other; "
                "choose other GPUs per engine",
            )
        layers = hf.get("num_hidden_layers") or 0
        v.require(
            engine.pp <= max(layers, 1),
            f"{engine.where}: pp_size {engine.pp} is above the {layers} layers; lower --sglang-pp-size",
        )


def dense_ranks(v: Values) -> None:
    """SGLang's moe_dense_tp_size: absent, 1, or all ranks."""
    for engine in engines_of(v):
        said = engine.text("moe_dense_tp_size")
        v.require(
            said in (None, "1", str(engine.tp)),
            f"{engine.where}: moe_dense_tp_size {said}; SGLang takes none, 1 or the engine's {engine.tp} ranks: pass "
            "--sglang-moe-dense-tp-size 1",
        )


def fp8_blocks(v: Values) -> None:
    """SGLang refuses a rank's share of a matrix that cuts an FP8 block."""
    hf = v.hf
    block = fp8_block(hf) if hf is not None else 0
    if not block:
        return
    for engine in served(v):
        found = list(_cut_blocks(engine, hf, block))
        v.mistakes += [f"{engine.where}: {what}, which cuts FP8 blocks of {block}; {fix}" for what, fix in found]
        if not found:
            v.holds(f"{engine.where}: FP8 blocks of experts, attention and dense layers lie inside one rank")


def _cut_blocks(engine: EngineSizes, hf: HfConfig, block: int):
    """(what is cut, the way out) for each kind of matrix."""
    if hf.num_experts and engine.tp % engine.ep == 0:
        share, width = engine.tp // engine.ep, hf.get("moe_intermediate_size") or 0
        if share > 1 and (width % share or width // share % block):
            yield (
                f"{share} ranks share an expert of width {width}, {width // share} each",
                f"raise ep_size to {engine.tp}, so that experts stay whole",
            )
        shared = (hf.get("n_shared_experts") or 0) * width
        apart = (engine.text("moe_a2a_backend") or "none") == "none"
        if shared and apart and engine.tp > 1 and (shared % engine.tp or shared // engine.tp % block):
            yield (
                f"{engine.tp} ranks share the shared expert of width {shared}, {shared // engine.tp} each",
                "pass --sglang-moe-a2a-backend deepep, which keeps it whole, or use fewer GPUs per engine",
            )
    dense = any(not hf.is_moe_layer(layer) for layer in range(hf.num_layers))
    width = hf.get("intermediate_size") or 0
    ranks = engine.tp if engine.text("moe_dense_tp_size") != "1" else 1
    if dense and ranks > 1 and (width % ranks or width // ranks % block):
        yield (
            f"{ranks} ranks share the dense feed-forward of width {width}, {width // ranks} columns each",
            "pass --sglang-moe-dense-tp-size 1" if hf.num_experts else "use fewer GPUs per engine",
        )
    ranks, heads = engine.attention_tp, hf.get("num_attention_heads") or 0
    if ranks > 1 and heads % ranks == 0:
        head = (hf.get("v_head_dim") or 0) if hf.is_mla else hf.head_dim
        rows = heads // ranks * head
        if rows % block:
            yield (
                f"attention over {ranks} ranks leaves {rows} columns of o_proj each",
                "raise --sglang-dp-size (attention data parallelism)",
            )


def sparse_attention(v: Values) -> None:
    """Pages, cache types and kernels of sparse attention; options of it elsewhere."""
    hf = v.hf
    for engine in served(v) if hf is not None else ():
        if hf.has_indexer:
            _sparse(v, engine)
            continue
        for name in ("nsa_prefill_backend", "nsa_decode_backend"):
            v.require(
                engine.text(name) is None,
                f"{engine.where}: {name} is for sparse-attention models, {hf.source} is {hf.get('model_type')}; "
                "remove the option",
            )


def _sparse(v: Values, engine: EngineSizes) -> None:
    page, dtype = engine.text("page_size"), kv_dtype(engine)
    v.require(
        page in (None, str(DSA_PAGE)),
        f"{engine.where}: page_size {page}; sparse attention works on pages of {DSA_PAGE}: pass --sglang-page-size {DSA_PAGE}",
        holds=f"{engine.where}: page size {DSA_PAGE}, which sparse attention needs" if page else "",
    )
    v.require(
        dtype in ("auto", "bf16", "fp8_e4m3"),
        f"{engine.where}: KV cache {dtype} has no sparse-attention kernel; use fp8_e4m3 or bf16",
        holds=f"{engine.where}: KV cache {dtype} has sparse-attention kernels",
    )
    for phase in ("prefill", "decode"):
        backend = engine.text(f"nsa_{phase}_backend")
        v.require(
            backend != "flashmla_kv" or dtype == "fp8_e4m3",
            f"{engine.where}: {phase} backend flashmla_kv reads an FP8 cache, the KV cache is {dtype}; "
            "pass --sglang-kv-cache-dtype fp8_e4m3, or use flashmla_sparse / fa3",
        )
        v.require(
            backend != "fa3" or dtype != "fp8_e4m3",
            f"{engine.where}: {phase} backend fa3 reads a bf16 cache, the KV cache is {dtype}; "
            "use flashmla_kv, or --sglang-kv-cache-dtype bf16",
        )
    for name in ("attention_backend", "prefill_attention_backend", "decode_attention_backend"):
        backend = engine.text(name)
        v.require(
            backend in (None, "nsa", "dsa"),
            f"{engine.where}: {name} {backend} is not sparse attention; use nsa (called dsa from 0.5.15 on)",
        )
    topk = v.hf.get("index_topk") or 0
    v.require(
        topk <= MOST_SELECTED,
        f"{engine.where}: index_topk {topk} of config.json; SGLang's kernels select at most {MOST_SELECTED} keys: serve a "
        "model that selects fewer",
    )
    v.require(
        not engine.on("enable_two_batch_overlap"),
        f"{engine.where}: two-batch overlap is refused with shared indices; remove --sglang-enable-two-batch-overlap",
    )


def speculation(v: Values) -> None:
    """A draft needs a model, and a chain of drafts the right number of tokens."""
    hf = v.hf
    for engine in served(v):
        algorithm = (engine.text("speculative_algorithm") or "").upper()
        if not algorithm or algorithm == "NGRAM":
            continue
        draft = engine.text("speculative_draft_model_path")
        if algorithm in DRAFTS_ITSELF and draft is None and hf is not None:
            v.require(
                hf.has_draft_layer,
                f"{engine.where}: {algorithm} without a draft model needs an MTP layer, {hf.source} has none; remove the "
                "speculative options, or name --sglang-speculative-draft-model-path",
            )
        elif algorithm not in DRAFTS_ITSELF:
            v.require(
                draft is not None,
                f"{engine.where}: {algorithm} needs a draft model; name --sglang-speculative-draft-model-path",
            )
        steps, drafts = engine.whole("speculative_num_steps"), engine.whole("speculative_num_draft_tokens")
        topk = engine.whole("speculative_eagle_topk")
        given = [name for name in ("num_steps", "eagle_topk", "num_draft_tokens") if engine.text(f"speculative_{name}")]
        v.require(
            len(given) in (0, 3),
            f"{engine.where}: speculative_{' and speculative_'.join(given)} alone; SGLang wants num_steps, eagle_topk and "
            "num_draft_tokens together: give all three or none",
        )
        if topk == 1 and steps is not None and drafts is not None:
            v.require(
                drafts == steps + 1,
                f"{engine.where}: with eagle_topk 1 a chain of {steps} steps has {steps + 1} tokens, not {drafts}; "
                f"pass --sglang-speculative-num-draft-tokens {steps + 1}",
            )
        page, backend = _spelled(v, engine, "page_size") or "1", _spelled(v, engine, "attention_backend")
        v.require(
            (topk or 1) <= 1 or page == "1" or backend in (None, *PAGED_TREES),
            f"{engine.where}: speculative_eagle_topk {topk} drafts a tree, which SGLang writes into pages of {page} tokens "
            f"with {', '.join(PAGED_TREES)} alone, not {backend}; pass --sglang-speculative-eagle-topk 1",
        )


def pairs(v: Values) -> None:
    """Prefill writes what decode reads: same cache type, page and layout, and one way to get it there."""
    engines = engines_of(v)
    for decode in (engine for engine in engines if engine.role == "decode"):
        for prefill in (engine for engine in engines if engine.role == "prefill" and engine.model == decode.model):
            _pair(v, prefill, decode)


RDMA_TRANSFERS = ("mooncake", "nixl", "mori")
_RAW_LAYOUT = {"trtllm", "tilelang"}
_RENAMED = {"nsa": "dsa", "NEXTN": "EAGLE"}


def _spelled(v: Values, engine: EngineSizes, name: str) -> str | None:
    """An option as SGLang completes it: old and new names are one, and sparse attention has its own page size."""
    text = engine.text(name)
    if name == "page_size" and text is None and v.hf is not None and v.hf.has_indexer:
        return str(DSA_PAGE)
    if name == "speculative_algorithm" and text is not None:
        text = text.upper()
    return _RENAMED.get(text or "", text)


def _pair(v: Values, prefill: EngineSizes, decode: EngineSizes) -> None:
    wrong = []
    if kv_dtype(prefill) != kv_dtype(decode):
        wrong.append(f"kv_cache_dtype: prefill {kv_dtype(prefill)}, decode {kv_dtype(decode)}")
    for name in ("page_size", "attention_backend", "speculative_algorithm"):
        left, right = (_spelled(v, engine, name) for engine in (prefill, decode))
        if left != right:
            wrong.append(f"{name}: prefill {left}, decode {right}")
    left, right = prefill.text("nsa_prefill_backend"), decode.text("nsa_decode_backend")
    if left and right and (left in _RAW_LAYOUT) != (right in _RAW_LAYOUT):
        wrong.append(f"KV layout: prefill backend {left}, decode backend {right}")
    v.require(
        not wrong,
        f"{decode.model}: prefill and decode differ on the KV cache that they share ({', '.join(wrong)}); give both groups the "
        "same values",
        holds=f"{decode.model}: prefill and decode agree on the KV layout",
    )
    sends, receives = (engine.text("disaggregation_transfer_backend") or DEFAULT_TRANSFER for engine in (prefill, decode))
    v.require(
        sends == receives,
        f"{decode.model}: prefill sends by {sends}, decode receives by {receives}; give both the same backend",
    )
    v.require(
        "fake" not in (sends, receives),
        f"{decode.model}: disaggregation_transfer_backend fake moves no cache: decode would go on from nothing; leave it out, "
        f"or name one of {', '.join(RDMA_TRANSFERS)}",
    )
    devices = prefill.text("disaggregation_ib_device")
    if sends == receives and sends in RDMA_TRANSFERS:
        names = (devices or "").split(",")
        v.require(
            len(set(names)) == len(names),
            f"{prefill.where}: disaggregation_ib_device names a device twice ({devices}); one each",
        )
        v.undecided(
            f"{decode.model}: KV goes by {sends} over {len(names)} RDMA devices, which only the nodes can confirm"
            if devices
            else f"{decode.model}: KV goes by {sends}; no RDMA devices are named",
            devices or "",
            "" if devices else "pass --sglang-disaggregation-ib-device mlx5_0,...",
            decides=False,
        )


def fractions(v: Values) -> None:
    for engine in engines_of(v):
        said = engine.text("mem_fraction_static")
        if said is None:
            continue
        try:
            good = 0 < float(said) < 1
        except ValueError:
            good = False
        v.require(good, f"{engine.where}: mem_fraction_static {said} is no share of the GPU; give one above 0 and below 1")
