"""How long engines generate: one decode step by what it waits for, and a rollout out of many. Pure arithmetic.

A step's parts come one after another: kernels that start whatever the batch, bytes of weights and cache that are read, products
of matrices, exchange between the engine's GPUs. Samples beyond what the engines hold at once take the place of those that end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from slime.engine.spec import EngineSpec
from slime.model.hf_config import HfConfig
from slime.rehearse.model.engine_memory import EngineRank, speculates
from slime.rehearse.model.rates import Rates


@dataclass(frozen=True)
class Served:
    """Engines of one kind."""

    spec: EngineSpec
    rank: EngineRank
    count: int
    held: int
    """Longest samples that one of them holds at once; 0 where nothing bounds a sample."""


@dataclass(frozen=True)
class Engines:
    """All that serve the trained model. Regular engines are in both."""

    decode: tuple[Served, ...]
    prefill: tuple[Served, ...]

    @property
    def held(self) -> int:
        """Longest samples that all decode engines hold at once."""
        return sum(kind.held * kind.count for kind in self.decode)

    @property
    def decode_gpus(self) -> int:
        return sum(kind.spec.num_gpus * kind.count for kind in self.decode)

    @property
    def prefill_gpus(self) -> int:
        return sum(kind.spec.num_gpus * kind.count for kind in self.prefill)


LIMITS = {
    "kernels": "decode latency",
    "weights": "decode bandwidth",
    "cache": "decode bandwidth",
    "products": "decode FLOPs",
    "exchange": "exchange of the engines",
    "given": "decode step",
}
"""Part of a step -> what would have to be faster."""


@dataclass(frozen=True)
class Step:
    """One decode step, seconds by part."""

    parts: Mapping[str, float]
    draft_tokens: int
    """Tokens of a request that a step works on: the last one and its drafts."""

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def limit(self) -> str:
        found: dict[str, float] = {}
        for part, seconds in self.parts.items():
            found[LIMITS[part]] = found.get(LIMITS[part], 0.0) + seconds
        return max(found, key=lambda limit: found[limit])


def draft_steps(spec: EngineSpec) -> int:
    said = str(spec.settings.get("speculative_num_steps", ""))
    return (int(said) if said.isdecimal() else 3) if speculates(spec) else 0


def decode_step(
    hf: HfConfig, kind: Served, rates: Rates, *, requests: float, context: float, flops: float, gpus_per_node: int
) -> Step:
    """requests: under way in one engine. context: their mean tokens. flops: of one token, forward."""
    spec, rank = kind.spec, kind.rank
    drafts = draft_steps(spec)
    tokens = requests * (drafts + 1)
    if rates.decode_step_ms:
        return Step({"given": rates.decode_step_ms / 1e3}, drafts + 1)
    layers = hf.num_layers / spec.pp_size
    touched = 1.0
    if hf.num_experts:
        touched = 1 - (1 - hf["num_experts_per_tok"] / hf.num_experts) ** tokens
    read = rank.weights - rank.expert_weights * (1 - touched) + rank.draft_weights * drafts
    own = max(requests / spec.dp_size, 1.0)  # of an attention replica that has any
    cache, rows = own * cache_read(hf, rank, context, drafts + 1), own * (drafts + 1)
    return Step(
        {
            "kernels": (layers + drafts) * rates.decode_layer_us / 1e6 * spec.pp_size,
            "weights": read * spec.pp_size / 1e9 / (rates.hbm_gb_per_s * rates.hbm_share),
            "cache": cache * spec.pp_size / 1e9 / (rates.hbm_gb_per_s * rates.hbm_share),
            "products": tokens * flops / spec.num_gpus / (rates.peak_tflops * 1e12 * rates.decode_mfu),
            "exchange": _exchange(hf, spec, rates, rows, gpus_per_node),
        },
        drafts + 1,
    )


def cache_read(hf: HfConfig, rank: EngineRank, context: float, queries: int) -> float:
    """Bytes of one rank's cache that one request reads in a step: all of it, or what the indexer selects for each query."""
    if not hf.has_indexer:
        return context * rank.kv_bytes_per_token
    selected = rank.kv_bytes_per_token - rank.index_bytes_per_token
    return queries * min(hf["index_topk"], context) * selected + context * rank.index_bytes_per_token


def _exchange(hf: HfConfig, spec: EngineSpec, rates: Rates, rows: float, gpus_per_node: int) -> float:
    """Of all layers. rows: tokens of one attention replica. DeepEP sends FP8 to the experts and gets bf16 back; without it, two
    sums of bf16 over all ranks."""
    if spec.tp_size == 1:
        return 0.0
    hidden = hf["hidden_size"]
    if str(spec.settings.get("moe_a2a_backend", "none")) == "none" or not hf.num_experts:
        link = rates.nic_gb_per_s if spec.num_gpus > gpus_per_node else rates.nvlink_gb_per_s
        nbytes = 2 * 2 * rows * spec.dp_size * hidden * 2
        return hf.num_layers * (2 * rates.exchange_latency_us / 1e6 + nbytes / 1e9 / link)
    moe = sum(hf.is_moe_layer(layer) for layer in range(hf.num_layers))
    own = rows * spec.dp_size / spec.num_gpus
    nbytes = own * hf["num_experts_per_tok"] * hidden * 3
    outside = max(0.0, 1 - gpus_per_node / spec.num_gpus)
    seconds = nbytes * outside / 1e9 / rates.nic_gb_per_s + nbytes * (1 - outside) / 1e9 / rates.nvlink_gb_per_s
    return moe * (2 * rates.exchange_latency_us / 1e6 + seconds)


@dataclass(frozen=True)
class Generation:
    """A rollout on the decode engines."""

    steps: float
    step: Step
    waves: float
    """Samples / what the engines hold at once."""

    @property
    def seconds(self) -> float:
        return self.steps * self.step.seconds

    @property
    def limit(self) -> str:
        return "KV room" if self.waves > 1 else self.step.limit


def generation(
    hf: HfConfig,
    engines: Engines,
    rates: Rates,
    *,
    samples: int,
    longest: int,
    prompt: int,
    flops: float,
    gpus_per_node: int,
) -> Generation:
    """The longest response decides; who waits takes a place when one of mean length ends, and the last may be the longest.

    longest: tokens of a response. prompt: of a prompt. flops: of one token, forward.
    """
    mean = longest * rates.mean_response_share
    held = engines.held or samples
    waves = samples / held
    tokens = longest + max(0.0, waves - 1) * mean
    under_way = samples * mean / tokens  # on average, over the whole rollout
    found: list[Generation] = []
    for kind in engines.decode:
        accepted = rates.tokens_per_decode_step if speculates(kind.spec) else 1.0
        requests = under_way * kind.spec.num_gpus / engines.decode_gpus
        step = decode_step(
            hf, kind, rates, requests=requests, context=prompt + mean / 2, flops=flops, gpus_per_node=gpus_per_node
        )
        found.append(Generation(tokens / accepted, step, waves))
    return max(found, key=lambda one: one.seconds)


def prefill_seconds(engines: Engines, rates: Rates, *, samples: int, prompt: int, flops: float) -> float:
    """Every sample's prompt is read once. flops: of one token, forward."""
    return samples * prompt * flops / (engines.prefill_gpus * rates.peak_tflops * 1e12 * rates.prefill_mfu)
