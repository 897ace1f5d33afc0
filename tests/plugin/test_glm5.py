"""The GLM-5.2 plugin: who computes, where stages may begin, what the indexer never does."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from model.parity import build, packed, run_step, samples_of, step
from ranks import RankFailed, run_ranks

from slime.batch.layout import SequenceLayout
from slime.config.stages import legal_splits
from slime.model.hf_config import HfConfig, read_hf_config
from slime_plugins.models.glm5.glm5 import check_stage_start

GLM52 = HfConfig(
    {
        "model_type": "glm_moe_dsa",
        "num_hidden_layers": 78,
        "index_topk": 2048,
        "index_topk_freq": 4,
        "index_skip_topk_offset": 3,
    }
)


def test_the_recipes_stages_start_on_computing_layers() -> None:
    """14, six times 8, 16: the seed's starts 1, 15, 23, 31, 39, 47, 55, 63."""
    starts = [0, *range(14, 63, 8)]
    assert [start + 1 for start in starts] == [1, 15, 23, 31, 39, 47, 55, 63]
    for stage, start in enumerate(starts):
        check_stage_start(GLM52, range(start, start + 8), stage=stage, num_stages=8)
    assert (14, *[8] * 6, 16) in legal_splits(GLM52, 8)


def test_an_illegal_start_names_stage_layer_source_and_legal_splits() -> None:
    with pytest.raises(ValueError) as told:
        check_stage_start(GLM52, range(10 + 2, 20), stage=1, num_stages=8)
    message = str(told.value)
    assert "stage 1 starts at layer 13, which reuses the indices of layer 11" in message
    assert "[1, 2, 3, 7, 11, 15," in message and "75]" in message
    assert "--decoder-first-pipeline-num-layers" in message and "14/16" in message


