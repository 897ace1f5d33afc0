"""No file runs what it names, and a checkpoint is compared with its manifest before anything of it is unpickled."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import pickle
import shutil
import uuid
import zlib
from argparse import Namespace
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from model.parity import build
from ranks import run_ranks
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.checkpoint.planner import WriteItemType

from slime.compat.pickles import foreign_classes, load_pickle, load_values
from slime.model.dist_ckpt import DESCRIPTION, describe, read_metadata, sharded_model
from slime.model.dist_reader import TorchDistReader
from slime.training.checkpoint import MANIFEST, begin_save
from tools import convert_torch_dist_to_hf, inspect_checkpoint


class Runs:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


class Attribute:
    """Pickled as Python before 3.11.4 pickles a member of an enumeration."""

    def __init__(self, owner: type, name: str) -> None:
        self.named = owner, name

    def __reduce__(self) -> tuple:
        return getattr, self.named


def test_a_member_of_an_enumeration_that_an_older_python_wrote_is_read_and_no_other_attribute():
    def read(owner: type, name: str) -> object:
        return load_pickle(io.BytesIO(pickle.dumps(Attribute(owner, name), protocol=4)))

    for member in WriteItemType:
        assert read(WriteItemType, member.name) is member
    for owner, name in ((WriteItemType, "__class__"), (WriteItemType, "mro"), (BytesStorageMetadata, "__init__")):
        with pytest.raises(pickle.UnpicklingError, match=f"asks for {name} of .*, which is no member of an enumeration"):
            read(owner, name)


@pytest.fixture(scope="module")
def saved(glm: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints with one converted model."""
    root = tmp_path_factory.mktemp("saved")

    def save(rank: int) -> None:
        chunks, ranks, hf, _ = build(rank, 1, glm)
        begin_save(root, "release", {**sharded_model(chunks, ranks), DESCRIPTION: describe(hf), "iteration": 1}, ranks).finish()

    run_ranks(1, save)
    return root


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "c")) / "release"


def export(checkpoint: Path, glm: str, output: Path) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        convert_torch_dist_to_hf.main(["--input-dir", str(checkpoint), "--origin-hf-dir", glm, "--output-dir", str(output)])
    return out.getvalue()


def seal(checkpoint: Path) -> None:
    """Whoever can write the files can write the manifest too."""
    files = {name: (path.stat().st_size, zlib.crc32(path.read_bytes())) for name in json.loads(
        (checkpoint / MANIFEST).read_text())["files"] if (path := checkpoint / name)}  # fmt: skip
    (checkpoint / MANIFEST).write_text(json.dumps({"files": files}))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_whole_checkpoint_is_exported_and_says_what_was_compared(checkpoint: Path, glm: str, tmp_path: Path) -> None:
    told = export(checkpoint, glm, tmp_path / "hf")
    files = len(json.loads((checkpoint / MANIFEST).read_text())["files"])
    assert f"{files} files as the manifest says, {files} of them by checksum" in told


