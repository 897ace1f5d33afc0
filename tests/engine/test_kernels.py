"""Compiled kernels: where they go, and SGLang's own compiler asked again for what a list says."""

import json
import os
import subprocess
import sys

import pytest

from slime.compat.sglang import host_environment
from slime.engine import kernels

# The one kernel of SGLang that a C++ compiler alone can make.
ASK = """
import sys
from pathlib import Path
from slime.engine.kernels import record
record(Path(sys.argv[1]))
from sglang.kernels.ops.speculative.ngram_corpus import get_ngram_corpus_cls
get_ngram_corpus_cls()
"""


def run(*argv, cache, **more):
    env = host_environment(cores=[0]) | kernels.cache_environment(cache) | more
    return subprocess.run([sys.executable, *argv], env=env, capture_output=True, text=True, timeout=300, check=True).stdout


def test_a_cache_lies_below_one_folder_by_versions(tmp_path):
    places = kernels.cache_environment(tmp_path)
    key = kernels.cache_key()
    assert key.startswith("sglang-0.") and "-torch-2." in key
    assert places["SGLANG_CACHE_DIR"] == str(tmp_path / key) and places["TRITON_CACHE_DIR"] == str(tmp_path / key / "triton")
    assert all(place.startswith(str(tmp_path / key)) for place in places.values())


def test_lists_are_the_folders_own_and_the_models(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "glm_moe_dsa"}))
    told = kernels.list_environment(tmp_path / "cache", tmp_path)[kernels.LISTS_VARIABLE].split(os.pathsep)
    assert told[0] == str(tmp_path / "cache" / kernels.cache_key() / "kernels.jsonl")
    assert told[1].endswith(f"glm_moe_dsa-sglang-{kernels._version('sglang')}.jsonl")
    [entry, *others] = kernels.read_lists([told[1]])
    assert entry["args"] == ["occupancy_cluster_probe"] and len(others) == 18  # of the SGLang that setup installs
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "of nobody"}))
    assert kernels.list_environment(None, tmp_path) == {}


@pytest.mark.slow
def test_what_one_engine_compiled_the_next_compiles_ahead(tmp_path):
    recorded, first, second = tmp_path / "kernels.jsonl", tmp_path / "first", tmp_path / "second"
    run("-c", ASK, str(recorded), cache=first)
    entries = kernels.read_lists([str(recorded), str(tmp_path / "absent"), ""])
    assert [entry["args"] for entry in entries] == [["ngram_corpus"]]
    assert len(recorded.read_text().splitlines()) == 1
    assert kernels.missing(entries, kernels.cache_environment(first)) == []
    assert kernels.missing(entries, kernels.cache_environment(second)) == entries
    assert "1 of 1 kernels compiled ahead" in run("-m", "slime.engine.kernels", str(recorded), cache=second)
    assert kernels.missing(entries, kernels.cache_environment(second)) == []
    assert run("-m", "slime.engine.kernels", str(recorded), cache=second) == ""
