"""The trainer's model computes what `transformers` computes: log-probabilities and every parameter's gradient, packed against
unpacked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model.parity import run_step, samples_of, whole_grads
from model.reference import FAMILIES, load_reference, make_reference, reference_step
from ranks import run_ranks

from slime.model.hf_config import read_hf_config
from slime.model.layout import unmerge
from slime.model.names import NameTable

LENGTHS = ((70, 33, 1, 90), (64, 5, 120))  # several times index_topk, one sample of a single token


def _ours_and_theirs(folder: str, model: torch.nn.Module, seed: int):
    hf = read_hf_config(folder)
    micro_batches = [samples_of(seed + number, lengths, hf["vocab_size"]) for number, lengths in enumerate(LENGTHS)]
    (ours,) = run_ranks(1, lambda rank: run_step(rank, 1, folder, micro_batches))
    log_probs, grads = reference_step(model, micro_batches)
    table = NameTable.for_model(hf, with_mtp=False)
    found = {}
    for name, whole in whole_grads(hf, [ours]).items():
        entry = table[name]
        found.update((tensor.name, piece) for tensor, piece in zip(entry.hf, unmerge(entry, whole), strict=True))
    return ours.log_probs, log_probs, found, grads


def _compare(found: dict[str, torch.Tensor], grads: dict[str, torch.Tensor]) -> None:
    # The indexer has no gradient on either side; nothing else may be missing on either side.
    assert set(found) == {name for name in grads if ".indexer." not in name}
    assert not any(".indexer." in name for name in grads)
    for name, expected in grads.items():
        scale = expected.abs().max().item()
        assert (found[name] - expected).abs().max().item() <= 2e-5 * scale + 1e-6, name


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_equal_transformers(family: str, tmp_path: Path) -> None:
    model = make_reference(family, tmp_path)
    ours, theirs, found, grads = _ours_and_theirs(str(tmp_path), model, seed=1)
    for left, right in zip(ours, theirs, strict=True):
        assert (left - right).abs().max().item() < 2e-5
    _compare(found, grads)


def test_the_tiny_checkpoint_equals_transformers(glm: str) -> None:
    ours, theirs, found, grads = _ours_and_theirs(glm, load_reference(glm), seed=5)
    for left, right in zip(ours, theirs, strict=True):
        assert (left - right).abs().max().item() < 5e-6
    _compare(found, grads)
