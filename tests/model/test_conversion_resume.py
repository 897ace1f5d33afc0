"""The recipe's conversion on 32 ranks; an interrupted one goes on, or says why it starts anew; memory; the manifest."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from ranks import RankFailed, run_ranks

import slime.model.build  # noqa: F401  (imported before ranks fork, which then share it)
import slime.training.checkpoint  # noqa: F401
import slime_plugins.models.glm5.glm5  # noqa: F401
from slime.config.command_line import flag_table
from slime.model.conversion import WORK, Journal, open_work, plan_of
from slime.model.hf_io import SafetensorsReader
from tools import convert_hf_to_torch_dist, convert_torch_dist_to_hf, inspect_checkpoint, make_tiny_checkpoint
from tools.make_tiny_checkpoint import GlmSize, Preset

pytestmark = pytest.mark.slow

VOCAB = 320
TOY = GlmSize(
    num_hidden_layers=42, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_attention_heads=8, q_lora_rank=16,
    kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=16, index_n_heads=8,
    index_head_dim=16, num_nextn_predict_layers=0,
)  # fmt: skip
SMALL = GlmSize(
    num_hidden_layers=8, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_attention_heads=8, q_lora_rank=16,
    kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, index_n_heads=8, index_head_dim=16,
)  # fmt: skip


def model_args(size: GlmSize, vocab_size: int = VOCAB) -> list[str]:
    moe = size.num_hidden_layers - size.first_k_dense_replace
    return f"""
    --spec slime_plugins.models.glm5.glm5 get_glm5_spec --enable-experimental --allgather-cp --num-layers
    {size.num_hidden_layers} --hidden-size {size.hidden_size} --ffn-hidden-size {size.intermediate_size} --num-attention-heads
    {size.num_attention_heads} --vocab-size {vocab_size} --make-vocab-size-divisible-by 16 --normalization RMSNorm
    --qk-layernorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights --position-embedding-type rope
    --no-position-embedding --rotary-base 8000000 --multi-latent-attention --q-lora-rank {size.q_lora_rank} --kv-lora-rank
    {size.kv_lora_rank} --qk-head-dim {size.qk_nope_head_dim} --qk-pos-emb-head-dim {size.qk_rope_head_dim} --v-head-dim
    {size.v_head_dim} --kv-channels {size.qk_nope_head_dim} --num-experts {size.n_routed_experts} --moe-layer-freq
    [0]*{size.first_k_dense_replace}+[1]*{moe} --moe-ffn-hidden-size {size.moe_intermediate_size}
    --moe-shared-expert-intermediate-size {size.moe_intermediate_size} --moe-router-topk {size.num_experts_per_tok}
    --moe-router-score-function sigmoid --moe-router-pre-softmax --moe-router-topk-scaling-factor 2.5 --moe-router-dtype fp32
    --moe-router-enable-expert-bias --moe-router-bias-update-rate 0 --moe-router-load-balancing-type seq_aux_loss
    --moe-aux-loss-coeff 0 --moe-grouped-gemm --moe-permute-fusion
    """.split()


def write(folder: Path, size: GlmSize, *, fp8: bool = False) -> str:
    make_tiny_checkpoint.write_checkpoint(folder, Preset("glm", size, 1 << 20), seed=0, fp8=fp8)
    return str(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("small") / "hf", SMALL)


TP2_EP4 = "--tensor-model-parallel-size 2 --expert-model-parallel-size 4 --expert-tensor-parallel-size 1".split()


def command(size: GlmSize, layout: list[str], source: str, save: Path) -> list[str]:
    return [*model_args(size), *layout, "--hf-checkpoint", source, "--save", str(save)]


def convert(rank: int, argv: list[str], kill_after: int | None = None) -> tuple[list[str], str]:
    """(HF tensors that this rank read, what it printed); rank 1 is killed at its `kill_after`-th read."""
    reads: list[str] = []
    published = SafetensorsReader.raw

    def raw(self, name: str) -> torch.Tensor:
        if rank == 1 and len(reads) == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        reads.append(name)
        return published(self, name)

    SafetensorsReader.raw = raw
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert convert_hf_to_torch_dist.main(argv) == 0
    return reads, out.getvalue()


def verify(folder: Path) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = inspect_checkpoint.main([str(folder), "--verify"])
    return status, out.getvalue(), err.getvalue()


def manifest(folder: Path) -> dict:
    return json.loads((folder / "release" / "slime_manifest.json").read_text())["tensors"]


@pytest.fixture
def interrupted(small: str, tmp_path: Path) -> tuple[Path, dict[int, set[str]]]:
    """A conversion on four ranks of which rank 1 was killed at its 60th read: (save folder, finished tensors by rank)."""
    save = tmp_path / "dist"
    with pytest.raises(RankFailed, match="rank 1 of 4 died with exit code -9"):
        run_ranks(4, convert, command(SMALL, TP2_EP4, small, save), 60)
    finished = {}
    for rank in range(4):
        lines = (save / WORK / f"rank_{rank:05d}.jsonl").read_text().split("\n")[:-1]
        finished[rank] = {json.loads(line)["name"] for line in lines}
    assert len(finished[1]) > 20 and not (save / "release").exists()
    return save, finished


def test_an_interrupted_conversion_reads_only_what_is_missing(small: str, interrupted, tmp_path: Path) -> None:
    save, finished = interrupted
    straight = run_ranks(4, convert, command(SMALL, TP2_EP4, small, tmp_path / "straight"))
    done = run_ranks(4, convert, command(SMALL, TP2_EP4, small, save))
    assert "going on with the conversion that was interrupted" in done[0][1]
    hf_of = {name: set(record["hf"]) for name, record in manifest(save).items()}
    for rank, (reads, _) in enumerate(done):
        had = set().union(*(hf_of[name] for name in finished[rank]))
        assert not had & set(reads), rank
        assert had | set(reads) == set(straight[rank][0]) and len(reads) == len(straight[rank][0]) - len(had)
    assert manifest(save) == manifest(tmp_path / "straight") and verify(save)[0] == 0
    assert not (save / WORK).exists() and not list(save.glob(".saving*"))


def test_another_flag_starts_anew_and_says_so(small: str, interrupted) -> None:
    save, _ = interrupted
    argv = command(SMALL, TP2_EP4, small, save)
    argv[argv.index("--make-vocab-size-divisible-by") + 1] = "32"
    _, said = run_ranks(4, convert, argv)[0]
    assert "starting anew: an interrupted conversion in" in said
    assert "differs in flags (--make-vocab-size-divisible-by 16 -> --make-vocab-size-divisible-by 32)" in said
    assert "rank 0 read" in said and "had 0 from before" in said and verify(save)[0] == 0


def test_another_source_or_number_of_ranks_is_another_plan(tmp_path: Path) -> None:
    source, save = tmp_path / "hf", tmp_path / "dist"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        (source / name).write_text("{}")
    assert open_work(save, plan_of(source, ["--a", "1"], 4))[1] == ""
    assert "going on" in open_work(save, plan_of(source, ["--a", "1"], 4))[1]
    (save / WORK / "rank_00000.bin").write_text("finished")
    assert "differs in ranks (4 -> 8)" in open_work(save, plan_of(source, ["--a", "1"], 8))[1]
    assert not (save / WORK / "rank_00000.bin").exists()
    os.utime(source / "model.safetensors", ns=(1, 1))
    assert "differs in source files (model.safetensors)" in open_work(save, plan_of(source, ["--a", "1"], 8))[1]
    (source / "config.json").write_text("{ }")
    assert "differs in source index (config.json)" in open_work(save, plan_of(source, ["--a", "1"], 8))[1]


def test_damaged_work_is_read_again_and_a_torn_line_is_no_line(tmp_path: Path) -> None:
    tensors = {name: torch.randn(5, 3).to(torch.bfloat16) for name in "abc"}
    with Journal(tmp_path, 0) as journal:
        for name, tensor in tensors.items():
            journal.note(name, tensor, f"sha of {name}")
    data, lines = tmp_path / "rank_00000.bin", tmp_path / "rank_00000.jsonl"
    assert data.stat().st_size == 3 * 30
    with open(data, "r+b") as file:  # one bit of b
        file.seek(31)
        file.write(bytes([data.read_bytes()[31] ^ 1]))
    os.truncate(lines, lines.stat().st_size - 5)
    with Journal(tmp_path, 0) as journal:
        into = torch.zeros(5, 3, dtype=torch.bfloat16)
        assert journal.take("a", into) == "sha of a" and torch.equal(into, tensors["a"])
        assert journal.take("b", into) is None and journal.take("c", into) is None
        assert journal.take("a", torch.zeros(5, 3)) is None  # another dtype
        journal.note("c", tensors["c"], "again")
    with Journal(tmp_path, 0) as journal:
        assert journal.take("c", into) == "again" and torch.equal(into, tensors["c"])


def test_a_changed_tensor_or_file_is_named_by_verify(small: str, tmp_path: Path) -> None:
    save = tmp_path / "dist"
    run_ranks(1, convert, command(SMALL, [], small, save))
    path = save / "release" / "slime_manifest.json"
    right = json.loads(path.read_text())
    wrong = json.loads(path.read_text())
    wrong["tensors"]["decoder.final_layernorm.weight"]["sha256"] = "0" * 64
    path.write_text(json.dumps(wrong))
    status, told, faults = verify(save)
    assert status == 1 and "1 faults" in told
    assert faults == "decoder.final_layernorm.weight has other values than model.norm.weight when they were converted\n"
    path.write_text(json.dumps(right))
    file = save / "release" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    status, _, faults = verify(save)
    assert status == 1 and faults == "the content of __0_0.distcp has changed since it was written\n"


def test_the_recipes_command_on_32_ranks(tmp_path: Path) -> None:
    """Its own flags on a toy with the same kinds of layers, there and back. One rank of each stage is measured until it has its
    tensors: the records of 2,517 tensors, which are gathered then, outweigh so small ones."""
    source, vocab = write(tmp_path / "hf", TOY), 4096
    _widen(tmp_path / "hf", vocab)
    mapped = {file.stat().st_size for file in (tmp_path / "hf").glob("*.safetensors")}
    layout = """--tensor-model-parallel-size 8 --pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 40
    --expert-model-parallel-size 16 --expert-tensor-parallel-size 1""".split()
    argv = [*model_args(TOY, vocab), *layout, "--hf-checkpoint", source, "--save", str(tmp_path / "dist")]
    flag_table()  # kept, and so shared by the ranks

    def on_rank(rank: int) -> tuple[list[str], str, tuple[int, int] | None]:
        if rank not in (0, 31):
            return *convert(rank, argv), None
        own = []
        with Allocations(mapped) as allocations:
            on_filled(lambda filled: (own.append(filled), allocations.stop()))
            done = convert(rank, argv)
        return *done, (allocations.peak, *own)

    done = run_ranks(32, on_rank, timeout=400)
    # By hand: 42 attention blocks of 9 tensors (2 norms, 7 of MLA), 12 with 5 of the indexer, 3 dense MLPs of 3,
    # 39 MoE layers of 16 x 3 + 3 shared + router and bias, embedding, last norm, head.
    names = 42 * 9 + 12 * 5 + 3 * 3 + 39 * (16 * 3 + 3 + 2) + 3
    held = set(SafetensorsReader(source).names())
    assert f"{names} tensors, 0 FP8 scales: each accounted for once" in done[0][1] and len(held) == names
    assert {name for reads, _, _ in done for name in reads} == held
    # An expert is on one rank of the 32; nobody else reads it.
    assert sum(reads.count("model.layers.41.mlp.experts.7.up_proj.weight") for reads, _, _ in done) == 1
    largest = vocab * TOY.hidden_size * 2  # the embedding, and the head
    for peak, own in (memory for _, _, memory in done if memory):
        assert own <= peak <= own + largest
    status, told, _ = verify(tmp_path / "dist")
    assert status == 0 and "every hash agrees" in told
    assert {name for record in manifest(tmp_path / "dist").values() for name in record["hf"]} == held
    back(tmp_path / "dist", tmp_path / "back", source)
    before, after = SafetensorsReader(source), SafetensorsReader(tmp_path / "back")
    assert set(after.names()) == held
    assert [name for name in held if not torch.equal(before.raw(name), after.raw(name))] == []


def back(folder: Path, output: Path, source: str, *more: str) -> None:
    """torch_dist -> HF."""
    argv = ["--input-dir", str(folder), "--output-dir", str(output), "--origin-hf-dir", source, *more]
    with contextlib.redirect_stdout(io.StringIO()):
        assert convert_torch_dist_to_hf.main(argv) == 0


class Allocations:
    """Torch's allocations on the host between `with` and `stop`, or the end. mapped: sizes of files, whose mapping torch
    records as allocations."""

    def __init__(self, mapped: set[int]) -> None:
        from torch.profiler import ProfilerActivity, profile

        self._mapped, self._running = mapped, False
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> Allocations:
        self._profile.start()
        self._running = True
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self._running:
            self._running = False
            self._profile.stop()

    @property
    def peak(self) -> int:
        """The most bytes at a time."""
        events = [event for event in self._profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if abs(e.nbytes()) not in self._mapped]
        return max(accumulate(changes))


def on_filled(act: Callable[[int], object]) -> None:
    """Of this process's conversions: call `act` with the bytes of the rank's own tensors when they are all there."""
    published = Journal.__exit__

    def leave(journal: Journal, *exc: object) -> None:
        published(journal, *exc)
        act(journal._data.stat().st_size)

    Journal.__exit__ = leave


def test_a_rank_holds_its_shard_and_less_than_one_tensor_more(tmp_path: Path) -> None:
    """Every allocation of torch in a conversion from FP8 is recorded, from the model's first to the last file's end; then those
    of the way back in one process, whose files are smaller than the checkpoint."""
    size = GlmSize(num_hidden_layers=8, hidden_size=512, intermediate_size=512, moe_intermediate_size=128, index_head_dim=64)
    vocab = 4096
    source = write(tmp_path / "hf", size, fp8=True)
    _widen(tmp_path / "hf", vocab)
    mapped = {file.stat().st_size for file in (tmp_path / "hf").glob("*.safetensors")}
    argv = [*model_args(size, vocab), *TP2_EP4, "--hf-checkpoint", source, "--save", str(tmp_path / "dist")]
    largest = vocab * size.hidden_size * 2  # the embedding, and the head

    def there(rank: int) -> tuple[int, int]:
        own: list[int] = []
        on_filled(own.append)
        with Allocations(mapped) as allocations:
            convert(rank, argv)
        return allocations.peak, *own

    for peak, own in run_ranks(4, there, timeout=400):
        assert own > 2 * largest
        assert own <= peak <= own + largest

    def and_back(rank: int) -> int:
        with Allocations(mapped) as allocations:
            back(tmp_path / "dist", tmp_path / "back", source, "--chunk-size", str(largest))
        return allocations.peak

    (peak,) = run_ranks(1, and_back)
    # A file's tensors, the tensor that is put together for the next one, and the half of it that a rank had written.
    assert largest < peak <= 2.5 * largest
    assert sum(file.stat().st_size for file in (tmp_path / "back").glob("*.safetensors")) > 3 * peak


def _widen(folder: Path, vocab: int) -> None:
    """Give the checkpoint a vocabulary that makes the embedding its largest tensor."""
    from safetensors.torch import load_file, save_file

    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        for name in [name for name in tensors if name in ("model.embed_tokens.weight", "lm_head.weight")]:
            tensors[name] = torch.randn(vocab, tensors[name].shape[1]).to(torch.bfloat16)
        save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": vocab}))
