"""Memory, time and cost of one reading of the flags, without a word: the rehearsal, the curves and the plan ask the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slime.config import Config
from slime.config.passes import passes_of
from slime.engine.spec import EngineSpec
from slime.rehearse.checks.engines import EnginePlan
from slime.rehearse.checks.layout import layer_costs
from slime.rehearse.checks.memory import Budget, assumed_of, check_memory, mean_sample, prompt_tokens, train_shapes
from slime.rehearse.findings import Findings
from slime.rehearse.model.cost import Cost, Shape, predict, sync_bytes
from slime.rehearse.model.decode import Engines, Generation, Served, generation, prefill_seconds
from slime.rehearse.model.engine_memory import EngineRank, KvCache, alike, engine_ranks, smallest_served
from slime.rehearse.model.exchange import training_exchange
from slime.rehearse.model.flops import ModelWork, model_work
from slime.rehearse.model.memory import TrainShapes
from slime.rehearse.model.rates import Rates
from slime.rehearse.model.shares import StageShare, stage_shares
from slime.rehearse.model.stages import rank_costs
from slime.rehearse.options import Options
from slime.rehearse.reading import Reading


@dataclass(frozen=True)
class Assessment:
    reading: Reading
    plan: EnginePlan
    shares: tuple[StageShare, ...]
    budget: Budget
    cost: Cost
    engines: Engines


def assess(
    reading: Reading,
    plan: EnginePlan,
    options: Options,
    rates: Rates,
    findings: Findings,
    *,
    length: int,
    longest: int | None,
    node_counts: bool = True,
) -> Assessment:
    """What memory says goes to `findings`. length: tokens of the sequence that FLOPs are for. node_counts: on how many nodes
    training would fit, too."""
    config, grid, hf = reading.config, reading.grid, reading.hf
    assumed = assumed_of(options.assume)
    shares = tuple(
        stage_shares(reading.table, reading.chunks, grid, padded_vocab=config.model.padded_vocab_size, mtp=reading.trains_mtp)
    )
    prompt = prompt_tokens(config, assumed)
    mean = mean_sample(longest, prompt=prompt, share=rates.mean_response_share)
    shapes = train_shapes(reading, longest=longest, mean=mean)
    told = {"version": plan.version, "env": options.env, "mem_fraction": assumed.mem_fraction_static}
    served = smallest_served(hf) if reading.basis == "flags" else hf
    ranks = engine_ranks(reading.table, served, plan.specs, **told)
    budget = check_memory(reading, shares, shapes, ranks, options, findings, longest=longest, node_counts=node_counts)
    engines = _engines(plan.specs, ranks, budget.caches)
    work = model_work(reading.table, hf, min(length, mean), mtp=reading.trains_mtp)
    shape = _shape(reading, shapes, mean=mean, longest=longest)
    arithmetic = {"budget": budget, "shares": shares, "shapes": shapes, "engines": engines, "work": work, "shape": shape}
    cost = _cost(reading, plan, rates, length=length, prompt=prompt, **arithmetic)
    return Assessment(reading, plan, shares, budget, cost, engines)


def _stage_costs(reading: Reading, length: int) -> list[float]:
    """Training FLOPs per token of each stage."""
    work = model_work(reading.table, reading.hf, length, mtp=reading.trains_mtp)
    costs, head = layer_costs(work, recompute=reading.config.model.megatron.get("recompute_granularity") == "full")
    return rank_costs(reading.chunks, costs, head)


def num_samples(config: Config) -> int:
    return (config.data.rollout_batch_size or 0) * config.data.n_samples_per_prompt


def num_steps(config: Config) -> int:
    """Optimizer steps of a rollout."""
    samples = num_samples(config)
    return max(1, samples // (config.batch.global_batch_size or max(samples, 1)))


def _engines(specs: Sequence[EngineSpec], ranks: Sequence[EngineRank], caches: Sequence[KvCache]) -> Engines:
    """The same engines as `ranks`, counted; max_running_requests bounds what one holds besides its cache."""
    mine = [spec for spec in specs if spec.update_weights]
    first = {alike(spec): spec for spec in reversed(mine)}
    keys = list(dict.fromkeys(alike(spec) for spec in mine))
    served = []
    for key, rank, cache in zip(keys, ranks, caches, strict=True):
        said, held = str(first[key].settings.get("max_running_requests", "")), cache.at_once or 0
        held = min(held, int(said)) if said.isdecimal() else held
        served.append(Served(first[key], rank, sum(alike(spec) == key for spec in mine), held))
    return Engines(
        tuple(kind for kind in served if kind.spec.role != "prefill"),
        tuple(kind for kind in served if kind.spec.role != "decode"),
    )


def _shape(reading: Reading, shapes: TrainShapes, *, mean: int, longest: int | None) -> Shape:
    """mean, longest: tokens of a sample."""
    config, steps = reading.config, num_steps(reading.config)
    return Shape(
        samples=num_samples(config),
        mean_tokens=mean,
        trainer_gpus=reading.grid.world,
        rollout_gpus=config.cluster.rollout_num_gpus or 0,
        micro_batches=shapes.micro_batches,
        steps=steps,
        passes=passes_of(config, steps).count,
        trains_critic=config.algorithm.advantage_estimator == "ppo",
        colocate=config.cluster.colocate,
        overlaps=config.loop.runs_ahead and not config.debug.debug_train_only,
        sync_every=config.engine.update_weights_interval,
        vpp=shapes.vpp,
        longest_sample=longest or 0,
    )


def _cost(
    reading: Reading,
    plan: EnginePlan,
    rates: Rates,
    *,
    budget: Budget,
    shares: tuple[StageShare, ...],
    shapes: TrainShapes,
    engines: Engines,
    work: ModelWork,
    shape: Shape,
    length: int,
    prompt: int,
) -> Cost:
    config, grid, hf, per_node = reading.config, reading.grid, reading.hf, reading.config.cluster.num_gpus_per_node
    generates: Generation | None = None
    prefill = 0.0
    if engines.decode and engines.prefill and shape.samples:
        response = config.rollout.rollout_max_response_len or length
        generates = generation(
            hf,
            engines,
            rates,
            samples=shape.samples,
            longest=response,
            prompt=prompt,
            flops=work.forward,
            gpus_per_node=per_node,
        )
        prefill = prefill_seconds(engines, rates, samples=shape.samples, prompt=prompt, flops=work.forward)
    exchange = training_exchange(
        hf,
        grid,
        shares,
        rates,
        tokens=shape.samples * shape.mean_tokens,
        steps=shape.steps,
        passes=shape.passes,
        recompute=shapes.recompute,
        grad_bytes=shapes.grad_bytes,
        gpus_per_node=per_node,
    )
    models = 2 if shape.trains_critic else 1
    parameters = reading.num_parameters * models
    saved = parameters * 2 if config.checkpoint.no_save_optim else parameters * (2 + shapes.optimizer_bytes)
    return predict(
        work,
        _stage_costs(reading, length),
        grid,
        shape,
        sync_bytes(reading.table, hf, plan.specs, rates, gpus_per_node=per_node, mtp=reading.trains_mtp),
        rates,
        generates=generates,
        prefill=prefill,
        exchange=exchange,
        recompute=shapes.recompute,
        trainer_bytes_per_gpu=models
        * max(stage.share.parameters * shapes.param_bytes + stage.share.trained * shapes.grad_bytes for stage in budget.stages),
        optimizer_bytes_per_node=budget.node_optimizer,
        checkpoint_bytes=saved,
        save_interval=config.checkpoint.save_interval if config.checkpoint.save else None,
    )
