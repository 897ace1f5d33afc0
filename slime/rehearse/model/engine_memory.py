"""Bytes of one GPU of each group of engines: weights, draft model, DeepEP's buffers, cache per token. Pure arithmetic."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from slime.config.rules.dispatch import DEFAULT_TOKENS, MOST_TOKENS, VARIABLE, buffer_bytes
from slime.engine.spec import EngineSpec
from slime.engine.versions import capabilities
from slime.model.hf_config import HfConfig
from slime.model.names import NameTable
from slime.rehearse.model.keepers import Keepers
from slime.rehearse.model.kinds import kinds
from slime.weights.serving import drafts_with_mtp
from slime.weights.wire import Format


@dataclass(frozen=True)
class EngineWeights:
    """Of one GPU, in the serving checkpoint's format."""

    main: int
    draft: int
    """The MTP layer, which is there only where the engine drafts with it."""
    experts: int = 0
    """Routed experts among `main`."""


@dataclass(frozen=True)
class EngineRank:
    """One engine rank's static bytes."""

    role: str
    weights: int
    kv_bytes_per_token: int
    mem_fraction: float
    draft_weights: int = 0
    buffers: int = 0
    """DeepEP's, which no sleep gives back."""
    gpus: int = 1
    """Of the engine."""
    attention_dp: int = 1
    expert_weights: int = 0
    """Routed experts among `weights`."""
    index_bytes_per_token: int = 0
    """The indexer's keys among `kv_bytes_per_token`."""
    most_tokens: int | None = None
    """max_total_tokens: a cache may be smaller than the room for it."""

    def cache_tokens(self, gpu_bytes: float) -> int:
        """Of this GPU: what fits beside the weights in the engine's share, or the fewer that the options allow."""
        room = max(0, int(gpu_bytes * self.mem_fraction) - self.weights - self.draft_weights)
        fitting = room // max(self.kv_bytes_per_token, 1)
        return fitting if self.most_tokens is None else min(fitting, self.most_tokens)

    @property
    def name(self) -> str:
        return self.role if self.gpus == 1 else f"{self.role} ({self.gpus} GPUs)"


@dataclass(frozen=True)
class KvCache:
    """What an engine GPU has left for its cache."""

    role: str
    tokens: int
    bytes_per_token: int
    gpus: int
    """Of the engine."""
    attention_dp: int
    longest: int | None
    """Tokens of the longest sample that the flags allow."""

    @property
    def at_once(self) -> int | None:
        """Longest samples that one engine holds at the same time: each attention-data-parallel rank has a cache of its own."""
        return self.tokens // self.longest * self.attention_dp if self.longest else None


_KNOWN: WeakKeyDictionary[NameTable, dict[tuple, EngineWeights]] = WeakKeyDictionary()


def engine_weights(table: NameTable, hf: HfConfig, spec: EngineSpec) -> EngineWeights:
    """What the fullest rank of an engine keeps of the checkpoint, tensor by tensor as SGLang cuts them."""
    form = Format.of(hf)
    known, key = _KNOWN.setdefault(table, {}), (alike(spec), form)
    if key not in known:
        known[key] = _engine_weights(table, hf, spec, form)
    return known[key]


