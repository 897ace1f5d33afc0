"""Weight names, one table for both directions: Megatron's global names <-> Hugging Face tensors.

A table is data made from the HF config alone: every dimension comes from it, so a tiny model and the 744B one differ in numbers
only. Global name: what a one-rank model would call the parameter, without wrappers; experts are numbered one by one
(`...experts.linear_fc1.weight17`) although a rank holds its experts in one stacked parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from slime.config.hf_fields import FAMILIES, unknown_family
from slime.model.hf_config import HfConfig, as_hf_config

Shape = tuple[int, ...]
Merge = Literal["single", "rows", "qkv"]
Split = Literal["none", "rows", "columns", "gated_rows", "vocab"]


@dataclass(frozen=True)
class HfTensor:
    name: str
    shape: Shape
    fp8: bool = False
    """Stored as e4m3 with `<name>_scale_inv` in a block-FP8 checkpoint of this model."""

    @property
    def scale_name(self) -> str:
        return f"{self.name}_scale_inv"


@dataclass(frozen=True)
class Entry:
    """One Megatron tensor and the HF tensors it is made of."""

    name: str
    shape: Shape
    """Whole, without vocabulary padding."""
    hf: tuple[HfTensor, ...]
    merge: Merge = "single"
    """How the HF tensors become one: itself | stacked rows | rows interleaved per query group."""
    split: Split = "none"
    """What tensor parallelism does: nothing | rows | columns | rows of each half | rows, padded."""
    groups: tuple[int, int, int] | None = None
    """qkv only: (query groups, query heads per group, head width)."""
    expert: int | None = None
    """Number of the routed expert; None for everything else."""
    float32: bool = False
    """Stays float32 whatever the parameters' dtype."""
    together: str = ""
    """Entries with the same key must reach an engine in one update call (it fuses them on load)."""

    @property
    def is_mtp(self) -> bool:
        """Of the multi-token-prediction layer."""
        return self.name.startswith("mtp.")

    @property
    def layer(self) -> int | None:
        """0-based decoder layer; None for embedding, final norm, output layer and the multi-token-prediction layer."""
        return int(self.name.split(".", 3)[2]) if self.name.startswith("decoder.layers.") else None


