"""The table of docs/en/advanced/parallelism.md that says which flags are tested together, made from the tests' own lists.

python tests/model/tested_layouts.py --write          put it into the page
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
for folder in (ROOT, ROOT / "tests", ROOT / "tests" / "training"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from model.test_layouts import BF16_LAYOUTS, DENSE_LAYOUTS, GLM_LAYOUTS, LATENT_LAYOUTS  # noqa: E402
from training.test_gradients import GLM_CUTS, QWEN_CUTS  # noqa: E402
from training.test_mtp_training import DEEPSEEK_MTP_LAYOUTS, MTP_LAYOUTS  # noqa: E402

PAGE = ROOT / "docs" / "en" / "advanced" / "parallelism.md"
BEGIN, END = "<!-- tested layouts: begin -->", "<!-- tested layouts: end -->"

# Key of a test's layout -> the flags that a user writes for it.
FLAGS = {
    "tp": "--tensor-model-parallel-size {} --sequence-parallel",
    "pp": "--pipeline-model-parallel-size {}",
    "vpp": "--num-virtual-stages-per-pipeline-rank {}",
    "first": "--decoder-first-pipeline-num-layers {}",
    "last": "--decoder-last-pipeline-num-layers {}",
    "stages": "--pipeline-model-parallel-layout '{}'",
    "cp": "--context-parallel-size {}",
    "ep": "--expert-model-parallel-size {}",
    "etp": "--expert-tensor-parallel-size {}",
    "axis": "--dsa-core-axis {}",
    "send_indices": "--dsa-send-indices",
    "move_cost": "--dsa-move-cost {}",
    "recompute": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "dtype": "--{}",
    "use_dynamic_batch_size": "(without --use-dynamic-batch-size)",
}
SHORT = {
    "tensor_model_parallel_size": "tp", "pipeline_model_parallel_size": "pp", "context_parallel_size": "cp",
    "virtual_pipeline_model_parallel_size": "vpp", "expert_model_parallel_size": "ep",
    "decoder_first_pipeline_num_layers": "first", "pipeline_model_parallel_layout": "stages",
}  # fmt: skip
GRADIENTS, STEP, DRAFT = "gradients", "step", "MTP"
MODELS = ("GLM-5.2", "Qwen3", "DeepSeek-V3")
Lists = Mapping[int, Mapping[str, Mapping[str, object]]]
"""Ranks -> name -> layout."""


def flags_of(layout: Mapping[str, object], *, experts: bool) -> str:
    """As they stand in a launcher. experts: the model has some, and tests keep them whole unless they say otherwise."""
    layout = {SHORT.get(name, name): value for name, value in layout.items()}
    if experts and "tp" in layout:
        layout.setdefault("etp", 1)
    words = []
    for name, value in layout.items():
        if name in FLAGS:
            words.append(FLAGS[name].format(value))
        elif value is not False:
            words.append("--" + name.replace("_", "-") + ("" if value is True else f" {value}"))
    return " ".join(words) or "none"


def table() -> str:
    """Markdown, one row per layout and model."""
    rows: dict[tuple[str, int, str], list[str]] = {}

    def add(model: str, lists: Lists, what: str, *, contiguous: bool, experts: bool, **more: object) -> None:
        """contiguous: a context-parallel layout is with --allgather-cp unless it says zigzag."""
        for world, layouts in lists.items():
            for name, layout in layouts.items():
                given = {key: value for key, value in layout.items() if key not in ("zigzag", "allgather_cp")}
                if "layers" in given:
                    given["stages"] = ",".join(map(str, given.pop("layers")))
                axes = {SHORT.get(key, key) for key in layout}
                if "cp" in axes and (layout.get("allgather_cp") or (contiguous and "zigzag" not in layout)):
                    given["allgather_cp"] = True
                text = flags_of({**given, **more}, experts=experts)
                if name != "whole":
                    rows.setdefault((model, world, text), []).append(what)

    add("GLM-5.2", GLM_LAYOUTS, GRADIENTS, contiguous=True, experts=True)
    add("GLM-5.2", GLM_CUTS, STEP, contiguous=True, experts=True)
    add("GLM-5.2", BF16_LAYOUTS, GRADIENTS, contiguous=True, experts=True, dtype="bf16")
    add("Qwen3", DENSE_LAYOUTS, GRADIENTS, contiguous=True, experts=False)
    add("Qwen3", QWEN_CUTS, STEP, contiguous=False, experts=False)
    add("DeepSeek-V3", LATENT_LAYOUTS, GRADIENTS, contiguous=True, experts=True)
    mtp = dict(mtp_num_layers=1, enable_mtp_training=True)
    add("GLM-5.2", MTP_LAYOUTS, DRAFT, contiguous=False, experts=True, **mtp)
    add("DeepSeek-V3", DEEPSEEK_MTP_LAYOUTS, DRAFT, contiguous=False, experts=True, **mtp)
    lines = ["| model | ranks | flags | compared |", "|---|---|---|---|"]
    for (model, world, text), what in sorted(rows.items(), key=lambda row: (list(MODELS).index(row[0][0]), row[0][1])):
        flags = text.replace("|", "\\|")
        lines.append(f"| {model} | {world} | `{flags}` | {', '.join(what)} |")
    return "\n".join(lines)


def page_with_table(page: str) -> str:
    """The page with the table between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page_with_table(PAGE.read_text()))
    else:
        print(table())
