"""--use-rollout-indexer-replay: attention reads what engines told, in every layout, and chooses where they told nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from ranks import RankFailed, run_ranks
from test_routing_replay import CUTS, RECOMPUTED
from tiny import config_for, plans, rollout, start

from slime.model.hf_config import read_hf_config
from slime.types import RolloutBatch
from slime.types.selections import Piece, Selections
from slime_plugins.models.glm5.attention import SparseLatentAttention

pytestmark = pytest.mark.slow


def trained(rank: int, folder, batch: RolloutBatch, world: int, changes: dict, megatron: dict | None = None) -> tuple:
    """(what the first step reports with the old log-probs' mean, how often an indexer ran)"""
    config = config_for(folder, clip_grad=0.0, advantage_estimator="gspo", **changes)
    config.model.megatron.update(megatron or {})
    ran, own = 0, SparseLatentAttention.run_indexer

    def counted(self, *args):
        nonlocal ran
        ran += 1
        return own(self, *args)

    SparseLatentAttention.run_indexer = counted
    report = start(config).train(batch, plans(batch, config, world))
    return report.per_step[0] | {"log_probs": report.metrics.get("rollout/log_probs", 0.0)}, ran


def told(folder, batch: RolloutBatch, places, *, lost: range = range(0)) -> RolloutBatch:
    """places(sample, layer) -> [tokens, topk]; of the tokens in `lost` no engine tells."""
    hf = read_hf_config(folder)
    layers, topk = [layer for layer in range(hf.num_layers) if hf.runs_indexer(layer)], hf["index_topk"]
    column = []
    for sample, tokens in enumerate(batch.tokens):
        rows = {layer: places(sample, layer)[: len(tokens) - 1] for layer in layers}
        last = len(tokens) - 1
        spans = [(0, min(lost.start, last)), (min(lost.stop, last), last)] if lost else [(0, last)]
        pieces = [Piece.of({k: v[a:b] for k, v in rows.items()}, a, topk) for a, b in spans]
        column.append(Selections(tuple(pieces)))
    return replace(batch, indexer_topk=tuple(column))


def any_places(folder, batch: RolloutBatch, seed: int):
    topk, rng = read_hf_config(folder)["index_topk"], np.random.default_rng(seed)

    def places(sample: int, layer: int) -> np.ndarray:
        rows = [rng.permutation(place + 1)[:topk] for place in range(len(batch.tokens[sample]))]
        return np.array([np.pad(row, (0, topk - len(row)), constant_values=-1) for row in rows])

    return places


def own_places(folder, batch: RolloutBatch):
    """What the model's own indexers choose in the micro-batches of a step."""

    def recorded(rank: int) -> dict[tuple[int, int], np.ndarray]:
        config = config_for(folder, advantage_estimator="gspo")
        trainer, passes = start(config), {}
        own = SparseLatentAttention.run_indexer

        def kept(self, hidden, query_latent, stream):
            keys = own(self, hidden, query_latent, stream)
            passes.setdefault(self.layer_number - 1, []).append((keys.numpy(), stream.bounds))
            return keys

        SparseLatentAttention.run_indexer = kept
        steps = plans(batch, config, 1)
        trainer.log_probs(batch, steps)
        micros = [micro for plan in steps for micro in plan.micro_batches[0]]
        return {
            (sample, layer): np.where(keys[start:end] < 0, -1, keys[start:end] - start)
            for layer, of_layer in passes.items()
            for micro, (keys, bounds) in zip(micros, of_layer, strict=True)
            for sample, start, end in zip(micro, bounds, bounds[1:], strict=False)
        }

    chosen = run_ranks(1, recorded)[0]
    return lambda sample, layer: chosen[sample, layer]


REPLAY = {"use_rollout_indexer_replay": True}
LAYOUTS = {2: ("PP2 VPP2", "TP2 EP2", "CP2 EP2")}


def test_told_what_its_own_indexers_choose_a_step_is_the_same(glm_tiny):
    """With a token of which nothing was told in the middle, too; and no indexer runs where none is open."""
    batch = rollout(seed=71, longest=50)
    places = own_places(glm_tiny, batch)
    plain, ran = run_ranks(1, trained, glm_tiny, batch, 1, {})[0]
    assert ran > 0
    for lost in (range(0), range(20, 24)):
        for megatron in ({}, RECOMPUTED) if lost else ({},):
            same, ran = run_ranks(1, trained, glm_tiny, told(glm_tiny, batch, places, lost=lost), 1, REPLAY, megatron)[0]
            assert (ran > 0) == bool(lost)
            assert same == pytest.approx(plain, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("world", LAYOUTS)
def test_what_engines_read_is_what_every_layout_reads(glm_tiny, world):
    """Drawn at random it is another function of the model, and must be the same one however the rows are cut."""
    batch = rollout(seed=72, longest=50)
    here, other = (told(glm_tiny, batch, any_places(glm_tiny, batch, seed)) for seed in (0, 1))
    (one, _), (free, _) = (run_ranks(1, trained, glm_tiny, said, 1, REPLAY)[0] for said in (here, other))
    assert one["train/ppo_kl"] == 0, "the old log-probs are of the same keys as the step's"
    assert abs(free["log_probs"] - one["log_probs"]) > 1e-4
    for name in LAYOUTS[world]:
        for found, ran in run_ranks(world, trained, glm_tiny, here, world, REPLAY | CUTS[world][name]):
            assert ran == 0, name
            assert found["train/grad_norm"] == pytest.approx(one["train/grad_norm"], rel=1e-3), name
            assert found["train/entropy_loss"] == pytest.approx(one["train/entropy_loss"], rel=1e-4), name


def test_selections_of_another_model_are_one_line(glm_tiny):
    batch = rollout(seed=73, longest=50)
    wrong = Selections((Piece.of({0: np.zeros((0, 5), np.int32)}, 0, 5),))
    with pytest.raises(RankFailed, match=r"told of 5 places in layers \[0\]; this model selects 16 in layers \[0, 1, 2, 6\]"):
        run_ranks(1, trained, glm_tiny, replace(batch, indexer_topk=(wrong,) * len(batch)), 1, REPLAY)
    with pytest.raises(RankFailed, match="this rollout has no selections; was it made without the flag"):
        run_ranks(1, trained, glm_tiny, batch, 1, REPLAY)
