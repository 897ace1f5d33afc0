from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slime.batch.flops import forward_flops

DENSE = {
    "num_layers": 2,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "kv_channels": 6,
    "num_query_groups": 2,
}


def test_one_token_costs_two_operations_per_weight_it_touches():
    matrices = 2 * (16 * 24 + 2 * 16 * 12 + 24 * 16 + 3 * 16 * 24) + 16 * 100
    attention = 2 * (2 * 4 * 6)  # one key per layer: a score and a weighted value of 6 numbers for 4 heads
    assert forward_flops([1], DENSE, vocab_size=100).tolist() == [2 * (matrices + attention)]


def test_a_dense_model_costs_what_torch_counts():
    n, h, heads, groups, d, ffn, vocab = 7, 16, 4, 2, 6, 24, 100
    x = torch.randn(n, h)
    with FlopCounterMode(display=False) as counter:
        for _ in range(2):
            q = (x @ torch.randn(h, heads * d)).view(n, heads, d)
            k, v = ((x @ torch.randn(h, groups * d)).view(n, groups, d).repeat_interleave(2, 1) for _ in range(2))
            for i in range(n):  # causal: query i multiplies i + 1 keys
                scores = torch.bmm(q[i][:, None], k[: i + 1].permute(1, 2, 0))
                torch.bmm(scores, v[: i + 1].transpose(0, 1))
            torch.randn(n, heads * d) @ torch.randn(heads * d, h)
            (x @ torch.randn(h, ffn), x @ torch.randn(h, ffn), torch.randn(n, ffn) @ torch.randn(ffn, h))
        x @ torch.randn(h, vocab)
    assert forward_flops([n], DENSE, vocab_size=vocab)[0] == counter.get_total_flops()


def test_sparse_attention_grows_linearly_beyond_the_selected_keys():
    short, long, longer = forward_flops([10, 100, 190], DENSE, vocab_size=100, attended=10)
    assert longer - long == pytest.approx(long - short)
    assert np.all(forward_flops([10], DENSE, vocab_size=100) == short), "up to the limit it is ordinary attention"


def test_experts_count_those_a_token_visits_and_the_shared_one():
    moe = {**DENSE, "num_moe_experts": 64, "moe_layer_freq": [0, 1], "moe_router_topk": 3, "moe_ffn_hidden_size": 8,
           "moe_shared_expert_intermediate_size": 8}  # fmt: skip
    difference = forward_flops([1], moe, vocab_size=100)[0] - forward_flops([1], DENSE, vocab_size=100)[0]
    assert difference == 2 * 3 * 16 * ((3 + 1) * 8 - 24)


def test_glm_5_2_has_forty_billion_active_weights():
    glm = {"num_layers": 78, "hidden_size": 6144, "ffn_hidden_size": 12288, "num_attention_heads": 64, "q_lora_rank": 2048,
           "kv_lora_rank": 512, "qk_head_dim": 192, "qk_pos_emb_head_dim": 64, "v_head_dim": 256,
           "num_moe_experts": 256, "moe_layer_freq": [0] * 3 + [1] * 75, "moe_router_topk": 8, "moe_ffn_hidden_size": 2048,
           "moe_shared_expert_intermediate_size": 2048}  # fmt: skip
    active = forward_flops([1], glm, vocab_size=154880)[0] / 2
    assert 38e9 < active < 42e9


def test_lengths_of_any_number_type_cost_the_same():
    """70,000 tokens: their square is beyond 32 bits."""
    wanted = forward_flops([70_000], DENSE, vocab_size=100)
    assert wanted.dtype == np.float64 and wanted[0] > 2 * 2 * 2 * 4 * 6 * 70_000**2 / 2
    for kind in (np.int32, np.int64, np.uint32):
        assert forward_flops(np.array([70_000], kind), DENSE, vocab_size=100).tolist() == wanted.tolist()
