"""The names that plugins written for slime import are here, and can be called as there."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch

# module -> {name: how public plugins call it (positional and keyword names)}; None: imported, not called by signature.
PUBLIC = {
    "slime.utils.types": {"Sample": None},
    "slime.utils.http_utils": {
        "post": "url, payload, max_retries=60, headers=None", "get": "url", "init_http_client": "args",
        "get_rollout_num_engines": "args",
    },
    "slime.utils.misc": {"load_function": "path", "SingletonMeta": None},
    "slime.utils.async_utils": {"run": "coro"},
    "slime.utils.data": {
        "Dataset": "path, tokenizer, processor, max_length, prompt_key=1, multimodal_keys=1, label_key=1, tool_key=1, "
        "metadata_key=1, seed=1, apply_chat_template=1, apply_chat_template_kwargs=1"
    },
    "slime.utils.processing_utils": {
        "load_tokenizer": "name_or_path, chat_template_path=None, trust_remote_code=True",
        "load_processor": "name_or_path, trust_remote_code=True", "encode_image_for_rollout_engine": "image",
        "build_processor_kwargs": "multimodal_inputs", "process_vision_info": "prompt, processor",
    },
    "slime.utils.arguments": {"parse_args": ""},
    "slime.rollout.base_types": {"RolloutFnTrainOutput": "samples=[], metrics=None", "RolloutFnEvalOutput": "data={}"},
    "slime.rollout.data_source": {
        "DataSource": None, "RolloutDataSource": "args", "RolloutDataSourceWithBuffer": "args",
        "pop_first": "args, rollout_id, buffer, num_samples",
    },
    "slime.rollout.filter_hub.base_types": {
        "DynamicFilterOutput": "keep=True, reason=None", "call_dynamic_filter": "fn, args, group", "MetricGatherer": "",
    },
    "slime.rollout.filter_hub.dynamic_sampling_filters": {"check_reward_nonzero_std": "args, samples, x=1"},
    "slime.rollout.rm_hub": {
        "async_rm": "args, sample", "batched_async_rm": "args, samples", "grade_answer_verl": "solution_str, ground_truth",
        "remote_rm": "args, sample", "extract_boxed_answer": "passage", "compute_score_dapo": "response, label",
        "get_deepscaler_rule_based_reward": "response, label", "f1_score": "prediction, ground_truth",
        "compute_gpqa_reward": "response, label, metadata=None",
    },
    "slime.rollout.rm_hub.math_utils": {
        "extract_answer": "passage", "extract_boxed_answer": "solution", "grade_answer_verl": "solution_str, ground_truth",
        "grade_answer_mathd": "given_answer, ground_truth", "grade_answer_sympy": "given_answer, ground_truth",
    },
    "slime.rollout.rm_hub.math_dapo_utils": {
        "compute_score": "solution_str, ground_truth, strict_box_verify=False, pause_tokens_index=None"
    },
    "slime.rollout.rm_hub.deepscaler": {"get_deepscaler_rule_based_reward": "response, label"},
    "slime.rollout.rm_hub.f1": {"f1_score": "prediction, ground_truth"},
    "slime.rollout.rm_hub.ifbench": {"compute_ifbench_reward": "response, label, metadata=None"},
    "slime.rollout.rm_hub.gpqa": {"compute_gpqa_reward": "response, label, metadata=None"},
    "slime.rollout.sglang_streaming_rollout": {"generate_streaming": "args, sample, sampling_params"},
    "slime.rollout.sglang_rollout": {
        "GenerateState": "args", "abort": "args, rollout_id", "eval_rollout": "args, rollout_id",
        "get_model_url": "args, model_name, endpoint='/generate'", "generate": "args, sample, sampling_params",
        "generate_and_rm": "args, sample, sampling_params, evaluation=False",
        "generate_and_rm_group": "args, group, sampling_params, evaluation=False",
        "generate_rollout": "args, rollout_id, data_source, evaluation=False",
        "generate_rollout_async": "args, rollout_id, data_source",
    },
    "slime.rollout.sft_rollout": {"generate_rollout": "args, rollout_id, data_buffer, evaluation=False"},
    "slime.backends.megatron_utils.loss": {
        name: "args, pg_loss=0, train_log_probs=0, rollout_log_probs=0, loss_masks=0, total_lengths=0, response_lengths=0"
        for name in ("icepop_function", "vanilla_tis_function")
    },
    "slime.backends.megatron_utils.cp_utils": {
        "all_gather_with_cp": "tensor, total_length, response_length",
        "slice_log_prob_with_cp": "log_prob, total_length, response_length",
    },
    "slime_plugins.models.glm4": {"get_glm_spec": "args, config, vp_stage"},
    "slime_plugins.models.glm5.glm5": {"get_glm5_spec": "args, config, vp_stage"},
}  # fmt: skip


@pytest.mark.parametrize("module, names", PUBLIC.items(), ids=PUBLIC)
def test_a_public_name_is_importable_and_takes_what_it_takes_there(module, names):
    found = importlib.import_module(module)
    for name, call in names.items():
        assert hasattr(found, name), f"{module} has no {name}"
        if call is None:
            continue
        given = [part.strip() for part in call.split(", ")] if call else []
        positional = [part for part in given if "=" not in part]
        keywords = {part.partition("=")[0]: 0 for part in given if "=" in part}
        inspect.signature(getattr(found, name)).bind(*positional, **keywords)


def test_graders_by_their_public_names_say_what_the_flags_graders_say():
    from slime.rollout.rm_hub import compute_gpqa_reward, f1_score, get_deepscaler_rule_based_reward, grade_answer_verl
    from slime.rollout.rm_hub.math_dapo_utils import compute_score
    from slime.rollout.rm_hub.math_utils import extract_answer, grade_answer_mathd

    assert extract_answer(r"so \boxed{\frac{1}{2}}.") == r"\frac{1}{2}" and extract_answer("none") is None
    assert grade_answer_verl(r"\boxed{0.5}", r"\frac{1}{2}") is True and grade_answer_verl(r"\boxed{3}", "4") is False
    assert grade_answer_verl(r"\boxed{3}", "") is False and grade_answer_mathd(None, "3") is False
    assert grade_answer_mathd("1/2", r"\frac{1}{2}") is True
    right, wrong = compute_score("Answer: 12", "12"), compute_score("no line", "12")
    assert (right["score"], right["acc"], wrong["score"], wrong["pred"]) == (1.0, True, -1.0, "[INVALID]")
    assert compute_score(r"Answer: \boxed{12}", "12", strict_box_verify=True) == {"score": 1.0, "acc": True, "pred": "12"}
    assert compute_score("Answer: 12", "12", strict_box_verify=True) == {"score": -1.0, "acc": False, "pred": None}
    assert get_deepscaler_rule_based_reward(r"</think>\boxed{7}", "7") == 1
    assert compute_gpqa_reward("The answer is B", "B") == 1.0
    # 2 of 3 words given, 2 of 4 words wanted: F1 = 2 * (2/3) * (1/2) / (2/3 + 1/2) = 4/7
    assert f1_score("red green blue", "red green black white") == pytest.approx((4 / 7, 2 / 3, 1 / 2))


def test_a_data_set_of_a_plugins_own_has_the_order_of_the_stock_one(rollout_config, prompt_file, tokenizer_folder):
    from slime.rollout.data_source import RolloutDataSource
    from slime.utils.data import Dataset
    from slime.utils.processing_utils import load_tokenizer

    own = Dataset(
        prompt_file, load_tokenizer(tokenizer_folder), None, None, prompt_key="prompt", label_key="label", seed=7,
        apply_chat_template=True,
    )  # fmt: skip
    stock = RolloutDataSource(rollout_config(rollout_shuffle=True, rollout_seed=7, n_samples_per_prompt=1).args)
    assert [sample.label for sample in own.samples[:6]] == ["0", "1", "2", "3", "4", "1"] and len(own) == 30
    for epoch in range(2):
        own.shuffle(epoch)
        taken = [group[0] for group in stock.get_samples(len(own))]
        assert [sample.prompt for sample in own.samples] == [sample.prompt for sample in taken]
    with pytest.raises(ValueError, match="trains text alone"):
        Dataset(prompt_file, None, None, None, multimodal_keys={"image": "images"})


def test_glm4s_layers_are_for_glm4(tmp_path):
    from types import SimpleNamespace

    from slime_plugins.models.glm4 import get_glm_spec

    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}')
    with pytest.raises(ValueError, match="get_glm_spec is for GLM-4 .*is a qwen3; leave --spec out"):
        get_glm_spec(SimpleNamespace(hf_checkpoint=str(tmp_path), allgather_cp=False), None, None)


def test_a_singleton_is_made_once_per_class():
    from slime.utils.misc import SingletonMeta

    class One(metaclass=SingletonMeta):
        def __init__(self, value):
            self.value = value

    class Two(metaclass=SingletonMeta):
        pass

    assert One(1) is One(2) and One(3).value == 1 and Two() is Two() and Two() is not One(1)


def test_load_function_names_what_is_missing():
    from slime.utils.misc import load_function

    assert load_function("os.path.join")("a", "b") == "a/b"
    for path, said in (("os.path.nothing", "module os.path has no 'nothing'"), ("join", "expected a dotted path")):
        with pytest.raises(ValueError, match=said):
            load_function(path)


def test_context_parallelism_has_ended_before_a_users_function_is_called():
    from slime.backends.megatron_utils.cp_utils import all_gather_with_cp, slice_log_prob_with_cp

    response = torch.arange(3.0)
    assert all_gather_with_cp(response, 8, 3) is response and slice_log_prob_with_cp(response, 8, 3) is response
    with pytest.raises(ValueError, match="a whole response of 4 tokens, got 3"):
        all_gather_with_cp(response, 8, 4)


def test_an_image_for_the_engine_is_a_png_that_reads_back():
    import base64
    import io

    from PIL import Image

    from slime.utils.processing_utils import encode_image_for_rollout_engine, load_processor

    image = Image.new("RGBA", (3, 2), (10, 20, 30, 255))
    head, _, body = encode_image_for_rollout_engine(image).partition(",")
    back = Image.open(io.BytesIO(base64.b64decode(body)))
    assert head == "data:image/png;base64" and (back.size, back.mode, back.getpixel((2, 1))) == ((3, 2), "RGB", (10, 20, 30))
    assert load_processor("anything") is None
