"""Which engine settings of the recipe come up, answer right, sleep, take weights, and answer right again.

    source scripts/models/glm5.2-mini.sh
    python3 tools/bench/engine_matrix.py --bf16 DIR --fp8 DIR [--rows "fp8;recipe"] [--lengths 1000,3000] -- "${MODEL_ARGS[@]}"

One engine after another over all visible GPUs, started by the code that a run starts them with. Right means: of the tokens that
the engine generated, its log-probs are those of the trainer (this process, in BF16 on the first GPU) for the same tokens. Three
times: with the weights that it loaded, after it slept and was sent them again, and after it was sent others. A row's figures:
seconds until it is up, seconds of the first and the second generation, GB a card that stay taken asleep, seconds of a weight
update, and per length the mean and the 99th percentile of |engine - trainer|. A row of selections asks the engine for the keys
that each position reads (one GPU per engine) and counts those that the trainer selects too. JSON goes to --json.

On a machine without a GPU the rows of a CPU engine are run (`--rows "bf16;fp8"`), with a tiny checkpoint.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench.one_rank import OneRank  # noqa: E402

NEW_TOKENS = 32
TOKEN = "token-of-engine-matrix"

DSA = {"attention_backend": "nsa", "nsa_prefill_backend": "flashmla_sparse", "page_size": 64}
# FlashMLA's decode reads FP8 alone: of a bf16 cache it would quantise all of it at each step.
BF16_KV = {"nsa_decode_backend": "fa3"}
FP8_KV = {"kv_cache_dtype": "fp8_e4m3", "nsa_decode_backend": "flashmla_kv"}
GRAPHS = {"cuda_graph_max_bs": 12}
NO_GRAPHS = {"disable_cuda_graph": True}
EAGLE = {
    "speculative_algorithm": "EAGLE", "speculative_num_steps": 4, "speculative_eagle_topk": 1,
    "speculative_num_draft_tokens": 5, "speculative_draft_attention_backend": "nsa", "disable_overlap_schedule": True,
}  # fmt: skip
DP_ATTENTION = {"enable_dp_attention": True, "enable_dp_lm_head": True, "moe_dense_tp_size": 1}
SELECTIONS = {"enable_return_indexer_topk": True, "max_total_tokens": 8192, "chunked_prefill_size": 4096}
SELECTION_TOKENS = 3000
# An engine tells the slots of its cache, or rows of what it gathered from there; it never gives its first page away.
FIRST_SLOTS = (0, 64)
DEEPEP_AUTO = {"moe_a2a_backend": "deepep", "deepep_mode": "auto", "moe_runner_backend": "deep_gemm"}
# These engines read prompts too, and in this mode a rank sends at most so many tokens at a time.
LOW_LATENCY_TOKENS = 128
DEEPEP_LOW = {"moe_a2a_backend": "deepep", "deepep_mode": "low_latency", "moe_runner_backend": "deep_gemm"}


@dataclass(frozen=True)
class Row:
    """One engine: which checkpoint it serves and its settings. dp, ep: over all its ranks, or 1."""

    fp8: bool
    settings: dict[str, object]
    dp: bool = False
    ep: bool = False
    selections: bool = False
    """Compares selected keys and nothing else."""


ROWS = {
    "bf16": Row(False, DSA | BF16_KV | NO_GRAPHS),
    "bf16, float32 logits": Row(False, DSA | BF16_KV | NO_GRAPHS | {"enable_fp32_lm_head": True}),
    "bf16, graphs": Row(False, DSA | BF16_KV | GRAPHS),
    "bf16, eagle": Row(False, DSA | BF16_KV | NO_GRAPHS | EAGLE),
    "bf16, graphs, eagle": Row(False, DSA | BF16_KV | GRAPHS | EAGLE),
    "bf16, selections": Row(False, DSA | BF16_KV | NO_GRAPHS | SELECTIONS, selections=True),
    "fp8": Row(True, DSA | BF16_KV | NO_GRAPHS),
    # Each mechanism by itself on the FP8 engine with an FP8 cache,
    "fp8 kv": Row(True, DSA | FP8_KV | NO_GRAPHS),
    "graphs": Row(True, DSA | FP8_KV | GRAPHS),
    "eagle": Row(True, DSA | FP8_KV | NO_GRAPHS | EAGLE),
    "graphs, eagle": Row(True, DSA | FP8_KV | GRAPHS | EAGLE),
    "selections": Row(True, DSA | FP8_KV | NO_GRAPHS | SELECTIONS, selections=True),
    "dp attention": Row(True, DSA | FP8_KV | NO_GRAPHS | DP_ATTENTION, dp=True),
    "ep": Row(True, DSA | FP8_KV | NO_GRAPHS, ep=True),
    "deepep auto": Row(True, DSA | FP8_KV | NO_GRAPHS | DP_ATTENTION | DEEPEP_AUTO, dp=True, ep=True),
    "deepep low latency": Row(True, DSA | FP8_KV | NO_GRAPHS | DP_ATTENTION | DEEPEP_LOW, dp=True, ep=True),
    # then together, as the recipe's decode and prefill groups have them.
    "recipe": Row(True, DSA | FP8_KV | GRAPHS | EAGLE | DP_ATTENTION, dp=True, ep=True),
    "recipe, deepep auto": Row(True, DSA | FP8_KV | GRAPHS | EAGLE | DP_ATTENTION | DEEPEP_AUTO, dp=True, ep=True),
    "recipe, deepep low latency": Row(True, DSA | FP8_KV | GRAPHS | EAGLE | DP_ATTENTION | DEEPEP_LOW, dp=True, ep=True),
}


@dataclass
class Outcome:
    row: str
    up_seconds: float | None = None
    first_generation_seconds: float | None = None
    second_generation_seconds: float | None = None
    asleep_gb: list[float] = field(default_factory=list)
    update_seconds: float | None = None
    update_gb: float | None = None
    gaps: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    """Phase -> prompt length -> [mean, 99th percentile] of |log-prob of the engine - log-prob of the trainer|."""
    accepted: float | None = None
    """Tokens per step of a speculating engine."""
    overlaps: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    """The trainer's scoring -> 0-based computing layer -> [mean, least] share of a position's keys that the engine reads."""
    failure: str = ""


def main(argv: Sequence[str]) -> int:
    args, model_args = _parse(argv)
    import torch

    from slime.config import load

    config = load([*model_args, "--hf-checkpoint", args.bf16, "--save", args.bf16], door="convert")
    trainer = OneRank(config, args.bf16, args.fp8)
    outcomes = []
    began = time.monotonic()
    for name in args.rows:
        if time.monotonic() - began > args.limit_seconds:
            print(f"not begun after {args.limit_seconds:.0f} s: {', '.join(args.rows[len(outcomes) :])}")
            break
        outcome = run_row(name, trainer, args)
        outcomes.append(outcome)
        print(line(outcome), flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps([asdict(one) for one in outcomes], indent=1))
    print("\n".join(table(outcomes)))
    torch.distributed.destroy_process_group()
    return int(any(outcome.failure for outcome in outcomes))


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    cut = list(argv).index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bf16", required=True, help="Hugging Face checkpoint of the trainer")
    parser.add_argument("--fp8", required=True, help="its FP8 twin")
    parser.add_argument(
        "--rows", type=lambda text: text.split(";"), default=list(ROWS), help="names of rows joined by ;, default all"
    )
    parser.add_argument(
        "--lengths",
        type=_lengths,
        default={1000: 8, 3000: 8},
        help="tokens of a prompt, x how many prompts (default 8): 1000,16000x2",
    )
    parser.add_argument("--ranks", type=int, default=0, help="of an engine; default: all visible GPUs")
    parser.add_argument("--ready-seconds", type=float, default=900.0)
    parser.add_argument("--limit-seconds", type=float, default=1e9, help="after which no further row is begun")
    parser.add_argument("--mem-fraction", type=float, default=0.4, help="of the free memory, for an engine's weights and cache")
    parser.add_argument("--cache-tokens", type=int, default=0, help="of an engine's KV cache, where several share a card")
    parser.add_argument("--kernel-cache", help="as the flag of a run")
    parser.add_argument("--logs", default="/tmp/engine_matrix")
    parser.add_argument("--json", default="")
    args = parser.parse_args(argv[:cut])
    unknown = [row for row in args.rows if row not in ROWS]
    if unknown:
        parser.error(f"--rows {', '.join(unknown)}: choose from {', '.join(ROWS)}")
    return args, list(argv[cut + 1 :])


def _lengths(text: str) -> dict[int, int]:
    """1000,16000x2 -> {1000: 8, 16000: 2}"""
    pairs = (word.partition("x") for word in text.split(","))
    return {int(length): int(count or 8) for length, _, count in pairs}


def run_row(name: str, trainer: OneRank, args: argparse.Namespace) -> Outcome:
    row, outcome = ROWS[name], Outcome(name)
    trainer.load()  # the row before has changed them
    ranks = args.ranks or max(1, _num_devices())
    log = Path(args.logs) / f"{name.replace(' ', '-').replace(',', '')}.log"
    engine = _engine(row, ranks, args, log, trainer.device.kind)
    began = time.monotonic()
    try:
        engine.start()
        engine.wait_ready(timeout=args.ready_seconds)
        outcome.up_seconds = time.monotonic() - began
        with asyncio.Runner() as runner:
            phases = _selections if row.selections else _phases
            phases(row, ranks, engine, trainer, args, outcome, runner)
    except Exception as error:  # a row that fails is a result, and the next one is tried
        outcome.failure = f"{type(error).__name__}: {_first_cause(str(error), log)}"
    finally:
        engine.stop()
    return outcome


def _phases(row: Row, ranks: int, engine, trainer: OneRank, args, outcome: Outcome, runner: asyncio.Runner) -> None:
    from slime.engine.client import EngineClient

    client = EngineClient(engine.url, TOKEN)
    version = 0

    def generate(phase: str) -> float:
        begin = time.monotonic()
        answers = {
            length: runner.run(_generate(client, length, count, trainer.vocab_size)) for length, count in args.lengths.items()
        }
        seconds = time.monotonic() - begin
        outcome.gaps[phase] = {length: gap(trainer, some) for length, some in answers.items()}
        meta = [answer["meta_info"] for some in answers.values() for _, answer in some]
        rates = [one["completion_tokens"] / one["spec_verify_ct"] for one in meta if one.get("spec_verify_ct")]
        outcome.accepted = statistics.mean(rates) if rates else None
        return seconds

    def update() -> None:
        nonlocal version
        version += 1
        begin = time.monotonic()
        outcome.update_gb = runner.run(_update(client, trainer, row.fp8, ranks, version)) / 1e9
        outcome.update_seconds = time.monotonic() - begin

    outcome.first_generation_seconds = generate("loaded")
    outcome.second_generation_seconds = generate("loaded, cached")
    runner.run(client.pause_generation())
    runner.run(client.flush_cache())
    if trainer.device.kind == "cuda":
        runner.run(client.release_memory())
        time.sleep(1)
        outcome.asleep_gb = _memory_of_group(engine.child.pid)
        runner.run(client.resume_memory())
    update()
    generate("sent")
    trainer.change()
    update()
    generate("sent others")
    runner.run(client.close())


def _selections(row: Row, ranks: int, engine, trainer: OneRank, args, outcome: Outcome, runner: asyncio.Runner) -> None:
    """One request by itself in an empty cache; of its prompt, the positions that have more keys than they may read."""
    import numpy as np
    import torch

    from slime.engine.client import EngineClient

    client = EngineClient(engine.url, TOKEN)
    answers = runner.run(_generate(client, SELECTION_TOKENS, 1, trainer.vocab_size, return_indexer_topk=True))
    runner.run(client.close())
    outcome.gaps["loaded"] = {SELECTION_TOKENS: gap(trainer, answers)}
    [(prompt, answer)] = answers
    tokens = [*prompt, *(token for _, token, *_ in answer["meta_info"]["output_token_logprobs"])]
    topk, layers = trainer.hf["index_topk"], trainer.hf.num_layers
    told = np.frombuffer(base64.b64decode(answer["meta_info"]["indexer_topk"]), np.int32).reshape(-1, layers, topk)
    read = torch.from_numpy(told.copy())  # [tokens - 1, layers, topk]: the last token was never read
    prompts = slice(topk, len(prompt))
    for scoring in ("params", "fp8"):
        picked = trainer.selections(tokens, scoring=scoring)
        outcome.overlaps[scoring] = {
            layer: max(overlap(rows[prompts], read[prompts, layer].to(rows.device) - first) for first in FIRST_SLOTS)
            for layer, rows in picked.items()
        }


def overlap(mine: Tensor, theirs: Tensor) -> list[float]:
    """int [rows, topk] each, -1 for none -> [mean, least] over the rows of the share of `mine` that `theirs` holds."""
    import torch

    width = int(max(mine.max(), theirs.max())) + 2
    held = torch.zeros(len(mine), width, dtype=torch.bool, device=mine.device)
    held.scatter_(1, theirs.long().clamp(min=-1) + 1, True)  # column 0 takes the empty places
    held[:, 0] = False
    shares = held.gather(1, mine.long() + 1).sum(1) / (mine >= 0).sum(1)
    return [shares.mean().item(), shares.min().item()]


async def _generate(client, length: int, count: int, vocab_size: int, **asked: object) -> list[tuple[list[int], dict]]:
    """(prompt, the engine's answer) of `count` different prompts, asked together."""
    words = vocab_size - 30
    prompts = [[(11 * number + 7 * at + at * at // 13) % words + 20 for at in range(length)] for number in range(count)]
    body = {
        "sampling_params": {"max_new_tokens": NEW_TOKENS, "temperature": 1.0, "ignore_eos": True},
        "return_logprob": True,
        **asked,
    }
    answers = await asyncio.gather(*(client.generate({"input_ids": tokens, **body}, timeout=600) for tokens in prompts))
    return list(zip(prompts, answers, strict=True))


def gap(trainer: OneRank, answers: Sequence[tuple[list[int], dict]]) -> list[float]:
    """[mean, 99th percentile] over all generated tokens."""
    distances = []
    for prompt, answer in answers:
        served = answer["meta_info"]["output_token_logprobs"]
        trained = trainer.log_probs([*prompt, *(token for _, token, *_ in served)], len(served))
        distances += [abs(mine - theirs[0]) for mine, theirs in zip(trained, served, strict=True)]
    distances.sort()
    return [statistics.mean(distances), distances[int(0.99 * (len(distances) - 1))]]


async def _update(client, trainer: OneRank, fp8: bool, ranks: int, version: int) -> int:
    """All weights to every rank of the engine, in the order that a run keeps; bytes of one copy.

    Each rank gets a handle of memory on its own device, as from the trainer rank beside it: it cannot read another's.
    """
    import torch

    from slime.engine.payload import bucket_payload
    from slime.types.weight_bucket import WeightBucket

    places = [trainer.device.torch_device] * ranks
    if trainer.device.kind == "cuda":
        places = [torch.device("cuda", number) for number in range(ranks)]

    sent = 0
    await client.pause_generation()
    await client.flush_cache()
    await client.begin_weight_update(version)
    for bucket in trainer.buckets(fp8=fp8):
        copies = [WeightBucket(bucket.metas, bucket.flat.to(place)) for place in places]
        if trainer.device.kind == "cuda":
            for place in places:
                torch.cuda.synchronize(place)
        await client.update_weights_from_tensor([bucket_payload(copy, trainer.device) for copy in copies])
        sent += bucket.nbytes
    await client.end_weight_update(version)
    await client.continue_generation()
    return sent


def _engine(row: Row, ranks: int, args: argparse.Namespace, log: Path, kind: str):
    from slime.engine.process import EngineProcess
    from slime.engine.spec import EngineSpec

    dp = ranks if row.dp else 1
    settings = {name: value for name, value in row.settings.items() if ranks > 1 or name not in DP_ATTENTION}
    if settings.get("deepep_mode") == "low_latency":
        settings["chunked_prefill_size"] = LOW_LATENCY_TOKENS * dp
    settings |= {"mem_fraction_static": args.mem_fraction, "max_running_requests": 64}
    if dp > 1:
        settings["dp_size"] = dp
    if args.cache_tokens:
        settings.setdefault("max_total_tokens", args.cache_tokens)
    spec = EngineSpec(
        model="default", role="regular", engine_id=0, gpu_offset=0, num_gpus=ranks, num_nodes=1, tp_size=ranks, pp_size=1,
        dp_size=dp, ep_size=ranks if row.ep else 1, model_path=args.fp8 if row.fp8 else args.bf16, update_weights=True,
        needs_offload=kind == "cuda",
        random_seed=1, settings=settings,
    )  # fmt: skip
    return EngineProcess(
        spec, device_kind=kind, token=TOKEN, log_path=log, kernel_cache=args.kernel_cache, report=print, detail=print
    )


def _num_devices() -> int:
    import torch

    return torch.cuda.device_count()


def _memory_of_group(group: int) -> list[float]:
    """GB of GPU memory of each process in the group that has some, largest first; without the driver's own tool, none."""
    try:
        asked = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    taken = [[int(word) for word in line.split(",")] for line in told.splitlines() if line.strip()]
    return sorted((round(mib * 2**20 / 1e9, 2) for pid, mib in taken if _group_of(pid) == group), reverse=True)


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def _first_cause(text: str, log: Path) -> str:
    """The engine's own first error where its log has one: the last lines tell what followed from it."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    errors = [one.strip() for one in lines if "Error" in one and "Traceback" not in one]
    return (errors[0] if errors else text.splitlines()[0])[:300]


def line(outcome: Outcome) -> str:
    def shown(value: float | None, unit: str) -> str:
        return "-" if value is None else f"{value:.1f}{unit}"

    gaps = "; ".join(
        f"{phase} " + ", ".join(f"{length}: {mean:.4f}/{tail:.4f}" for length, (mean, tail) in by_length.items())
        for phase, by_length in outcome.gaps.items()
    )
    overlaps = "; ".join(
        f"keys shared with the trainer's {scoring} scores "
        + ", ".join(f"layer {layer}: {100 * mean:.2f} %, least {100 * least:.1f}" for layer, (mean, least) in layers.items())
        for scoring, layers in outcome.overlaps.items()
    )
    parts = [
        outcome.row,
        f"up {shown(outcome.up_seconds, ' s')}",
        f"first {shown(outcome.first_generation_seconds, ' s')}, second {shown(outcome.second_generation_seconds, ' s')}",
        f"asleep {outcome.asleep_gb} GB",
        f"update {shown(outcome.update_gb, ' GB')} in {shown(outcome.update_seconds, ' s')}",
        f"accepted {shown(outcome.accepted, '')}",
        f"gap {gaps or '-'}",
        *([overlaps] if overlaps else []),
        outcome.failure or "ok",
    ]
    return " | ".join(parts)


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Markdown, a line per row of the matrix; gaps are means, with the 99th percentile, at each length."""

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    lines = [
        "| row | up, s | asleep, GB | update, s | accepted | gap as loaded | gap after the second update | |",
        "|" + "---|" * 8,
    ]
    for one in outcomes:
        gaps = [
            "; ".join(f"{length}: {mean:.4f} ({tail:.3f})" for length, (mean, tail) in one.gaps.get(phase, {}).items()) or "-"
            for phase in ("loaded", "sent others")
        ]
        cells = [
            one.row,
            shown(one.up_seconds),
            f"{sum(one.asleep_gb):.1f}" if one.asleep_gb else "-",
            shown(one.update_seconds),
        ]
        lines.append("| " + " | ".join([*cells, shown(one.accepted), *gaps, one.failure or "ok"]) + " |")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
