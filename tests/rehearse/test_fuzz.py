"""No value of a flag and no content of a file ends in a traceback: random flags, YAML, config.json, index, hosts and prompts.

Ten minutes by hand: RULES_FUZZ_EXAMPLES=600 pytest tests/rehearse/test_fuzz.py
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slime.config import ConfigError, parse
from slime.config.command_line import flag_table
from slime.rehearse.known_models import known_config
from slime.rehearse.report.page import as_html
from slime.rehearse.report.text import as_json, as_text
from slime.rehearse.result import Options, rehearse
from tests.config.flags import MINIMAL
from tests.rehearse.recipes import Recipe

EXAMPLES = int(os.environ.get("RULES_FUZZ_EXAMPLES", "20"))
SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="RULES_FUZZ_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
WORDS = st.sampled_from(
    [
        "",
        "0",
        "-1",
        "1",
        "3",
        "1e9",
        "inf",
        "nan",
        "none",
        "true",
        "x",
        "[]",
        "{}",
        "a b",
        "/",
        "/tmp",
        "{rollout_id}",
        "1,2",
        "E|L",
    ]
    + ["t*3|L", "é", "9" * 30, "0.5", "-0.5", "{x", "auto", "@[1:2]"]
)
FLAGS = st.lists(st.tuples(st.sampled_from(sorted(flag_table())), st.lists(WORDS, max_size=2)), max_size=3)
JSON = st.sampled_from([None, 0, -1, 1, 3, 2.5, "x", "", [], {}, [1], {"a": 1}, True, 1e308, "silu", [128], [128, 64], ["a"]])
CONFIG = st.dictionaries(st.sampled_from(sorted(known_config("/x/GLM-5.2-FP8"))), JSON, max_size=3)
BROKEN = st.sampled_from(
    [b"[]", b"", b"null", b"3", b"{", b'"x"', b"\xff", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}']
)
HOSTS = st.sampled_from([b"10.0.0.1\r\n10.0.0.2\r\n", b"\xff\xfe", b"", b"a b c\n#x\n", b"\x00", b"10.0.0.1 # \n"])
PROMPTS = st.sampled_from(
    [b"", b"{", b"[1]\n", b'{"prompt": 3}\n', b"\xff\n", b'{"prompt": [{"role": 1}]}\n', b"null\n", b"PAR1"]
)


@given(FLAGS)
@settings(SETTINGS, max_examples=15 * EXAMPLES)
def test_any_flags_are_a_config_or_an_error(words: list[tuple[str, list[str]]]) -> None:
    try:
        parse([*MINIMAL, *(word for name, values in words for word in (name, *values))], door="rehearse", env={})
    except ConfigError as error:
        assert str(error).strip()


@given(st.data())
@SETTINGS
def test_any_recipe_is_judged(flagship: Recipe, data: st.DataObject) -> None:
    draw = data.draw
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        recipe = flagship
        for flag, values in draw(FLAGS):
            recipe = recipe.with_flag(flag, *values)
        if draw(st.booleans()):
            checkpoint = folder / "GLM-5.2-FP8"
            checkpoint.mkdir()
            raw = dict(known_config("/x/" + draw(st.sampled_from(["GLM-5.2-FP8", "Qwen3-4B", "Qwen3-30B-A3B"]))))
            text = draw(st.one_of(CONFIG.map(lambda odd: json.dumps({**raw, **odd}).encode()), BROKEN))
            (checkpoint / "config.json").write_bytes(text)
            if draw(st.booleans()):
                (checkpoint / "model.safetensors.index.json").write_bytes(draw(BROKEN))
            recipe = recipe.with_flag("--hf-checkpoint", str(checkpoint))
        if draw(st.booleans()):
            recipe = replace(recipe, yaml=_scrambled(recipe.yaml, draw))
        if draw(st.booleans()):
            recipe = recipe.with_env(**{draw(st.sampled_from(sorted(recipe.env))): draw(WORDS)})
        if draw(st.booleans()):
            prompts = folder / draw(st.sampled_from(["p.jsonl", "p.parquet", "p"]))
            prompts.write_bytes(draw(PROMPTS))
            recipe = recipe.with_flag("--prompt-data", str(prompts))
        hosts = folder / "hosts"
        hosts.write_bytes(draw(HOSTS))
        where = draw(st.sampled_from([None, str(hosts), str(folder), "/nowhere"]))
        done = rehearse(
            recipe.written(folder), Options(env=recipe.env, quick=draw(st.booleans()), build_ranks=False, hostfile=where)
        )
        assert as_text(done) and json.dumps(as_json(done)) and as_html(done)


def _scrambled(text: str, draw) -> str:
    lines = text.split("\n")
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(lines) - 1))
        how = draw(st.sampled_from(["value", "drop", "append", "insert"]))
        if how == "value":
            lines[at] = lines[at].split(":")[0] + ": " + draw(WORDS)
        elif how == "drop" and len(lines) > 1:
            del lines[at]
        elif how == "append":
            lines[at] += draw(st.sampled_from([" [", "}", " x", " 1", ": y"]))
        else:
            lines.insert(at, draw(WORDS))
    return "\n".join(lines)
