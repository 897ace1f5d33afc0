"""transformers' GLM-5.2 as the number to compare an engine with, and the weights of a checkpoint as plain float32.

The block-FP8 arithmetic here is its own (numpy, one tile at a time), so that it can disagree with slime.ops.fp8.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file


def restore_fp8(codes: torch.Tensor, scale: torch.Tensor, block: int = 128) -> torch.Tensor:
    values = codes.float().numpy().copy()
    scales = scale.float().numpy()
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            values[i * block : (i + 1) * block, j * block : (j + 1) * block] *= scales[i, j]
    return torch.from_numpy(values.astype(np.float32))


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint in float32, FP8 restored, scales left out."""
    raw: dict[str, torch.Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(str(file), "pt") as reader:
            raw |= {name: reader.get_tensor(name) for name in reader.keys()}
    return restored(raw)


def restored(raw: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {}
    for name, tensor in raw.items():
        if name.endswith("_scale_inv"):
            continue
        scale = raw.get(f"{name}_scale_inv")
        out[name] = tensor.float() if scale is None else restore_fp8(tensor, scale)
    return out


def load_reference(config_of: Path, weights: dict[str, torch.Tensor], scratch: Path):
    """A float32 transformers model with these weights (per-expert names; transformers itself fuses them on load)."""
    from transformers import AutoModelForCausalLM

    config = json.loads((Path(config_of) / "config.json").read_text())
    config.pop("quantization_config", None)
    config["dtype"] = "float32"
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()}, str(scratch / "model.safetensors"), {"format": "pt"}
    )
    model = AutoModelForCausalLM.from_pretrained(str(scratch), attn_implementation="eager", dtype=torch.float32).eval()
    if config["model_type"] == "glm_moe_dsa":
        model.config._experts_implementation = "eager"
        for layer in model.model.layers:
            # transformers builds these two with 1e-6; every server and trainer takes the config's value.
            for norm in (layer.self_attn.q_a_layernorm, layer.self_attn.kv_a_layernorm):
                norm.variance_epsilon = config["rms_norm_eps"]
    return model


@contextmanager
def lowest_position_wins():
    """torch.topk picks arbitrarily among equal scores; both sides of the comparison must follow the same rule."""
    plain = torch.Tensor.topk

    def stable(self, k, dim=-1, largest=True, sorted=True):
        values, indices = self.sort(dim=dim, descending=largest, stable=True)
        return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))

    torch.Tensor.topk = stable
    try:
        yield
    finally:
        torch.Tensor.topk = plain


@torch.no_grad()
def log_probs(model, tokens: list[int], *, index_topk: int | None = None) -> torch.Tensor:
    """[len(tokens), vocab] log-probabilities of the next token. index_topk: use another top-k (control experiments)."""
    indexers = [
        layer.self_attn.indexer for layer in model.model.layers if getattr(layer.self_attn, "indexer", None) is not None
    ]
    kept = [indexer.index_topk for indexer in indexers]
    for indexer in indexers:
        indexer.index_topk = index_topk or indexer.index_topk
    try:
        with lowest_position_wins():
            logits = model(torch.tensor([tokens]), use_cache=False).logits
    finally:
        for indexer, topk in zip(indexers, kept, strict=True):
            indexer.index_topk = topk
    return torch.log_softmax(logits.float(), -1)[0]


def largest_difference(model, prompt: list[int], answer: dict, **kwargs) -> tuple[float, float]:
    """max |server - reference| over (prompt tokens, generated tokens); the answer needs logprob_start_len 0."""
    output, meta = answer["output_ids"], answer["meta_info"]
    expected = log_probs(model, prompt + output, **kwargs)
    served = [entry[0] for entry in meta["input_token_logprobs"]][1:] + [entry[0] for entry in meta["output_token_logprobs"]]
    gaps = [abs(expected[i, token].item() - served[i]) for i, token in enumerate((prompt + output)[1:])]
    assert len(served) == len(prompt) + len(output) - 1, "the server left log-probs out"
    return max(gaps[: len(prompt) - 1]), max(gaps[len(prompt) - 1 :])


