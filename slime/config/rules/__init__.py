"""The rule book: one ordered list of everything that a configuration must fulfil, run by whoever asks.

The launcher's check (`python3 -m slime.config --check`) and the start of a run stop at the first stage with a mistake
(`stop_at_first`); the rehearsal collects what every rule says (`collect`). Nobody else holds rules of his own.

A rule is a function `rule(v: Values) -> None` in the file of its subject. It reads `v[attribute]`, `v.facts` (what the disk
says) and `v.env` (the job's environment, None when unknown), and calls
    v.derive(name, value, why)              a value that follows from others
    v.require(good, mistake, holds=...)     a law: the mistake names the values and, after the last semicolon, the way out
    v.undecided(what, values, fix)          what decides is not at hand; the rehearsal's verdict is then "not proven"
    v.holds(what, values)                   something proven, for the report
To add one: write it, put it into its stage below, and add a row to tests/rehearse/test_rule_book.py.

Must never know: torch, other rooms, what a disk holds (that is gathered once, in slime.config.facts).
"""

from __future__ import annotations

from slime.config.rules import (
    algorithm,
    batch,
    config_json,
    context,
    critic,
    dispatch,
    distillation,
    effects,
    engine_answers,
    engine_model,
    engine_options,
    engine_server,
    engines,
    environment,
    evaluation,
    external,
    layout,
    lengths,
    loop,
    model,
    optimizer,
    placement,
    replay,
    rewards,
    router,
    saving,
    supervised,
    training,
    weight_sync,
)
from slime.config.rules.book import Collected, Rule, Said, Stage, Values, collect, stop_at_first, way_out

STAGES: tuple[Stage, ...] = (
    Stage(
        (
            config_json.types,
            optimizer.numbers,
            model.shape,
            model.checkpoint_fields,
            model.family,
            model.mtp,
            training.dispatcher,
        ),
        converts=True,
    ),
    Stage((external.external, placement.debug_modes, loop.chosen, placement.placement)),
    Stage((layout.layout,), converts=True),
    Stage((layout.sequences, layout.stage_starts, training.multi_token_prediction, training.recomputation)),
    Stage(
        (
            algorithm.algorithm,
            distillation.distillation,
            critic.critic,
            batch.batch,
            lengths.lengths,
            evaluation.evaluation,
            supervised.supervised,
            evaluation.responses,
            rewards.grading,
            training.probabilities,
            training.schedule,
            training.offloading,
            saving.saving,
            saving.snapshots,
            saving.folders,
            saving.initial_weights,
            weight_sync.weight_sync,
            loop.schedule,
            replay.trainable,
            lengths.what_is_left,
            effects.without_effect,
            effects.belongs_to_another,
        )
    ),
    Stage((engines.groups, replay.kept_words, replay.recorded, engines.sizes, router.joined, router.options)),
    Stage(
        (
            context.engine_context,
            engine_model.division,
            engine_model.dense_ranks,
            engine_model.fp8_blocks,
            engine_model.sparse_attention,
            engine_model.speculation,
            engine_model.fractions,
            engine_model.pairs,
            engine_server.arguments,
            engine_options.options,
            engine_answers.answers,
            engine_options.accepted_drafts,
            replay.recordable,
            dispatch.deepep,
            weight_sync.broadcast,
            weight_sync.unused_ways,
        )
    ),
    Stage(
        (
            dispatch.variable,
            environment.trainers_own,
            environment.addresses,
            environment.nvshmem,
            environment.offloading,
            environment.devices,
            environment.spelling,
        )
    ),
)

RULES: tuple[Rule, ...] = tuple(rule for stage in STAGES for rule in stage.rules)

__all__ = ["Collected", "RULES", "Rule", "STAGES", "Said", "Stage", "Values", "collect", "stop_at_first", "way_out"]
