#!/usr/bin/env python3
"""Write a tiny GLM-5.2 checkpoint pair (BF16 and block-FP8), or a tiny Qwen3, in the Hugging Face layout of the released ones.

    python tools/make_tiny_checkpoint.py --preset cpu --seed 0 --output-bf16 DIR/GLM-5.2-tiny --output-fp8 DIR/GLM-5.2-tiny-FP8
    python tools/make_tiny_checkpoint.py --preset cpu --output DIR            # DIR/bf16 and DIR/fp8
    python tools/make_tiny_checkpoint.py --preset cpu --index-topk 8 --output DIR       # another number of keys per query
    python tools/make_tiny_checkpoint.py --preset mini --device cuda --output DIR       # production widths, drawn on a GPU

Every mechanism of the 744B model is there with small numbers: MLA with a query latent, sparse attention with an indexer on the
computing layers and index sharing between (freq 4, offset 3), a sigmoid router with a float32 selection bias, a shared expert,
the MTP layer, per-expert 2-D tensors, `weight_scale_inv`, sharded safetensors with an index, a tokenizer with a chat template.
The weights are random, seeded by (seed, tensor name): the same file on every machine, whatever the order of writing. With
--device cuda they are others, the same on every GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.tiny_tokenizer import TokenizerFacts, write_tokenizer  # noqa: E402

FP8_BLOCK = 128
MADE_HERE = ".made-by-make_tiny_checkpoint"
"""A file in every directory that this tool may delete."""


@dataclass(frozen=True)
class GlmSize:
    """The numbers in which a GLM-5.2-shaped model may differ; field names are those of config.json."""

    num_hidden_layers: int = 8
    first_k_dense_replace: int = 3
    hidden_size: int = 128
    intermediate_size: int = 256
    moe_intermediate_size: int = 64
    num_attention_heads: int = 4
    q_lora_rank: int = 64
    kv_lora_rank: int = 32
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    n_shared_experts: int = 1
    # ReLU scores of few heads are often exactly zero and tie; 16 heads of 128 make a tie rare. 128 is what SGLang's pools
    # accept.
    index_n_heads: int = 16
    index_head_dim: int = 128
    index_topk: int = 16
    index_topk_freq: int = 4
    index_skip_topk_offset: int = 3
    num_nextn_predict_layers: int = 1
    max_position_embeddings: int = 4096


@dataclass(frozen=True)
class QwenSize:
    """A dense GQA model with q/k norms."""

    num_hidden_layers: int = 4
    hidden_size: int = 128
    intermediate_size: int = 384
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    max_position_embeddings: int = 4096


@dataclass(frozen=True)
class Preset:
    family: str  # "glm" | "qwen"
    size: GlmSize | QwenSize
    max_shard_bytes: int


PRESETS = {
    "cpu": Preset("glm", GlmSize(), 1 << 20),
    # The smallest GLM-5.2 that the CUDA sparse-attention kernels accept: 64 heads, 512+64 latent, 32 x 128 index heads, top-k
    # 2048.
    "h200": Preset(
        "glm",
        GlmSize(
            hidden_size=1024, intermediate_size=2048, moe_intermediate_size=256, num_attention_heads=64, q_lora_rank=512,
            kv_lora_rank=512, qk_nope_head_dim=192, qk_rope_head_dim=64, v_head_dim=256, n_routed_experts=16,
            num_experts_per_tok=4, index_n_heads=32, index_topk=2048, max_position_embeddings=16384,
        ),
        256 << 20,
    ),
    # GLM-5.2's own widths and heads with few layers and experts: 8.3 billion parameters, 29 GB for the pair.
    "mini": Preset(
        "glm",
        GlmSize(
            hidden_size=6144, intermediate_size=12288, moe_intermediate_size=2048, num_attention_heads=64, q_lora_rank=2048,
            kv_lora_rank=512, qk_nope_head_dim=192, qk_rope_head_dim=64, v_head_dim=256, n_routed_experts=32,
            num_experts_per_tok=8, index_n_heads=32, index_topk=2048, max_position_embeddings=131072,
        ),
        2 << 30,
    ),
    "qwen3": Preset("qwen", QwenSize(), 512 << 10),
}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the BF16 checkpoint."""

    name: str
    shape: tuple[int, ...]
    std: float  # 0 means constant
    fill: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    fp8: bool = False  # stored in block FP8 by the FP8 twin


