"""Files beside the flags: an index and its shards, hosts with the line ends of another system, folders in a file's place."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from slime.model.names import NameTable
from slime.rehearse.findings import Findings
from slime.rehearse.known_models import known_config
from slime.rehearse.result import Options, rehearse
from tests.rehearse.recipes import Recipe

GLM = dict(known_config("/x/GLM-5.2-FP8"))
HEADER = struct.pack("<Q", 2) + b"{}"


def found(recipe: Recipe, folder: Path, **options: object) -> Findings:
    return rehearse(recipe.written(folder), Options(env=recipe.env, quick=True, **options)).findings


def lines(findings: Findings) -> str:
    return "\n".join(finding.line() for finding in findings.of("violation"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """GLM-5.2-FP8 as to its index and the first bytes of its one shard."""
    folder = tmp_path / "GLM-5.2-FP8"
    folder.mkdir()
    write(folder, GLM, fp8=True)
    (folder / "model-00001.safetensors").write_bytes(HEADER)
    return folder


def write(folder: Path, config: dict, *, fp8: bool) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    names = NameTable.for_model(known_config("/x/GLM-5.2-FP8")).hf_names(fp8=fp8)
    index = {"weight_map": dict.fromkeys(names, "model-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_whole_checkpoint_passes(checkpoint: Path, flagship: Recipe, tmp_path: Path) -> None:
    assert lines(found(flagship.with_flag("--hf-checkpoint", str(checkpoint)), tmp_path)) == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes and no header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a git-lfs pointer"),
        (struct.pack("<Q", 500) + b"{}", "is cut short"),
        (b"<html><body>", "is no safetensors file"),
    ],
)
def test_shards_that_are_not_whole_are_named(
    content: bytes, message: str, checkpoint: Path, flagship: Recipe, tmp_path: Path
) -> None:
    (checkpoint / "model-00001.safetensors").write_bytes(content)
    told = lines(found(flagship.with_flag("--hf-checkpoint", str(checkpoint)), tmp_path))
    assert "1 of 1 safetensors files" in told and message in told and "model-00001.safetensors" in told


def test_the_number_format_of_index_and_config_is_one(checkpoint: Path, flagship: Recipe, tmp_path: Path) -> None:
    recipe = flagship.with_flag("--hf-checkpoint", str(checkpoint))
    plain = {key: value for key, value in GLM.items() if key != "quantization_config"}
    write(checkpoint, plain, fp8=True)
    assert "has scales of FP8 blocks, config.json no quantization_config" in lines(found(recipe, tmp_path))
    write(checkpoint, GLM, fp8=False)
    assert "has no scales, config.json has a quantization_config" in lines(found(recipe, tmp_path))


@pytest.mark.parametrize("text", ["[]", "{}", "3", "{", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}'])
def test_an_index_of_another_kind_is_one_finding(text: str, checkpoint: Path, flagship: Recipe, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(text)
    told = lines(found(flagship.with_flag("--hf-checkpoint", str(checkpoint)), tmp_path))
    assert "is no safetensors index" in told and told.count("VIOLATION") == 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_hidden_layers", "78", "num_hidden_layers is '78', it must be a whole number above 0"),
        ("hidden_size", 0, "hidden_size is 0, it must be a whole number above 0"),
        ("n_routed_experts", -1, "n_routed_experts is -1, it must be a whole number, 0 or above"),
        ("rms_norm_eps", True, "rms_norm_eps is True, it must be a number above 0"),
        ("rope_parameters", [], "rope_parameters is [], it must be an object"),
        ("quantization_config", {"weight_block_size": [128]}, "whose weight_block_size is two whole numbers"),
        ("tie_word_embeddings", "no", "tie_word_embeddings is 'no', it must be true or false"),
        ("model_type", 3, "model_type is 3, it must be a text"),
    ],
)
def test_a_field_of_the_wrong_type_is_named(
    name: str, value: object, message: str, checkpoint: Path, flagship: Recipe, tmp_path: Path
) -> None:
    (checkpoint / "config.json").write_text(json.dumps({**GLM, name: value}))
    assert message in lines(found(flagship.with_flag("--hf-checkpoint", str(checkpoint)), tmp_path))


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "{"])
def test_a_config_of_another_kind_is_one_finding(text: str, checkpoint: Path, flagship: Recipe, tmp_path: Path) -> None:
    (checkpoint / "config.json").write_text(text)
    told = found(flagship.with_flag("--hf-checkpoint", str(checkpoint)), tmp_path)
    assert "config.json" in lines(told) and told.verdict == "not launchable"


def test_hosts_are_read_as_the_launcher_reads_them(flagship: Recipe, tmp_path: Path) -> None:
    """Line ends of Windows count as line ends; a folder, or bytes that are no text, are a finding."""
    hosts = tmp_path / "hosts"
    workers = [f"10.0.1.{number} slots=8" for number in range(31)]
    hosts.write_bytes("\r\n".join(workers).encode() + b"\r\n")
    assert lines(found(flagship, tmp_path, hostfile=str(hosts))) == ""
    assert lines(found(flagship, tmp_path, hostfile=str(hosts), head="10.0.1.99")) == ""
    hosts.write_bytes(b"\xef\xbb\xbf" + "\n".join(workers).encode())
    assert lines(found(flagship, tmp_path, hostfile=str(hosts))) == ""
    for nobody in ("0.0.0.0", "224.0.0.1"):
        hosts.write_text("\n".join([*workers[1:], nobody]))
        assert f"lines that are no address [{nobody}]" in lines(found(flagship, tmp_path, hostfile=str(hosts)))
    assert "cannot be read" in lines(found(flagship, tmp_path, hostfile=str(tmp_path)))
    hosts.write_bytes(b"\xff\xfe1\x00")
    assert "cannot be read" in lines(found(flagship, tmp_path, hostfile=str(hosts)))
