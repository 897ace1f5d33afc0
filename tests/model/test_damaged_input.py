"""Whatever is wrong with a checkpoint is one line with its file and tensor, said before anything is converted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model.parity import build
from ranks import RankFailed, run_ranks
from safetensors.torch import load_file, save_file

from slime.model.coverage import check_files
from slime.model.hf_config import read_hf_config
from slime.model.hf_io import INDEX, SafetensorsReader, check_copies
from slime.model.names import HfTensor, NameTable
from tools.make_tiny_checkpoint import main as make_tiny

WEIGHT = "model.layers.1.self_attn.q_b_proj.weight"
SCALE = f"{WEIGHT}_scale_inv"
PLAIN = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def fp8(glm_pair: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(glm_pair / "fp8", tmp_path / "fp8"))


def edit(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """Pass one stored tensor through `change`; the name of its file."""
    file = json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(folder / file)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / file)
    return file


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as told:
        check_files(NameTable.for_model(read_hf_config(folder)), SafetensorsReader(folder))
    return str(told.value)


def cut(data: bytes) -> bytes:
    return data[:-10]


TORN = {
    "cut short": (cut, "is cut short: "),
    "cut in its header": (lambda data: data[:100], "its header alone needs"),
    "empty": (lambda data: b"", "has 0 bytes and no header"),
    "git-lfs pointer": (
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
        "run git lfs pull",
    ),
    "web page": (lambda data: b"<!DOCTYPE html><html>404</html>", "is no safetensors file"),
    "longer": (lambda data: data + b"0", "has more than its header says"),
    "bad header": (lambda data: data[:8] + b"}" + data[9:], "its header is damaged"),
}


@pytest.mark.parametrize("kind", TORN)
def test_a_torn_file_is_named(kind: str, fp8: Path) -> None:
    change, told = TORN[kind]
    victim = sorted(fp8.glob("*.safetensors"))[1]
    victim.write_bytes(change(victim.read_bytes()))
    with pytest.raises(ValueError) as error:
        SafetensorsReader(fp8)
    assert str(victim) in str(error.value) and told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{}", "[]", "", '{"weight_map": ["a"]}', "version https://git-lfs.github.com/spec/v1"])
def test_an_index_that_cannot_be_used_is_named(text: str, fp8: Path) -> None:
    (fp8 / INDEX).write_text(text)
    with pytest.raises(ValueError, match=f"{INDEX} has no weight_map of tensors to files"):
        SafetensorsReader(fp8)


def test_a_tensor_that_is_elsewhere_than_the_index_says_is_named_with_both_files(fp8: Path) -> None:
    index = json.loads((fp8 / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    true = index["weight_map"][PLAIN]
    index["weight_map"][PLAIN] = other = next(file for file in files if file != true)
    (fp8 / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{PLAIN} is said to be in {other}, it is in {true}"):
        SafetensorsReader(fp8)


def test_a_config_that_is_no_json_object_is_named(fp8: Path) -> None:
    for text in ("[1]", "", "version https://git-lfs.github.com/spec/v1"):
        (fp8 / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"fp8/config.json is n"):
            read_hf_config(fp8)
        with pytest.raises(ValueError, match=r"fp8/config.json is n"):
            SafetensorsReader(fp8)


def test_folders_of_other_formats_say_so(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="pytorch_model.bin: only safetensors are read"):
        SafetensorsReader(tmp_path)


FORMATS = {
    "e5m2 codes": (WEIGHT, lambda x: x.to(torch.float32).to(torch.float8_e5m2), f"{WEIGHT} is F8_E5M2; BF16,"),
    "int8 codes": (WEIGHT, lambda x: x.view(torch.int8), f"{WEIGHT} is I8; BF16,"),
    "float64": (PLAIN, lambda x: x.double(), f"{PLAIN} is F64; BF16,"),
    "a norm in FP8": (PLAIN, lambda x: x.float().to(torch.float8_e4m3fn), f"{PLAIN} is F8_E4M3, and this model's is never"),
    "a scale beside bf16": (WEIGHT, lambda x: x.to(torch.bfloat16), f"{WEIGHT} is BF16 and has a scale beside it, {SCALE}"),
    "scales as bytes": (SCALE, lambda x: torch.full_like(x, 120, dtype=torch.uint8), f"{SCALE} is U8, which config.json does"),
    "scales as integers": (SCALE, lambda x: x.int(), f"{SCALE} is I32, no type of a scale"),
    "too few scales": (SCALE, lambda x: x[:0], f"{SCALE} has shape [0, 1], {WEIGHT} [192, 64] in blocks of 128 needs [2, 1]"),
    "scales the other way": (SCALE, lambda x: x.t(), f"{SCALE} has shape [1, 2], {WEIGHT} [192, 64]"),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_format_that_cannot_be_read_is_refused_before_conversion(kind: str, fp8: Path) -> None:
    name, change, told = FORMATS[kind]
    file = edit(fp8, name, change)
    message = refusal(fp8)
    assert f"1 unreadable tensors: {file}: {told}" in message
    with pytest.raises(ValueError, match=f"{fp8}/{file}"):
        SafetensorsReader(fp8).read(NameTable.for_model(read_hf_config(fp8)).by_hf(WEIGHT if name == SCALE else name).hf[0])


def test_fnuz_codes_are_refused_whatever_their_header_calls_them(tmp_path: Path) -> None:
    """A type that the library itself does not know: written by hand, 8 bytes of length, the header, the codes."""
    header = json.dumps({"a.weight": {"dtype": "F8_E4M3FNUZ", "shape": [2, 2], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert "a.weight is F8_E4M3FNUZ; BF16," in SafetensorsReader(tmp_path).fault(HfTensor("a.weight", (2, 2), fp8=True))


@pytest.mark.parametrize("block", [[128, 64], [64, 128], [128]])
def test_blocks_that_are_not_square_are_refused(block: list[int], fp8: Path) -> None:
    config = json.loads((fp8 / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = block
    (fp8 / "config.json").write_text(json.dumps(config))
    assert f"{SCALE}: config.json says weight_block_size {block}; blocks must be square" in refusal(fp8)


def test_fp8_files_and_their_config_must_agree(fp8: Path) -> None:
    config = json.loads((fp8 / "config.json").read_text())
    quantization = config.pop("quantization_config")
    (fp8 / "config.json").write_text(json.dumps(config))
    assert "is FP8, and config.json has no quantization_config that says in which blocks" in refusal(fp8)
    plain = fp8.parent / "bf16"
    shutil.copytree(fp8, plain, ignore=shutil.ignore_patterns("*.safetensors", INDEX))
    (plain / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    table = NameTable.for_model(read_hf_config(plain))
    save_file({t.name: torch.zeros(t.shape, dtype=torch.bfloat16) for t in table.hf_tensors()}, plain / "model.safetensors")
    assert "config.json has a quantization_config of FP8, and no tensor is FP8; remove it beside" in refusal(plain)


def test_scales_that_are_powers_of_two_are_read_as_such(fp8: Path) -> None:
    """UE8M0: a byte is an exponent, 2^-7 is stored as 120. With the type e8m0, or as bytes where config.json says ue8m0."""
    edit(fp8, SCALE, lambda x: torch.full_like(x, 2.0**-7))
    tensor = NameTable.for_model(read_hf_config(fp8)).by_hf(WEIGHT).hf[0]
    expected = SafetensorsReader(fp8).read(tensor)
    codes = SafetensorsReader(fp8).raw(WEIGHT)
    assert torch.equal(expected.float(), codes.float() / 128)
    edit(fp8, SCALE, lambda x: x.to(torch.float8_e8m0fnu))
    assert torch.equal(SafetensorsReader(fp8).read(tensor), expected)
    edit(fp8, SCALE, lambda x: x.view(torch.uint8))
    config = json.loads((fp8 / "config.json").read_text())
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    (fp8 / "config.json").write_text(json.dumps(config))
    assert SafetensorsReader(fp8).raw(SCALE).flatten().tolist() == [120, 120]
    assert torch.equal(SafetensorsReader(fp8).read(tensor), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [PLAIN, SCALE])
def test_numbers_that_are_none_are_named(name: str, value: float, fp8: Path) -> None:
    def poison(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    edit(fp8, name, poison)
    owner = PLAIN if name == PLAIN else WEIGHT
    file = json.loads((fp8 / INDEX).read_text())["weight_map"][owner]
    tensor = NameTable.for_model(read_hf_config(fp8)).by_hf(owner).hf[0]
    with pytest.raises(ValueError, match=f"{fp8}/{file}: {owner} holds NaN or infinite values"):
        SafetensorsReader(fp8).read(tensor)


# --- what releases and exports hold or lack ---


def without_mtp(folder: Path, target: Path) -> Path:
    """An export of the main model: the layer's tensors are gone, config.json still announces it."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors", INDEX))
    reader = SafetensorsReader(folder)
    last = f"model.layers.{read_hf_config(folder).num_layers}."
    save_file({name: reader.raw(name) for name in reader.names() if not name.startswith(last)}, target / "model.safetensors")
    return target