def indexer_types(size: GlmSize) -> list[str]:
    """ "full" for a layer that runs its own indexer, "shared" for one that reuses the nearest earlier full layer's choice."""
    computing = (max(i - size.index_skip_topk_offset + 1, 0) % size.index_topk_freq == 0 for i in range(size.num_hidden_layers))
    return ["full" if full else "shared" for full in computing]


# ------------------------------------------------------------------------------------------------------------- tensors


def _linear(name: str, rows: int, columns: int, *, gain: float = 1.0, fp8: bool = True) -> TensorSpec:
    return TensorSpec(name + ".weight", (rows, columns), gain / math.sqrt(columns), fp8=fp8)


def _norm(name: str, width: int) -> TensorSpec:
    return TensorSpec(name + ".weight", (width,), 0.0, fill=1.0)


def _glm_attention(prefix: str, size: GlmSize, *, with_indexer: bool, out_gain: float) -> Iterator[TensorSpec]:
    heads, hidden = size.num_attention_heads, size.hidden_size
    yield _linear(prefix + "q_a_proj", size.q_lora_rank, hidden)
    yield _norm(prefix + "q_a_layernorm", size.q_lora_rank)
    yield _linear(prefix + "q_b_proj", heads * (size.qk_nope_head_dim + size.qk_rope_head_dim), size.q_lora_rank)
    yield _linear(prefix + "kv_a_proj_with_mqa", size.kv_lora_rank + size.qk_rope_head_dim, hidden)
    yield _norm(prefix + "kv_a_layernorm", size.kv_lora_rank)
    yield _linear(prefix + "kv_b_proj", heads * (size.qk_nope_head_dim + size.v_head_dim), size.kv_lora_rank)
    yield _linear(prefix + "o_proj", hidden, heads * size.v_head_dim, gain=out_gain)
    if with_indexer:
        yield _linear(prefix + "indexer.wq_b", size.index_n_heads * size.index_head_dim, size.q_lora_rank)
        yield _linear(prefix + "indexer.wk", size.index_head_dim, hidden)
        yield _norm(prefix + "indexer.k_norm", size.index_head_dim)
        yield TensorSpec(prefix + "indexer.k_norm.bias", (size.index_head_dim,), 0.0)
        yield _linear(prefix + "indexer.weights_proj", size.index_n_heads, hidden, fp8=False)


def _gated_mlp(prefix: str, hidden: int, inner: int, *, out_gain: float) -> Iterator[TensorSpec]:
    yield _linear(prefix + "gate_proj", inner, hidden)
    yield _linear(prefix + "up_proj", inner, hidden)
    yield _linear(prefix + "down_proj", hidden, inner, gain=out_gain)


def _glm_layer(layer: int, size: GlmSize, *, with_indexer: bool) -> Iterator[TensorSpec]:
    prefix, hidden = f"model.layers.{layer}.", size.hidden_size
    out_gain = 1 / math.sqrt(2 * size.num_hidden_layers)
    yield _norm(prefix + "input_layernorm", hidden)
    yield from _glm_attention(prefix + "self_attn.", size, with_indexer=with_indexer, out_gain=out_gain)
    yield _norm(prefix + "post_attention_layernorm", hidden)
    mlp = prefix + "mlp."
    if layer < size.first_k_dense_replace:
        yield from _gated_mlp(mlp, hidden, size.intermediate_size, out_gain=out_gain)
        return
    yield _linear(mlp + "gate", size.n_routed_experts, hidden, fp8=False)
    yield TensorSpec(mlp + "gate.e_score_correction_bias", (size.n_routed_experts,), 0.01, dtype=torch.float32)
    for expert in range(size.n_routed_experts):
        yield from _gated_mlp(f"{mlp}experts.{expert}.", hidden, size.moe_intermediate_size, out_gain=out_gain)
    yield from _gated_mlp(
        mlp + "shared_experts.", hidden, size.moe_intermediate_size * size.n_shared_experts, out_gain=out_gain
    )


