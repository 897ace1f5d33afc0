"""What the model is and how it is cut over the training ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from slime.config.flags import derived, flag

_ROPE = "RoPE scaling by flag (rope_parameters of the HF config decide)"


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is cut over training ranks; data parallelism is what remains."""

    tensor_model_parallel_size: int = flag(1, low=1)
    """Ranks that share every matrix."""
    pipeline_model_parallel_size: int = flag(1, low=1)
    """Pipeline stages."""
    context_parallel_size: int = flag(1, low=1)
    """Ranks that share every sequence."""
    expert_model_parallel_size: int = flag(1, low=1)
    """Ranks that share the experts of a layer."""
    expert_tensor_parallel_size: int | None = flag(None, low=1)
    """Ranks that share each expert's matrices; None takes the tensor-parallel size."""
    sequence_parallel: bool = False
    """Split activations between tensor-parallel ranks outside the matrix products."""
    num_layers_per_virtual_pipeline_stage: int | None = flag(None, low=1)
    """Layers of one model chunk with interleaved pipelining."""
    num_virtual_stages_per_pipeline_rank: int | None = flag(None, low=1)
    """The same, said as chunks per stage."""
    microbatch_group_size_per_virtual_pipeline_stage: int | None = flag(
        None, later="micro-batch groups of other than the pipeline's size"
    )
    """Consecutive micro-batches of one chunk; None takes the pipeline size."""
    decoder_first_pipeline_num_layers: int | None = flag(None, low=1)
    """Layers of the first stage when stages differ."""
    decoder_last_pipeline_num_layers: int | None = flag(None, low=1)
    """Layers of the last stage when stages differ."""
    pipeline_model_parallel_layout: str | None = None
    """Megatron's layout string, one letter per layer and | between stages; or a plain list of layers per stage, 10,12,8,8, in
    the order in which a token passes the stages (a multiple of the stages: virtual ones)."""
    allgather_cp: bool = False
    """Contiguous context-parallel shards with gathered keys: the layout of sparse attention."""
    dsa_core_axis: Literal["queries", "heads"] = "queries"
    """What sparse attention's core is split by between tensor-parallel ranks: its queries (each rank all heads of its rows), or
    its heads, as the projections are; heads is for comparison."""
    dsa_move_cost: int = flag(20480, low=-1)
    """Rows of the indexer with long contexts are scored by tensor- or context-parallel ranks whose rows have short ones; what
    moving a row may cost, in keys scored. 0 moves whenever it evens the ranks, -1 never."""
    dsa_index_scoring: Literal["params", "fp8"] = "params"
    """How the indexer multiplies queries by keys: in the type of the parameters, or as SGLang's engine does on a GPU, with
    both rounded to FP8 (e4m3, one float32 scale per vector), so that the trainer selects the keys that generation selected."""
    dsa_attention_forward: Literal["ours", "flashmla"] = "ours"
    """Whose kernel computes sparse attention's output on a Hopper GPU: this project's, the faster one, or that of an installed
    FlashMLA (flash_mla or sgl_kernel). The backward is this project's either way; a CPU computes with torch."""
    dsa_send_indices: bool = False
    """Sparse attention's selected keys travel with the hidden states to the next pipeline stage, which may then start on a
    layer that shares them; off, every stage must start on a layer that computes its own."""
    distributed_timeout_minutes: int = flag(10, low=1)
    """A collective that takes longer fails."""
    virtual_pipeline_model_parallel_size: int | None = derived(None)
    """Model chunks per stage."""
    world_size: int | None = derived(None)
    """Training ranks; None at the conversion door, where torchrun decides."""
    data_parallel_size: int | None = derived(None)
    """Copies of the model among the training ranks, without the context-parallel ones."""


