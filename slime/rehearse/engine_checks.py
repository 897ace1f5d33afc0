"""Do the rollout engines fit their GPUs, the model, each other, and the SGLang that will run them?"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from slime.engine.kinds import DEFAULT_TRANSFER
from slime.engine.plan import Slots, _engine
from slime.engine.spec import EngineSpec
from slime.engine.versions import TABLE, capabilities, installed_version, option_table, translate, typed_argv
from slime.rehearse.findings import Findings
from slime.rehearse.reading import Reading

DEEPEP_MAX_RANKS = 160
"""DeepEP's dispatch configurations exist up to this many expert-parallel ranks."""
DISPATCH_VARIABLE = "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"
DISPATCH_DEFAULT = 128
GRAPH_BATCH_DEFAULT = 8
DSA_PAGE = 64
RDMA_BACKENDS = ("mooncake", "nixl", "mori")


@dataclass(frozen=True)
class EnginePlan:
    specs: tuple[EngineSpec, ...]
    version: str
    renames: tuple[str, ...]
    """One line per option that this SGLang version calls otherwise."""


def check_engines(
    reading: Reading, findings: Findings, *, version: str | None, env: Mapping[str, str] | None = None
) -> EnginePlan:
    """All engines, with what is wrong about each. env: the launcher's variables if its file was given, else this process's."""
    config = reading.config
    found = version or _installed(findings)
    if config.debug.debug_train_only:
        return EnginePlan((), found, ())
    wanted = sum(group.num_gpus for model in config.engine.groups for group in model.server_groups)
    have = config.cluster.rollout_num_gpus
    if config.engine.groups and wanted == have:
        listed = " + ".join(
            f"{group.num_gpus} {group.worker_type}" for model in config.engine.groups for group in model.server_groups
        )
        findings.ok("engines", f"the groups take all {have} rollout GPUs", listed)
    specs = _specs(reading, findings)
    renames: list[str] = []
    for spec in specs:
        renames += _check_options(spec, found, findings)
    by_label = {(spec.model, spec.role): spec for spec in specs}
    for spec in by_label.values():
        _check_sizes(spec, reading, findings)
        _check_dispatch(spec, findings, env if env is not None else os.environ, given=env is not None)
        _check_sparse(spec, reading, findings, found)
    _check_pair(by_label, findings, found)
    return EnginePlan(tuple(specs), found, tuple(dict.fromkeys(renames)))


def _installed(findings: Findings) -> str:
    try:
        return installed_version()
    except ValueError:
        findings.unchecked(
            "engines",
            f"sglang is not installed here; options are checked against {TABLE[-1].version}",
            "",
            "name the cluster's with --engine-version",
        )
        return TABLE[-1].version


def _specs(reading: Reading, findings: Findings) -> list[EngineSpec]:
    config, cluster = reading.config, reading.config.cluster
    trainer = cluster.actor_num_nodes * cluster.actor_num_gpus_per_node
    alone = cluster.colocate or config.debug.debug_rollout_only
    slots = Slots(
        cluster.rollout_num_gpus or 0,
        cluster.num_gpus_per_node,
        0 if config.debug.debug_rollout_only else trainer,
        0 if alone else trainer,
        bool(cluster.offload_rollout),
    )
    specs: list[EngineSpec] = []
    offset = rank = 0
    for model in config.engine.groups:
        for group in model.server_groups:
            for _ in range(group.num_engines):
                try:
                    spec = _engine(
                        model,
                        group,
                        slots,
                        config.engine.sglang,
                        str(config.checkpoint.hf_checkpoint),
                        engine_id=len(specs),
                        offset=offset,
                        rank=rank,
                        seed=config.model.seed,
                    )
                except ValueError as error:
                    findings.violation("engines", str(error), "", str(error).rpartition(";")[2].strip())
                    break
                specs.append(spec)
                offset += group.num_gpus_per_engine
                rank += spec.num_nodes
            else:
                offset += group.num_gpus if group.worker_type == "placeholder" else 0
    return specs


