"""GLM-5.2 (MLA, sparse attention with shared indices, sigmoid-routed experts) on the CPU, in plain torch.

SGLang's own path for it needs CUDA at three places (0.5.23: arg_groups/model_hook.py, mem_cache/memory_pool.py,
layers/attention/dsa/dsa_indexer.py), so `slime.engine.kinds` starts the server with these config overrides:

* `architectures = [EntryClass, "DeepseekV2ForCausalLM"]`: the registry reads the first name and finds this class, which
  also keeps SGLang's CUDA path off; ModelConfig finds the second and gives the model a plain MLA cache;
* `qk_rope_head_dim += index_head_dim`: a row of that cache is [latent | rotated key | index key], so whatever moves rows
  (radix cache, retraction, prefill -> decode transfer) moves index keys without knowing of them;
* `slime_model`: config.json as it was before the overrides. Every dimension here is read from it.

Shapes in comments: t tokens of the flat batch, b requests, q queries of one request, n context positions, k selected.
Tensor parallel: heads, MLP columns and whole experts are split; latents, indexer, embedding and head are on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sglang.srt.distributed.communication_op import tensor_model_parallel_all_reduce
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.model_executor.forward_context import get_req_to_token_pool, get_token_to_kv_pool
from sglang.srt.runtime_context import get_parallel
from sglang.srt.state_capturer.indexer_topk import get_global_indexer_capturer
from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer
from torch import Tensor, nn

from slime.engine.host_models.loading import WeightLoader

# Up to here (tokens x local experts) all experts run as two matrix products: quicker than a loop for a decode batch.
DENSE_EXPERT_LIMIT = 1024
# Queries gathered at once in a prefill: bounds the [queries, k, row] copy.
QUERIES_AT_ONCE = 128


@dataclass(frozen=True)
class Dims:
    """The numbers of config.json that the model needs, and this rank's share of the heads and experts."""

    hidden: int
    layers: int
    heads: int
    q_rank: int
    kv_rank: int
    nope: int
    rope: int
    value: int
    eps: float
    theta: float
    index_heads: int
    index_dim: int
    index_topk: int
    computing_layers: tuple[bool, ...]
    dense_layers: tuple[bool, ...]
    dense_width: int
    expert_width: int
    shared_width: int
    experts: int
    experts_per_token: int
    expert_scale: float
    normalise_experts: bool
    vocab: int
    rank: int
    ranks: int

    @classmethod
    def from_config(cls, c: dict[str, Any], *, rank: int, ranks: int) -> Dims:
        heads, experts = c["num_attention_heads"], c["n_routed_experts"]
        if c.get("n_group") not in (None, 1):
            raise ValueError(
                f"config.json has n_group {c['n_group']}; the CPU engine knows GLM-5.2's 1 (no group-limited routing)"
            )
        if heads % ranks or experts % ranks:
            raise ValueError(
                f"tensor parallel size {ranks} must divide num_attention_heads {heads} and n_routed_experts {experts}"
            )
        return cls(
            hidden=c["hidden_size"],
            layers=c["num_hidden_layers"],
            heads=heads // ranks,
            q_rank=c["q_lora_rank"],
            kv_rank=c["kv_lora_rank"],
            nope=c["qk_nope_head_dim"],
            rope=c["qk_rope_head_dim"],
            value=c["v_head_dim"],
            eps=c["rms_norm_eps"],
            theta=float((c.get("rope_parameters") or c)["rope_theta"]),
            index_heads=c["index_n_heads"],
            index_dim=c["index_head_dim"],
            index_topk=c["index_topk"],
            computing_layers=computing_layers(c),
            dense_layers=dense_layers(c),
            dense_width=c["intermediate_size"] // ranks,
            expert_width=c["moe_intermediate_size"],
            shared_width=c["moe_intermediate_size"] * c["n_shared_experts"] // ranks,
            experts=experts // ranks,
            experts_per_token=c["num_experts_per_tok"],
            expert_scale=c["routed_scaling_factor"],
            normalise_experts=c.get("norm_topk_prob", True),
            vocab=c["vocab_size"],
            rank=rank,
            ranks=ranks,
        )

    @property
    def row(self) -> int:
        """Width of the part of a cache row that attention reads: latent and rotated key."""
        return self.kv_rank + self.rope