def test_a_checkpoint_without_the_announced_mtp_layer_is_whole_unless_it_is_trained(glm: str, tmp_path: Path) -> None:
    folder = without_mtp(Path(glm), tmp_path / "export")
    table, reader = NameTable.for_model(read_hf_config(folder)), SafetensorsReader(folder)
    told = str(check_files(table, reader))
    assert told.endswith("each accounted for once; without the multi-token-prediction layer that config.json announces")
    with pytest.raises(ValueError, match="holds no multi-token-prediction layer, though its config.json announces one; "):
        check_files(table, reader, needs_mtp=True)


def test_an_export_without_the_layer_fills_the_model_of_the_release(glm: str, tmp_path: Path) -> None:
    """--load EXPORT --hf-checkpoint RELEASE, and the export as --hf-checkpoint itself."""
    folder = without_mtp(Path(glm), tmp_path / "export")

    def norms(rank: int, source: str) -> float:
        chunks, *_ = build(rank, 1, source)
        return sum(parameter.double().square().sum().item() for parameter in chunks[0].parameters())

    assert run_ranks(1, norms, str(folder)) == run_ranks(1, norms, glm)
    with pytest.raises(RankFailed, match="holds no multi-token-prediction layer, though its config.json announces one"):
        run_ranks(1, lambda rank: build(rank, 1, str(folder), mtp=True) and None)


