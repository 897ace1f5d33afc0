"""config.json of a Hugging Face checkpoint as plain data: no transformers, so that a laptop checks a 744B model in a second."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any


class HfConfig(Mapping[str, Any]):
    """One model's config.json. A missing key raises ValueError naming the file; `get` is for keys that may be absent."""

    def __init__(self, raw: Mapping[str, Any], source: str = "the HF config") -> None:
        # Vision-language checkpoints nest the language model's fields.
        self._raw = {**raw, **raw.get("text_config", {})}
        self.source = source

    def __getitem__(self, key: str) -> Any:
        if key not in self._raw:
            raise ValueError(f"{self.source} has no {key!r}; is it the config.json of a {self._raw.get('model_type')} model?")
        return self._raw[key]

    def __iter__(self):
        return iter(self._raw)

    def __len__(self) -> int:
        return len(self._raw)

    def __contains__(self, key: object) -> bool:
        return key in self._raw

    def get(self, key: str, default: Any = None) -> Any:
        value = self._raw.get(key)
        return default if value is None else value

    @property
    def model_type(self) -> str:
        return self["model_type"]

    @property
    def is_float32(self) -> bool:
        """Whether the weights are meant to be float32; all else counts as bf16 (FP8 checkpoints are of bf16 models)."""
        return (self.get("dtype") or self.get("torch_dtype")) == "float32"

    @property
    def num_layers(self) -> int:
        return self["num_hidden_layers"]

    @property
    def head_dim(self) -> int:
        """Width of one attention head of a GQA model. Meaningless for MLA, where GLM-5.2's own `head_dim` is wrong."""
        return self.get("head_dim") or self["hidden_size"] // self["num_attention_heads"]

    @property
    def is_mla(self) -> bool:
        return "kv_lora_rank" in self

    @property
    def has_indexer(self) -> bool:
        return "index_topk" in self and self.model_type in ("glm_moe_dsa", "deepseek_v32")

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """Theta and scaling under one roof: newer files nest theta, older ones have it flat beside `rope_scaling`."""
        nested = self.get("rope_parameters") or self.get("rope_scaling") or {}
        merged = {"rope_type": nested.get("rope_type", nested.get("type", "default")), **nested}
        merged.setdefault("rope_theta", self.get("rope_theta", 10000.0))
        return merged

    @property
    def rope_theta(self) -> float:
        return float(self.rope_parameters["rope_theta"])

    @property
    def partial_rotary_factor(self) -> float:
        fallback = 0.5 if self.model_type in ("glm4", "glm4_moe") else 1.0
        return float(self.rope_parameters.get("partial_rotary_factor", self.get("partial_rotary_factor", fallback)))

    @property
    def num_experts(self) -> int:
        """Routed experts per MoE layer; 0 for a dense model."""
        # transformers 5 writes Qwen3-MoE's number under its own name for it.
        return next((self[key] for key in ("n_routed_experts", "num_experts", "num_local_experts") if self.get(key)), 0)

    @property
    def fp8_exceptions(self) -> frozenset[str]:
        """Modules that a quantised checkpoint keeps in BF16, under either name that engines read."""
        section = self.get("quantization_config", {})
        return frozenset(name for key in ("modules_to_not_convert", "ignored_layers") for name in section.get(key) or ())

    @property
    def num_mtp_layers(self) -> int:
        """Layers that can be trained; MiMo's one is built otherwise and left out."""
        return 0 if self.get("model_type") == "mimo" else self.get("num_nextn_predict_layers", 0)

    @property
    def has_draft_layer(self) -> bool:
        """The checkpoint holds a layer from which an engine drafts, MiMo's too."""
        return bool(self.get("num_nextn_predict_layers", 0))

    @property
    def has_qk_norm(self) -> bool:
        """Queries and keys of grouped-query attention are normalised head by head."""
        if self.model_type == "glm4_moe":
            return bool(self.get("use_qk_norm", False))
        return self.model_type in ("qwen3", "qwen3_moe")

    @property
    def has_qkv_bias(self) -> bool:
        """Qwen2 has the bias whatever its config says, which says nothing."""
        return self.model_type == "qwen2" or bool(self.get("attention_bias", False))

    @property
    def has_sandwich_norms(self) -> bool:
        """Attention and feed-forward are normalised again before the residual sums, and gate and up are one matrix (GLM-4)."""
        return self.model_type == "glm4"

    @property
    def has_softmax_router(self) -> bool:
        """Experts are chosen by a softmax; the other families have a sigmoid and a selection bias."""
        return self.model_type == "qwen3_moe"

    def is_moe_layer(self, layer: int) -> bool:
        """0-based; the multi-token-prediction layers after the last one are MoE layers too."""
        if not self.num_experts or layer in self.get("mlp_only_layers", []):
            return False
        if kinds := self.get("mlp_layer_types"):
            return layer >= self.num_layers or kinds[layer] == "sparse"
        if "first_k_dense_replace" in self:
            return layer >= self["first_k_dense_replace"] and layer % self.get("moe_layer_freq", 1) == 0
        return (layer + 1) % self.get("decoder_sparse_step", 1) == 0

    def runs_indexer(self, layer: int) -> bool:
        """True on a computing layer (0-based), False where the nearest earlier one's indices are reused.

        A multi-token-prediction layer always owns an indexer, wherever the schedule would put it.
        """
        if not self.has_indexer:
            return False
        if layer >= self.num_layers:
            return True
        return self._indexer_schedule[layer]

    @cached_property
    def _indexer_schedule(self) -> tuple[bool, ...]:
        """Per layer, whether it runs an indexer, by the rules of transformers: a list, or a pattern, or frequency and offset.

        Raises ValueError where the first layer would reuse indices that nobody has computed.
        """
        frequency, offset = self.get("index_topk_freq", 1), self.get("index_skip_topk_offset", 2)
        if frequency < 1 or offset < 0:
            raise ValueError(f"{self.source}: index_topk_freq {frequency} or index_skip_topk_offset {offset} is too small")
        full = tuple(max(layer + 1 - offset, 0) % frequency == 0 for layer in range(self.num_layers))
        if listed := self.get("indexer_types") or self.get("index_topk_pattern"):
            told = tuple(kind in ("full", "F") for kind in listed)
            if len(told) != self.num_layers or any(kind not in ("full", "F", "shared", "S") for kind in listed):
                raise ValueError(
                    f"{self.source}: indexer_types (or index_topk_pattern) {listed!r:.80} must say full or shared for each of "
                    f"the {self.num_layers} layers"
                )
            if self.get("index_topk_freq") and told != full:
                raise ValueError(
                    f"{self.source}: indexer_types (or index_topk_pattern) names other layers than index_topk_freq {frequency} "
                    f"with index_skip_topk_offset {offset}; correct one of them, or remove it"
                )
            full = told
        if not full[0]:
            raise ValueError(
                f"{self.source}: layer 0 would reuse the indices of an earlier layer, and there is none (index_topk_freq "
                f"{self.get('index_topk_freq')}, index_skip_topk_offset {self.get('index_skip_topk_offset')})"
            )
        return full

    def index_source(self, layer: int) -> int:
        """The computing layer whose indices `layer` uses: itself, or the nearest earlier one."""
        return next(candidate for candidate in range(layer, -1, -1) if self.runs_indexer(candidate))