def _engine_weights(table: NameTable, hf: HfConfig, spec: EngineSpec, form: Format) -> EngineWeights:
    totals = {False: 0, True: 0}
    whole_experts = {False: 0, True: 0}
    layers_of_a_stage = -(-hf.num_layers // spec.pp_size) / hf.num_layers
    for entry, count in kinds(table):
        draft = entry.name.startswith("mtp.")
        for tensor in entry.hf:
            nbytes = form.nbytes(entry, tensor)
            if entry.expert is not None:
                nbytes *= count
                whole_experts[draft] += nbytes
                continue
            share = layers_of_a_stage if entry.layer is not None and not draft else 1
            totals[draft] += int(nbytes / Keepers.cut(entry, tensor, spec) * share) * count
    # Experts lie on the expert-parallel ranks, and what tensor parallelism is left cuts each of them.
    experts = int(whole_experts[False] / spec.tp_size * layers_of_a_stage)
    return EngineWeights(totals[False] + experts, totals[True] + whole_experts[True] // spec.tp_size, experts)


def alike(spec: EngineSpec) -> str:
    """Equal for engines that hold the same and serve the same way."""
    sizes = (spec.role, spec.num_gpus, spec.tp_size, spec.pp_size, spec.dp_size, spec.ep_size)
    return repr((sizes, sorted((name, str(value)) for name, value in spec.settings.items())))


def smallest_served(hf: HfConfig) -> HfConfig:
    """The model in FP8 blocks, where its config.json, which would say the format, is not at hand: what does not fit then fits
    in no format."""
    return HfConfig({**hf, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, hf.source)


def speculates(spec: EngineSpec) -> bool:
    return drafts_with_mtp(spec.settings)


def engine_ranks(
    table: NameTable,
    hf: HfConfig,
    specs: Iterable[EngineSpec],
    *,
    version: str,
    env: Mapping[str, str] | None,
    mem_fraction: float,
) -> tuple[EngineRank, ...]:
    """One rank of each different engine of the trained model. mem_fraction: where no option says one."""
    found: dict[str, EngineRank] = {}
    for spec in specs:
        key = alike(spec)
        if spec.update_weights and key not in found:
            found[key] = _rank(table, hf, spec, version=version, env=env, mem_fraction=mem_fraction)
    return tuple(found.values())


def _rank(
    table: NameTable, hf: HfConfig, spec: EngineSpec, *, version: str, env: Mapping[str, str] | None, mem_fraction: float
) -> EngineRank:
    dtype = str(spec.settings.get("kv_cache_dtype", "auto"))
    drafts = speculates(spec) and hf.num_mtp_layers > 0
    weights = engine_weights(table, hf, spec)
    every = not capabilities(version).index_cache_where_computed
    return EngineRank(
        spec.role,
        weights.main,
        kv_bytes_per_token(hf, fp8=dtype.startswith("fp8"), tp=spec.tp_size // spec.dp_size, drafts=drafts, every_layer=every),
        _fraction(spec.settings.get("mem_fraction_static"), mem_fraction),
        weights.draft if drafts else 0,
        _buffers(hf, spec, env),
        spec.num_gpus,
        spec.dp_size,
        weights.experts,
        index_bytes(hf, drafts=drafts, every_layer=every),
        _most_tokens(spec.settings.get("max_total_tokens")),
    )


_COUNT = re.compile(r"(\d+(?:\.\d+)?)(k|M|G|Ki|Mi|Gi)?")
_UNITS = {"k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def _most_tokens(said: object) -> int | None:
    """Of SGLang's "400000", "400k" or "1Mi"; what it would refuse is said elsewhere."""
    found = _COUNT.fullmatch(str(said).strip())
    return None if found is None else int(float(found[1]) * _UNITS.get(found[2], 1))


def _fraction(said: object, otherwise: float) -> float:
    try:
        return otherwise if said is None else float(str(said))
    except ValueError:
        return otherwise


def _buffers(hf: HfConfig, spec: EngineSpec, env: Mapping[str, str] | None) -> int:
    low_latency = str(spec.settings.get("deepep_mode", "auto")) != "normal"
    if str(spec.settings.get("moe_a2a_backend")) != "deepep" or not low_latency or not hf.num_experts:
        return 0
    text = (env or {}).get(VARIABLE, str(DEFAULT_TOKENS))
    tokens = min(int(text), MOST_TOKENS) if text.isdecimal() else DEFAULT_TOKENS
    return buffer_bytes(tokens=tokens, hidden=hf["hidden_size"], experts=hf.num_experts)


def kv_bytes_per_token(hf: HfConfig, *, fp8: bool, tp: int = 1, drafts: bool = False, every_layer: bool = False) -> int:
    """Of one engine rank. Sparse attention keeps 656 bytes (or 576 bf16 values) a layer, and 132 bytes for its indexer.

    drafts: the MTP layer, which runs an indexer of its own, keeps a cache too. every_layer: the engine keeps the indexer's
    cache also in layers that share another's selection (SGLang before 0.5.23).
    """
    layers = hf.num_layers + (hf.num_mtp_layers if drafts else 0)
    if hf.has_indexer:
        latent = (
            hf["kv_lora_rank"] + hf["kv_lora_rank"] // 128 * 4 + 2 * hf["qk_rope_head_dim"]
            if fp8
            else 2 * (hf["kv_lora_rank"] + hf["qk_rope_head_dim"])
        )
        return layers * latent + index_bytes(hf, drafts=drafts, every_layer=every_layer)
    size = 1 if fp8 else 2
    if hf.is_mla:
        return layers * (hf["kv_lora_rank"] + hf["qk_rope_head_dim"]) * size
    groups = max(1, hf["num_key_value_heads"] // tp)
    return layers * 2 * groups * hf.head_dim * size


def index_bytes(hf: HfConfig, *, drafts: bool, every_layer: bool) -> int:
    """The indexer's keys of one token, 0 without an indexer."""
    if not hf.has_indexer:
        return 0
    draft = hf.num_mtp_layers if drafts else 0
    layers = hf.num_layers if every_layer else sum(hf.runs_indexer(layer) for layer in range(hf.num_layers))
    return (layers + draft) * (hf["index_head_dim"] + 4)
