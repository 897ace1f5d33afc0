"""An auditor's sums: bytes and operations of a recipe from config.json and its flags alone, on paper's formulas.

Nothing of `slime` is imported here, so that a mistake of the model is not repeated. Sources: the layouts of DeepSeek-V3 (arXiv
2412.19437, 2.1), Qwen3 (2505.09388) and GLM-5.2's release; mixed precision and its sixteen bytes a parameter (1910.02054);
one-forward-one-backward and interleaved stages (2104.04473); stored inputs under recomputation (2205.05198); DeepEP's
`get_low_latency_rdma_size_hint`.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Layout:
    """How the trainer is cut, as flags say."""

    world: int
    tp: int
    pp: int
    cp: int
    ep: int
    stages: tuple[tuple[int, ...], ...]
    """Layers (from 0) of each pipeline rank, all its virtual stages together."""
    vpp: int = 1
    tokens: int = 8192
    """--max-tokens-per-gpu."""
    micro_batches: int = 64
    vocab: int = 0
    """Padded rows of the embedding."""

    @property
    def copies(self) -> int:
        """Ranks that hold the same dense weights."""
        return self.world // (self.tp * self.pp)

    @property
    def copies_of_experts(self) -> int:
        return self.world // (self.ep * self.pp)


@dataclass
class Count:
    """Numbers of one rank."""

    dense: int = 0
    experts: int = 0
    frozen: int = 0
    layers: int = 0
    indexers: int = 0
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def all(self) -> int:
        return self.dense + self.experts

    @property
    def trained(self) -> int:
        return self.all - self.frozen


def indexes(hf: dict, layer: int) -> bool:
    """Does a layer run an indexer of its own? GLM-5.2: layers 1 to 3, then every fourth from the seventh on."""
    if "index_topk" not in hf:
        return False
    freq, skip = hf.get("index_topk_freq") or 1, hf.get("index_skip_topk_offset", 2)
    return freq == 1 or layer < skip or (layer - skip + 1) % freq == 0


def routed(hf: dict, layer: int) -> bool:
    if not experts_of(hf):
        return False
    return layer >= hf.get("first_k_dense_replace", 0)


def experts_of(hf: dict) -> int:
    return hf.get("n_routed_experts") or hf.get("num_experts") or 0


def attention(hf: dict) -> tuple[int, int]:
    """(numbers that tensor parallelism cuts, numbers that every rank has), norms before and behind included."""
    hidden, heads = hf["hidden_size"], hf["num_attention_heads"]
    if "kv_lora_rank" in hf:
        query, latent, rope = hf["q_lora_rank"], hf["kv_lora_rank"], hf["qk_rope_head_dim"]
        width, value = hf["qk_nope_head_dim"] + rope, hf["v_head_dim"]
        cut = heads * width * query + heads * (hf["qk_nope_head_dim"] + value) * latent + hidden * heads * value
        return cut, query * hidden + query + (latent + rope) * hidden + latent + 2 * hidden
    groups, width = hf["num_key_value_heads"], hf.get("head_dim") or hidden // heads
    return (heads + 2 * groups + heads) * width * hidden, 2 * width + 2 * hidden


def index_numbers(hf: dict) -> int:
    if "index_topk" not in hf:
        return 0
    heads, width = hf["index_n_heads"], hf["index_head_dim"]
    return heads * width * hf["q_lora_rank"] + width * hf["hidden_size"] + 2 * width + heads * hf["hidden_size"]


def one_expert(hf: dict) -> int:
    return 3 * hf["hidden_size"] * hf["moe_intermediate_size"]


def shared_expert(hf: dict) -> int:
    return one_expert(hf) * (hf.get("n_shared_experts") or 0)


def rank_of(hf: dict, cut: Layout, stage: int) -> Count:
    """Numbers of one rank of a stage."""
    found = Count()
    for layer in cut.stages[stage]:
        split, whole = attention(hf)
        found.dense += split // cut.tp + whole
        if indexes(hf, layer):
            found.dense += index_numbers(hf)
            found.frozen += index_numbers(hf)
            found.indexers += 1
        if routed(hf, layer):
            found.dense += experts_of(hf) * hf["hidden_size"] + shared_expert(hf) // cut.tp
            found.experts += one_expert(hf) * experts_of(hf) // cut.ep
        else:
            found.dense += 3 * hf["hidden_size"] * hf["intermediate_size"] // cut.tp
        found.layers += 1
    table = cut.vocab * hf["hidden_size"] // cut.tp
    tied = bool(hf.get("tie_word_embeddings"))
    found.dense += table * (stage == 0) + (table * (not tied or cut.pp > 1) + hf["hidden_size"]) * (stage == cut.pp - 1)
    return found


def whole_model(hf: dict, *, layers: int | None = None) -> int:
    count = hf["num_hidden_layers"] if layers is None else layers
    alone = Layout(1, 1, 1, 1, 1, (tuple(range(count)),), vocab=hf["vocab_size"])
    return rank_of(hf, alone, 0).all


def state_bytes(count: Count, cut: Layout, *, a_number: int = 12) -> float:
    """Master weight and two moments, spread over the ranks that hold the same weights."""
    return a_number * ((count.dense - count.frozen) / cut.copies + count.experts / cut.copies_of_experts)


def under_way(stage: int, cut: Layout) -> float:
    """Micro-batches that a stage holds at once, in units of all its layers."""
    if cut.vpp == 1:
        return min(cut.pp - stage, cut.micro_batches)
    chunks = 2 * (cut.pp - stage - 1) + cut.pp * (cut.vpp - 1) + 1
    return min(chunks, cut.micro_batches * cut.vpp) / cut.vpp


def stored(hf: dict, cut: Layout, stage: int) -> float:
    """Inputs of recomputed layers: tokens x hidden in bf16, shared by tensor-parallel ranks."""
    return 2 * cut.tokens * hf["hidden_size"] / cut.tp * len(cut.stages[stage]) * under_way(stage, cut)


def selections(hf: dict, cut: Layout, stage: int) -> float:
    """int32 indices of selected keys, a tensor-parallel rank its own rows."""
    own = sum(indexes(hf, layer) for layer in cut.stages[stage])
    return 4 * cut.tokens / cut.tp * hf.get("index_topk", 0) * own * under_way(stage, cut)


def cache_bytes(hf: dict, *, fp8: bool, drafts: bool, ranks: int = 1, all_index: bool = False) -> int:
    """A token's KV on one engine rank; ranks share an attention."""
    layers = hf["num_hidden_layers"] + drafts
    if "kv_lora_rank" not in hf:
        heads = max(1, hf["num_key_value_heads"] // ranks)
        return layers * 2 * heads * hf["head_dim"] * (1 if fp8 else 2)
    if "index_topk" not in hf:
        return layers * (hf["kv_lora_rank"] + hf["qk_rope_head_dim"]) * (1 if fp8 else 2)
    # FlashMLA's FP8 row: 512 bytes of latent, four float32 scales, 64 rotary numbers in bf16.
    row = 512 + 4 * 4 + 64 * 2 if fp8 else 2 * (512 + 64)
    keys = layers if all_index else sum(indexes(hf, layer) for layer in range(hf["num_hidden_layers"])) + drafts
    return layers * row + keys * (hf["index_head_dim"] + 4)


def buffers(hf: dict, tokens: int) -> int:
    """DeepEP's low-latency buffers: two of what is sent and received, dispatch with 16 bytes a message, combine with scales."""
    hidden, experts = hf["hidden_size"], experts_of(hf)
    dispatch = 16 + max(2 * hidden, hidden + hidden // 128 * 4)
    combine = 2 * hidden + hidden // 128 * 4
    send = max(tokens * dispatch, experts * tokens * combine)
    return 2 * (send + experts * tokens * max(dispatch, combine))


def engine_weights(hf: dict, *, ranks: int, fp8: bool, attention_ranks: int, dense_ranks: int, head_ranks: int) -> float:
    """One rank of an engine whose experts lie whole on `ranks` ranks, DeepEP's shared expert on each: FP8 codes and a float32
    scale a block of 128 x 128 for matrices, bf16 for norms, router, embedding and head."""
    each = 1 + 4 / 128**2 if fp8 else 2.0
    total = 0.0
    for layer in range(hf["num_hidden_layers"]):
        cut, whole = attention(hf)
        total += cut * each / attention_ranks + whole * each
        total += index_numbers(hf) * each * indexes(hf, layer)
        if routed(hf, layer):
            total += one_expert(hf) * experts_of(hf) / ranks * each + shared_expert(hf) * each
            total += 2 * experts_of(hf) * hf["hidden_size"]
        else:
            total += 3 * hf["hidden_size"] * hf["intermediate_size"] * each / dense_ranks
    return total + 2 * hf["vocab_size"] * hf["hidden_size"] * (1 / attention_ranks + 1 / head_ranks)


def operations(hf: dict, length: int) -> float:
    """Forward of one token of a causal sequence, averaged over it; a multiply-add is two."""
    hidden, heads = hf["hidden_size"], hf["num_attention_heads"]
    total = 2.0 * hf["vocab_size"] * hidden
    for layer in range(hf["num_hidden_layers"]):
        cut, whole = attention(hf)
        vectors = 2 * hidden + (hf["q_lora_rank"] + hf["kv_lora_rank"] if "kv_lora_rank" in hf else 2 * hf["head_dim"])
        matrices = cut + whole - vectors
        if routed(hf, layer):
            matrices += one_expert(hf) * hf["num_experts_per_tok"] + shared_expert(hf) + experts_of(hf) * hidden
        else:
            matrices += 3 * hidden * hf["intermediate_size"]
        seen = sum(range(1, length + 1)) / length
        if "index_topk" in hf:
            seen = sum(min(place, hf["index_topk"]) for place in range(1, length + 1)) / length
            widths = 2 * hf["kv_lora_rank"] + hf["qk_rope_head_dim"]
            if indexes(hf, layer):
                matrices += index_numbers(hf) - 2 * hf["index_head_dim"]
                total += 2 * hf["index_n_heads"] * hf["index_head_dim"] * (length + 1) / 2
        elif "kv_lora_rank" in hf:
            widths = hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"] + hf["v_head_dim"]
        else:
            widths = 2 * hf["head_dim"]
        total += 2 * matrices + 2 * heads * widths * seen
    return total