def glm_tensors(size: GlmSize, vocab_size: int) -> Iterator[TensorSpec]:
    """All tensors in the order of the released shards; the MTP layer follows the last one and owns an indexer."""
    yield TensorSpec("model.embed_tokens.weight", (vocab_size, size.hidden_size), 1.0)
    for layer, kind in enumerate(indexer_types(size)):
        yield from _glm_layer(layer, size, with_indexer=kind == "full")
    for extra in range(size.num_nextn_predict_layers):
        layer = size.num_hidden_layers + extra
        prefix = f"model.layers.{layer}."
        yield from _glm_layer(layer, size, with_indexer=True)
        yield _linear(prefix + "eh_proj", size.hidden_size, 2 * size.hidden_size, fp8=False)
        for name in ("enorm", "hnorm", "shared_head.norm"):
            yield _norm(prefix + name, size.hidden_size)
    yield _norm("model.norm", size.hidden_size)
    yield _linear("lm_head", vocab_size, size.hidden_size, gain=0.2, fp8=False)


def qwen_tensors(size: QwenSize, vocab_size: int) -> Iterator[TensorSpec]:
    hidden, out_gain = size.hidden_size, 1 / math.sqrt(2 * size.num_hidden_layers)
    yield TensorSpec("model.embed_tokens.weight", (vocab_size, hidden), 1.0)
    for layer in range(size.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        attention = prefix + "self_attn."
        yield _norm(prefix + "input_layernorm", hidden)
        yield _linear(attention + "q_proj", size.num_attention_heads * size.head_dim, hidden)
        yield _linear(attention + "k_proj", size.num_key_value_heads * size.head_dim, hidden)
        yield _linear(attention + "v_proj", size.num_key_value_heads * size.head_dim, hidden)
        yield _linear(attention + "o_proj", hidden, size.num_attention_heads * size.head_dim, gain=out_gain)
        yield _norm(attention + "q_norm", size.head_dim)
        yield _norm(attention + "k_norm", size.head_dim)
        yield _norm(prefix + "post_attention_layernorm", hidden)
        yield from _gated_mlp(prefix + "mlp.", hidden, size.intermediate_size, out_gain=out_gain)
    yield _norm("model.norm", hidden)
    yield _linear("lm_head", vocab_size, hidden, gain=0.2, fp8=False)


def tensor_specs(preset: Preset, vocab_size: int) -> list[TensorSpec]:
    return list((glm_tensors if preset.family == "glm" else qwen_tensors)(preset.size, vocab_size))


def draw(spec: TensorSpec, seed: int, device: str = "cpu") -> torch.Tensor:
    """The values of one tensor: a function of (seed, name) and of the device's generator, and of nothing else."""
    if spec.std == 0.0:
        return torch.full(spec.shape, spec.fill, dtype=spec.dtype, device=device)
    digest = hashlib.sha256(f"{seed}/{spec.name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return (torch.randn(spec.shape, generator=generator, device=device) * spec.std).to(spec.dtype)


def stored_tensors(specs: list[TensorSpec], seed: int, *, fp8: bool, device: str = "cpu") -> Iterator[tuple[str, torch.Tensor]]:
    """What goes into the files, one tensor at a time; the FP8 twin quantises the BF16 values, not the drawn ones."""
    from slime.ops.fp8 import quantize_blockwise

    for spec in specs:
        value = draw(spec, seed, device)
        if fp8 and spec.fp8:
            quantised, scale_inv = quantize_blockwise(value, FP8_BLOCK)
            yield spec.name, quantised
            yield spec.name.removesuffix("weight") + "weight_scale_inv", scale_inv
        else:
            yield spec.name, value


# -------------------------------------------------------------------------------------------------------------- config


def glm_config(size: GlmSize, facts: TokenizerFacts) -> dict[str, object]:
    dense = size.first_k_dense_replace
    config: dict[str, object] = {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "model_type": "glm_moe_dsa",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "eos_token_id": list(facts.eos_token_ids),
        "pad_token_id": facts.pad_token_id,
        # The released config carries the nope width here, which is neither the query width nor what `transformers` makes of it.
        "head_dim": size.qk_nope_head_dim,
        "hidden_act": "silu",
        "index_share_for_mtp_iteration": True,
        "index_topk_pattern": None,
        "indexer_rope_interleave": True,
        "indexer_types": indexer_types(size),
        "initializer_range": 0.02,
        "mlp_bias": False,
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (size.num_hidden_layers - dense),
        "moe_layer_freq": 1,
        "moe_router_dtype": "float32",
        "n_group": 1,
        "norm_topk_prob": True,
        "num_key_value_heads": size.num_attention_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleave": True,
        "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "transformers_version": "5.12.0",
        "use_cache": True,
        "vocab_size": facts.vocab_size,
    }
    config |= {field.name: getattr(size, field.name) for field in fields(size)}
    return config | {"qk_head_dim": size.qk_nope_head_dim + size.qk_rope_head_dim}


def qwen_config(size: QwenSize, facts: TokenizerFacts) -> dict[str, object]:
    config: dict[str, object] = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "eos_token_id": facts.eos_token_ids[0],
        "pad_token_id": facts.pad_token_id,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_window_layers": size.num_hidden_layers,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "transformers_version": "5.12.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": facts.vocab_size,
    }
    return config | {field.name: getattr(size, field.name) for field in fields(size)}


def quantization_config(specs: list[TensorSpec]) -> dict[str, object]:
    """The block of the FP8 twin; its list keeps the release's slip: it says `indexers_proj`, the tensor is
    `indexer.weights_proj`."""
    kept = [spec.name.removesuffix(".weight") for spec in specs if not spec.fp8]
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": sorted(name.replace("indexer.weights_proj", "indexers_proj") for name in kept),
        "quant_method": "fp8",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    }


