"""Versions in a folder: what is written of each, and a copy that follows them or says why it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slime.weights.published import Header, LocalCopy, PartWriter, publish_version, version_folder, wrong_tensors

Named = dict[str, torch.Tensor]


class Trainer:
    """Two ranks that publish what the test gives them; rank 0 has the first tensor."""

    def __init__(self, root: Path, origin: Path, *, run: str = "run", encoding: str | None = "xor", checksum: str = "xxh3-128"):
        self.root, self.origin, self.run, self.encoding, self.checksum = root, origin, run, encoding, checksum
        self.ranks = [PartWriter(root, origin=origin, part=part, encoding=encoding, checksum=checksum) for part in (0, 1)]

    def publish(self, version: int, weights: Named) -> Path:
        partial = self.root / ".part"
        partial.mkdir(parents=True)
        named = list(weights.items())
        parts = [
            rank.write(partial, share, max_bytes=40) for rank, share in zip(self.ranks, (named[:1], named[1:]), strict=True)
        ]
        header = Header(
            self.run, version, version - 1 if self.encoding else None, self.encoding or "xor", self.checksum, {}, {}
        )
        folder = publish_version(self.root, parts, partial, header, origin=self.origin, mtp_kept=True)
        assert sum(part.tensors for part in parts) == len(weights)
        return folder


def weights_of(step: int) -> Named:
    """`frozen` never changes; `b` changes in one byte from step to step."""
    b = torch.arange(12, dtype=torch.float32).view(3, 4).to(torch.float8_e4m3fn)
    b.view(torch.uint8)[1, 2] += step
    return {"a": torch.full((2, 3), float(step)).bfloat16(), "b": b, "frozen": torch.ones(5)}


@pytest.fixture()
def origin(tmp_path) -> Path:
    folder = tmp_path / "origin"
    folder.mkdir()
    named = list(weights_of(0).items())
    save_file(dict(named[:2]), folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    save_file(dict(named[2:]), folder / "model-00002-of-00002.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def same(folder: Path, wanted: Named) -> bool:
    held = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert held.keys() == wanted.keys()
    return all(torch.equal(held[name].view(torch.uint8), wanted[name].view(torch.uint8)) for name in wanted)


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
@pytest.mark.parametrize("checksum", ["xxh3-128", "blake3", "adler32"])
def test_a_copy_follows_version_by_version_and_catches_up(tmp_path, origin, encoding, checksum):
    trainer, copies = Trainer(tmp_path / "root", origin, encoding=encoding, checksum=checksum), tmp_path / "local"
    always, late = (LocalCopy(copies / name, origin=origin) for name in ("always", "late"))
    trainer.publish(1, weights_of(1))
    assert always.follow(trainer.root, 1) == [1] and same(always.folder, weights_of(1)), "the first sync is there"
    trainer.publish(2, weights_of(2))
    trainer.publish(3, weights_of(2))
    assert always.follow(trainer.root, 3) == [2, 3] and same(always.folder, weights_of(2))
    assert always.follow(trainer.root, 3) == []
    assert late.follow(trainer.root, 3) == [1, 2, 3] and same(late.folder, weights_of(2))
    assert (late.folder / "tokenizer.json").read_text() == "{}" and same(origin, weights_of(0))
    sent = Header.read(version_folder(trainer.root, 2))
    assert set(sent.files) == {"a", "b"}, "what has not changed does not travel"
    assert not Header.read(version_folder(trainer.root, 3)).files


def test_a_spoilt_byte_is_found_with_the_tensor_and_the_copy_begins_anew(tmp_path, origin):
    trainer, copy = Trainer(tmp_path / "root", origin), LocalCopy(tmp_path / "local", origin=origin)
    trainer.publish(1, weights_of(1))
    copy.follow(trainer.root, 1)
    folder = trainer.publish(2, weights_of(2))
    header = json.loads((folder / "version.json").read_text())
    good = header["digests"]["b"]
    header["digests"]["b"] = "0" * 32
    (folder / "version.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match=r"weight_v000002: b is not what the trainer had \(xxh3-128\)"):
        copy.follow(trainer.root, 2)
    header["digests"]["b"] = good
    (folder / "version.json").write_text(json.dumps(header))
    assert copy.follow(trainer.root, 2) == [1, 2] and same(copy.folder, weights_of(2))


def test_a_missing_base_and_another_runs_versions_are_refused(tmp_path, origin):
    trainer, copy = Trainer(tmp_path / "root", origin), LocalCopy(tmp_path / "local", origin=origin)
    for version in (1, 2, 3):
        trainer.publish(version, weights_of(version))
    version_folder(trainer.root, 2).rename(tmp_path / "away")
    with pytest.raises(ValueError, match="weight_v000002 is no published version"):
        copy.follow(trainer.root, 3)
    Trainer(trainer.root, origin, run="another").publish(2, weights_of(2))
    with pytest.raises(ValueError, match="weight_v000003 rests on version 2, which another run has published"):
        copy.follow(trainer.root, 3)


def test_a_new_run_begins_with_the_serving_checkpoint_whatever_the_copy_holds(tmp_path, origin):
    first, copy = Trainer(tmp_path / "root", origin), LocalCopy(tmp_path / "local", origin=origin)
    first.publish(1, weights_of(7))
    copy.follow(first.root, 1)
    second = Trainer(tmp_path / "second", origin, run="second")
    second.publish(1, weights_of(1))
    assert copy.follow(second.root, 1) == [1] and same(copy.folder, weights_of(1))


def test_the_serving_checkpoint_is_never_written_to(tmp_path, origin):
    trainer = Trainer(tmp_path / "root", origin)
    trainer.publish(1, weights_of(1))
    with pytest.raises(ValueError, match="is the serving checkpoint itself"):
        LocalCopy(origin, origin=origin).follow(trainer.root, 1)


def test_a_tensor_that_the_checkpoint_has_otherwise_is_named(tmp_path, origin):
    with pytest.raises(ValueError, match=r"has frozen as torch.float32 \[5\], the trainer sends torch.bfloat16"):
        Trainer(tmp_path / "root", origin).publish(1, weights_of(1) | {"frozen": torch.ones(5).bfloat16()})


def test_a_whole_version_is_a_checkpoint_in_the_serving_format_and_a_turned_bit_is_named(tmp_path, origin):
    folder = Trainer(tmp_path / "root", origin, encoding=None).publish(1, weights_of(3))
    assert same(folder, weights_of(3)) and wrong_tensors(folder) == []
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
    assert (folder / "tokenizer.json").is_file() and Header.read(folder).base is None
    file = folder / Header.read(folder).files["b"]
    spoilt = bytearray(file.read_bytes())
    spoilt[-1] ^= 1  # the narrowest tensor comes last
    file.write_bytes(spoilt)
    assert wrong_tensors(folder) == ["b"]
