"""Attention over packed samples in plain torch: grouped queries (Qwen3, GLM-4, Llama) and dense latent attention
(DeepSeek-V3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from slime.compat.megatron import prepare

prepare()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel.layers import RowParallelLinear  # noqa: E402
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from slime.model.hf_config import HfConfig  # noqa: E402
from slime.model.layers import DuplicatedLinear, NormColumnParallelLinear, RMSNorm  # noqa: E402
from slime.model.rope import RopeTable  # noqa: E402
from slime.model.stream import Segment, Stream, stream_of  # noqa: E402
from slime.ops.rope import rotate  # noqa: E402


@dataclass(frozen=True)
class GqaShape:
    """Sizes of a grouped-query attention, from the HF config."""

    heads: int
    groups: int
    width: int
    qk_norm: bool
    bias: bool
    interleaved: bool
    """GLM-4 turns pairs (2i, 2i+1), Llama and Qwen (i, i + width/2)."""
    rope: RopeTable

    @staticmethod
    def for_model(hf: HfConfig) -> GqaShape:
        heads = hf["num_attention_heads"]
        return GqaShape(
            heads=heads,
            groups=hf.get("num_key_value_heads") or heads,
            width=hf.head_dim,
            qk_norm=hf.has_qk_norm,
            bias=hf.has_qkv_bias,
            interleaved=hf.model_type == "glm4",
            rope=RopeTable.for_model(hf),
        )


class PackedAttention(MegatronModule):
    """What every attention of ours shares: groups, the packed stream, and megatron-core's call signature."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        contiguous_cp: bool = False,
        cp_comm_type: str | None = None,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.tp_size = dist.get_world_size(self.tp_group)
        self.contiguous_cp = contiguous_cp

    def stream(self, packed: PackedSeqParams, t: int, device: torch.device) -> Stream:
        cp_group = self.cp_group if dist.get_world_size(self.cp_group) > 1 else None
        return stream_of(packed, t, cp_group=cp_group, contiguous=self.contiguous_cp, device=device)

    def whole_sequence(self, shard: Tensor) -> Tensor:
        """[t / tp, ...] -> [t, ...] under sequence parallelism; every rank then works on its own heads, so backward sums and
        scatters."""
        if self.tp_size == 1 or not self.config.sequence_parallel:
            return shard
        return gather_from_sequence_parallel_region(shard.contiguous(), tensor_parallel_output_grad=True, group=self.tp_group)

    def output_projection(self, width: int) -> RowParallelLinear:
        return RowParallelLinear(
            width,
            self.config.hidden_size,
            config=self.config,
            init_method=self.config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_group=self.tp_group,
        )