# ------------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Written:
    directory: Path
    num_parameters: int
    num_tensors: int
    num_bytes: int
    num_shards: int


class ShardWriter:
    """Collects tensors up to `max_bytes`, then writes a file; the count of files is in their names, so they are renamed at the
    end."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory, self.max_bytes = directory, max_bytes
        self.pending: dict[str, torch.Tensor] = {}
        self.pending_bytes = 0
        self.shards: list[tuple[Path, list[str]]] = []
        self.total_bytes = 0

    def add(self, name: str, value: torch.Tensor) -> None:
        num_bytes = value.numel() * value.element_size()
        if self.pending and self.pending_bytes + num_bytes > self.max_bytes:
            self._flush()
        self.pending[name] = value.contiguous().cpu()
        self.pending_bytes += num_bytes
        self.total_bytes += num_bytes

    def _flush(self) -> None:
        from safetensors.torch import save_file

        path = self.directory / f".shard-{len(self.shards) + 1:05d}.tmp"
        save_file(self.pending, path, metadata={"format": "pt"})
        self.shards.append((path, list(self.pending)))
        self.pending, self.pending_bytes = {}, 0

    def close(self) -> None:
        if self.pending:
            self._flush()
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self.shards, start=1):
            file_name = f"model-{number:05d}-of-{len(self.shards):05d}.safetensors"
            path.chmod(0o644)  # safetensors creates its files unreadable for others
            path.rename(self.directory / file_name)
            weight_map.update(dict.fromkeys(names, file_name))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self.directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_checkpoint(
    directory: Path, preset: Preset, *, seed: int, fp8: bool, device: str = "cpu", weights: bool = True
) -> Written:
    """One complete HF directory, or without `weights` its config and tokenizer, which is what a rehearsal reads. An earlier one
    that this tool made is replaced; any other directory is left alone with an error."""
    if directory.exists() and any(directory.iterdir()):
        if not (directory / MADE_HERE).exists():
            raise ValueError(f"{directory} is not empty and was not made by this tool (no {MADE_HERE}); name a new directory")
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MADE_HERE).touch()
    facts = write_tokenizer(directory, preset.family, max_length=preset.size.max_position_embeddings)
    specs = tensor_specs(preset, facts.vocab_size)
    writer = ShardWriter(directory, preset.max_shard_bytes)
    if weights:
        for name, value in stored_tensors(specs, seed, fp8=fp8, device=device):
            writer.add(name, value)
        writer.close()

    config = (glm_config if preset.family == "glm" else qwen_config)(preset.size, facts)
    if fp8:
        config["quantization_config"] = quantization_config(specs)
    generation = {
        "_from_model_config": True,
        "do_sample": True,
        "eos_token_id": list(facts.eos_token_ids),
        "pad_token_id": facts.pad_token_id,
        "temperature": 1.0,
        "transformers_version": "5.12.0",
    }
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    # Last: whoever finds a config.json finds a whole checkpoint.
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    num_tensors = sum(len(names) for _, names in writer.shards)
    return Written(directory, sum(math.prod(s.shape) for s in specs), num_tensors, writer.total_bytes, len(writer.shards))


def parameter_counts(preset: Preset, vocab_size: int) -> dict[str, int]:
    """Parameters by part, so that the reader sees where they sit."""
    counts = {"embedding and head": 0, "attention": 0, "indexer": 0, "dense MLP": 0, "experts": 0, "MTP layer": 0, "rest": 0}
    mtp_prefix = f"model.layers.{preset.size.num_hidden_layers}."
    for spec in tensor_specs(preset, vocab_size):
        if spec.name.startswith(mtp_prefix):
            part = "MTP layer"
        elif "embed_tokens" in spec.name or "lm_head" in spec.name:
            part = "embedding and head"
        elif ".indexer." in spec.name:
            part = "indexer"
        elif ".self_attn." in spec.name:
            part = "attention"
        elif "experts" in spec.name:
            part = "experts"
        elif ".mlp." in spec.name and ".gate." not in spec.name:
            part = "dense MLP"
        else:
            part = "rest"
        counts[part] += math.prod(spec.shape)
    return {part: count for part, count in counts.items() if count}


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), required=True)
    parser.add_argument("--output", type=Path, help="writes OUTPUT/bf16 and OUTPUT/fp8")
    parser.add_argument("--output-bf16", type=Path, help="directory of the BF16 checkpoint")
    parser.add_argument("--output-fp8", type=Path, help="directory of its block-FP8 twin")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where weights are drawn and quantised: cpu or cuda")
    parser.add_argument("--without-weights", action="store_true", help="write config and tokenizer alone")
    parser.add_argument("--experts", type=int, help="replace the preset's number of routed experts")
    parser.add_argument("--num-hidden-layers", type=int, help="replace the preset's number of layers")
    parser.add_argument("--index-topk", type=int, help="replace the preset's number of keys that sparse attention keeps")
    parser.add_argument("--max-shard-bytes", type=int, help="replace the preset's size of one safetensors file")
    args = parser.parse_args(argv)
    if args.output is not None:
        args.output_bf16 = args.output_bf16 or args.output / "bf16"
        args.output_fp8 = args.output_fp8 or args.output / "fp8"
    if args.output_bf16 is None and args.output_fp8 is None:
        parser.error("say where to write: --output DIR, or --output-bf16 DIR and/or --output-fp8 DIR")
    for name in ("index_topk", "experts"):
        if getattr(args, name) is not None and PRESETS[args.preset].family != "glm":
            parser.error(f"--{name.replace('_', '-')}: preset {args.preset} has no sparse attention and no experts")
    if args.device != "cpu" and not (args.device.startswith("cuda") and torch.cuda.is_available()):
        parser.error(f"--device {args.device}: choose cpu, or cuda where torch sees a GPU")
    return args


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    preset = PRESETS[args.preset]
    if args.num_hidden_layers is not None:
        preset = replace(preset, size=replace(preset.size, num_hidden_layers=args.num_hidden_layers))
    if args.index_topk is not None:
        preset = replace(preset, size=replace(preset.size, index_topk=args.index_topk))
    if args.experts is not None:
        preset = replace(preset, size=replace(preset.size, n_routed_experts=args.experts))
    if args.max_shard_bytes is not None:
        preset = replace(preset, max_shard_bytes=args.max_shard_bytes)
    for directory, fp8 in ((args.output_bf16, False), (args.output_fp8, True)):
        if directory is None:
            continue
        weights = not args.without_weights
        written = write_checkpoint(directory, preset, seed=args.seed, fp8=fp8, device=args.device, weights=weights)
        print(
            f"{'fp8 ' if fp8 else 'bf16'} {written.directory}: {written.num_parameters:,} parameters, "
            f"{written.num_tensors} tensors, {written.num_bytes / 1e6:.1f} MB in {written.num_shards} files"
        )
    from tools.tiny_tokenizer import VOCAB_SIZE

    print("  " + ", ".join(f"{part} {count:,}" for part, count in parameter_counts(preset, VOCAB_SIZE).items()))


if __name__ == "__main__":
    main()