@dataclass(frozen=True, eq=False)
class NameTable:
    """Every tensor of one model; equal to itself alone, so that what is worked out of it can be kept.

    `aliases`: Megatron names of tied copies -> the name that owns the data.
    `duplicates`: HF tensors some releases repeat (the head of Qwen3-0.6B, which is tied; DeepSeek-V3's MTP layer has its own
    copy of the embedding) -> owner's HF name.
    """

    model_type: str
    entries: tuple[Entry, ...]
    aliases: dict[str, str] = field(default_factory=dict)
    duplicates: dict[str, str] = field(default_factory=dict)
    _by_name: dict[str, Entry] = field(default_factory=dict, repr=False)
    _by_hf: dict[str, Entry] = field(default_factory=dict, repr=False)

    @staticmethod
    def for_model(hf_config: object, *, with_mtp: bool = True) -> NameTable:
        """The table of the model that `hf_config` (HfConfig, mapping or PretrainedConfig) describes.

        with_mtp: include the multi-token-prediction layers that the checkpoint carries.
        """
        hf = as_hf_config(hf_config)
        if hf.model_type not in FAMILIES:
            raise ValueError(unknown_family(hf.model_type, hf.source))
        entries = tuple(_all_entries(hf, with_mtp))
        tied = bool(hf.get("tie_word_embeddings", False))
        aliases = {"output_layer.weight": "embedding.word_embeddings.weight"} if tied else {}
        duplicates = {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}
        if with_mtp:
            for layer in range(hf.num_layers, hf.num_layers + hf.num_mtp_layers):
                duplicates[f"model.layers.{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
                duplicates[f"model.layers.{layer}.shared_head.head.weight"] = "lm_head.weight"
        table = NameTable(hf.model_type, entries, aliases, duplicates)
        table._by_name.update((entry.name, entry) for entry in entries)
        table._by_hf.update((tensor.name, entry) for entry in entries for tensor in entry.hf)
        assert len(table._by_name) == len(entries), "a Megatron name occurs twice"
        assert len(table._by_hf) == sum(len(entry.hf) for entry in entries), "an HF name occurs twice"
        return table

    def __getitem__(self, name: str) -> Entry:
        """The entry of a global Megatron name; a tied copy gives its owner's."""
        owner = self.aliases.get(name, name)
        if owner not in self._by_name:
            raise ValueError(
                f"parameter {name} is not in the {self.model_type} weight table; does the layer spec match the model?"
            )
        return self._by_name[owner]

    def by_hf(self, hf_name: str) -> Entry | None:
        """The entry that an HF tensor belongs to; None for a name that this model does not have."""
        return self._by_hf.get(hf_name)

    def hf_tensors(self) -> Iterator[HfTensor]:
        """Every HF tensor once, in checkpoint order."""
        for entry in self.entries:
            yield from entry.hf

    def hf_names(self, *, fp8: bool = False) -> list[str]:
        """Names a checkpoint of this model holds; fp8 adds the scales."""
        names = []
        for tensor in self.hf_tensors():
            names.append(tensor.name)
            if fp8 and tensor.fp8:
                names.append(tensor.scale_name)
        return names

    def num_parameters(self, *, mtp: bool) -> int:
        """Trained numbers (expert biases are buffers) of the main model, or of the MTP layers."""
        return sum(_numel(entry.shape) for entry in self.entries if entry.is_mtp == mtp and not entry.float32)


def _numel(shape: Shape) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _all_entries(hf: HfConfig, with_mtp: bool) -> Iterator[Entry]:
    vocab, hidden = hf["vocab_size"], hf["hidden_size"]
    yield _plain("embedding.word_embeddings.weight", "model.embed_tokens.weight", (vocab, hidden), split="vocab")
    for layer in range(hf.num_layers):
        yield from _layer(hf, layer, f"decoder.layers.{layer}.")
    yield _plain("decoder.final_layernorm.weight", "model.norm.weight", (hidden,))
    if not hf.get("tie_word_embeddings", False):
        yield _plain("output_layer.weight", "lm_head.weight", (vocab, hidden), split="vocab")
    if with_mtp:
        for number in range(hf.num_mtp_layers):
            yield from _mtp_layer(hf, number)


def _mtp_layer(hf: HfConfig, number: int) -> Iterator[Entry]:
    hidden, layer = hf["hidden_size"], hf.num_layers + number
    ours, theirs = f"mtp.layers.{number}.", f"model.layers.{layer}."
    yield _plain(f"{ours}enorm.weight", f"{theirs}enorm.weight", (hidden,))
    yield _plain(f"{ours}hnorm.weight", f"{theirs}hnorm.weight", (hidden,))
    yield _plain(f"{ours}eh_proj.weight", f"{theirs}eh_proj.weight", (hidden, 2 * hidden))
    yield from _layer(hf, layer, f"{ours}transformer_layer.")
    yield _plain(f"{ours}final_layernorm.weight", f"{theirs}shared_head.norm.weight", (hidden,))


def _layer(hf: HfConfig, layer: int, ours: str) -> Iterator[Entry]:
    theirs = f"model.layers.{layer}."
    yield from (_mla(hf, ours, theirs) if hf.is_mla else _gqa(hf, ours, theirs))
    if hf.runs_indexer(layer):
        yield from _indexer(hf, f"{ours}self_attention.", f"{theirs}self_attn.indexer.")
    if hf.has_sandwich_norms:
        for norm in ("post_self_attn_layernorm", "post_mlp_layernorm"):
            yield _plain(f"{ours}{norm}.weight", f"{theirs}{norm}.weight", (hf["hidden_size"],))
    yield from (_moe if hf.is_moe_layer(layer) else _dense)(hf, ours, theirs)


def _plain(ours: str, theirs: str, shape: Shape, *, split: Split = "none", fp8: bool = False, **more: object) -> Entry:
    return Entry(ours, shape, (HfTensor(theirs, shape, fp8),), split=split, **more)


def _mla(hf: HfConfig, ours: str, theirs: str) -> Iterator[Entry]:
    hidden, heads, latent = hf["hidden_size"], hf["num_attention_heads"], hf["kv_lora_rank"]
    nope, rope, value = hf["qk_nope_head_dim"], hf["qk_rope_head_dim"], hf["v_head_dim"]
    yield _plain(f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight", (hidden,))
    ours, theirs = f"{ours}self_attention.", f"{theirs}self_attn."
    query = hf.get("q_lora_rank")
    pair = f"{theirs}fused_qkv_a"
    if query:
        yield _plain(f"{ours}linear_q_down_proj.weight", f"{theirs}q_a_proj.weight", (query, hidden), fp8=True, together=pair)
        yield _plain(f"{ours}linear_q_up_proj.layer_norm_weight", f"{theirs}q_a_layernorm.weight", (query,))
        shape = (heads * (nope + rope), query)
        yield _plain(f"{ours}linear_q_up_proj.weight", f"{theirs}q_b_proj.weight", shape, split="rows", fp8=True)
    else:
        shape = (heads * (nope + rope), hidden)
        yield _plain(f"{ours}linear_q_proj.weight", f"{theirs}q_proj.weight", shape, split="rows", fp8=True)
    shape = (latent + rope, hidden)
    yield _plain(
        f"{ours}linear_kv_down_proj.weight",
        f"{theirs}kv_a_proj_with_mqa.weight",
        shape,
        fp8=True,
        together=pair if query else "",
    )
    yield _plain(f"{ours}linear_kv_up_proj.layer_norm_weight", f"{theirs}kv_a_layernorm.weight", (latent,))
    shape = (heads * (nope + value), latent)
    yield _plain(f"{ours}linear_kv_up_proj.weight", f"{theirs}kv_b_proj.weight", shape, split="rows", fp8=True)
    yield _plain(f"{ours}linear_proj.weight", f"{theirs}o_proj.weight", (hidden, heads * value), split="columns", fp8=True)


def _indexer(hf: HfConfig, ours: str, theirs: str) -> Iterator[Entry]:
    hidden, heads, width = hf["hidden_size"], hf["index_n_heads"], hf["index_head_dim"]
    # SGLang fuses wk and weights_proj into one matrix on load.
    pair = f"{theirs}fused_wk"
    yield _plain(f"{ours}wq_b.weight", f"{theirs}wq_b.weight", (heads * width, hf["q_lora_rank"]), fp8=True)
    yield _plain(f"{ours}wk.weight", f"{theirs}wk.weight", (width, hidden), fp8=True, together=pair)
    yield _plain(f"{ours}k_norm.weight", f"{theirs}k_norm.weight", (width,))
    yield _plain(f"{ours}k_norm.bias", f"{theirs}k_norm.bias", (width,))
    yield _plain(f"{ours}weights_proj.weight", f"{theirs}weights_proj.weight", (heads, hidden), together=pair)


def _gqa(hf: HfConfig, ours: str, theirs: str) -> Iterator[Entry]:
    hidden, heads, width = hf["hidden_size"], hf["num_attention_heads"], hf.head_dim
    groups = hf.get("num_key_value_heads") or heads
    layout = (groups, heads // groups, width)
    ours, norm, theirs = f"{ours}self_attention.", f"{theirs}input_layernorm.weight", f"{theirs}self_attn."
    yield _plain(f"{ours}linear_qkv.layer_norm_weight", norm, (hidden,))
    rows = {"q": heads * width, "k": groups * width, "v": groups * width}
    total = sum(rows.values())
    weights = tuple(HfTensor(f"{theirs}{part}_proj.weight", (size, hidden), True) for part, size in rows.items())
    yield Entry(f"{ours}linear_qkv.weight", (total, hidden), weights, "qkv", "rows", layout)
    if hf.has_qkv_bias:
        biases = tuple(HfTensor(f"{theirs}{part}_proj.bias", (size,)) for part, size in rows.items())
        yield Entry(f"{ours}linear_qkv.bias", (total,), biases, "qkv", "rows", layout)
    if hf.has_qk_norm:
        yield _plain(f"{ours}q_layernorm.weight", f"{theirs}q_norm.weight", (width,))
        yield _plain(f"{ours}k_layernorm.weight", f"{theirs}k_norm.weight", (width,))
    yield _plain(f"{ours}linear_proj.weight", f"{theirs}o_proj.weight", (hidden, heads * width), split="columns", fp8=True)


def _dense(hf: HfConfig, ours: str, theirs: str) -> Iterator[Entry]:
    hidden, inner = hf["hidden_size"], hf["intermediate_size"]
    yield _plain(f"{ours}mlp.linear_fc1.layer_norm_weight", f"{theirs}post_attention_layernorm.weight", (hidden,))
    if hf.has_sandwich_norms:
        whole = (HfTensor(f"{theirs}mlp.gate_up_proj.weight", (2 * inner, hidden), True),)
        yield Entry(f"{ours}mlp.linear_fc1.weight", (2 * inner, hidden), whole, "single", "gated_rows")
        yield _plain(
            f"{ours}mlp.linear_fc2.weight", f"{theirs}mlp.down_proj.weight", (hidden, inner), split="columns", fp8=True
        )
    else:
        yield from _gated(f"{ours}mlp.", f"{theirs}mlp.", hidden, inner)


def _gated(ours: str, theirs: str, hidden: int, inner: int, expert: int | None = None) -> Iterator[Entry]:
    number = "" if expert is None else str(expert)
    halves = tuple(HfTensor(f"{theirs}{half}_proj.weight", (inner, hidden), True) for half in ("gate", "up"))
    yield Entry(f"{ours}linear_fc1.weight{number}", (2 * inner, hidden), halves, "rows", "gated_rows", expert=expert)
    down = (HfTensor(f"{theirs}down_proj.weight", (hidden, inner), True),)
    yield Entry(f"{ours}linear_fc2.weight{number}", (hidden, inner), down, "single", "columns", expert=expert)


def _moe(hf: HfConfig, ours: str, theirs: str) -> Iterator[Entry]:
    hidden, inner, experts = hf["hidden_size"], hf["moe_intermediate_size"], hf.num_experts
    yield _plain(f"{ours}pre_mlp_layernorm.weight", f"{theirs}post_attention_layernorm.weight", (hidden,))
    yield _plain(f"{ours}mlp.router.weight", f"{theirs}mlp.gate.weight", (experts, hidden))
    if not hf.has_softmax_router:
        # Its spread is a few bf16 steps: rounded, it would reorder the routing.
        yield _plain(f"{ours}mlp.router.expert_bias", f"{theirs}mlp.gate.e_score_correction_bias", (experts,), float32=True)
    for expert in range(experts):
        yield from _gated(f"{ours}mlp.experts.", f"{theirs}mlp.experts.{expert}.", hidden, inner, expert)
    if shared := hf.get("n_shared_experts", 0):
        yield from _gated(f"{ours}mlp.shared_experts.", f"{theirs}mlp.shared_experts.", hidden, shared * inner)
