"""torch_dist as Megatron-LM and the slime on it save it: made into HF files where that is right, refused with the reasons where
it is not.

The layers are stacked by megatron-core's own code (`non_homogeneous_layers` off, as Megatron-LM saves models of one kind of
layer), and the experts get the name that TransformerEngine's grouped module gives them.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from model.parity import build
from model.reference import make_reference
from ranks import run_ranks

from slime.model import dist_ckpt
from slime.model.dist_ckpt import check_description, save_sharded, sharded_model
from slime.model.dist_reader import TorchDistReader
from slime.model.hf_config import read_hf_config
from slime.model.hf_io import SafetensorsReader
from tools.convert_torch_dist_to_hf import main


def values(tree: object) -> Iterator[object]:
    if isinstance(tree, dict):
        for part in tree.values():
            yield from values(part)
    elif isinstance(tree, list):
        for part in tree:
            yield from values(part)
    else:
        yield tree


def save_as_megatron_does(rank: int, world: int, source: str, folder: Path, layout: dict) -> None:
    chunks, ranks, hf, _ = build(rank, world, source, **layout)
    stacked = dist_ckpt.sharding_metadata(ranks) | {"non_homogeneous_layers": hf.has_indexer}
    dist_ckpt.sharding_metadata = lambda ranks: stacked
    state = sharded_model(chunks, ranks)
    for piece in values(state):
        if hasattr(piece, "key"):
            piece.key = piece.key.replace(".mlp.experts.", ".mlp.experts.experts.")
    save_sharded({**state, "iteration": 7, "args": {"rotary_base": 1e4}}, folder, ranks)


@pytest.mark.parametrize(
    ("family", "layout"),
    [("qwen3-tied", {}), ("qwen2", {"tp": 2}), ("qwen3_moe", {"ep": 2}), ("glm4", {"pp": 2, "first": 2})],
    ids=str,
)
def test_hf_files_are_made_of_a_foreign_checkpoint_bit_for_bit(family: str, layout: dict, tmp_path: Path) -> None:
    make_reference(family, tmp_path / "hf")
    hf, world = read_hf_config(tmp_path / "hf"), 2 if layout else 1
    run_ranks(world, save_as_megatron_does, world, str(tmp_path / "hf"), tmp_path / "iter_0000007", layout)
    keys = TorchDistReader(tmp_path / "iter_0000007").names()
    # megatron-core numbers the layers of a model whose --moe-layer-freq is a list.
    assert hf.num_experts or any(key.startswith("decoder.layers.self_attention.") for key in keys), "layers are not stacked"
    assert not hf.num_experts or any(".mlp.experts.experts." in key for key in keys)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main(["--input-dir", str(tmp_path / "iter_0000007"), "--origin-hf-dir", str(tmp_path / "hf"),
              "--output-dir", str(tmp_path / "out")])  # fmt: skip
    assert "its files are taken as they are" in out.getvalue()
    before, after = SafetensorsReader(tmp_path / "hf"), SafetensorsReader(tmp_path / "out")
    assert sorted(before.names()) == sorted(after.names())
    assert all(torch.equal(before.raw(name), after.raw(name)) for name in before.names())
    # The export's config.json is the original's, to the last field.
    assert dict(read_hf_config(tmp_path / "out")) == dict(hf)
    # Training takes those files; the checkpoint itself is refused with the command that makes them.
    with pytest.raises(ValueError, match=r"not here: its common.pt has no slime_model.*make HF files of it"):
        check_description(hf, tmp_path / "iter_0000007")


class Arguments:
    """Megatron-LM keeps its arguments in common.pt, and those name classes of any package."""


def test_arguments_of_foreign_classes_are_not_read(tmp_path: Path) -> None:
    make_reference("qwen3", tmp_path / "hf")
    run_ranks(1, save_as_megatron_does, 1, str(tmp_path / "hf"), tmp_path / "ckpt", {})
    torch.save({"args": Arguments(), "iteration": 7}, tmp_path / "ckpt" / "common.pt")
    hf = read_hf_config(tmp_path / "hf")
    assert TorchDistReader(tmp_path / "ckpt", hf).is_foreign
    with pytest.raises(ValueError, match="was written by Megatron-LM or the slime on it, not here"):
        check_description(hf, tmp_path / "ckpt")


def test_a_foreign_checkpoint_of_another_model_names_what_does_not_fit(tmp_path: Path) -> None:
    make_reference("qwen3", tmp_path / "hf")
    make_reference("llama", tmp_path / "other")
    run_ranks(1, save_as_megatron_does, 1, str(tmp_path / "hf"), tmp_path / "ckpt", {})
    with pytest.raises(ValueError, match=r"llama model .* as Megatron-LM saves it: .*q_layernorm.weight is no tensor"):
        TorchDistReader(tmp_path / "ckpt", read_hf_config(tmp_path / "other"))


def test_an_indexer_is_never_taken_over(glm: str, tmp_path: Path) -> None:
    """Its rows lie in another order under the same names and shapes: a plain import would select other keys in silence."""
    run_ranks(1, save_as_megatron_does, 1, glm, tmp_path / "ckpt", {})
    told = r"under mlp.experts.experts, the rows of its indexer begin with .* export .* with the tools/.* of the project"
    with pytest.raises(ValueError, match=told):
        TorchDistReader(tmp_path / "ckpt", read_hf_config(glm))