def computing_layers(c: dict[str, Any]) -> tuple[bool, ...]:
    """Per layer: does it run its own indexer (else it reuses the nearest earlier computing layer's indices)."""
    if c.get("indexer_types"):
        return tuple(kind == "full" for kind in c["indexer_types"][: c["num_hidden_layers"]])
    freq, offset = c.get("index_topk_freq", 1), c.get("index_skip_topk_offset", 2)
    return tuple(max(layer - offset + 1, 0) % freq == 0 for layer in range(c["num_hidden_layers"]))


def dense_layers(c: dict[str, Any]) -> tuple[bool, ...]:
    if c.get("mlp_layer_types"):
        return tuple(kind == "dense" for kind in c["mlp_layer_types"][: c["num_hidden_layers"]])
    return tuple(layer < c["first_k_dense_replace"] for layer in range(c["num_hidden_layers"]))


@dataclass(frozen=True)
class Window:
    """Queries handled in one batched step: `b` requests with `q` queries each, over the same `n` context positions."""

    rows: slice
    """their rows in the flat batch, b * q of them"""
    slots: Tensor
    """[b, n] cache slot of every context position; entries that no query sees may be anything valid"""
    visible: Tensor
    """[b, q, n] bool, causal"""


def windows(forward_batch, positions: Tensor) -> list[Window]:
    """Decode: one window of all requests, one query each. Prefill: per request, windows of QUERIES_AT_ONCE queries."""
    table = get_req_to_token_pool().req_to_token
    requests = forward_batch.req_pool_indices
    if forward_batch.forward_mode.is_decode():
        longest = int(positions.max()) + 1
        seen = torch.arange(longest) <= positions[:, None, None]
        # A shorter request's row holds stale slots past its end: masked, but they must stay inside the pool.
        slots = table[requests, :longest].long() * seen.squeeze(1)
        return [Window(slice(0, len(requests)), slots, seen)]
    found, first = [], 0
    spans = zip(requests.tolist(), forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu, strict=True)
    for request, cached, new in spans:
        slots = table[request, : cached + new].long()[None]
        for at in range(0, new, QUERIES_AT_ONCE):
            until = min(at + QUERIES_AT_ONCE, new)
            rows = slice(first + at, first + until)
            seen = torch.arange(cached + until) <= positions[rows, None]
            found.append(Window(rows, slots[:, : cached + until], seen[None]))
        first += new
    return found


def best_positions(score: Tensor, k: int) -> Tensor:
    """The k best positions of the last axis; of equal scores the lowest position wins.

    ReLU makes exact zeros, hence ties, and torch.topk's choice among them depends on the row's length, which differs
    between prefill, decode and the trainer.
    """
    return score.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def whole_batch(chosen: list[Tensor | None], parts: list[Window], tokens: int, k: int) -> Tensor:
    """The positions chosen in each window as int32 [tokens, k]; -1 where there was nothing to choose."""
    out = torch.full((tokens, k), -1, dtype=torch.int32)
    for part, positions in zip(parts, chosen, strict=True):
        if positions is not None:
            out[part.rows] = positions.flatten(0, 1).int()
    return out


