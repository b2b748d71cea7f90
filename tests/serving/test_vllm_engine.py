"""vLLM's engine with the plug-in, against generate(). Runs where vLLM is installed: `.ci/vllm` makes such a place."""

import os
import random

import pytest
import torch

pytest.importorskip("vllm", reason="runs in an environment with vLLM: .ci/vllm")

# Read when vLLM is imported. In this process, so that the engine can be interrupted between two steps.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

from small_models import small_lm  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402

from modeling_seqboat import SeqBoatModel  # noqa: E402

BUDGET = 24


def start(folder, **options):
    """An engine that cuts prompts of more than `BUDGET` tokens, with room for 12 of the requests at a time."""
    settings = {"max_num_seqs": 12, "max_num_batched_tokens": BUDGET, "max_model_len": 256, "dtype": "float32"}
    return LLM(str(folder), skip_tokenizer_init=True, enforce_eager=True, **(settings | options))


@pytest.fixture(scope="module", params=["ema", "truncated", "local"])
def served(request, tmp_path_factory):
    """A model and an engine that serves its folder."""
    options = {"ema": {}, "truncated": {"ssm_truncation": 6}, "local": {"position_embedding_type": "local"}}
    model = small_lm(max_position_embeddings=256, **options[request.param])
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, start(folder)


def prompts(count):
    """Prompts of 1 to 90 tokens, and how many tokens each is to be continued by."""
    draw = random.Random(0)
    lengths = [draw.choice([1, 2, 7, 20, 23, 24, 25, 48, 90]) for _ in range(count)]
    return [([draw.randrange(3, 40) for _ in range(length)], draw.randrange(1, 40)) for length in lengths]


def expected(model, prompt, count):
    ids = torch.tensor([prompt])
    with torch.no_grad():
        made = model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return made[0, len(prompt) :].tolist()


def greedy(count):
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)


def as_prompt(ids):
    return {"prompt_token_ids": ids}


def finish(engine, found=None):
    """Steps until nothing is left: request -> its tokens."""
    found = {} if found is None else found
    while engine.has_unfinished_requests():
        for output in engine.step():
            found[output.request_id] = list(output.outputs[0].token_ids)
    return found


def test_mixed_requests_equal_generate(served):
    """P: continuous batching and prompts in chunks do not change a token."""
    model, llm = served
    requests = prompts(32)
    assert sum(len(prompt) > BUDGET for prompt, _ in requests) >= 8
    outputs = llm.generate([as_prompt(p) for p, _ in requests], [greedy(n) for _, n in requests], use_tqdm=False)
    for (prompt, count), output in zip(requests, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == expected(model, prompt, count), len(prompt)


def test_preempted_requests_go_on_as_if_they_were_not(served):
    model, llm = served
    engine, requests = llm.llm_engine, prompts(12)
    for index, (prompt, count) in enumerate(requests):
        engine.add_request(str(index), as_prompt(prompt), greedy(count))
    found = {}
    for _ in range(6):
        for output in engine.step():
            found[output.request_id] = list(output.outputs[0].token_ids)
    scheduler = engine.engine_core.engine_core.scheduler
    assert len(scheduler.running) > 2
    assert engine.reset_prefix_cache(reset_running_requests=True)
    assert not scheduler.running
    finish(engine, found)
    for index, (prompt, count) in enumerate(requests):
        assert found[str(index)] == expected(model, prompt, count), index


def test_an_aborted_request_leaves_nothing_in_its_page(served):
    model, llm = served
    engine, requests = llm.llm_engine, prompts(8)
    for index, (prompt, _) in enumerate(requests):
        engine.add_request(f"gone {index}", as_prompt(prompt), greedy(100))
    for _ in range(20):
        engine.step()
    engine.abort_request([f"gone {index}" for index in range(8)])
    for index, (prompt, count) in enumerate(requests):
        engine.add_request(f"next {index}", as_prompt(prompt[::-1]), greedy(count))
    found = finish(engine)
    assert set(found) == {f"next {index}" for index in range(8)}
    for index, (prompt, count) in enumerate(requests):
        assert found[f"next {index}"] == expected(model, prompt[::-1], count)


def test_a_seed_repeats_an_answer_whoever_else_is_served(served):
    _, llm = served
    # All within one budget: on a CPU vLLM 0.32 itself stops where the prompt of a request with a seed is cut.
    requests = [[3 + index, 20, 9][: 1 + index % 3] for index in range(6)]

    def sampled(seed):
        return SamplingParams(temperature=1.0, seed=seed, max_tokens=20, ignore_eos=True, detokenize=False)

    def tokens(asked, seeds):
        outputs = llm.generate([as_prompt(p) for p in asked], [sampled(s) for s in seeds], use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    together = tokens(requests, range(6))
    assert together == [tokens([prompt], [seed])[0] for seed, prompt in enumerate(requests)]
    assert tokens(requests, range(10, 16)) != together


def test_logprobs_of_a_prompt_equal_the_models(served):
    model, llm = served
    (prompt, _), *_ = [request for request in prompts(32) if len(request[0]) == 90]
    asked = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    (output,) = llm.generate([as_prompt(prompt)], asked, use_tqdm=False)
    found = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    wanted = logprobs.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found), wanted, atol=1e-4, rtol=1e-4)


def test_a_folder_of_the_model_without_its_head(tmp_path):
    """Whatever from_pretrained reads: here names without the prefix, in bfloat16 and in two files."""
    model = small_lm(max_position_embeddings=256)
    model.model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    reread = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert isinstance(reread.model, SeqBoatModel)
    llm = start(tmp_path, hf_overrides={"architectures": ["SeqBoatForCausalLM"]})
    (output,) = llm.generate([as_prompt([5, 6, 7])], greedy(12), use_tqdm=False)
    assert list(output.outputs[0].token_ids) == expected(reread, [5, 6, 7], 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2"),
        ({"enable_prefix_caching": True}, "enable_prefix_caching"),
        ({"enable_lora": True}, "enable_lora"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}}, "speculat"),
    ],
)
def test_what_does_not_run_is_refused_by_name(tmp_path, options, message):
    small_lm(max_position_embeddings=256).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"SeqBoat does not run in vLLM with .*{message}"):
        start(tmp_path, **options)