def test_an_mtp_layer_of_which_a_part_is_missing_is_named(glm: str, tmp_path: Path) -> None:
    folder = without_mtp(Path(glm), tmp_path / "export")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.8.enorm.weight"] = SafetensorsReader(glm).raw("model.layers.8.enorm.weight")
    save_file(tensors, folder / "model.safetensors")
    assert "missing tensors: model.layers.8.hnorm.weight; " in refusal(folder)


def test_an_mtp_layer_that_config_json_does_not_announce_is_left_out_and_other_layers_are_not(glm: str, tmp_path: Path) -> None:
    """The release's files beside the config of an export; and a config with a layer too few, which is a mistake."""
    folder = Path(shutil.copytree(glm, tmp_path / "release"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    told = str(check_files(NameTable.for_model(read_hf_config(folder)), SafetensorsReader(folder)))
    assert "tensors of a multi-token-prediction layer that cannot be trained here are left out" in told
    few = {"num_nextn_predict_layers": 0, "num_hidden_layers": 7, "indexer_types": config["indexer_types"][:7]}
    (folder / "config.json").write_text(json.dumps(config | few))
    assert "unexpected tensors: model.layers.7." in refusal(folder)


def test_a_stored_head_is_taken_where_it_is_the_embedding_and_refused_where_it_is_not(tmp_path: Path) -> None:
    """As Qwen3-0.6B and 1.7B are released: tie_word_embeddings true, and lm_head.weight in the files."""
    make_tiny(["--preset", "qwen3", "--output-bf16", str(tmp_path / "q")])
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    (tmp_path / "q" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    edit(tmp_path / "q", "lm_head.weight", lambda head: SafetensorsReader(tmp_path / "q").raw("model.embed_tokens.weight"))
    table = NameTable.for_model(read_hf_config(tmp_path / "q"))
    assert "1 tied duplicates" in str(check_files(table, SafetensorsReader(tmp_path / "q")))
    check_copies(table, SafetensorsReader(tmp_path / "q"))

    def change(head: torch.Tensor) -> torch.Tensor:
        head[-1, -1] += 1
        return head

    edit(tmp_path / "q", "lm_head.weight", change)
    with pytest.raises(ValueError, match="lm_head.weight is stored beside model.embed_tokens.weight, whose copy it should be"):
        check_copies(table, SafetensorsReader(tmp_path / "q"))