@dataclass(frozen=True)
class ModelConfig:
    """The model as Megatron's flags describe it. `megatron` holds what goes to its TransformerConfig unchanged."""

    spec: tuple[str, str] | None = None
    """MODULE FUNCTION that builds the layer spec from (args, config, vp_stage)."""
    custom_model_provider_path: str | None = None
    """Dotted path of a function that builds the whole model."""
    model_name: str | None = None
    """Key of the weight-name table."""
    vocab_size: int | None = flag(None, low=1)
    """Rows of the tokenizer's vocabulary."""
    padded_vocab_size: int | None = flag(None, low=1)
    """Rows of the embedding; None pads vocab_size."""
    make_vocab_size_divisible_by: int = flag(128, low=1)
    """The embedding has a multiple of this times the tensor-parallel size."""
    untie_embeddings_and_output_weights: bool = False
    """The output layer has weights of its own."""
    position_embedding_type: Literal["learned_absolute", "rope", "yarn", "mrope", "relative", "none"] = "learned_absolute"
    """Kind of position information."""
    use_rotary_position_embeddings: bool = False
    """Older spelling of --position-embedding-type rope."""
    add_position_embedding: bool = flag(True, off="--no-position-embedding")
    """Off: no table of absolute positions (rotary models)."""
    rotary_base: float = flag(10000.0, above=0)
    """RoPE theta."""
    rotary_percent: float = flag(1.0, above=0, high=1)
    """Share of the head that RoPE turns."""
    rotary_seq_len_interpolation_factor: int | None = flag(None, later=_ROPE)
    """Linear RoPE interpolation."""
    use_rope_scaling: bool = False
    """Llama 3's stretched positions: config.json must say the same."""
    rope_scaling_factor: float = flag(8.0, above=0)
    """Their factor."""
    max_position_embeddings: int | None = flag(None, low=1)
    """Longest position; None takes seq_length. YaRN reads it as the original context."""
    seq_length: int = flag(4096, low=1)
    """Nominal length; packed batches are not bound to it."""
    swiglu: bool = False
    """Gated SiLU feed-forward."""
    group_query_attention: bool = False
    """Fewer key/value heads than query heads; --num-query-groups says how many."""
    multi_latent_attention: bool = False
    """DeepSeek's latent attention (MLA)."""
    post_self_attn_layernorm: bool = False
    """A norm after attention, before the residual sum (GLM-4)."""
    post_mlp_layernorm: bool = False
    """A norm after the feed-forward, before the residual sum (GLM-4)."""
    params_dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of trained weights and activations; auto is bf16 on GPUs and fp32 on CPUs."""
    bf16: bool = False
    """Same as --params-dtype bf16."""
    fp16: bool = flag(False, later="fp16 training")
    """Half precision."""
    recompute_activations: bool = False
    """Older spelling of --recompute-granularity selective."""
    seed: int = flag(1234, low=0, high=2**32 - 1)
    """Base of every random stream."""
    enable_experimental: bool = False
    """Megatron's consent to experimental features."""
    only_train_params_name_list: tuple[str, ...] | None = None
    """Regular expressions: only matching parameters are trained."""
    freeze_params_name_list: tuple[str, ...] | None = None
    """Regular expressions: matching parameters are not trained."""
    freeze_indexer: bool = False
    """The sparse-attention indexer is not trained, which is this project's default."""
    qwen_gdn_backend: Literal["fla", "flashqla"] = flag("fla", later="Qwen's gated delta-net layers")
    """Kernels of Qwen's gated delta-net layers."""
    mtp_num_layers: int | None = flag(None, low=0)
    """1 converts the checkpoint's multi-token-prediction layer too, and builds it where --enable-mtp-training trains it."""
    mtp_loss_scaling_factor: float = flag(0.2, low=0)
    """Weight of its loss beside the policy's."""
    enable_mtp_training: bool = False
    """Train it, and send it to the engines' draft model."""
    megatron_deepgemm_forward_layers: tuple[int, ...] | None = flag(None, later="DeepGEMM forward in the trainer")
    """Layers (0-based) whose forward uses the engine's kernels."""
    megatron_deepgemm_forward_modules: tuple[str, ...] | None = flag(None, later="DeepGEMM forward in the trainer")
    """Modules of those layers."""
    megatron_deepgemm_moe_forward_layers: tuple[int, ...] | None = flag(None, later="DeepGEMM forward in the trainer")
    """Expert layers, likewise."""
    megatron_deepgemm_moe_forward_modules: tuple[str, ...] | None = flag(None, later="DeepGEMM forward in the trainer")
    """Expert modules, likewise."""
    megatron: Mapping[str, object] = derived({})
    """Field of megatron-core's TransformerConfig or MLATransformerConfig -> value, only what was given or derived."""