def _check_options(spec: EngineSpec, version: str, findings: Findings) -> list[str]:
    """Each option by itself, so that all wrong ones are named."""
    column = capabilities(version)
    try:
        translated = translate(spec.settings, column)
    except ValueError as error:
        findings.violation("engines", f"{spec.model} {spec.role}: {error}", "", "keep one of the two spellings")
        return []
    wrong = 0
    for name, value in translated.settings.items():
        try:
            typed_argv({name: value}, option_table(version))
        except ValueError as error:
            wrong += 1
            findings.violation("engines", f"{spec.model} {spec.role}: {error}", "", _option_fix(str(error)))
    if not wrong:
        findings.ok(
            "engines",
            f"{spec.model} {spec.role}: every option exists in sglang {version}",
            f"{len(translated.settings)} options",
        )
    return list(translated.notes)


def _option_fix(error: str) -> str:
    return f"write {error.partition('nearest: ')[2]}" if "nearest: " in error else "correct the value or remove the option"


def _int(spec: EngineSpec, *names: str, default: int | None = None) -> int | None:
    for name in names:
        if name in spec.settings:
            try:
                return int(str(spec.settings[name]))
            except ValueError:
                return default
    return default


def _text(spec: EngineSpec, *names: str) -> str | None:
    return next((str(spec.settings[name]) for name in names if name in spec.settings), None)


def _on(spec: EngineSpec, name: str) -> bool:
    return str(spec.settings.get(name, "")).lower() in ("true", "1")


