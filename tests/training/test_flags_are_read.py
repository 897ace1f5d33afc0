"""No flag in vain: what a whole tiny run reads of megatron-core's config, by attribute access on the real object.

A field that is accepted is read by code that runs here, is compared with config.json (which decides it), is turned off with a
note, or stands in slime.config.rules.effects, whose note says at start that it changes nothing.
"""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from tiny import config_for, plans, rollout, start

from slime.config.command_line import flag_table
from slime.config.hf_check import NEUTRAL
from slime.config.rules.effects import UNREAD
from slime.config.rules.training import DISPATCHER_EXTRAS
from slime.model import build
from slime.model.transformer_config import NEEDS_OTHER_PACKAGES

pytestmark = pytest.mark.slow


COMPARED = frozenset(
    """add_qkv_bias beta_fast beta_slow kv_channels kv_lora_rank moe_layer_freq mscale mscale_all_dim normalization
    num_attention_heads num_query_groups original_max_position_embeddings q_lora_rank qk_head_dim qk_layernorm
    qk_pos_emb_head_dim rope_type rotary_interleaved rotary_scaling_factor v_head_dim""".split()
)
"""slime.config.hf_check compares them with config.json, from which the layers read."""
ELSEWHERE = frozenset(
    """batch_p2p_sync use_ring_exchange_p2p overlap_p2p_comm_warmup_flush
    clone_scatter_output_in_embedding
    wgrad_deferral_limit
    moe_token_drop_policy
    recompute_modules moe_layer_recompute""".split()
)
"""Line by line: read with pipeline stages, sequence parallelism, deferred weight gradients, a capacity of experts, selective
recomputation."""
OURS_WHATEVER_IS_SAID = frozenset(
    """attention_backend perform_initialization use_cpu_initialization mlp_chunks_for_prefill
    moe_router_padding_for_quantization""".split()
)
"""megatron-core reads them, with the values that slime.model.transformer_config sets or leaves at their defaults."""


def names_read(rank: int, folder, changes: dict, megatron: dict) -> tuple[set[str], bool]:
    """Attributes of the TransformerConfig that were read after it was made, by build, one rollout's training, named weights."""
    read: set[str] = set()
    real = build.transformer_config

    def recording(*args: object, **kwargs: object):
        config, notes = real(*args, **kwargs)
        plain = type(config)

        class Recording(plain):
            def __getattribute__(self, name: str) -> object:
                read.add(name)
                return super().__getattribute__(name)

        config.__class__ = Recording
        return config, notes

    build.transformer_config = recording
    config = config_for(folder, **changes)
    config.model.megatron.update(megatron)
    trainer = start(config)
    batch = rollout()
    trainer.train(batch, plans(batch, config, 1))
    assert list(trainer.named_weights())
    return read, torch.are_deterministic_algorithms_enabled()


def test_every_field_that_a_flag_fills_is_read_or_said_to_change_nothing(qwen3, glm):
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    (dense, ordered), (sparse, unordered) = (
        run_ranks(1, names_read, folder, {}, megatron)[0]
        for folder, megatron in ((qwen3, {"deterministic_mode": True}), (glm, full))
    )
    assert ordered and not unordered, "--deterministic-mode reaches torch, which our kernels ask"
    read = dense | sparse
    assert {"hidden_size", "moe_router_topk", "recompute_method"} <= read
    fields = {row.dest for row in flag_table().values() if row.section == "model.megatron" and not row.later}
    told = NEUTRAL.keys() | NEEDS_OTHER_PACKAGES.keys() | UNREAD.keys() | set(DISPATCHER_EXTRAS) | {"attention_dropout"}
    silent = fields - read - told - COMPARED - ELSEWHERE
    assert silent == set(), "read them, or say in slime.config.rules.effects.UNREAD why they change nothing"
    assert UNREAD.keys() & read <= OURS_WHATEVER_IS_SAID, "these are read after all"
