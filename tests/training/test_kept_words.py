"""--rollout-top-p and --rollout-top-k: a step's log-probs are over the words that sampling left each token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from ranks import run_ranks
from test_index_replay import LAYOUTS
from test_routing_replay import CUTS
from tiny import config_for, plans, rollout, start

from slime.types import RolloutBatch
from slime.types.kept_words import KeptWords

pytestmark = pytest.mark.slow
VOCAB = 96


def with_kept_words(batch: RolloutBatch, *, seed: int = 0) -> RolloutBatch:
    """Each trained token among up to nine words in no order; what is not trained has none."""
    rng, column = np.random.default_rng(seed), []
    for tokens, response, mask in zip(batch.tokens, batch.response_lengths, batch.loss_masks, strict=True):
        spans = []
        for token, trained in zip(tokens[len(tokens) - response :], mask, strict=True):
            others = np.setdiff1d(rng.choice(VOCAB, rng.integers(0, 9), replace=False), [token])
            spans.append(rng.permutation([*others, token]) if trained else np.zeros(0, np.int64))
        offsets = np.cumsum([0, *map(len, spans)])
        column.append(KeptWords(np.concatenate(spans).astype(np.int32), offsets.astype(np.int32)))
    return replace(batch, kept_words=tuple(column))


def test_log_probs_are_transformers_over_the_kept_words(qwen3):
    import transformers

    batch = with_kept_words(rollout(seed=81))
    model = transformers.Qwen3ForCausalLM.from_pretrained(qwen3, dtype=torch.float32, attn_implementation="eager")

    def own(rank: int) -> dict[int, torch.Tensor]:
        config = config_for(qwen3)
        return start(config).log_probs(batch, plans(batch, config, 1))

    found = run_ranks(1, own)[0]
    for position, (tokens, kept) in enumerate(zip(batch.tokens, batch.kept_words, strict=True)):
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)[None]).logits[0] / 0.8
        response = int(batch.response_lengths[position])
        for number in range(response):
            row = len(tokens) - response - 1 + number
            words = torch.from_numpy(kept.ids[kept.offsets[number] : kept.offsets[number + 1]]).long()
            among = logits[row, words] if len(words) else logits[row]
            want = logits[row, tokens[row + 1]] - torch.logsumexp(among, -1)
            assert float(found[position][number]) == pytest.approx(float(want), abs=2e-5)


@pytest.mark.parametrize("world", LAYOUTS)
def test_every_layout_limits_the_same_rows(glm_tiny, world):
    batch = with_kept_words(rollout(seed=82))

    def step(rank: int, cut: dict, of: RolloutBatch = batch) -> dict[str, float]:
        config = config_for(glm_tiny, clip_grad=0.0, **cut)
        return start(config).train(of, plans(of, config, world if cut else 1)).per_step[0]

    one = run_ranks(1, step, {})[0]
    free = run_ranks(1, lambda rank: step(rank, {}, replace(batch, kept_words=None)))[0]
    assert one["train/entropy_loss"] < 0.6 * free["train/entropy_loss"], "of nine words at most"
    for name in LAYOUTS[world]:
        for found in run_ranks(world, step, CUTS[world][name]):
            assert found["train/grad_norm"] == pytest.approx(one["train/grad_norm"], rel=1e-3), name
            assert found["train/entropy_loss"] == pytest.approx(one["train/entropy_loss"], rel=1e-4), name
