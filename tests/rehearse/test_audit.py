"""What the rehearsal says of whole recipes, against an auditor's sums that share no code with it.

Parameters and their bytes agree within 1 %, everything else within 5 %.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from slime.rehearse.known_models import known_config
from slime.rehearse.model.flops import model_work
from slime.rehearse.result import Options, Rehearsal, rehearse
from tests.rehearse import auditor
from tests.rehearse.auditor import Layout
from tests.rehearse.edits import Edit, all_of, env, flags, without
from tests.rehearse.recipes import Recipe, model_args, one_node

GLM = json.loads(json.dumps(dict(known_config("/x/GLM-5.2-FP8"))))
QWEN_4B, QWEN_30B = (dict(known_config(f"/x/{name}")) for name in ("Qwen3-4B", "Qwen3-30B-A3B"))
# The fields of deepseek-ai/DeepSeek-V3's config.json that decide a size.
DEEPSEEK = {
    "model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "moe_layer_freq": 1, "n_group": 8,
    "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 129280,
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-06, "rope_theta": 10000, "tie_word_embeddings": False,
    "num_nextn_predict_layers": 1, "hidden_act": "silu", "attention_bias": False, "topk_method": "noaux_tc",
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0,
                     "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1},
}  # fmt: skip


def stages(*sizes: int, ranks: int | None = None) -> tuple[tuple[int, ...], ...]:
    """Layers of each rank; sizes are those of the model chunks in the order in which a token passes them."""
    ranks, at = ranks or len(sizes), 0
    held: list[list[int]] = [[] for _ in range(ranks)]
    for number, size in enumerate(sizes):
        held[number % ranks] += range(at, at + size)
        at += size
    return tuple(map(tuple, held))


def of_glm(*sizes: int, **changes: object) -> Layout:
    # 64 samples of (65,536 / 2 + 1024) tokens or so over micro-batches of 65,536: more than are ever under way.
    told = {"vocab": 154880, "tokens": 8192} | changes
    return Layout(256, 4, 8, 8, 32, stages(*sizes, ranks=8), **told)


STOCK = (14, *[8] * 6, 16)
VIRTUAL = (6, 4, 4, 4, 4, 4, 8, 8, 8, 4, 4, 4, 4, 4, 4, 4)
LISTED = all_of(
    without("--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"),
    flags("--pipeline-model-parallel-layout", ",".join(map(str, VIRTUAL))),
)


def audited(done: Rehearsal, hf: dict, cut: Layout, *, offloaded: float = 1.0, a_number: int = 12) -> None:
    """Every stage's parameters, states, stored inputs, and the fullest node's main memory."""
    fullest = {"optimizer": 0.0, "gradients": 0.0, "weights": 0.0}
    for stage, memory in enumerate(done.budget.stages):
        count, train = auditor.rank_of(hf, cut, stage), memory.phase("train").parts
        assert memory.share.parameters == pytest.approx(count.all, rel=0.01), stage
        assert train["weights"] == pytest.approx(2 * count.all, rel=0.01)
        assert train["gradients"] == pytest.approx(4 * count.trained, rel=0.01)
        state = auditor.state_bytes(count, cut, a_number=a_number)
        assert train["optimizer on GPU"] == pytest.approx((1 - offloaded) * state, rel=0.01, abs=1)
        assert memory.host_optimizer == pytest.approx(offloaded * state, rel=0.01, abs=1)
        assert train["index selection"] == pytest.approx(auditor.selections(hf, cut, stage), rel=0.05)
        own = {"optimizer": offloaded * state, "gradients": offloaded * state / a_number * 4, "weights": 2 * count.all}
        fullest = {name: max(most, 8 * own[name]) for name, most in fullest.items()}
    node = dict(done.budget.node.rollout)
    assert node["optimizer"] == pytest.approx(fullest["optimizer"], rel=0.05, abs=1)
    told = sum(count for name, count in node.items() if "optimizer" not in name and "draft" not in name)
    assert told == pytest.approx(fullest["gradients"] + fullest["weights"], rel=0.05), node


CASES: dict[str, tuple[Edit, Layout, float]] = {
    "as it is": (lambda recipe: recipe, of_glm(*STOCK), 1.0),
    "virtual stages": (LISTED, of_glm(*VIRTUAL, vpp=2), 1.0),
    "half an optimizer offloaded": (flags("--optimizer-offload-fraction", "0.5"), of_glm(*STOCK), 0.5),
    "no offload of the optimizer": (
        without("--optimizer-cpu-offload", "--overlap-cpu-optimizer-d2h-h2d"),
        of_glm(*STOCK),
        0.0,
    ),
    "shorter micro-batches": (flags("--max-tokens-per-gpu", "4096"), of_glm(*STOCK, tokens=4096), 1.0),
}


@pytest.fixture(scope="module")
def rehearsed(flagship: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Edit], Rehearsal]:
    folder, known = tmp_path_factory.mktemp("audit"), {}

    def run(edit: Edit) -> Rehearsal:
        if edit not in known:
            recipe = edit(flagship)
            known[edit] = rehearse(
                recipe.written(folder), Options(env=recipe.env, build_ranks=False, weight_map=False, engine_version="0.5.23")
            )
        return known[edit]

    return run


@pytest.mark.parametrize("name", CASES)
def test_the_trainer_of_the_large_recipe(name: str, rehearsed: Callable[[Edit], Rehearsal]) -> None:
    edit, cut, offloaded = CASES[name]
    done = rehearsed(edit)
    audited(done, GLM, cut, offloaded=offloaded)
    for stage, memory in enumerate(done.budget.stages):
        assert memory.phase("train").parts["stored layer inputs"] == pytest.approx(auditor.stored(GLM, cut, stage), rel=0.05)


def test_block_recomputation_recomputes_so_many_layers_of_each_chunk(rehearsed: Callable[[Edit], Rehearsal]) -> None:
    """A layer that keeps all holds sixteen inputs' worth: the 34 bytes a number of 2205.05198, without dropout's masks."""
    done = rehearsed(flags("--recompute-method", "block", "--recompute-num-layers", "5"))
    for stage, memory in enumerate(done.budget.stages):
        layers = STOCK[stage]
        one = auditor.stored(GLM, of_glm(*STOCK), stage) / layers
        assert memory.phase("train").parts["stored layer inputs"] == pytest.approx(one * (5 + 16 * (layers - 5)), rel=0.05)
    both = rehearsed(all_of(LISTED, flags("--recompute-method", "block", "--recompute-num-layers", "3")))
    cut = of_glm(*VIRTUAL, vpp=2)
    for stage, memory in enumerate(both.budget.stages):
        layers = len(cut.stages[stage])
        one = auditor.stored(GLM, cut, stage) / layers
        assert memory.phase("train").parts["stored layer inputs"] == pytest.approx(one * (6 + 16 * (layers - 6)), rel=0.05)


def test_engines_of_the_large_recipe(rehearsed: Callable[[Edit], Rehearsal]) -> None:
    for edit, tokens in ((lambda recipe: recipe, 64), (env(SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK="512"), 512)):
        parts = rehearsed(edit).budget.stages[3].phase("rollout").parts
        assert parts["DeepEP buffers"] == pytest.approx(auditor.buffers(GLM, tokens), rel=0.05)
    weights = auditor.engine_weights(GLM, ranks=64, fp8=True, attention_ranks=1, dense_ranks=1, head_ranks=1)
    assert parts["engine weights"] == pytest.approx(weights, rel=0.01)
    draft = parts["draft weights"]
    cache = auditor.cache_bytes(GLM, fp8=True, drafts=True)
    for found in rehearsed(CASES["as it is"][0]).budget.caches:
        assert found.bytes_per_token == cache
        assert found.tokens == pytest.approx((0.7 * 80e9 - weights - draft) / cache, rel=0.05)
    bf16 = rehearsed(
        flags("--hf-checkpoint", "/BASE_DIR/GLM-5.2", "--sglang-kv-cache-dtype", "bf16", "--sglang-nsa-decode-backend", "fa3")
    )
    weights = auditor.engine_weights(GLM, ranks=64, fp8=False, attention_ranks=1, dense_ranks=1, head_ranks=1)
    assert bf16.budget.stages[3].phase("rollout").parts["engine weights"] == pytest.approx(weights, rel=0.01)
    assert bf16.budget.caches[0].bytes_per_token == auditor.cache_bytes(GLM, fp8=False, drafts=True)


def test_nothing_sleeps_where_nothing_is_handed_over(rehearsed: Callable[[Edit], Rehearsal]) -> None:
    """Row 3: about 113 GB on the last stage while it trains."""
    usual, awake = rehearsed(CASES["as it is"][0]), rehearsed(flags("--no-offload-rollout"))
    for before, after in zip(usual.budget.stages, awake.budget.stages, strict=True):
        engine = after.phase("rollout").parts
        static = sum(engine[name] for name in ("engine weights", "draft weights", "KV cache"))
        assert static == pytest.approx(0.7 * 80e9, rel=0.01)
        assert after.phase("train").total - before.phase("train").total == pytest.approx(static + 8e9 - 5e9, rel=0.05)
    assert awake.budget.stages[7].phase("train").total == pytest.approx(113e9, rel=0.05)


@pytest.mark.parametrize(
    ("script", "folder", "hf", "cut"),
    [
        ("qwen3-4B", "Qwen3-4B", QWEN_4B, Layout(8, 2, 1, 1, 1, stages(36), tokens=9216, vocab=151936)),
        ("qwen3-30B-A3B", "Qwen3-30B-A3B", QWEN_30B, Layout(8, 4, 1, 1, 8, stages(48), tokens=9216, vocab=152064)),
    ],
)
def test_smaller_models_on_one_node(script: str, folder: str, hf: dict, cut: Layout) -> None:
    done = rehearse(
        one_node(script, folder, tp=str(cut.tp), ep=str(cut.ep)),
        Options(build_ranks=False, weight_map=False, engine_version="0.5.23"),
    )
    audited(done, hf, cut)
    stored = done.budget.stages[0].phase("train").parts["stored layer inputs"]
    assert stored == pytest.approx(auditor.stored(hf, cut, 0), rel=0.05)
    assert done.budget.caches[0].bytes_per_token == auditor.cache_bytes(hf, fp8=False, drafts=False, ranks=2)


def test_deepseek_v3_over_sixteen_nodes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK))
    sizes = (7, *[8] * 6, 6)
    words = f"""
        --actor-num-nodes 16 --actor-num-gpus-per-node 8 --colocate --num-rollout 10 --bf16 --ref-load /models/ref
        --hf-checkpoint {tmp_path} --prompt-data /data/p.jsonl --label-key label --rm-type deepscaler
        --rollout-batch-size 32 --n-samples-per-prompt 8 --rollout-max-response-len 8192 --global-batch-size 256
        --tensor-model-parallel-size 8 --sequence-parallel --pipeline-model-parallel-size 8 --context-parallel-size 2
        --pipeline-model-parallel-layout {",".join(map(str, sizes))}
        --expert-model-parallel-size 16 --expert-tensor-parallel-size 1
        --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
        --use-dynamic-batch-size --max-tokens-per-gpu 4096 --optimizer-cpu-offload --use-precision-aware-optimizer
        --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16 --rollout-num-gpus-per-engine 64 --sglang-mem-fraction-static 0.7
        --sglang-ep-size 64 --sglang-dp-size 64 --sglang-enable-dp-attention --sglang-moe-dense-tp-size 1
        --sglang-enable-dp-lm-head --sglang-moe-a2a-backend deepep
    """.split()
    variables = {"NVSHMEM_DISABLE_NCCL": "1", "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": "256"}
    done = rehearse(
        [*model_args("deepseek-v3"), *words],
        Options(env=variables, build_ranks=False, weight_map=False, engine_version="0.5.23"),
    )
    cut = Layout(128, 8, 8, 2, 16, stages(*sizes), tokens=4096, vocab=130048, micro_batches=1 << 20)
    audited(done, DEEPSEEK, cut, a_number=8)
    parts = done.budget.stages[2].phase("rollout").parts
    assert parts["DeepEP buffers"] == pytest.approx(auditor.buffers(DEEPSEEK, 256), rel=0.05)
    weights = auditor.engine_weights(DEEPSEEK, ranks=64, fp8=False, attention_ranks=1, dense_ranks=1, head_ranks=1)
    assert parts["engine weights"] == pytest.approx(weights, rel=0.01)
    assert done.budget.caches[0].bytes_per_token == auditor.cache_bytes(DEEPSEEK, fp8=False, drafts=False) == 61 * 1152


def test_whole_models_and_their_operations() -> None:
    """671 B and 37 B are DeepSeek-V3's own words, 744 B and 40 B GLM-5.2's, 30.5 B and 3.3 B Qwen3-30B-A3B's."""
    from slime.model.hf_config import HfConfig
    from slime.model.names import NameTable

    sizes = {name: auditor.whole_model(hf) / 1e9 for name, hf in (("glm", GLM), ("v3", DEEPSEEK), ("30b", QWEN_30B))}
    assert sizes["v3"] == pytest.approx(671, rel=0.005) and sizes["glm"] == pytest.approx(743.4, rel=0.005)
    assert sizes["30b"] == pytest.approx(30.5, rel=0.005)
    for hf in (GLM, DEEPSEEK, QWEN_4B, QWEN_30B):
        config = HfConfig(hf)
        table = NameTable.for_model(config)
        assert table.num_parameters(mtp=False) == pytest.approx(auditor.whole_model(hf), rel=0.01)
        for length in (512, 8192, 65536):
            assert model_work(table, config, length).forward == pytest.approx(auditor.operations(hf, length), rel=0.05)
