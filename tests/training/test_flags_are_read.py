"""No flag in vain: what a whole tiny run reads of megatron-core's config, by attribute access on the real object.

A field that is accepted is read by code that runs here, is compared with config.json (which decides it), is turned off with a
note, or stands in slime.config.rules.effects, whose note says at start that it changes nothing.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
from model.reference import FAMILIES, make_reference
from ranks import run_ranks
from tiny import config_for, plans, rollout, start

from slime.config.command_line import flag_table
from slime.config.hf_check import NEUTRAL
from slime.config.rules.effects import UNREAD
from slime.config.rules.training import DISPATCHER_EXTRAS
from slime.model import build
from slime.model.hf_config import read_hf_config
from slime.model.transformer_config import NEEDS_OTHER_PACKAGES
from slime_plugins.models.glm5.ops import hopper_ops

pytestmark = pytest.mark.slow


COMPARED = frozenset(
    """add_qkv_bias beta_fast beta_slow kv_channels kv_lora_rank moe_layer_freq mscale mscale_all_dim normalization
    num_attention_heads num_query_groups original_max_position_embeddings q_lora_rank qk_head_dim qk_layernorm
    qk_pos_emb_head_dim rope_type rotary_interleaved rotary_scaling_factor v_head_dim""".split()
)
"""slime.config.hf_check compares them with config.json, from which the layers read."""
OURS_WHATEVER_IS_SAID = frozenset(
    """attention_backend perform_initialization use_cpu_initialization mlp_chunks_for_prefill
    moe_router_padding_for_quantization overlap_p2p_comm batch_p2p_comm""".split()
)
"""megatron-core reads them, with the values that slime.model.transformer_config sets or leaves at their defaults."""


def names_read(rank: int, runs: list[tuple[Path, dict, dict]]) -> tuple[list[set[str]], bool]:
    """Attributes of the TransformerConfig that are read after it was made: by build, one rollout's training, named weights.

    runs: (HF folder, changes of the config, fields of megatron-core's) each. Also: do our kernels then add in order?
    """
    real, found = build.transformer_config, []

    def recording(*args: object, **kwargs: object):
        config, notes = real(*args, **kwargs)
        plain, read = type(config), found[-1]

        class Recording(plain):
            def __getattribute__(self, name: str) -> object:
                read.add(name)
                return super().__getattribute__(name)

        config.__class__ = Recording
        return config, notes

    build.transformer_config = recording
    for folder, changes, megatron in runs:
        found.append(set())
        config = config_for(folder, **changes)
        hf = read_hf_config(folder)
        if hf.is_mla and (factor := hf.rope_parameters.get("factor")):
            config.model.megatron["rotary_scaling_factor"] = factor
        config.model.megatron.update(megatron)
        trainer = start(config)
        batch = rollout()
        trainer.train(batch, plans(batch, config, dist.get_world_size()))
        assert list(trainer.named_weights()) or dist.get_world_size() > 1
    return found, hopper_ops._in_order()


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
FOUR_RANKS = dict(
    tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=6,
    expert_model_parallel_size=2, expert_tensor_parallel_size=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def read(glm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """What each family's model reads in one process, and GLM-5.2 over four ranks."""
    folder = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        make_reference(family, folder / family)
    sandwich = {"glm4": dict(post_self_attn_layernorm=True, post_mlp_layernorm=True)}
    runs = [(folder / name, sandwich.get(name, {}), FULL if number % 2 else {}) for number, name in enumerate(FAMILIES)]
    alone, unordered = run_ranks(1, names_read, runs, timeout=300)[0]
    assert not unordered
    together = [ranks for ranks, _ in run_ranks(4, names_read, [(glm, FOUR_RANKS, FULL), (glm, FOUR_RANKS, SELECTIVE)])]
    four = set().union(*(one for ranks in together for one in ranks))
    return dict(zip(FAMILIES, alone, strict=True)) | {"glm over four ranks": four}


def test_every_field_that_a_flag_fills_is_read_or_said_to_change_nothing(read: dict[str, set[str]]) -> None:
    for family, names in read.items():
        assert {"hidden_size", "num_layers", "layernorm_epsilon"} <= names, family
        assert family.endswith("ranks") or ("moe_router_topk" in names) == ("moe" in family or "deepseek" in family), family
    names = set().union(*read.values())
    fields = {row.dest for row in flag_table().values() if row.section == "model.megatron" and not row.later}
    told = NEUTRAL.keys() | NEEDS_OTHER_PACKAGES.keys() | UNREAD.keys() | set(DISPATCHER_EXTRAS) | {"attention_dropout"}
    silent = fields - names - told - COMPARED
    assert silent == set(), "read them, or say in slime.config.rules.effects.UNREAD why they change nothing"
    assert UNREAD.keys() & names <= OURS_WHATEVER_IS_SAID, "these are read after all"


def test_deterministic_mode_reaches_our_kernels(qwen3: Path) -> None:
    """The sparse core's backward then stages contributions, cuts them at a fixed size and adds them key by key in query order;
    of slime.ops nothing adds two values into one place in an order of its own."""
    _, ordered = run_ranks(1, names_read, [(qwen3, {}, {"deterministic_mode": True})])[0]
    assert ordered