def test_the_exporter_notices_a_flipped_bit(checkpoint: Path, glm: str, tmp_path: Path) -> None:
    victim = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    flip(victim)
    with pytest.raises(ValueError, match=f"is damaged: the content of {victim.name} has changed since it was written"):
        export(checkpoint, glm, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_file_that_is_cut_short_is_named_with_its_tensor(checkpoint: Path, glm: str, tmp_path: Path) -> None:
    victim = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"{victim.name} has .* bytes instead of"):
        export(checkpoint, glm, tmp_path / "hf")
    (checkpoint / MANIFEST).unlink()
    with pytest.raises(ValueError, match=rf"{victim.name}: [\w.]+ cannot be read \(.*\); the file is cut short or damaged"):
        export(checkpoint, glm, tmp_path / "hf")


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
@pytest.mark.parametrize("sealed", [True, False], ids=["manifest agrees", "manifest differs"])
def test_a_malicious_pickle_is_not_run(name: str, sealed: bool, checkpoint: Path, glm: str, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    if name == ".metadata":
        (checkpoint / name).write_bytes(pickle.dumps(Runs(ran)))
    else:
        torch.save({"iteration": Runs(ran)}, checkpoint / name)
    if sealed:
        seal(checkpoint)
    told = "it names .*nothing of it was run" if sealed else f"{name} has .* bytes instead of"
    with pytest.raises(ValueError, match=told):
        export(checkpoint, glm, tmp_path / "hf")
    if name == ".metadata" or not sealed:
        with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
            try:
                assert inspect_checkpoint.main([str(checkpoint), "--verify"]) == 1
            except ValueError as wrong:
                err.write(str(wrong))
        assert "instead of" in err.getvalue() or "nothing of it was run" in err.getvalue()
    assert not ran.exists()


def test_small_objects_of_a_checkpoint_are_not_run_either(checkpoint: Path, tmp_path: Path) -> None:
    """Random streams and the like are pickles inside the .distcp files; torch's planner reads them."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.state_dict = {}
    item = Namespace(dest_index=Namespace(fqn="rng_state"))
    good, bad = io.BytesIO(), io.BytesIO()
    torch.save({"numpy": np.random.get_state(), "python": (3, (1, 2), None), "torch": torch.get_rng_state()}, good)
    torch.save(Runs(tmp_path / "ran"), bad)
    good.seek(0), bad.seek(0)
    planner.load_bytes(item, good)
    assert planner.state_dict["rng_state"]["python"] == (3, (1, 2), None)
    assert np.array_equal(planner.state_dict["rng_state"]["numpy"][1], np.random.get_state()[1])
    with pytest.raises(pickle.UnpicklingError):
        planner.load_bytes(item, bad)
    assert not (tmp_path / "ran").exists()


def test_values_of_a_data_sets_columns_come_back_and_a_save_names_what_would_not(tmp_path: Path) -> None:
    when = datetime.datetime(2026, 11, 30, 5, 0, tzinfo=datetime.UTC)
    row = {"when": when, "day": when.date(), "took": datetime.timedelta(1.5), "cost": Decimal("1.10"), "id": uuid.UUID(int=7)}
    torch.save(row, tmp_path / "row.pt")
    assert load_values(tmp_path / "row.pt") == row and foreign_classes([row, np.float32(1)]) == []
    (name,) = foreign_classes({"buffer": [[{"metadata": Namespace2(1)}]]})
    assert name.endswith("Namespace2")


class Namespace2:
    """Some class of a plugin's."""

    def __init__(self, value: int) -> None:
        self.value = value


def test_values_of_every_kind_come_back_and_classes_do_not(tmp_path: Path) -> None:
    arrays = {kind: np.arange(3).astype(kind) for kind in ("float32", "float64", "int64", "int8", "bool", "uint16", "float16")}
    values = {**arrays, "text": np.array(["a", "bc"]), "number": np.float64(1.5), "nested": [({"x": {1, 2}}, b"y", None)],
              "tensor": torch.arange(3)}  # fmt: skip
    torch.save(values, tmp_path / "v.pt")
    back = load_values(tmp_path / "v.pt")
    assert all(np.array_equal(back[kind], array) and back[kind].dtype == array.dtype for kind, array in arrays.items())
    assert back["nested"] == [({"x": {1, 2}}, b"y", None)] and back["number"] == 1.5 and back["text"].tolist() == ["a", "bc"]
    torch.save({"x": Runs(tmp_path / "ran")}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"bad.pt cannot be read: it names .* plain values alone; nothing of it was run"):
        load_values(tmp_path / "bad.pt")
    torch.save({"x": np.array([Runs(tmp_path / "ran")], dtype=object)}, tmp_path / "object.pt")
    with pytest.raises(ValueError, match="object.pt cannot be read"):
        load_values(tmp_path / "object.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "v.pt").read_bytes()[:200])
    with pytest.raises(ValueError, match="torn.pt cannot be read: "):
        load_values(tmp_path / "torn.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda path: pickle.dumps(Runs(path)),
        lambda path: b"cos\nsystem\n(S'touch " + str(path).encode() + b"'\ntR.",
        # A dotted name, from an allowed class to the builtins behind it.
        lambda path: b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x13Metadata.__init__.x\x93.",
        lambda path: pickle.dumps(print),
        lambda path: pickle.dumps(load_values),
    ],
)
def test_the_closed_list_knows_classes_and_no_functions(make: Callable[[Path], bytes], tmp_path: Path) -> None:
    for rooms in ((), ("slime",)):
        with pytest.raises((pickle.UnpicklingError, AttributeError)):
            load_pickle(io.BytesIO(make(tmp_path / "ran")), rooms=rooms)
    assert not (tmp_path / "ran").exists()


def test_metadata_of_a_real_checkpoint_is_read(checkpoint: Path) -> None:
    assert set(TorchDistReader(checkpoint).names()) <= set(read_metadata(checkpoint).state_dict_metadata)
