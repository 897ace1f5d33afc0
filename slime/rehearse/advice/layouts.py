"""Layouts of the trainer on so many GPUs: what divides, ordered by how long training would take. The rule book judges later."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from slime.config.stages import Cut, cut_layers, layout_string
from slime.model.placement import Grid
from slime.rehearse.advice.variants import Variant
from slime.rehearse.assess import num_samples, num_steps
from slime.rehearse.checks.layout import LAYOUT, PAIR, VIRTUAL, layer_costs
from slime.rehearse.checks.memory import DEFAULT_LENGTH, mean_sample
from slime.rehearse.model.cost import bubble, spread
from slime.rehearse.model.exchange import training_exchange
from slime.rehearse.model.flops import model_work
from slime.rehearse.model.rates import Rates
from slime.rehearse.model.shares import StageParts, shares_of, stage_parts
from slime.rehearse.model.stages import balance, best_list, rank_costs
from slime.rehearse.reading import Reading

MOST_STAGES = 32
FEW_EXPERT_SIZES = 5
MOST_EXPERT_RANKS = 64
"""Over more ranks an exchange is many small messages, which its bandwidth does not describe."""


@dataclass(frozen=True)
class Layout:
    """One way to cut the model. sizes: layers of each chunk in the order in which a token passes them."""

    grid: Grid
    sizes: tuple[int, ...]
    seconds: float
    """Of training one rollout: products, bubble and exchange."""
    least_gb: float
    """Weights and gradients of the fullest rank."""

    @property
    def vpp(self) -> int:
        return len(self.sizes) // self.grid.pp

    def said(self) -> str:
        grid = self.grid
        experts = f", EP {grid.ep}" + (f" x ETP {grid.etp}" if grid.etp > 1 else "") if grid.ep > 1 else ""
        stages = f", layers {'/'.join(map(str, self.sizes))}" if grid.pp > 1 else ""
        return f"TP {grid.tp} x PP {grid.pp} x CP {grid.cp} x DP {grid.dp}{experts}{stages}"


class Layouts:
    """The layouts of one model and batch. `reading` says what the model is; its own sizes do not matter."""

    def __init__(self, reading: Reading, rates: Rates, *, length: int, longest: int | None, prompt: int):
        self._reading, self._rates, self._prompt = reading, rates, prompt
        self._recompute = reading.config.model.megatron.get("recompute_granularity") == "full"
        self._longest = longest
        self._work = model_work(reading.table, reading.hf, length, mtp=reading.trains_mtp)
        self._costs, self._head = layer_costs(self._work, recompute=self._recompute)

    @cache  # noqa: B019
    def _split(self, pp: int, vpp: int) -> tuple[tuple[int, ...], tuple[StageParts, ...], float] | None:
        """(layers of each chunk, tensors of each stage, evenness); None where no cut is legal."""
        reading = self._reading
        sends = reading.config.parallel.dsa_send_indices
        best = best_list(reading.hf, pp * vpp, self._costs, self._head, any_start=sends) if pp > 1 else None
        if best is None and pp > 1:
            return None
        sizes = best.sizes if best else (reading.hf.num_layers,)
        chunks = cut_layers(Cut(reading.hf.num_layers, pp, layout=layout_string(sizes)))
        parts = tuple(stage_parts(reading.table, chunks, pp, mtp=reading.trains_mtp))
        return sizes, parts, balance(rank_costs(chunks, self._costs, self._head))

    @cache  # noqa: B019
    def on(self, gpus: int, *, prompts_times: int = 1) -> list[Layout]:
        """All that divide, fastest first. prompts_times: so many times the run's prompts."""
        found = (self._layout(grid, vpp, prompts_times) for grid, vpp in self._grids(gpus))
        return sorted((layout for layout in found if layout is not None), key=lambda layout: layout.seconds)

    def _grids(self, gpus: int) -> Iterator[tuple[Grid, int]]:
        hf, per_node = self._reading.hf, self._reading.config.cluster.actor_num_gpus_per_node or 8
        mega = self._reading.config.model.megatron
        heads, groups = hf["num_attention_heads"], mega.get("num_query_groups") or hf["num_attention_heads"]
        for tp in (size for size in (1, 2, 4, 8) if size <= per_node and heads % size == 0 and groups % size == 0):
            for pp in range(1, min(gpus // tp, hf.num_layers, MOST_STAGES) + 1):
                if gpus % (tp * pp):
                    continue
                for cp in (size for size in (1, 2, 4, 8, 16) if gpus % (tp * pp * size) == 0):
                    for ep, etp in self._experts(gpus // pp, tp):
                        for vpp in (1, 2) if 1 < pp and pp * 2 <= hf.num_layers else (1,):
                            yield Grid(world=gpus, tp=tp, pp=pp, cp=cp, ep=ep, etp=etp), vpp

    def _experts(self, ranks: int, tp: int) -> list[tuple[int, int]]:
        """(EP, ETP): the widest that divide, with whole experts; shared ones where there are fewer experts than ranks."""
        experts = self._reading.hf.num_experts
        if not experts:
            return [(1, tp)] if ranks % tp == 0 else []
        wide = [
            size for size in range(min(ranks, experts, MOST_EXPERT_RANKS), 0, -1) if experts % size == 0 and ranks % size == 0
        ]
        found = [(size, 1) for size in wide[:FEW_EXPERT_SIZES]]
        if ranks > experts and tp > 1 and ranks % (experts * tp) == 0:
            found.append((experts, tp))
        return found

    def _layout(self, grid: Grid, vpp: int, prompts_times: int) -> Layout | None:
        split = self._split(grid.pp, vpp)
        if split is None:
            return None
        sizes, parts, evenness = split
        config, hf, rates = self._reading.config, self._reading.hf, self._rates
        shares = shares_of(parts, grid, padded_vocab=config.model.padded_vocab_size)
        width = 4 if config.model.params_dtype == "fp32" else 2
        grad = 4 if width == 4 or config.optimizer.accumulate_allreduce_grads_in_fp32 else 2
        least = max(share.parameters * width + share.trained * grad for share in shares) / 1e9
        mean = mean_sample(self._longest, prompt=self._prompt, share=rates.mean_response_share)
        tokens = num_samples(config) * prompts_times * mean
        micro = self._micro_batches(grid, tokens / num_steps(config))
        alike = spread(tokens / num_steps(config), self._longest or 0, grid.dp)
        busy = evenness * (1 - bubble(grid.pp, micro, vpp)) * alike
        usable = grid.world * rates.peak_tflops * 1e12 * rates.training_mfu
        told = {"tokens": tokens, "steps": num_steps(config), "passes": 1, "recompute": self._recompute, "grad_bytes": grad}
        exchange = training_exchange(hf, grid, shares, rates, **told, gpus_per_node=config.cluster.num_gpus_per_node)
        products = tokens * (self._work.training(recompute=self._recompute) + self._work.forward) / usable / busy
        return Layout(grid, sizes, products + sum(exchange.values()), least)

    def _micro_batches(self, grid: Grid, tokens: float) -> int:
        batch = self._reading.config.batch
        own = batch.max_tokens_per_gpu if batch.use_dynamic_batch_size and batch.max_tokens_per_gpu else None
        own = own or (self._longest or DEFAULT_LENGTH) * batch.micro_batch_size // grid.cp
        return max(1, int(tokens / grid.dp // (own * grid.cp)))


def layout_flags(reading: Reading, layout: Layout) -> Variant:
    """The layout's flags, to be put behind the run's: what it had otherwise is taken back."""
    grid, parallel = layout.grid, reading.config.parallel
    words = ["--tensor-model-parallel-size", str(grid.tp)]
    words += ["--sequence-parallel"] if grid.tp > 1 and not parallel.sequence_parallel else []
    words += ["--pipeline-model-parallel-size", str(grid.pp), "--context-parallel-size", str(grid.cp)]
    words += ["--allgather-cp"] if grid.cp > 1 and reading.hf.has_indexer and not parallel.allgather_cp else []
    words += ["--expert-model-parallel-size", str(grid.ep), "--expert-tensor-parallel-size", str(grid.etp)]
    for flag in (*PAIR, *VIRTUAL):
        if getattr(parallel, flag[2:].replace("-", "_")) is not None:
            words += [flag, "none"]
    if grid.pp > 1:
        words += [LAYOUT, ",".join(map(str, layout.sizes))]
    elif parallel.pipeline_model_parallel_layout is not None:
        words += [LAYOUT, "none"]
    return Variant(tuple(words))


def smaller_batches(reading: Reading) -> list[Variant]:
    """The run's tokens per micro-batch, then halves of them."""
    tokens = reading.config.batch.max_tokens_per_gpu
    if not tokens or not reading.config.batch.use_dynamic_batch_size:
        return [Variant()]
    return [Variant() if part == 1 else Variant(("--max-tokens-per-gpu", str(tokens // part))) for part in (1, 2, 4)]


def on_nodes(reading: Reading, nodes: int, rollout_gpus: int | None) -> Variant:
    """The cluster's flags. rollout_gpus: of engines with GPUs of their own; None where they share the trainer's."""
    words = ["--actor-num-nodes", str(nodes)]
    if rollout_gpus is not None:
        words += ["--rollout-num-gpus", str(rollout_gpus)]
    elif not any(note.startswith("rollout_num_gpus ") for note in reading.config.notes):
        words += ["--rollout-num-gpus", "none"]
    return Variant(tuple(words))
