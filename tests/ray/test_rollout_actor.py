"""The rollout actor without engines: what it dumps, it can replay, and the checkpoint's data position survives both."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from slime.config import Config
from slime.config.config import section_of
from slime.ray.rollout_actor import RolloutActor, seed_generators
from slime.ray.run import sample_costs
from tools.tiny_tokenizer import write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    write_tokenizer(folder / "tokenizer", "qwen", max_length=512)
    rows = [[{"role": "user", "content": f"{n} plus 1?"}, {"role": "assistant", "content": str(n + 1)}] for n in range(1, 8)]
    (folder / "sft.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return folder


def config_with(folder: Path, **values) -> Config:
    values = {
        "hf_checkpoint": str(folder / "tokenizer"), "prompt_data": str(folder / "sft.jsonl"), "input_key": "messages",
        "rollout_function_path": "slime.rollout.sft_rollout.generate_rollout", "loss_type": "sft_loss",
        "n_samples_per_prompt": 1, "rollout_batch_size": 3, "debug_train_only": True, "loss_mask_type": "qwen3",
    } | values  # fmt: skip
    config = Config()
    for name, value in values.items():
        section = section_of()[name]
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{name: value})})
    return config


def started(config: Config, tmp_path: Path):
    """The actor's class as a plain object: the same code, no Ray."""
    actor = RolloutActor.__ray_metadata__.modified_class(config, None, tmp_path, "token")
    actor.start()
    return actor


def test_what_is_dumped_is_replayed_with_its_data_position_and_without_prompts(folder, tmp_path):
    template = str(tmp_path / "dumps" / "{rollout_id}.pt")
    live = started(config_with(folder, save_debug_rollout_data=template), tmp_path)
    batches = [live.generate(rollout_id)[0] for rollout_id in range(3)]
    replay = started(config_with(folder, load_debug_rollout_data=template, prompt_data=None), tmp_path)
    assert replay.state() is None
    for rollout_id, batch in enumerate(batches):
        again, report = replay.generate(rollout_id)
        assert all(np.array_equal(a, b) for a, b in zip(batch.tokens, again.tokens, strict=True))
        assert all(np.array_equal(a, b) for a, b in zip(batch.loss_masks, again.loss_masks, strict=True))
        assert report.metrics["rollout/response_len/mean"] == np.mean([mask.sum() for mask in batch.loss_masks])
    assert replay.state() == live.state() and replay.state()["epoch_id"] == 1
    with pytest.raises(ValueError, match=r"there is no .*3\.pt"):
        replay.generate(3)


def test_a_resumed_replay_keeps_the_checkpoints_position_until_a_file_tells_a_later_one(folder, tmp_path):
    torch.save({"rollout_id": 5, "samples": []}, tmp_path / "5.pt")
    replay = started(config_with(folder, load_debug_rollout_data=str(tmp_path / "{rollout_id}.pt")), tmp_path)
    replay.restore({"sample_offset": 4})
    with pytest.raises(ValueError, match="rollout 6 has no samples"):
        replay.generate(5)
    assert replay.state() == {"sample_offset": 4}


def test_epochs_cannot_be_counted_without_prompts(folder, tmp_path):
    replay = started(config_with(folder, load_debug_rollout_data="/d/{rollout_id}.pt", num_epoch=1, num_rollout=None), tmp_path)
    with pytest.raises(ValueError, match="give --num-rollout with --load-debug-rollout-data"):
        replay.num_rollout()


def test_dump_details_keeps_the_tokenizer_beside_the_rollouts(folder, tmp_path):
    from slime.rollout.tokenizer import load_tokenizer

    details = tmp_path / "details"
    started(config_with(folder, dump_details=str(details)), tmp_path)
    text = "3 plus 4?"
    kept, original = load_tokenizer(str(details)), load_tokenizer(str(folder / "tokenizer"))
    assert kept.encode(text) == original.encode(text)
    assert kept.chat_template == original.chat_template


MLA = {
    "num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 24, "num_attention_heads": 4, "multi_latent_attention": True,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_head_dim": 6, "qk_pos_emb_head_dim": 2, "v_head_dim": 6,
}  # fmt: skip


@pytest.mark.parametrize("topk, work_of_a_late_key", [(10, 0.0), (None, 2.0 * 2 * 4 * (6 + 2 + 6))])
def test_samples_are_balanced_by_work_with_sparse_attention_counted_as_used(tmp_path, topk, work_of_a_late_key):
    """Beyond the selected keys each token costs the same; without sparse attention one key more for each token before it."""
    sparse = {"model_type": "glm_moe_dsa", "index_topk": topk} if topk else {"model_type": "deepseek_v3"}
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 100, **sparse}))
    config = config_with(tmp_path, hf_checkpoint=str(tmp_path), balance_data=True)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, megatron=MLA))
    costs = sample_costs(config, np.array([100, 101, 102]))
    assert np.diff(costs, 2)[0] == pytest.approx(work_of_a_late_key)


def test_nothing_is_estimated_where_nothing_is_balanced(tmp_path):
    assert sample_costs(config_with(tmp_path, hf_checkpoint="/missing"), np.array([1, 2])) is None


def test_what_a_plugin_draws_depends_on_the_seed_and_the_rollout_alone():
    def draw(seed: int, rollout_id: int) -> tuple[float, float]:
        seed_generators(seed, rollout_id)
        return random.random(), float(np.random.rand())

    first = draw(42, 3)
    draw(42, 2)
    assert draw(42, 3) == first
    assert len({draw(seed, rollout_id) for seed in (42, 43) for rollout_id in range(4)}) == 8
