"""Which engine settings of the recipe come up, answer right, sleep, take weights, and answer right again.

    source scripts/models/glm5.2-mini.sh
    python3 tools/bench/engine_matrix.py --bf16 DIR --fp8 DIR [--rows "fp8;recipe"] [--lengths 1000,3000] -- "${MODEL_ARGS[@]}"

One engine after another over all visible GPUs, started by the code that a run starts them with. Right means: of the tokens that
the engine generated, its log-probs are those of the trainer (this process, in BF16 on the first GPU) for the same tokens. Three
times: with the weights that it loaded, after it slept and was sent them again, and after it was sent others. A row's figures:
seconds until it is up, seconds of the first and the second generation, GB a card that stay taken asleep, seconds of a weight
update, and per length the mean and the 99th percentile of |engine - trainer|. JSON goes to --json.

On a machine without a GPU the rows of a CPU engine are run (`--rows "bf16;fp8"`), with a tiny checkpoint.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

NEW_TOKENS = 32
TOKEN = "token-of-engine-matrix"
BUCKET_BYTES = 2 << 30

DSA = {
    "attention_backend": "nsa", "nsa_prefill_backend": "flashmla_sparse", "nsa_decode_backend": "flashmla_kv", "page_size": 64,
}  # fmt: skip
FP8_KV = {"kv_cache_dtype": "fp8_e4m3"}
GRAPHS = {"cuda_graph_max_bs": 12}
NO_GRAPHS = {"disable_cuda_graph": True}
EAGLE = {
    "speculative_algorithm": "EAGLE", "speculative_num_steps": 4, "speculative_eagle_topk": 1,
    "speculative_num_draft_tokens": 5, "speculative_draft_attention_backend": "nsa", "disable_overlap_schedule": True,
}  # fmt: skip
DP_ATTENTION = {"enable_dp_attention": True, "enable_dp_lm_head": True, "moe_dense_tp_size": 1}
DEEPEP_AUTO = {"moe_a2a_backend": "deepep", "deepep_mode": "auto", "moe_runner_backend": "deep_gemm"}
DEEPEP_LOW = {"moe_a2a_backend": "deepep", "deepep_mode": "low_latency", "moe_runner_backend": "deep_gemm"}


@dataclass(frozen=True)
class Row:
    """One engine: which checkpoint it serves and its settings. dp, ep: over all its ranks, or 1."""

    fp8: bool
    settings: dict[str, object]
    dp: bool = False
    ep: bool = False


ROWS = {
    # Each mechanism by itself on the plain FP8 engine,
    "bf16": Row(False, DSA | NO_GRAPHS),
    "fp8": Row(True, DSA | NO_GRAPHS),
    "fp8 kv": Row(True, DSA | FP8_KV | NO_GRAPHS),
    "graphs": Row(True, DSA | FP8_KV | GRAPHS),
    "eagle": Row(True, DSA | FP8_KV | GRAPHS | EAGLE),
    "dp attention": Row(True, DSA | FP8_KV | NO_GRAPHS | DP_ATTENTION, dp=True),
    "ep": Row(True, DSA | FP8_KV | NO_GRAPHS, ep=True),
    "deepep auto": Row(True, DSA | FP8_KV | NO_GRAPHS | DP_ATTENTION | DEEPEP_AUTO, dp=True, ep=True),
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
    failure: str = ""


def main(argv: Sequence[str]) -> int:
    args, model_args = _parse(argv)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29531")
    from slime.config import load

    config = load([*model_args, "--hf-checkpoint", args.bf16, "--save", args.bf16], door="convert")
    trainer = Trainer(config, args.bf16, args.fp8)
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
    return int(any(outcome.failure for outcome in outcomes))


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    cut = list(argv).index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bf16", required=True, help="Hugging Face checkpoint of the trainer")
    parser.add_argument("--fp8", required=True, help="its FP8 twin")
    parser.add_argument(
        "--rows", type=lambda text: text.split(";"), default=list(ROWS), help="names of rows joined by ;, default all"
    )
    parser.add_argument("--lengths", type=lambda text: [int(word) for word in text.split(",")], default=[1000, 3000])
    parser.add_argument("--prompts", type=int, default=8, help="of each length")
    parser.add_argument("--ranks", type=int, default=0, help="of an engine; default: all visible GPUs")
    parser.add_argument("--ready-seconds", type=float, default=900.0)
    parser.add_argument("--limit-seconds", type=float, default=1e9, help="after which no further row is begun")
    parser.add_argument("--logs", default="/tmp/engine_matrix")
    parser.add_argument("--json", default="")
    args = parser.parse_args(argv[:cut])
    unknown = [row for row in args.rows if row not in ROWS]
    if unknown:
        parser.error(f"--rows {', '.join(unknown)}: choose from {', '.join(ROWS)}")
    return args, list(argv[cut + 1 :])


class Trainer:
    """The model as the trainer computes it, alone on the first device; its weights go to the engines."""

    def __init__(self, config, bf16: str, fp8: str) -> None:
        import torch

        from slime.device import get_device
        from slime.model.build import build_model, own_vocabulary, padded_vocab_size
        from slime.model.hf_config import read_hf_config
        from slime.model.hf_io import SafetensorsReader, load_hf
        from slime.model.names import NameTable
        from slime.parallel import init_ranks
        from slime.training.forward import Pipeline

        self.device = get_device()
        self.device.init_process(0)
        self.ranks = init_ranks(config.parallel, rank=0, world_size=1, device=self.device, seed=1)
        hf = read_hf_config(bf16)
        self.served = {False: hf, True: read_hf_config(fp8)}
        dtype = torch.bfloat16 if self.device.kind == "cuda" else torch.float32
        self.chunks = build_model(config, hf, self.ranks, self.device, dtype=dtype)
        padded = padded_vocab_size(config, hf)
        load_hf(self.chunks, NameTable.for_model(hf), SafetensorsReader(bf16), self.ranks, padded_vocab=padded)
        for chunk in self.chunks:
            chunk.to(self.device.torch_device)
            chunk.config.variable_seq_lengths = True
        self.vocab_size = hf["vocab_size"]
        self.vocabulary = own_vocabulary(padded, hf, self.ranks)
        self.pipeline = Pipeline(self.chunks, self.ranks, self.device)

    def log_probs(self, tokens: Sequence[int], num_response: int) -> list[float]:
        """Of the last `num_response` tokens, at temperature 1."""
        import numpy as np

        from slime.batch.pack import pack
        from slime.training.forward import response_log_probs
        from slime.types import RolloutBatch

        one = np.zeros(1, np.int64)
        batch = RolloutBatch(
            rollout_id=0, tokens=(np.asarray(tokens, np.int64),), response_lengths=one + num_response,
            loss_masks=(np.ones(num_response, np.float32),), rewards=one.astype(np.float32), raw_rewards=one.astype(np.float32),
            groups=one, trajectories=one, sample_ids=one, truncated=one.astype(bool),
        )  # fmt: skip
        micro = pack(batch, [0], loss_weight=np.ones(1), multiple=128)

        def read(micro, output):
            values, _ = response_log_probs(
                micro, output, self.ranks, vocabulary=self.vocabulary, temperature=1.0, chunk_size=16384
            )
            return values.cpu().tolist()

        return self.pipeline.evaluate([micro], read)[0]

    def change(self) -> None:
        """Other weights, far enough away that an engine which did not take them is seen."""
        import torch

        generator = torch.Generator(self.device.torch_device).manual_seed(5)
        with torch.no_grad():
            for chunk in self.chunks:
                for parameter in chunk.parameters():
                    noise = torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=parameter.dtype)
                    parameter.add_(noise * parameter.std() if parameter.ndim > 1 else 0.1 * noise, alpha=0.3)
                    parameter.copy_(parameter.bfloat16())  # what the wire carries

    def buckets(self, *, fp8: bool):
        from slime.model.export import export_weights
        from slime.model.names import NameTable
        from slime.weights.buckets import fill_buckets
        from slime.weights.quantize import WireFormat

        wire = WireFormat.of_checkpoint(self.served[fp8])
        groups = export_weights(self.chunks, NameTable.for_model(self.served[fp8]), self.ranks, gather_to_source=False)
        return fill_buckets((wire.encode_group(group) for group in groups if group), limit_bytes=BUCKET_BYTES)


def run_row(name: str, trainer: Trainer, args: argparse.Namespace) -> Outcome:
    row, outcome = ROWS[name], Outcome(name)
    ranks = args.ranks or max(1, _num_devices())
    log = Path(args.logs) / f"{name.replace(' ', '-').replace(',', '')}.log"
    engine = _engine(row, ranks, args.fp8 if row.fp8 else args.bf16, log, trainer.device.kind)
    taken = _taken_bytes()
    began = time.monotonic()
    try:
        engine.start()
        engine.wait_ready(timeout=args.ready_seconds)
        outcome.up_seconds = time.monotonic() - began
        with asyncio.Runner() as runner:
            _phases(row, ranks, engine, trainer, args, outcome, runner, taken)
    except Exception as error:  # a row that fails is a result, and the next one is tried
        outcome.failure = f"{type(error).__name__}: {_first_cause(str(error), log)}"
    finally:
        engine.stop()
    return outcome


def _phases(row: Row, ranks: int, engine, trainer: Trainer, args, outcome: Outcome, runner: asyncio.Runner, taken) -> None:
    from slime.engine.client import EngineClient

    client = EngineClient(engine.url, TOKEN)
    version = 0

    def generate(phase: str) -> float:
        begin = time.monotonic()
        answers = {length: runner.run(_generate(client, length, args.prompts, trainer.vocab_size)) for length in args.lengths}
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
        outcome.asleep_gb = [round((now - before) / 1e9, 2) for now, before in zip(_taken_bytes(), taken, strict=True)]
        runner.run(client.resume_memory())
    update()
    generate("sent")
    trainer.change()
    update()
    generate("sent others")
    runner.run(client.close())


async def _generate(client, length: int, count: int, vocab_size: int) -> list[tuple[list[int], dict]]:
    """(prompt, the engine's answer) of `count` different prompts, asked together."""
    words = vocab_size - 30
    prompts = [[(11 * number + 7 * at + at * at // 13) % words + 20 for at in range(length)] for number in range(count)]
    body = {"sampling_params": {"max_new_tokens": NEW_TOKENS, "temperature": 1.0, "ignore_eos": True}, "return_logprob": True}
    answers = await asyncio.gather(*(client.generate({"input_ids": tokens, **body}, timeout=600) for tokens in prompts))
    return list(zip(prompts, answers, strict=True))


def gap(trainer: Trainer, answers: Sequence[tuple[list[int], dict]]) -> list[float]:
    """[mean, 99th percentile] over all generated tokens."""
    distances = []
    for prompt, answer in answers:
        served = answer["meta_info"]["output_token_logprobs"]
        trained = trainer.log_probs([*prompt, *(token for _, token, *_ in served)], len(served))
        distances += [abs(mine - theirs[0]) for mine, theirs in zip(trained, served, strict=True)]
    distances.sort()
    return [statistics.mean(distances), distances[int(0.99 * (len(distances) - 1))]]


async def _update(client, trainer: Trainer, fp8: bool, ranks: int, version: int) -> int:
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


def _engine(row: Row, ranks: int, model_path: str, log: Path, kind: str):
    from slime.engine.process import EngineProcess
    from slime.engine.spec import EngineSpec

    dp = ranks if row.dp else 1
    settings = dict(row.settings) | {"mem_fraction_static": 0.4, "max_running_requests": 64}
    if row.dp:
        settings["dp_size"] = dp
    spec = EngineSpec(
        model="default", role="regular", engine_id=0, gpu_offset=0, num_gpus=ranks, num_nodes=1, tp_size=ranks, pp_size=1,
        dp_size=dp, ep_size=ranks if row.ep else 1, model_path=model_path, update_weights=True, needs_offload=kind == "cuda",
        random_seed=1, settings=settings,
    )  # fmt: skip
    return EngineProcess(spec, device_kind=kind, token=TOKEN, log_path=log, report=print)


def _num_devices() -> int:
    import torch

    return torch.cuda.device_count()


def _taken_bytes() -> list[int]:
    import torch

    free_total = [torch.cuda.mem_get_info(number) for number in range(_num_devices())]
    return [total - free for free, total in free_total]


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
    parts = [
        outcome.row,
        f"up {shown(outcome.up_seconds, ' s')}",
        f"first {shown(outcome.first_generation_seconds, ' s')}, second {shown(outcome.second_generation_seconds, ' s')}",
        f"asleep {outcome.asleep_gb} GB",
        f"update {shown(outcome.update_gb, ' GB')} in {shown(outcome.update_seconds, ' s')}",
        f"accepted {shown(outcome.accepted, '')}",
        f"gap {gaps or '-'}",
        outcome.failure or "ok",
    ]
    return " | ".join(parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