@torch.no_grad()
def chosen_experts(model, tokens: list[int]) -> dict[int, torch.Tensor]:
    """By 0-based layer [len(tokens), topk]: the experts that transformers' layers are called with, in rising order."""
    chosen: dict[int, torch.Tensor] = {}
    hooks = []
    for number, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            keep = lambda module, inputs, number=number: chosen.__setitem__(number, inputs[1])  # noqa: E731
            hooks.append(layer.mlp.experts.register_forward_pre_hook(keep))
    with lowest_position_wins():
        model(torch.tensor(tokens)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {number: experts.reshape(len(tokens), -1).sort(-1).values for number, experts in chosen.items()}


@torch.no_grad()
def selected_keys(model, tokens: list[int]) -> dict[int, torch.Tensor]:
    """By 0-based layer int64 [len(tokens), topk], rising: the places that transformers' indexers choose."""
    chosen: dict[int, torch.Tensor] = {}
    hooks = []
    for number, layer in enumerate(model.model.layers):
        if getattr(layer.self_attn, "indexer", None) is not None:
            keep = lambda module, inputs, out, number=number: chosen.__setitem__(number, out)  # noqa: E731
            hooks.append(layer.self_attn.indexer.register_forward_hook(keep))
    with lowest_position_wins():
        model(torch.tensor(tokens)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {number: places[0].long().sort(-1).values for number, places in chosen.items()}


def share_of_equal_keys(model, sample) -> float:
    """Of the places that tokens beyond topk read, at worst in a layer: as transformers chooses. A near-tie may fall either
    way."""
    theirs, topk = selected_keys(model, list(sample.tokens)), model.config.index_topk
    told, rows = sample.rollout_indexer_topk, range(topk, len(sample.tokens) - 1)
    assert told.layers == tuple(theirs) and told.end == rows.stop and not told.has_gap
    shares = []
    for layer, places in theirs.items():
        said = told.rows(layer, rows.start, rows.stop, topk)
        both = [len(set(a) & set(b.tolist())) for a, b in zip(said.tolist(), places[rows.start : rows.stop], strict=True)]
        shares.append(sum(both) / (len(rows) * topk))
    return min(shares)


def left_by_sampling(log_probs: torch.Tensor, top_p: float, top_k: int) -> set[int]:
    """The likeliest words before which less than top_p lies, top_k at most."""
    ordered = log_probs.exp().sort(descending=True)
    before = ordered.values.cumsum(-1) - ordered.values
    return set(ordered.indices[(before <= top_p) & (torch.arange(len(before)) < top_k)].tolist())


def sample_of(model, tokens: list[int], answers: list[dict]):
    """A Sample that has taken the engine's answers, each with the experts of its turn."""
    from types import SimpleNamespace

    from slime.types.sample import Sample

    args = SimpleNamespace(
        num_layers=model.config.num_hidden_layers,
        moe_router_topk=model.config.num_experts_per_tok,
        sglang_speculative_algorithm=None,
    )
    sample = Sample(tokens=list(tokens))
    for answer in answers:
        new = [int(item[1]) for item in answer["meta_info"]["output_token_logprobs"]]
        sample.append_response_tokens(args, tokens=new, log_probs=[0.0] * len(new), meta_info=answer["meta_info"])
    return sample


def share_of_equal_experts(model, sample) -> float:
    """Of the tokens that have experts, at worst in a layer: as transformers chooses. A near-tie may fall either way."""
    theirs = chosen_experts(model, list(sample.tokens))
    said = torch.from_numpy(sample.rollout_routed_experts.astype("int64"))
    assert said.shape == (len(sample.tokens) - 1, model.config.num_hidden_layers, model.config.num_experts_per_tok)
    known = (said >= 0).flatten(1).all(1)
    same = [
        (said[known, number].sort(-1).values == experts[:-1][known]).all(-1).float().mean()
        for number, experts in theirs.items()
    ]
    return float(min(same))