def _check_sizes(spec: EngineSpec, reading: Reading, findings: Findings) -> None:
    hf, where = reading.hf, f"{spec.model} {spec.role}"
    findings.ok(
        "engines",
        f"{where}: {spec.num_gpus} GPUs = TP {spec.tp_size} x PP {spec.pp_size}",
        f"attention DP {spec.dp_size}, EP {spec.ep_size}, {spec.num_nodes} nodes",
    )
    if hf is None:
        findings.unchecked(
            "engines", f"{where}: experts, heads and FP8 blocks over its ranks; the model's config.json is not known here"
        )
        return
    if hf.num_experts and hf.num_experts % spec.ep_size:
        findings.violation(
            "engines",
            f"{where}: {hf.num_experts} experts do not divide over ep_size {spec.ep_size}",
            "",
            f"choose ep_size among {_divisors(hf.num_experts, spec.tp_size)}",
        )
    attention_tp = spec.tp_size // spec.dp_size
    if hf["num_attention_heads"] % attention_tp:
        findings.violation(
            "engines",
            f"{where}: {hf['num_attention_heads']} heads do not divide over {attention_tp} attention ranks",
            f"TP {spec.tp_size} / attention DP {spec.dp_size}",
            "raise --sglang-dp-size or change the GPUs per engine",
        )
    block = int((hf.get("quantization_config") or {}).get("weight_block_size", [0])[0])
    if block and hf.num_experts:
        share = spec.tp_size // spec.ep_size
        width = hf["moe_intermediate_size"]
        findings.check(
            share == 1 or (width // share) % block == 0,
            "engines",
            f"{where}: FP8 blocks of experts lie inside one rank",
            values=f"{share} ranks share an expert",
            wrong=f"{where}: {share} ranks share an expert of width {width}, {width // max(share, 1)} each, "
            f"which cuts FP8 blocks of {block}",
            fix=f"raise ep_size to {spec.tp_size}, so that experts stay whole",
        )
    if block and attention_tp > 1:
        rows = hf["num_attention_heads"] // attention_tp * (hf["v_head_dim"] if hf.is_mla else hf.head_dim)
        findings.check(
            rows % block == 0,
            "engines",
            f"{where}: FP8 blocks of attention lie inside one rank",
            wrong=f"{where}: attention over {attention_tp} ranks leaves {rows} columns of o_proj each, "
            f"which cuts FP8 blocks of {block}",
            fix="raise --sglang-dp-size (attention data parallelism)",
        )


def _divisors(number: int, limit: int) -> list[int]:
    return [d for d in range(1, limit + 1) if number % d == 0 and limit % d == 0]


def _check_dispatch(spec: EngineSpec, findings: Findings, env: Mapping[str, str], *, given: bool) -> None:
    """DeepEP: ranks, and the buffer that must hold the largest decode batch."""
    where = f"{spec.model} {spec.role}"
    if _text(spec, "moe_a2a_backend") != "deepep":
        if _text(spec, "deepep_mode"):
            findings.violation(
                "engines",
                f"{where}: deepep_mode {_text(spec, 'deepep_mode')} without DeepEP",
                "",
                "pass --sglang-moe-a2a-backend deepep",
            )
        return
    findings.check(
        spec.ep_size <= DEEPEP_MAX_RANKS,
        "engines",
        f"{where}: EP {spec.ep_size} is within DeepEP's {DEEPEP_MAX_RANKS} ranks",
        wrong=f"{where}: DeepEP has no dispatch configuration for EP {spec.ep_size} (at most {DEEPEP_MAX_RANKS} ranks)",
        fix="lower num_gpus_per_engine and ep_size: several engines instead of one large one",
    )
    if spec.ep_size == 1:
        findings.violation(
            "engines", f"{where}: DeepEP with ep_size 1 has nobody to dispatch to", "", f"pass --sglang-ep-size {spec.tp_size}"
        )
    mode = _text(spec, "deepep_mode") or "auto"
    if mode == "normal" and spec.role == "decode":
        findings.violation(
            "engines",
            f"{where}: deepep_mode normal cannot be captured in CUDA graphs, which decode needs",
            "",
            "use low_latency (or auto)",
        )
    if mode == "normal" or spec.role == "prefill":
        return
    batch = _int(spec, "cuda_graph_max_bs", "cuda_graph_max_bs_decode", default=GRAPH_BATCH_DEFAULT)
    drafts = _int(spec, "speculative_num_draft_tokens", default=1) if _text(spec, "speculative_algorithm") else 1
    need = batch * drafts
    limit = int(env[DISPATCH_VARIABLE]) if env.get(DISPATCH_VARIABLE, "").isdigit() else None
    values = f"cuda_graph_max_bs {batch} x draft tokens {drafts} = {need}"
    if limit is None:
        findings.unchecked(
            "engines",
            f"{where}: {DISPATCH_VARIABLE} must be at least {need}, and is not set here (DeepEP's default: {DISPATCH_DEFAULT})",
            values,
            f"set {DISPATCH_VARIABLE}={_round_up(need)} in the launcher's environment",
        )
        return
    findings.check(
        limit >= need,
        "engines",
        f"{where}: {DISPATCH_VARIABLE} {limit} covers the largest decode batch",
        values=values,
        wrong=f"{where}: {DISPATCH_VARIABLE} is {limit}, below the largest decode batch; "
        "graph capture would fail in DeepEP's buffer",
        fix=f"set {DISPATCH_VARIABLE}={_round_up(need)}, or lower cuda_graph_max_bs to {max(limit // drafts, 1)}",
    )


def _round_up(need: int) -> int:
    return 1 << max(0, math.ceil(math.log2(need)))


def _check_sparse(spec: EngineSpec, reading: Reading, findings: Findings, version: str) -> None:
    hf, where = reading.hf, f"{spec.model} {spec.role}"
    if hf is None or not hf.has_indexer:
        for name in ("nsa_prefill_backend", "nsa_decode_backend", "dsa_prefill_backend", "dsa_decode_backend"):
            if hf is not None and name in spec.settings:
                findings.violation(
                    "engines",
                    f"{where}: {name} is for sparse-attention models, {hf.source} is {hf.model_type}",
                    "",
                    "remove the option",
                )
        return
    page = _int(spec, "page_size")
    if page is not None:
        findings.check(
            page == DSA_PAGE,
            "engines",
            f"{where}: page size {DSA_PAGE}, which sparse attention needs",
            wrong=f"{where}: page_size {page}; sparse attention works on pages of {DSA_PAGE}",
            fix=f"pass --sglang-page-size {DSA_PAGE}",
        )
    dtype = _text(spec, "kv_cache_dtype") or "auto"
    findings.check(
        dtype in ("auto", "bf16", "bfloat16", "fp8_e4m3"),
        "engines",
        f"{where}: KV cache {dtype} has sparse-attention kernels",
        wrong=f"{where}: KV cache {dtype} has no sparse-attention kernel",
        fix="use fp8_e4m3 or bf16",
    )
    for phase in ("prefill", "decode"):
        backend = _text(spec, f"nsa_{phase}_backend", f"dsa_{phase}_backend")
        if backend == "flashmla_kv" and dtype != "fp8_e4m3":
            findings.violation(
                "engines",
                f"{where}: {phase} backend flashmla_kv reads an FP8 cache, the KV cache is {dtype}",
                "",
                "pass --sglang-kv-cache-dtype fp8_e4m3, or use flashmla_sparse / fa3",
            )
        elif backend == "fa3" and dtype == "fp8_e4m3":
            findings.violation(
                "engines",
                f"{where}: {phase} backend fa3 reads a bf16 cache, the KV cache is {dtype}",
                "",
                "use flashmla_kv, or --sglang-kv-cache-dtype bf16",
            )
        elif backend:
            findings.ok("engines", f"{where}: {phase} backend {backend} goes with KV cache {dtype}")
    backend = _text(spec, "attention_backend")
    if backend not in (None, "nsa", "dsa"):
        findings.violation(
            "engines",
            f"{where}: attention_backend {backend} is not sparse attention",
            "",
            "use nsa (called dsa from 0.5.15 on)",
        )
    if _on(spec, "enable_two_batch_overlap"):
        findings.violation(
            "engines",
            f"{where}: two-batch overlap is refused with shared indices",
            "",
            "remove --sglang-enable-two-batch-overlap",
        )
    if _text(spec, "speculative_algorithm") in ("EAGLE", "NEXTN"):
        topk = _int(spec, "speculative_eagle_topk", default=1)
        steps, drafts = _int(spec, "speculative_num_steps"), _int(spec, "speculative_num_draft_tokens")
        if topk == 1 and steps is not None and drafts is not None and drafts != steps + 1:
            findings.violation(
                "engines",
                f"{where}: with eagle_topk 1 a chain of {steps} steps has {steps + 1} tokens, not {drafts}",
                "",
                f"pass --sglang-speculative-num-draft-tokens {steps + 1}",
            )
        if not hf.num_mtp_layers:
            findings.violation(
                "engines",
                f"{where}: EAGLE without a draft model needs an MTP layer, {hf.source} has none",
                "",
                "remove the speculative options",
            )


def _check_pair(by_label: Mapping[tuple[str, str], EngineSpec], findings: Findings, version: str) -> None:
    """Prefill writes what decode reads: same cache type, page and layout; and a way to get it there."""
    for (model, role), decode in by_label.items():
        prefill = by_label.get((model, "prefill"))
        if role != "decode" or prefill is None:
            continue
        wrong = []
        for names in (("kv_cache_dtype",), ("page_size",), ("attention_backend",), ("speculative_algorithm",)):
            left, right = _text(prefill, *names), _text(decode, *names)
            if left != right:
                wrong.append(f"{names[0]}: prefill {left}, decode {right}")
        raw = {"trtllm", "tilelang"}
        left, right = (
            _text(prefill, "nsa_prefill_backend", "dsa_prefill_backend"),
            _text(decode, "nsa_decode_backend", "dsa_decode_backend"),
        )
        if left and right and (left in raw) != (right in raw):
            wrong.append(f"KV layout: prefill backend {left}, decode backend {right}")
        findings.check(
            not wrong,
            "engines",
            f"{model}: prefill and decode agree on the KV layout",
            wrong=f"{model}: prefill and decode differ on the KV cache that they share",
            values="; ".join(wrong),
            fix="give both groups the same values",
        )
        transfer, receives = (
            _text(engine, "disaggregation_transfer_backend") or DEFAULT_TRANSFER for engine in (prefill, decode)
        )
        devices = _text(prefill, "disaggregation_ib_device")
        if transfer != receives:
            findings.violation(
                "engines",
                f"{model}: prefill sends by {transfer}, decode receives by {receives}",
                "",
                "give both the same backend",
            )
        elif transfer in RDMA_BACKENDS and devices:
            count = len(devices.split(","))
            findings.unchecked(
                "engines",
                f"{model}: KV goes by {transfer} over {count} RDMA devices, which only the nodes can confirm",
                devices,
            )
        elif transfer in RDMA_BACKENDS:
            findings.unchecked(
                "engines",
                f"{model}: KV goes by {transfer}; no RDMA devices are named",
                "",
                "pass --sglang-disaggregation-ib-device mlx5_0,...",
            )