def test_legal_splits_start_on_computing_layers_and_the_best_are_named_first() -> None:
    splits = legal_splits(GLM52, 8)
    for sizes in splits:
        assert sum(sizes) == 78 and len(set(sizes[1:-1])) == 1
        assert all(GLM52.runs_indexer(sum(sizes[:stage])) for stage in range(8))
    with pytest.raises(ValueError) as told:
        check_stage_start(GLM52, range(12, 20), stage=1, num_stages=8)
    named = [tuple(map(int, pair)) for pair in re.findall(r"(\d+)/(\d+)[,;]", str(told.value))]
    slowest = [max(first, last, (78 - first - last) // 6) for first, last in named]
    assert slowest == sorted(map(max, splits))[:4]


def test_an_illegal_split_is_refused_when_the_model_is_built(glm: str) -> None:
    with pytest.raises(
        RankFailed, match=r"stage 1 starts at layer 5, which reuses the indices of layer 3 .* computing layers \[1, 2, 3, 7\]"
    ):
        run_ranks(2, lambda rank: build(rank, 2, glm, pp=2) and None)


def test_each_virtual_stage_must_start_on_a_computing_layer(glm: str) -> None:
    with pytest.raises(RankFailed, match="which reuses the indices of layer"):
        run_ranks(2, lambda rank: build(rank, 2, glm, pp=2, vpp=2) and None)


def test_the_indexer_is_frozen_and_only_on_computing_layers(glm: str) -> None:
    def names(rank: int) -> dict[str, bool]:
        (chunk,), *_ = build(rank, 1, glm)
        return {name: parameter.requires_grad for name, parameter in chunk.named_parameters()}

    (found,) = run_ranks(1, names)
    parts = ("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight")
    indexer = {f"decoder.layers.{layer}.self_attention.{part}" for layer in (0, 1, 2, 6) for part in parts}
    assert {name for name in found if any(part in name for part in parts)} == indexer
    assert not any(found[name] for name in indexer)
    assert all(trains for name, trains in found.items() if name not in indexer)


def test_selections_are_own_past_keys_best_first_rule_and_padded_with_minus_one(glm: str) -> None:
    lengths = (40, 7, 25)

    def indices(rank: int):
        return run_step(rank, 1, glm, [samples_of(3, lengths, 320)]).indices

    (found,) = run_ranks(1, indices)
    assert {layer for _, layer in found} == {1, 2, 3, 7}
    starts = torch.tensor([0] * 40 + [40] * 7 + [47] * 25)
    rows = torch.arange(72)
    for _, picked in found.values():
        assert picked.shape == (72, 16) and picked.dtype == torch.int32
        keys = rows - starts + 1
        assert ((picked >= 0).sum(1) == keys.clamp(max=16)).all()
        inside = (picked >= starts[:, None]) & (picked <= rows[:, None])
        assert (inside | (picked == -1)).all()


def test_index_topk_comes_from_the_config(glm: str, tmp_path: Path) -> None:
    """Twice the keys: other numbers, and as many indices as the config says."""
    shutil.copytree(glm, tmp_path / "wide")
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    (tmp_path / "wide" / "config.json").write_text(json.dumps({**config, "index_topk": 32}))

    def run(rank: int, folder: str):
        result = run_step(rank, 1, folder, [samples_of(3, (90,), 320)])
        return result.log_probs[0], result.indices[(0, 1)][1].shape

    narrow, narrow_shape = run_ranks(1, run, glm)[0]
    wide, wide_shape = run_ranks(1, run, str(tmp_path / "wide"))[0]
    assert (narrow_shape, wide_shape) == ((90, 16), (90, 32))
    assert torch.allclose(narrow[:16], wide[:16], atol=1e-5)  # up to 16 keys both see everything
    assert (narrow[40:] - wide[40:]).abs().max() > 1e-3


def test_a_sample_does_not_see_its_neighbours(glm: str) -> None:
    def run(rank: int):
        first, second, other = samples_of(4, (60, 50, 60), 320)
        chunks, ranks, hf, config = build(rank, 1, glm)
        return [step(chunks, ranks, hf, config, [batch]).log_probs[0] for batch in ([first, second], [other, second], [second])]

    (both, swapped, alone) = run_ranks(1, run)[0]
    assert torch.equal(both[60:], swapped[60:])
    assert torch.allclose(both[60:], alone, atol=2e-6)


def test_padding_rows_change_nothing(glm: str) -> None:
    def run(rank: int):
        (chunk,), *_ = build(rank, 1, glm)
        (sample,) = samples_of(5, (50,), 320)
        out = []
        for multiple in (1, 128):
            layout = SequenceLayout.contiguous([50], multiple=multiple)
            with torch.no_grad():
                out.append(chunk(layout.take(sample, 0)[None], None, None, packed_seq_params=packed(layout))[0, :50])
        return out

    plain, with_padding = run_ranks(1, run)[0]
    assert torch.allclose(plain, with_padding, atol=2e-6)


def test_attention_needs_packed_sequences_and_says_so(glm: str) -> None:
    def run(rank: int) -> str:
        (chunk,), *_ = build(rank, 1, glm)
        try:
            chunk(torch.zeros(1, 4, dtype=torch.int64), None, None)
        except ValueError as told:
            return str(told)
        return ""

    assert "pass packed_seq_params with cu_seqlens_q" in run_ranks(1, run)[0]


def test_head_dim_of_the_config_is_not_used(glm: str, tmp_path: Path) -> None:
    """GLM-5.2's config.json says head_dim 192, which describes nothing."""
    shutil.copytree(glm, tmp_path / "stale")
    config = json.loads((tmp_path / "stale" / "config.json").read_text())
    (tmp_path / "stale" / "config.json").write_text(json.dumps({**config, "head_dim": 7}))

    def run(rank: int, folder: str):
        return run_step(rank, 1, folder, [samples_of(3, (30,), 320)]).log_probs[0]

    assert torch.equal(run_ranks(1, run, glm)[0], run_ranks(1, run, str(tmp_path / "stale"))[0])


def test_a_dense_model_is_refused_by_the_spec(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from slime_plugins.models.glm5.glm5 import get_glm5_spec

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    with pytest.raises(ValueError, match=r"\(qwen3\) has no indexer"):
        get_glm5_spec(SimpleNamespace(hf_checkpoint=str(tmp_path)), None)


def test_computing_layers_of_the_tiny_model(glm: str) -> None:
    hf = read_hf_config(glm)
    assert [hf.index_source(layer) for layer in range(8)] == [0, 1, 2, 2, 2, 2, 6, 6]
