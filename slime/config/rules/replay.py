"""What engines chose and training takes again: what they must record, and what keeps them from it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from slime.config.engine_groups import SglangModel
from slime.config.flags import FrozenMap
from slime.config.rules.engine_model import served

if TYPE_CHECKING:
    from slime.config.rules.book import Values

RECORDS = {
    "use_rollout_routing_replay": "enable_return_routed_experts",
    "use_rollout_indexer_replay": "enable_return_indexer_topk",
}
"""Flag of ours -> option with which an engine records."""
MOST_WORDS = 4000
"""Words that top-p alone may leave, the likeliest first: SGLang tells of a bounded number."""
TIED_WORDS = 96
"""More that an engine may tell of, where several are as likely as the last one."""


def recorded(v: Values) -> None:
    """The engines record what training takes."""
    if v["debug_train_only"]:
        return
    options: dict[str, object] = {option: True for name, option in RECORDS.items() if v[name]}
    if options:
        v.notes.append(f"{_asked(v)[0]} asks the engines what they chose ({', '.join(options)})")
    if v["most_kept_words"]:
        options["sampling_mask_max_tokens"] = v["most_kept_words"] + TIED_WORDS
    # A model beside the trained one, a judge's, may have nothing to record.
    v["groups"] = tuple(_with(model, options) if _is_trained(v, model) else model for model in v["groups"])


def kept_words(v: Values) -> None:
    """Sampling that cuts the vocabulary: the trainer's probabilities are over what it left."""
    top_p, top_k = v["rollout_top_p"], v["rollout_top_k"]
    cut = [f"--rollout-top-p {top_p:g}"] if top_p < 1 else []
    cut += [f"--rollout-top-k {top_k}"] if top_k > 0 else []
    if not cut or v["debug_rollout_only"] or v["loss_type"] == "sft_loss":
        return
    engines = [group for model in v["groups"] if _is_trained(v, model) for group in model.server_groups]
    drafts = v["sglang"].get("speculative_algorithm") or any(group.overrides.get("speculative_algorithm") for group in engines)
    obstacle = (
        "--loss-type custom_loss is given all logits" if v["loss_type"] == "custom_loss"
        else "--rollout-top-k 1 leaves one word, of probability 1" if top_k == 1
        else "SGLang does not tell what it left under speculative decoding" if drafts
        else None
    )  # fmt: skip
    words = " and ".join(cut)
    if obstacle:
        v.notes.append(
            f"{words} cut the vocabulary when sampling, and the trainer's probabilities are over all of it ({obstacle}): "
            "training is off-policy by that much"
        )
        return
    most = top_k if top_k > 0 else MOST_WORDS
    v.derive("most_kept_words", most, f"{words} cut the vocabulary, and engines tell what is left of it for each token")


def _is_trained(v: Values, model: SglangModel) -> bool:
    return model.model_path is None or str(model.model_path) == str(v["hf_checkpoint"])


def _with(model: SglangModel, options: dict[str, object]) -> SglangModel:
    groups = tuple(replace(group, overrides=FrozenMap({**group.overrides, **options})) for group in model.server_groups)
    return replace(model, server_groups=groups)


def _asked(v: Values) -> list[str]:
    return [f"--{name.replace('_', '-')}" for name in RECORDS if v[name]]


def trainable(v: Values) -> None:
    """Selections replayed by a model that makes some."""
    if not v["use_rollout_indexer_replay"]:
        return
    hf = v.hf
    v.require(
        hf is None or hf.has_indexer,
        f"--use-rollout-indexer-replay takes the keys that sparse attention selected, and "
        f"{hf.get('model_type') if hf is not None else ''} has none; remove it",
    )
    v.require(
        v["loss_type"] == "policy_loss",
        f"--use-rollout-indexer-replay takes what engines selected, and --loss-type {v['loss_type']} trains without; remove it",
    )


def recordable(v: Values) -> None:
    """An engine remembers a choice by the place of the token's cache, in the process that computed it."""
    asked = _asked(v)
    if not asked or v["debug_train_only"]:
        return
    for engine in served(v):
        where = f"{engine.where}: {asked[0]} with"
        v.require(
            engine.pp == 1,
            f"{where} pp_size {engine.pp}, but a stage records its own layers and the last one answers; remove pp_size",
        )
        v.require(
            not engine.on("enable_hierarchical_cache"),
            f"{where} enable_hierarchical_cache, which brings prefixes back without what was chosen for them; remove it",
        )
        workers = engine.whole("tokenizer_worker_num") or 1
        v.require(
            workers <= 1,
            f"{where} tokenizer_worker_num {workers}, but one process reads what is asked through the router; remove it",
        )
