"""The difference between an engine on CUDA and one on the CPU; nothing else in this room knows it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slime.compat.sglang import host_environment, with_system_libraries
from slime.engine.ports import EnginePorts
from slime.engine.spec import EngineSpec, NodePlacement
from slime.engine.versions import Capabilities, translate

HOST_MODEL_CLASS = {"glm_moe_dsa": ("SlimeGlmMoeDsaForCausalLM", "DeepseekV2ForCausalLM")}

# What a launcher written for GPUs may say and a CPU cannot do. Each is dropped with a note.
CUDA_ONLY = (
    "attn_dp_size", "base_gpu_id", "cuda_graph_bs_decode", "cuda_graph_bs_prefill", "cuda_graph_max_bs_decode",
    "cuda_graph_max_bs_prefill", "deepep_mode",
    "disable_cuda_graph", "disaggregation_ib_device", "dp_size", "dsa_decode_backend", "dsa_prefill_backend",
    "enable_dp_attention", "enable_dp_lm_head", "enable_draft_weights_cpu_backup", "enable_memory_saver", "ep_size",
    "gpu_id_step", "kv_cache_dtype", "mem_fraction_static", "moe_a2a_backend", "moe_dense_tp_size", "moe_runner_backend",
    "page_size", "speculative_algorithm", "speculative_draft_attention_backend", "speculative_eagle_topk",
    "speculative_num_draft_tokens", "speculative_num_steps",
)  # fmt: skip
HOST_TRANSFER = {"mooncake": "mooncake_tcp"}
HOST_ATTENTION = "torch_native"

# SGLang would take 15 GB for its cache otherwise.
HOST_MAX_TOTAL_TOKENS = 16384
HOST_MAX_RUNNING_REQUESTS = 32


# Servers close idle connections after 5 s unless told otherwise, and a step of training lasts about as long: a request that
# the router sends at that moment is lost. In a prefill/decode pair the other half then waits for its partner for minutes.
COMMON_ENVIRONMENT = {"SGLANG_TIMEOUT_KEEP_ALIVE": "86400"}

# With them every rank keeps a whole matrix of which the trainer sends it a share (slime.weights.shares).
REPLICATING = ("SGLANG_ENABLE_EMBED_REPLICATION", "SGLANG_SHARED_EXPERT_TP1")


@dataclass(frozen=True)
class Command:
    """How to start one process of an engine."""

    settings: dict[str, object]
    env: dict[str, str]
    notes: tuple[str, ...]


def command(
    kind: str,
    spec: EngineSpec,
    place: NodePlacement,
    ports: EnginePorts,
    column: Capabilities,
    *,
    base_env: Mapping[str, str] | None = None,
) -> Command:
    """kind "cuda" or "host" -> the complete settings and environment. Raises ValueError for what the kind cannot do."""
    if place.node_rank > 0 and place.dist_init_addr is None:
        raise ValueError(f"node {place.node_rank} of engine {spec.label} needs node 0's dist_init_addr")
    translated = translate(spec.settings, column)
    common = _common_settings(spec, place, ports)
    env = with_system_libraries(os.environ if base_env is None else base_env)
    build = {"cuda": _cuda, "host": _host}.get(kind)
    if build is None:
        raise ValueError(f"device kind {kind!r} is neither cuda nor host")
    settings, env, notes = build(spec, place, column, translated.settings, common, env)
    if settings.get("sampling_mask_max_tokens"):
        # A prefill engine draws the first token: its words go to the decode engine along with the cache.
        env["SGLANG_ENABLE_DISAGG_SAMPLING_MASK"] = "1"
    if spec.update_weights and spec.tp_size > 1:
        replicating = [name for name in REPLICATING if env.get(name, "").lower() in ("1", "true", "yes", "y")]
        notes = [
            *notes,
            *(f"{name} is turned off: the trainer sends each rank its share of that matrix" for name in replicating),
        ]
        env |= dict.fromkeys(replicating, "0")
    return Command(settings, COMMON_ENVIRONMENT | env, (*translated.notes, *notes))


def _common_settings(spec: EngineSpec, place: NodePlacement, ports: EnginePorts) -> dict[str, object]:
    common: dict[str, object] = {
        "model_path": spec.model_path,
        "trust_remote_code": True,
        "random_seed": spec.random_seed,
        "host": place.host,
        "port": ports.http,
        "nccl_port": ports.nccl,
        "nnodes": spec.num_nodes,
        "node_rank": place.node_rank,
        "dist_init_addr": place.dist_init_addr or f"{place.host}:{ports.dist_init}",
        "tp_size": spec.tp_size,
        "skip_server_warmup": True,
    }
    if spec.role == "prefill":
        common |= {
            "disaggregation_mode": "prefill",
            "disaggregation_bootstrap_port": ports.bootstrap,
            "load_balance_method": "follow_bootstrap_room",
        }
    elif spec.role == "decode":
        common["disaggregation_mode"] = "decode"
    return common


def _cuda(spec, place, column, asked, common, env) -> tuple[dict[str, object], dict[str, str], list[str]]:
    common |= {
        "pp_size": spec.pp_size,
        "base_gpu_id": place.base_gpu_id,
        "gpu_id_step": 1,
        "enable_memory_saver": spec.needs_offload,
        "enable_metrics": True,
    }
    common["ep_size"] = spec.ep_size
    if spec.update_weights:
        # The trainer computes in bf16; SGLang's "auto" makes float16 of a config.json that says float32, or nothing.
        common["dtype"] = "bfloat16"
    elif spec.needs_offload:
        common["enable_weights_cpu_backup"] = True  # nobody sends them again
    if asked.get("speculative_algorithm"):
        common["enable_draft_weights_cpu_backup"] = True
    notes = _override_notes(common, asked)
    settings = common | asked
    if settings["enable_memory_saver"] and "cuda_graph_backend_prefill" not in settings:
        # Captured prefill graphs keep addresses that the memory saver gives back.
        settings["cuda_graph_backend_prefill"] = "disabled"
    for allocator in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        env.pop(allocator, None)  # expandable segments and the memory saver exclude each other
    defaults = {
        "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "false",
        "SGLANG_JIT_DEEPGEMM_FAST_WARMUP": "true",
        # Trainer ranks on the same devices take more here and less there. Each name is of other versions of SGLang.
        "SGL_DISABLE_TP_MEMORY_INBALANCE_CHECK": "true",
        "SGLANG_DISABLE_TP_MEMORY_INBALANCE_CHECK": "true",
        "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "false",
        "SGLANG_MEMORY_SAVER_CUDA_GRAPH": "true",
        "SGLANG_BATCH_INVARIANT_OPS_ENABLE_MM_FALLBACK_VARIANT": "true",
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false",
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "false",
    }
    if settings.get("enable_return_indexer_topk"):
        # Fused with the top-k, places within a sample become places in the cache, which a trainer does not have.
        env["SGLANG_DSA_FUSE_TOPK"] = "0"
    return settings, defaults | env, notes


def _host(spec, place, column, asked, common, env) -> tuple[dict[str, object], dict[str, str], list[str]]:
    if not column.cpu_engine:
        raise ValueError(f"sglang {column.version} cannot serve on a CPU here; install 0.5.23 (scripts/setup.sh, extra cpu)")
    interface = env.get("GLOO_SOCKET_IFNAME") if spec.num_nodes > 1 else "lo"
    if why := why_not_over_nodes(spec, interface, processor=_processor()):
        raise ValueError(why)
    if spec.pp_size > 1:
        raise ValueError(
            f"engine {spec.label} has pipeline parallel size {spec.pp_size}; a CPU engine has tensor parallelism only"
        )
    notes = []
    kept = {}
    for name, value in asked.items():
        if name in CUDA_ONLY:
            notes.append(f"CPU engine: {name} {value} is for CUDA and not passed on")
        elif name == "disaggregation_transfer_backend" and value in HOST_TRANSFER:
            kept[name] = HOST_TRANSFER[value]
            notes.append(f"CPU engine: KV transfer {value} becomes {kept[name]} (no RDMA)")
        elif name == "attention_backend" and value != HOST_ATTENTION:
            notes.append(f"CPU engine: attention_backend {value} becomes {HOST_ATTENTION}")
        else:
            kept[name] = value
    common |= {
        "device": "cpu",
        # Nothing is gained by bf16 on a CPU, and log-probs would be 1e-3 off the trainer's.
        "dtype": "float32",
        "attention_backend": HOST_ATTENTION,
        "max_total_tokens": HOST_MAX_TOTAL_TOKENS,
        "max_running_requests": HOST_MAX_RUNNING_REQUESTS,
        "sleep_on_idle": True,
        "disable_overlap_schedule": True,
        "enable_memory_saver": False,
    }
    if spec.role in ("prefill", "decode"):
        common["disaggregation_transfer_backend"] = "mooncake_tcp"
    if spec.role == "decode":
        common["disaggregation_decode_retraction_backup"] = "cpu_tensor"
    model_override = host_model_override(spec.model_path, kept.pop("json_model_override_args", None))
    if model_override:
        common["json_model_override_args"] = json.dumps(model_override)
    notes += _override_notes(common, kept)
    env = host_environment(cores=_cores(spec), host=place.host, peers=place.peers, interface=interface, base=env)
    return common | kept, env, notes


def why_not_over_nodes(spec: EngineSpec, interface: str | None, *, processor: str) -> str | None:
    """Why a CPU engine cannot be on as many nodes; None where it can. processor: kind and flags, as the kernel tells them."""
    if spec.num_nodes == 1:
        return None
    spans = f"engine {spec.label} spans {spec.num_nodes} nodes"
    if shared := [word for word in ("amx_tile", "aarch64") if word in processor.split()]:
        return (
            f"{spans}; on this processor ({shared[0]}) SGLang reduces in one machine's shared memory: give each its own engine"
        )
    if not interface or interface == "lo":
        return (
            f"{spans}, and GLOO_SOCKET_IFNAME is {interface or 'not set'}: set it to the interface between them (SOCKET_IFNAME)"
        )
    return None


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return " ".join([platform.machine(), *(line.partition(":")[2] for line in lines if line.startswith("flags"))][:2])


def _override_notes(common: Mapping[str, object], asked: Mapping[str, object]) -> list[str]:
    return [
        f"{name} {asked[name]} as asked, not {common[name]}"
        for name in asked
        if name in common and str(asked[name]) != str(common[name])
    ]


def _cores(spec: EngineSpec) -> Sequence[int]:
    """One core per tensor-parallel rank, spread over the cores that this process may use."""
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return [available[(spec.gpu_offset + rank) % len(available)] for rank in range(spec.tp_size)]


def host_model_override(model_path: str, asked: object = None) -> dict[str, object]:
    """Overrides of config.json with which SGLang serves the model on a CPU; {} for models that it serves as they are.

    See slime/engine/host_models/glm_moe_dsa.py for what each is for. The FP8 section is taken away because SGLang's FP8
    path needs CUDA; our loader restores the weights itself, from the block size kept in `slime_model`.
    """
    override: dict[str, object] = dict(json.loads(asked) if isinstance(asked, str) else (asked or {}))
    path = Path(model_path) / "config.json"
    if not path.exists():
        raise ValueError(f"{model_path} has no config.json; --hf-checkpoint must be a local Hugging Face folder")
    config = json.loads(path.read_text())
    if config.get("model_type") not in HOST_MODEL_CLASS:
        if config.get("quantization_config"):
            raise ValueError(
                f"{model_path} ({config.get('model_type')}) is quantised; on a CPU only {', '.join(HOST_MODEL_CLASS)} may be"
            )
        return override
    return override | {
        "architectures": list(HOST_MODEL_CLASS[config["model_type"]]),
        "qk_rope_head_dim": config["qk_rope_head_dim"] + config["index_head_dim"],
        "quantization_config": None,
        "slime_model": config,
    }
