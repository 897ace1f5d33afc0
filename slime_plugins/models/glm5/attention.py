"""Sparse latent attention of GLM-5.2: the indexer, and MLA in absorbed form over the selected keys."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from slime.compat.megatron import prepare

prepare()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402

from slime.model.attention import LatentAttention, MlaShape  # noqa: E402
from slime.model.hf_config import HfConfig  # noqa: E402
from slime.model.layers import DuplicatedLinear, LayerNorm  # noqa: E402
from slime.model.stream import Stream  # noqa: E402
from slime.ops.rope import rotate  # noqa: E402
from slime_plugins.models.glm5.balance import deal_rows  # noqa: E402
from slime_plugins.models.glm5.exchange import Traffic, heads_to_queries, queries_to_heads, whole_weight  # noqa: E402
from slime_plugins.models.glm5.ops import get_ops  # noqa: E402
from slime_plugins.models.glm5.ops.absorb import absorbed_queries, released_values  # noqa: E402

KEY_NORM_EPS = 1e-6  # fixed in the released model, whatever rms_norm_eps says


@dataclass(frozen=True)
class IndexerShape:
    """Sizes of the indexer, from the HF config."""

    heads: int
    width: int
    topk: int
    interleaved: bool

    @staticmethod
    def for_model(hf: HfConfig) -> IndexerShape:
        if not hf["q_lora_rank"] or hf["index_head_dim"] < hf["qk_rope_head_dim"]:
            raise ValueError(f"{hf.source}: an indexer needs q_lora_rank and index_head_dim >= qk_rope_head_dim")
        # DeepSeek-V3.2 pairs (i, i + half) in the indexer; GLM-5.2 pairs neighbours and says so.
        interleaved = bool(hf.get("indexer_rope_interleave", hf.model_type == "glm_moe_dsa"))
        return IndexerShape(hf["index_n_heads"], hf["index_head_dim"], hf["index_topk"], interleaved)


class SparseLatentAttention(LatentAttention):
    """MLA over at most `topk` keys per query. hidden [t / tp, 1, h] -> same.

    A computing layer (index_source == its own layer number) owns wq_b, wk, k_norm and weights_proj; a shared layer has none of
    them and reads the indices from the micro-batch's stream.

    core_axis: what the core is split by inside the tensor-parallel group. "queries": a rank has all heads of its slice of the
    rows, and the only copy of their indices. "heads": a rank has its heads of all rows, and a copy of every index.
    move_cost: of slime_plugins.models.glm5.balance.deal_rows, for the indexer's rows.
    index_scoring: "params" or "fp8", the operator index_topk or index_topk_fp8.
    attention_forward: of get_ops.
    """

    def __init__(
        self,
        config: object,
        layer_number: int,
        shape: MlaShape,
        indexer: IndexerShape,
        index_source: int,
        core_axis: str = "queries",
        move_cost: int = -1,
        index_scoring: str = "params",
        attention_forward: str = "ours",
        **kwargs: object,
    ) -> None:
        super().__init__(config, layer_number, shape, **kwargs)
        self.indexer_shape, self.index_source = indexer, index_source
        self.rows_are_split = self.tp_size > 1 and config.sequence_parallel
        self.by_queries = self.rows_are_split and core_axis == "queries"
        self.move_cost, self.sharing_group = move_cost, kwargs["pg_collection"].tp_cp
        self.index_scoring, self.attention_forward = index_scoring, attention_forward
        if self.runs_indexer:
            self.wq_b = DuplicatedLinear(shape.q_latent, indexer.heads * indexer.width, config=config)
            self.wk = DuplicatedLinear(config.hidden_size, indexer.width, config=config)
            self.k_norm = LayerNorm(config, indexer.width, eps=KEY_NORM_EPS)
            self.weights_proj = DuplicatedLinear(config.hidden_size, indexer.heads, config=config)
            for module in (self.wq_b, self.wk, self.k_norm, self.weights_proj):
                module.requires_grad_(False)

    @property
    def runs_indexer(self) -> bool:
        return self.index_source == self.layer_number

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams = None,
        **_: object,
    ) -> tuple[Tensor, Tensor | None]:
        stream = self.stream(packed_seq_params, self.local_rows(hidden_states), hidden_states.device)
        query, query_latent = self.queries(hidden_states, stream)
        keys = stream.gather(self.latents(hidden_states, stream))
        indices = self.selected_keys(hidden_states, query_latent, stream)
        up = self.linear_kv_up_proj.weight
        if self.by_queries:
            # Exchanged before W_k and after W_v are absorbed: 256 + 256 columns per head then travel instead of 576 + 512.
            out = self.core(heads_to_queries(query, self.tp_group), keys, indices, whole_weight(up, self.tp_group))
            out = queries_to_heads(out, self.tp_group)
        else:
            out = self.core(query, keys, indices, up)
        return self.linear_proj(out.flatten(1).unsqueeze(1))

    def core(self, query: Tensor, keys: Tensor, indices: Tensor, up: Tensor) -> Tensor:
        """query [rows, heads, nope + rope], keys [T, latent + rope], indices [rows, topk], up: the key/value up-projection of
        these heads -> [rows, heads, value].

        Absorbed form: W_k moves from the keys to the queries, W_v from the values to the outputs, so that all heads read one
        latent.
        """
        shape = self.shape
        w_key, w_value = up.view(-1, shape.nope + shape.value, shape.kv_latent).split([shape.nope, shape.value], dim=1)
        ops = get_ops(query.device.type, self.attention_forward)
        absorbed = absorbed_queries(query, w_key)
        out, _ = ops.sparse_mla(absorbed, keys, indices, scale=shape.scale, v_dim=shape.kv_latent)
        return released_values(out, w_value)

    def selected_keys(self, hidden: Tensor, query_latent: Tensor, stream: Stream) -> Tensor:
        """int32 [rows, topk] rows of the whole stream, -1 = none: computed here, or by the layer this one shares with."""
        if self.runs_indexer and stream.told is not None and self.layer_number <= self.config.num_layers:
            if self.layer_number not in stream.indices:  # a recomputation finds them
                stream.indices[self.layer_number] = self.told_keys(hidden, query_latent, stream)
        elif self.runs_indexer:
            stream.indices[self.layer_number] = self.run_indexer(hidden, query_latent, stream)
        elif self.index_source not in stream.indices:
            raise RuntimeError(
                f"layer {self.layer_number} reuses the indices of layer {self.index_source}, which has not run "
                "on this micro-batch"
            )
        return stream.indices[self.index_source]

    def told_keys(self, hidden: Tensor, query_latent: Tensor, stream: Stream) -> Tensor:
        """run_indexer's answer from what engines told; the indexer itself runs only where they left something open."""
        mine = self._slice(stream) if self.by_queries else slice(None)
        keys, told = stream.told.keys(self.layer_number - 1, stream, mine, self.indexer_shape.topk)
        if stream.told.needs_own:
            keys = torch.where(told[:, None], keys, self.run_indexer(hidden, query_latent, stream))
        return keys

    @torch.no_grad()
    def run_indexer(self, hidden: Tensor, query_latent: Tensor, stream: Stream) -> Tensor:
        """Score and select for this rank's slice of the rows: int32 [t / tp, topk], or [t, topk] where the core is split by
        heads.

        Each query is scored once in the whole TP x CP group, mostly by its owner, who has its q and gates, and everybody's
        keys; where contexts are long some rows are scored by a rank with shorter ones.
        """
        index, mine = self.indexer_shape, self._slice(stream)
        ops = get_ops(hidden.device.type, self.attention_forward)
        index_topk = ops.index_topk_fp8 if self.index_scoring == "fp8" else ops.index_topk
        flat = hidden.squeeze(1)
        query = self.wq_b(self.linear_q_up_proj.normalised(query_latent).squeeze(1)).view(-1, index.heads, index.width)
        key = self.k_norm(self.wk(flat)).unsqueeze(1)
        # The gate's projection stays float32: its spread over heads is small.
        gates = flat.float() @ self.weights_proj.weight.float().t() * (index.heads**-0.5 * index.width**-0.5)
        cos, sin = self.shape.rope.cos_sin(stream)
        query = self._rotate(query, cos[mine], sin[mine])
        key = self._rotate(key, cos[mine], sin[mine]).squeeze(1)
        keys = stream.gather(self.whole_sequence(key))
        select = functools.partial(_select, index_topk, keys, index.topk)
        rows = (query, gates, stream.starts[mine], stream.ends[mine])
        traffic = self._traffic(stream)
        picked = select(*rows) if traffic is None else traffic.select(select, *rows, stream.bounds)
        return self._everyone(picked) if self.rows_are_split and not self.by_queries else picked

    def _traffic(self, stream: Stream) -> Traffic | None:
        """Which rows are scored on another rank of the TP x CP group than their own; None when none is, on any rank."""
        if "indexer traffic" not in stream.derived:
            ranks = dist.get_world_size(self.sharing_group)
            moves = _dealt(stream.bounds, ranks, move_cost=self.move_cost)
            share = stream.total // ranks
            made = Traffic.of(moves, share, self.sharing_group, stream.rows.device) if moves else None
            stream.derived["indexer traffic"] = made
        return stream.derived["indexer traffic"]

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The first rope_width dimensions turn (rope first here, last in the attention's heads)."""
        return rotate(x, cos, sin, interleaved=self.indexer_shape.interleaved)

    def _slice(self, stream: Stream) -> slice:
        if not self.rows_are_split:
            return slice(None)
        share, rank = len(stream.rows) // self.tp_size, dist.get_rank(self.tp_group)
        return slice(rank * share, (rank + 1) * share)

    def _everyone(self, picked: Tensor) -> Tensor:
        whole = picked.new_empty(picked.shape[0] * self.tp_size, picked.shape[1])
        dist.all_gather_into_tensor(whole, picked.contiguous(), group=self.tp_group)
        return whole


def _select(index_topk, keys: Tensor, topk: int, query: Tensor, gates: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    return index_topk(query, keys, gates, starts, ends, topk=topk)


# A batch's log-prob and training passes ask for the same streams again.
_dealt = functools.lru_cache(maxsize=1024)(deal_rows)

__all__ = ["IndexerShape", "SparseLatentAttention"]