def turn_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding on interleaved pairs (2i, 2i+1). x [t, rope] or [t, heads, rope]; angles [t, rope/2] complex."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    turned = pairs * (angles if x.dim() == 2 else angles[:, None])
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def matrix(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Norm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Indexer(nn.Module):
    """Scores every visible position for every query and keeps the `index_topk` best."""

    def __init__(self, d: Dims):
        super().__init__()
        self.d = d
        self.wq_b = matrix(d.q_rank, d.index_heads * d.index_dim)
        self.wk = matrix(d.hidden, d.index_dim)
        self.k_norm = nn.LayerNorm(d.index_dim, eps=1e-6)
        self.weights_proj = matrix(d.hidden, d.index_heads)

    def key(self, x: Tensor, angles: Tensor) -> Tensor:
        """[t, index_dim]; the first `rope` dimensions are turned."""
        key = self.k_norm(self.wk(x))
        return torch.cat((turn_pairs(key[:, : self.d.rope], angles), key[:, self.d.rope :]), -1)

    def select(self, x: Tensor, q_latent: Tensor, angles: Tensor, keys: Tensor, parts: list[Window]) -> list[Tensor | None]:
        """Per window the chosen positions [b, q, k]; None where there is nothing to choose (n <= index_topk).

        keys: the index part of the cache, [slots, index_dim]. Rows with fewer than k visible positions are filled up
        with hidden ones, which attention masks again.
        """
        d = self.d
        query = self.wq_b(q_latent).view(-1, d.index_heads, d.index_dim)
        query = torch.cat((turn_pairs(query[..., : d.rope], angles), query[..., d.rope :]), -1).float()
        gate = self.weights_proj(x).float() * (d.index_heads**-0.5 * d.index_dim**-0.5)
        chosen: list[Tensor | None] = []
        for part in parts:
            b, q, n = part.visible.shape
            if n <= d.index_topk:
                chosen.append(None)
                continue
            key = keys[part.slots].float().transpose(1, 2)
            score = torch.matmul(query[part.rows].reshape(b, q * d.index_heads, -1), key).relu_().view(b, q, d.index_heads, n)
            score = torch.matmul(gate[part.rows].view(b, q, 1, d.index_heads), score).squeeze(2)
            chosen.append(best_positions(score.masked_fill(~part.visible, float("-inf")), d.index_topk))
        return chosen


class Attention(nn.Module):
    def __init__(self, d: Dims, layer: int):
        super().__init__()
        self.d, self.layer = d, layer
        self.q_a_proj = matrix(d.hidden, d.q_rank)
        self.q_a_layernorm = Norm(d.q_rank, d.eps)
        self.q_b_proj = matrix(d.q_rank, d.heads * (d.nope + d.rope))
        self.kv_a_proj_with_mqa = matrix(d.hidden, d.row)
        self.kv_a_layernorm = Norm(d.kv_rank, d.eps)
        self.kv_b_proj = matrix(d.kv_rank, d.heads * (d.nope + d.value))
        self.o_proj = matrix(d.heads * d.value, d.hidden)
        self.indexer = Indexer(d) if d.computing_layers[layer] else None

    def forward(self, x: Tensor, angles: Tensor, slots: Tensor, parts: list[Window], chosen) -> tuple[Tensor, list]:
        """x [t, hidden] -> (this rank's partial output [t, hidden], the positions chosen here or passed through)."""
        d = self.d
        q_latent = self.q_a_layernorm(self.q_a_proj(x))
        query = self.q_b_proj(q_latent).view(-1, d.heads, d.nope + d.rope)
        cache = get_token_to_kv_pool().get_key_buffer(self.layer)[:, 0]
        self._write(cache, slots, x, angles)
        if self.indexer is not None:
            chosen = self.indexer.select(x, q_latent, angles, cache[:, d.row :], parts)
            if (capturer := get_global_indexer_capturer()) is not None:
                capturer.capture(self.layer, whole_batch(chosen, parts, len(x), d.index_topk))
        # Absorbed MLA: kv_b_proj acts on queries and outputs instead of on the cache. These are views of the parameter,
        # so a weight update needs no second step.
        unfold = self.kv_b_proj.weight.view(d.heads, d.nope + d.value, d.kv_rank)
        latent_query = torch.einsum("thd,hdc->thc", query[..., : d.nope], unfold[:, : d.nope])
        latent_query = torch.cat((latent_query, turn_pairs(query[..., d.nope :], angles)), -1)
        mixed = latent_query.new_empty(len(x), d.heads, d.kv_rank)
        for part, positions in zip(parts, chosen, strict=True):
            mixed[part.rows] = self._attend(latent_query[part.rows], cache, part, positions)
        out = torch.einsum("thc,hvc->thv", mixed, unfold[:, d.nope :])
        return self.o_proj(out.flatten(1)), chosen

    def _write(self, cache: Tensor, slots: Tensor, x: Tensor, angles: Tensor) -> None:
        d = self.d
        latent, rope_key = self.kv_a_proj_with_mqa(x).split((d.kv_rank, d.rope), -1)
        fields = [self.kv_a_layernorm(latent), turn_pairs(rope_key, angles)]
        if self.indexer is not None:
            fields.append(self.indexer.key(x, angles))
        row = torch.cat(fields, -1)
        cache[slots, : row.shape[1]] = row.to(cache.dtype)

    def _attend(self, query: Tensor, cache: Tensor, part: Window, positions: Tensor | None) -> Tensor:
        """query [b*q, heads, row] -> softmax-weighted latents [b*q, heads, kv_rank]; softmax in float32."""
        d = self.d
        b, q, n = part.visible.shape
        if positions is None:
            rows, seen = cache[part.slots, : d.row].unsqueeze(1), part.visible
        else:
            seen = part.visible.gather(2, positions)
            rows = cache[part.slots.unsqueeze(1).expand(b, q, n).gather(2, positions), : d.row]
        rows = rows.to(query.dtype)
        score = torch.matmul(query.view(b, q, d.heads, d.row), rows.transpose(-1, -2)).float()
        score = (score * (d.nope + d.rope) ** -0.5).masked_fill_(~seen.unsqueeze(2), float("-inf"))
        weight = torch.softmax(score, -1).to(query.dtype)
        return torch.matmul(weight, rows[..., : d.kv_rank]).reshape(b * q, d.heads, d.kv_rank)


class SwiGLU(nn.Module):
    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = matrix(hidden, width), matrix(hidden, width), matrix(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    def __init__(self, d: Dims):
        super().__init__()
        self.d = d
        experts = d.experts * d.ranks
        self.weight = nn.Parameter(torch.empty(experts, d.hidden))
        # float32 whatever the model's dtype: its spread is a few bf16 steps, rounding would reorder the experts.
        self.e_score_correction_bias = nn.Parameter(torch.zeros(experts, dtype=torch.float32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [t, hidden] -> (expert ids [t, k], weights [t, k] float32). The bias moves the choice, never the weight."""
        score = F.linear(x.float(), self.weight.float()).sigmoid()
        ids = (score + self.e_score_correction_bias).topk(self.d.experts_per_token, dim=-1).indices
        weight = score.gather(1, ids)
        if self.d.normalise_experts:
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        return ids, weight * self.d.expert_scale


class Experts(nn.Module):
    """Router, this rank's whole experts, and its columns of the shared expert; the output is this rank's partial sum."""

    def __init__(self, d: Dims, layer: int):
        super().__init__()
        self.d, self.layer = d, layer
        self.gate = Router(d)
        self.gate_up = nn.Parameter(torch.empty(d.experts, 2 * d.expert_width, d.hidden))
        self.down = nn.Parameter(torch.empty(d.hidden, d.experts, d.expert_width))
        self.shared_experts = SwiGLU(d.hidden, d.shared_width)

    def forward(self, x: Tensor) -> Tensor:
        ids, weight = self.gate(x)
        if (capturer := get_global_experts_capturer()) is not None:
            capturer.capture(layer_id=self.layer, topk_indices=ids.to(torch.int32))
        share = x.new_zeros(len(x), self.d.experts * self.d.ranks).scatter_(1, ids, weight.to(x.dtype))
        share = share.view(len(x), self.d.ranks, self.d.experts)[:, self.d.rank]
        run = self._all_at_once if share.numel() <= DENSE_EXPERT_LIMIT else self._one_by_one
        return run(x, share) + self.shared_experts(x)

    def _all_at_once(self, x: Tensor, share: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up.flatten(0, 1)).view(len(x), self.d.experts, -1).chunk(2, -1)
        return F.linear((F.silu(gate) * up * share.unsqueeze(-1)).flatten(1), self.down.flatten(1))

    def _one_by_one(self, x: Tensor, share: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(self.d.experts):
            tokens = share[:, expert].nonzero().squeeze(1)
            if len(tokens) == 0:
                continue
            gate, up = F.linear(x[tokens], self.gate_up[expert]).chunk(2, -1)
            out.index_add_(0, tokens, F.linear(F.silu(gate) * up, self.down[:, expert]) * share[tokens, expert, None])
        return out


class Layer(nn.Module):
    def __init__(self, d: Dims, layer: int):
        super().__init__()
        self.self_attn = Attention(d, layer)
        self.mlp = SwiGLU(d.hidden, d.dense_width) if d.dense_layers[layer] else Experts(d, layer)
        self.input_layernorm = Norm(d.hidden, d.eps)
        self.post_attention_layernorm = Norm(d.hidden, d.eps)
        self.ranks = d.ranks

    def forward(self, x: Tensor, angles: Tensor, slots: Tensor, parts: list[Window], chosen) -> tuple[Tensor, list]:
        mixed, chosen = self.self_attn(self.input_layernorm(x), angles, slots, parts, chosen)
        x = x + self._summed(mixed)
        return x + self._summed(self.mlp(self.post_attention_layernorm(x))), chosen

    def _summed(self, partial: Tensor) -> Tensor:
        return partial if self.ranks == 1 else tensor_model_parallel_all_reduce(partial)


class Body(nn.Module):
    def __init__(self, d: Dims):
        super().__init__()
        self.d = d
        self.embed_tokens = nn.Embedding(d.vocab, d.hidden)
        self.layers = nn.ModuleList(Layer(d, layer) for layer in range(d.layers))
        self.norm = Norm(d.hidden, d.eps)
        self.frequencies = d.theta ** -(torch.arange(0, d.rope, 2, dtype=torch.float32) / d.rope)

    def forward(self, input_ids: Tensor, positions: Tensor, forward_batch) -> Tensor:
        angle = positions[:, None].float() * self.frequencies
        angles = torch.polar(torch.ones_like(angle), angle)
        x = self.embed_tokens(input_ids)
        parts = windows(forward_batch, positions)
        chosen: list | None = None
        for layer in self.layers:
            x, chosen = layer(x, angles, forward_batch.out_cache_loc, parts, chosen)
        return self.norm(x)


class SlimeGlmMoeDsaForCausalLM(nn.Module):
    def __init__(self, config, quant_config=None, prefix: str = ""):
        super().__init__()
        if quant_config is not None:
            raise ValueError("SGLang found a quantization_config; slime.engine.kinds must override it with null on a CPU")
        source = getattr(config, "slime_model", None)
        if source is None or config.qk_rope_head_dim != source["qk_rope_head_dim"] + source["index_head_dim"]:
            raise ValueError("start the server through slime.engine, which widens the cache row (see slime/engine/kinds.py)")
        parallel = get_parallel()
        self.config = config
        self.dims = Dims.from_config(source, rank=parallel.tp_rank, ranks=parallel.tp_size)
        self.model = Body(self.dims)
        self.lm_head = matrix(self.dims.hidden, self.dims.vocab)
        # Every rank holds the whole head: nothing to gather.
        self.logits_processor = LogitsProcessor(config, skip_all_gather=True)
        self.loader = WeightLoader(self, source)

    @torch.no_grad()
    def forward(self, input_ids: Tensor, positions: Tensor, forward_batch, **_):
        hidden = self.model(input_ids, positions, forward_batch)
        return self.logits_processor(input_ids, hidden, self.lm_head, forward_batch)

    @torch.no_grad()
    def load_weights(self, weights) -> set[str]:
        return self.loader.load(weights)

    def get_weights_by_name(self, name: str, truncate_size: int = 100, tp_size: int = 1):
        """This rank's part of a tensor, under its checkpoint name (the endpoint /get_weights_by_name)."""
        return self.loader.view(name)[:truncate_size].float().tolist()


EntryClass = SlimeGlmMoeDsaForCausalLM