class GroupedQueryAttention(PackedAttention):
    """hidden [t / tp, 1, h] -> same; input norm inside linear_qkv, whose rows lie per query group as [queries | key |
    value]."""

    def __init__(self, config: TransformerConfig, layer_number: int, shape: GqaShape, **kwargs: object) -> None:
        super().__init__(config, layer_number, **kwargs)
        if shape.groups % self.tp_size:
            raise ValueError(
                f"{shape.groups} key/value heads cannot be split over --tensor-model-parallel-size "
                f"{self.tp_size}; use a divisor"
            )
        self.shape = shape
        self.linear_qkv = NormColumnParallelLinear(
            config.hidden_size,
            (shape.heads + 2 * shape.groups) * shape.width,
            config=config,
            init_method=config.init_method,
            bias=shape.bias,
            gather_output=False,
            skip_bias_add=False,
            tp_group=self.tp_group,
        )
        if shape.qk_norm:
            self.q_layernorm = _HeadNorm(config, shape.width, config.layernorm_epsilon)
            self.k_layernorm = _HeadNorm(config, shape.width, config.layernorm_epsilon)
        self.linear_proj = self.output_projection(shape.heads * shape.width)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams = None,
        **_: object,
    ) -> tuple[Tensor, Tensor | None]:
        shape = self.shape
        mixed, _ = self.linear_qkv(hidden_states)
        t = mixed.shape[0]
        stream = self.stream(packed_seq_params, t, mixed.device)
        per_group = shape.heads // shape.groups
        mixed = mixed.view(t, shape.groups // self.tp_size, per_group + 2, shape.width)
        query, key, value = mixed.split([per_group, 1, 1], dim=2)
        query, key, value = query.flatten(1, 2), key.flatten(1, 2), value.flatten(1, 2)
        if shape.qk_norm:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        cos, sin = shape.rope.cos_sin(stream)
        query = rotate(query, cos, sin, interleaved=shape.interleaved)
        key = rotate(key, cos, sin, interleaved=shape.interleaved)
        out = packed_causal_attention(query, stream.gather(key), stream.gather(value), stream, scale=shape.width**-0.5)
        return self.linear_proj(out.flatten(1).unsqueeze(1))


class _HeadNorm(RMSNorm):
    """RMSNorm of each head. Its weight meets this rank's heads only; megatron-core adds up its gradients by the name
    `q_layernorm` / `k_layernorm` (finalize_model_grads), which would double them without sequence parallelism (build refuses
    that)."""


def packed_causal_attention(query: Tensor, key: Tensor, value: Tensor, stream: Stream, *, scale: float) -> Tensor:
    """Each local row attends to its own sample up to itself.

    query [t, heads, d], key [T, groups, d], value [T, groups, dv] in stream order -> [t, heads, dv].
    """
    out = []
    for segment in stream.segments:
        rows = slice(segment.local, segment.local + segment.end - segment.begin)
        out.append(
            _segment_attention(
                query[rows], key[segment.sample : segment.end], value[segment.sample : segment.end], segment, scale
            )
        )
    return out[0] if len(out) == 1 else torch.cat(out)


def _segment_attention(query: Tensor, key: Tensor, value: Tensor, segment: Segment, scale: float) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    grouped = q.shape[1] != k.shape[1]
    if segment.begin == segment.sample:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    else:
        # The rows are the last ones of their keys: the causal diagonal starts at the bottom right.
        from torch.nn.attention.bias import causal_lower_right

        mask = causal_lower_right(q.shape[2], k.shape[2])
        if not q.is_cuda:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out.squeeze(0).transpose(0, 1)


@dataclass(frozen=True)
class MlaShape:
    """Sizes of a multi-head latent attention, from the HF config. `head_dim` there is stale in GLM-5.2 and not used."""

    heads: int
    q_latent: int | None
    kv_latent: int
    nope: int
    rope_width: int
    value: int
    interleaved: bool
    rope: RopeTable

    @property
    def query(self) -> int:
        return self.nope + self.rope_width

    @property
    def scale(self) -> float:
        return self.query**-0.5 * self.rope.softmax_factor()

    @staticmethod
    def for_model(hf: HfConfig) -> MlaShape:
        return MlaShape(
            heads=hf["num_attention_heads"],
            q_latent=hf.get("q_lora_rank"),
            kv_latent=hf["kv_lora_rank"],
            nope=hf["qk_nope_head_dim"],
            rope_width=hf["qk_rope_head_dim"],
            value=hf["v_head_dim"],
            # DeepSeek's checkpoints pair neighbours too, whether or not their config says so.
            interleaved=bool(hf.get("rope_interleave", True)),
            rope=RopeTable.for_model(hf),
        )


class LatentAttention(PackedAttention):
    """Multi-head latent attention with every key visible (DeepSeek-V3). hidden [t / tp, 1, h] -> same.

    Down-projections are whole on every rank and run on its slice of the sequence; up-projections are split by heads.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, shape: MlaShape, **kwargs: object) -> None:
        super().__init__(config, layer_number, **kwargs)
        self.shape = shape
        if shape.heads % self.tp_size:
            raise ValueError(
                f"{shape.heads} heads cannot be split over --tensor-model-parallel-size {self.tp_size}; use a divisor"
            )
        self.heads_here = shape.heads // self.tp_size
        linear = {
            "config": config,
            "init_method": config.init_method,
            "bias": False,
            "gather_output": False,
            "skip_bias_add": False,
            "tp_group": self.tp_group,
        }
        if shape.q_latent:
            self.linear_q_down_proj = DuplicatedLinear(config.hidden_size, shape.q_latent, config=config)
            self.linear_q_up_proj = NormColumnParallelLinear(shape.q_latent, shape.heads * shape.query, **linear)
        else:
            from megatron.core.tensor_parallel.layers import ColumnParallelLinear

            self.linear_q_proj = ColumnParallelLinear(config.hidden_size, shape.heads * shape.query, **linear)
        self.linear_kv_down_proj = DuplicatedLinear(config.hidden_size, shape.kv_latent + shape.rope_width, config=config)
        self.linear_kv_up_proj = NormColumnParallelLinear(shape.kv_latent, shape.heads * (shape.nope + shape.value), **linear)
        self.linear_proj = self.output_projection(shape.heads * shape.value)

    def queries(self, hidden: Tensor, stream: Stream) -> tuple[Tensor, Tensor | None]:
        """-> ([t, heads, nope + rope], the last ones rotated; raw query latent of this slice or None)."""
        latent = self.linear_q_down_proj(hidden) if self.shape.q_latent else None
        query, _ = self.linear_q_up_proj(latent) if self.shape.q_latent else self.linear_q_proj(hidden)
        return self._rotated(query.view(-1, self.heads_here, self.shape.query), stream, self.shape.nope), latent

    def latents(self, hidden: Tensor, stream: Stream) -> Tensor:
        """-> [t, latent + rope] of this context-parallel rank's rows: normalised key/value latent, rotated shared key."""
        both = self.linear_kv_down_proj(hidden).squeeze(1)
        latent, rope = both.split([self.shape.kv_latent, self.shape.rope_width], dim=-1)
        whole = self.whole_sequence(torch.cat([self.linear_kv_up_proj.normalised(latent), rope], dim=-1))
        return self._rotated(whole.unsqueeze(1), stream, self.shape.kv_latent).squeeze(1)

    def _rotated(self, x: Tensor, stream: Stream, first: int) -> Tensor:
        cos, sin = self.shape.rope.cos_sin(stream)
        return rotate(x, cos, sin, interleaved=self.shape.interleaved, first=first)

    def local_rows(self, hidden: Tensor) -> int:
        """Rows of this context-parallel rank, from a hidden state that sequence parallelism may have sliced."""
        return hidden.shape[0] * (self.tp_size if self.config.sequence_parallel else 1)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams = None,
        **_: object,
    ) -> tuple[Tensor, Tensor | None]:
        shape = self.shape
        stream = self.stream(packed_seq_params, self.local_rows(hidden_states), hidden_states.device)
        query, _ = self.queries(hidden_states, stream)
        latent, shared_key = self.latents(hidden_states, stream).split([shape.kv_latent, shape.rope_width], dim=-1)
        both = F.linear(latent, self.linear_kv_up_proj.weight).view(-1, self.heads_here, shape.nope + shape.value)
        key, value = both.split([shape.nope, shape.value], dim=-1)
        key = torch.cat([key, shared_key[:, None, :].expand(-1, self.heads_here, -1)], dim=-1)
        out = packed_causal_attention(query, stream.gather(key), stream.gather(value), stream, scale=shape.scale)
        return self.linear_proj(out.flatten(1).unsqueeze(1))
