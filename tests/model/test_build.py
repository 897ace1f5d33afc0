"""From flags to megatron-core's config: what is changed says why, what cannot be honoured is refused; a 744B rank fits."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from model.parity import make_config
from model.test_names import GLM52
from ranks import run_ranks

from slime.device import get_device
from slime.model.build import build_model, own_vocabulary, padded_vocab_size
from slime.model.hf_config import HfConfig, read_hf_config
from slime.model.local import check_shapes, local_tensors
from slime.model.names import NameTable
from slime.model.rope import RopeTable
from slime.model.stream import make_stream
from slime.model.transformer_config import transformer_config
from slime.parallel import init_ranks


def _changed(glm: str, **values: object) -> SimpleNamespace:
    config = make_config(glm, read_hf_config(glm))
    config.model.megatron.update(values)
    return config


def test_flags_that_need_other_packages_are_off_and_say_why(glm: str) -> None:
    config = _changed(glm, moe_permute_fusion=True, moe_grouped_gemm=True, moe_token_dispatcher_type="flex")
    megatron, notes = transformer_config(config, get_device())
    assert not megatron.moe_permute_fusion and megatron.moe_token_dispatcher_type == "alltoall"
    assert any(note.startswith("moe_permute_fusion off: its kernel is TransformerEngine's") for note in notes)
    assert any(note.startswith("moe_token_dispatcher_type alltoall instead of flex") for note in notes)


def test_selective_recompute_of_what_keeps_nothing_is_left_out(glm: str) -> None:
    config = _changed(glm, recompute_granularity="selective", recompute_modules=["core_attn", "layernorm", "mlp"])
    megatron, notes = transformer_config(config, get_device())
    assert megatron.recompute_modules == ["mlp"]
    assert any("core_attn is left out, attention here never holds a score matrix" in note for note in notes)
    assert any("layernorm is left out, megatron-core drops a norm's output by TransformerEngine's" in note for note in notes)


def test_the_parameter_dtype_is_the_devices_unless_told(glm: str) -> None:
    config = make_config(glm, read_hf_config(glm))
    config.model.params_dtype = "auto"
    megatron, notes = transformer_config(config, get_device())
    assert megatron.params_dtype is get_device().default_params_dtype
    assert any(note.startswith("params_dtype") for note in notes)
    config.model.bf16 = True
    assert transformer_config(config, get_device())[0].params_dtype is torch.bfloat16


def test_combinations_that_would_compute_something_else_are_refused(glm: str) -> None:
    config = make_config(glm, read_hf_config(glm), tp=2)
    config.parallel.sequence_parallel = False
    with pytest.raises(ValueError, match="--tensor-model-parallel-size 2 needs --sequence-parallel"):
        transformer_config(config, get_device())
    assert transformer_config(config, get_device(), weights_only=True)[0].tensor_model_parallel_size == 2
    with pytest.raises(ValueError, match="--hidden-dropout 0.1: dropout would separate trained from served"):
        transformer_config(_changed(glm, hidden_dropout=0.1), get_device())
    with pytest.raises(ValueError, match="not fields of the installed megatron-core's TransformerConfig: no_such_field"):
        transformer_config(_changed(glm, no_such_field=1), get_device())


def test_padded_vocabulary_columns_belong_to_nobody() -> None:
    """By hand: 100 tokens over 4 ranks in units of 8 x 4: 128 rows, 32 each; the last rank has 4 real columns."""
    hf = HfConfig({"vocab_size": 100})
    model = SimpleNamespace(padded_vocab_size=None, make_vocab_size_divisible_by=8)
    config = SimpleNamespace(model=model, parallel=SimpleNamespace(tensor_model_parallel_size=4))
    assert padded_vocab_size(config, hf) == 128
    own = [own_vocabulary(128, hf, SimpleNamespace(tp_rank=rank, tp_size=4)) for rank in range(4)]
    assert own == [range(0, 32), range(32, 64), range(64, 96), range(96, 100)]
    assert len(own_vocabulary(256, hf, SimpleNamespace(tp_rank=3, tp_size=4))) == 0


def test_the_yarn_table_equals_transformers() -> None:
    from transformers import DeepseekV3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096,
                  "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.8}  # fmt: skip
    config = DeepseekV3Config(qk_rope_head_dim=64, rope_parameters=parameters, max_position_embeddings=163840)
    wanted, magnitude = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    hf = HfConfig({"qk_rope_head_dim": 64, "kv_lora_rank": 1, "rope_parameters": parameters, "max_position_embeddings": 163840})
    found, ours = RopeTable.for_model(hf).frequencies()
    assert torch.allclose(found, wanted, rtol=1e-6) and ours == pytest.approx(magnitude)


def test_rows_of_a_stream_know_their_sample() -> None:
    stream = make_stream([0, 3, 4, 8], 8, cp_group=None, contiguous=True, device=torch.device("cpu"))
    assert stream.positions.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert stream.starts.tolist() == [0, 0, 0, 3, 4, 4, 4, 4] and stream.ends.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    with pytest.raises(ValueError, match="cu_seqlens runs from 0 to 7, but 1 context-parallel ranks hold 8 rows each"):
        make_stream([0, 7], 8, cp_group=None, contiguous=True, device=torch.device("cpu"))


@pytest.mark.slow
def test_a_744b_rank_on_the_meta_device_has_the_tables_shapes(tmp_path: Path) -> None:
    """Stage of 2 ranks x 39 layers, TP2, EP2, no memory: every parameter's name and shape is the table's."""
    (tmp_path / "config.json").write_text(json.dumps(GLM52))

    def count(rank: int) -> tuple[int, int]:
        hf = read_hf_config(tmp_path)
        config = make_config(str(tmp_path), hf, tp=2, pp=2, ep=2, first=38)
        ranks = init_ranks(config.parallel, rank=rank, world_size=4, device=get_device())
        with torch.device("meta"):
            chunks = build_model(config, hf, ranks, get_device())
        check_shapes(chunks, NameTable.for_model(hf), ranks, padded_vocab_size(config, hf))
        names = {local.name for local in local_tensors(chunks, ranks)}
        return len(names), sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())

    found = run_ranks(4, count)
    assert found[0] == found[1] and found[2] == found[3]
    # Experts are halved over EP, the large dense matrices over TP: a rank of each stage holds a little more than half of it.
    assert 743_377_000_704 / 2 < found[0][1] + found[2][1] < 743_377_000_704 / 2 * 1.01
