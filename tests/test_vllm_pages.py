"""The plug-in for vLLM without vLLM: states in pages, and what is refused. vLLM's engine itself: tests/serving."""

import math
from types import SimpleNamespace

import pytest
import torch
from small_models import random_ids, small_lm

from vllm_seqboat import refuse
from vllm_seqboat.pages import PagedCache, empty_pages, page_layout

KINDS = [
    {},
    {"ssm_truncation": 6, "attention_activation": "relu2"},
    {"ssm_type": "s5", "position_embedding_type": "local"},
    {"position_embedding_type": "simple", "attention_activation": "laplace", "hidden_act": "gelu"},
    {"router_type": "random", "norm_first": False, "intermediate_size": 20},
]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def used_pages(config, count):
    """Pages as vLLM lays them out, the tensors of one behind one another, full of what other texts left."""
    layout = page_layout(config, torch.float32).values()
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in layout]
    pool, begin, tensors = torch.zeros(count, sum(sizes) + 16, dtype=torch.uint8), 0, []
    for (shape, dtype), size in zip(layout, sizes, strict=True):
        tensor = pool[:, begin : begin + size].view(dtype).view(count, *shape)
        tensors.append(tensor.fill_(7 if dtype == torch.int64 else float("nan")))
        begin += size
    return tensors


class Texts:
    """Texts that are read in any order, and the logits behind each token."""

    def __init__(self, model, ids, pages, cache):
        self.model, self.ids, self.cache = model, ids, cache
        self.pages, self.read = torch.tensor(pages), torch.zeros(len(pages), dtype=torch.long)
        self.logits = torch.zeros(*ids.shape, model.config.vocab_size)

    def prompts(self, counts):
        """counts: row -> tokens."""
        starts = {row: int(self.read[row]) for row in counts}
        parts = [self.ids[row, start : start + counts[row]] for row, start in starts.items()]
        pages = [int(self.pages[row]) for row in counts]
        found = self.cache.prompts(self.model, parts, pages, list(starts.values()))
        for (row, start), hidden in zip(starts.items(), found, strict=True):
            assert hidden.shape[0] == counts[row]
            self.logits[row, start : start + counts[row]] = self.model.lm_head(hidden)
            self.read[row] += counts[row]

    def step(self, rows):
        rows = torch.tensor(rows)
        at = self.read[rows]
        hidden = self.cache.step(self.model, self.ids[rows, at], self.pages[rows], at)
        self.logits[rows, at] = self.model.lm_head(hidden)
        self.read[rows] += 1

    def expect_equal(self):
        whole = self.model(self.ids, use_cache=False).logits
        for row, count in enumerate(self.read):
            torch.testing.assert_close(self.logits[row, :count], whole[row, :count], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("overrides", KINDS)
def test_prompts_in_parts_and_steps_of_several_texts_equal_whole_texts(overrides):
    """P: what is read together, in which order and in which page does not matter."""
    model = small_lm(**overrides)
    texts = Texts(model, random_ids(4, 60), [4, 1, 5, 2], PagedCache(model.config, used_pages(model.config, 7)))
    texts.prompts({0: 13})
    texts.prompts({2: 33})
    for _ in range(4):
        texts.step([2, 0])
    # A text may begin with a step, and go on with a part of its prompt.
    texts.step([1, 0])
    # Of prompts of one batch some begin and some go on.
    texts.prompts({1: 11, 3: 1, 0: 1})
    for _ in range(12):
        texts.step([3, 1, 0, 2])
    texts.prompts({3: 9})
    texts.expect_equal()


def test_prompts_of_all_lengths_that_begin_together():
    model = small_lm(ssm_truncation=6)
    cache = PagedCache(model.config, used_pages(model.config, 8))
    texts = Texts(model, random_ids(6, 60), [4, 1, 5, 2, 7, 3], cache)
    texts.prompts({0: 3, 1: 50, 2: 1, 3: 5, 4: 30, 5: 3})
    for _ in range(5):
        texts.step([5, 4, 3, 2, 1, 0])
    texts.expect_equal()


def test_a_page_begins_anew_with_its_next_text():
    model = small_lm(ssm_truncation=6)
    cache = PagedCache(model.config, empty_pages(model.config, 3, torch.float32, "cpu"))
    for seed, first in ((0, 20), (1, 1), (2, 30)):
        texts = Texts(model, random_ids(2, 50, seed=seed), [2, 1], cache)
        if first > 1:
            texts.prompts({0: first, 1: first})
        for _ in range(15):
            texts.step([1, 0])
        texts.expect_equal()


def test_nobody_else_is_touched():
    model = small_lm()
    pages = empty_pages(model.config, 6, torch.float32, "cpu")
    for tensor in pages:
        tensor.fill_(3)
    before = [tensor.clone() for tensor in pages]
    texts = Texts(model, random_ids(2, 30), [4, 1], PagedCache(model.config, pages))
    texts.prompts({0: 12})
    texts.step([1, 0])
    # Requests that fill up a batch: the first page takes what they leave.
    texts.cache.step(model, torch.tensor([5, 6, 7]), torch.tensor([0, 4, 0]), torch.tensor([3, 13, 0]))
    for tensor, old in zip(pages, before, strict=True):
        assert torch.equal(tensor[[2, 3, 5]], old[[2, 3, 5]])
        assert not torch.equal(tensor[[1, 4]], old[[1, 4]])


def test_the_pool_is_not_copied():
    """A step takes memory for its rows, not for what their pages hold."""
    model = small_lm(memory_size=4096, v_head_dim=512)
    cache = PagedCache(model.config, empty_pages(model.config, 3, torch.float32, "cpu"))
    addresses = [tensor.data_ptr() for tensor in cache.pool.values()]
    page = sum(tensor[0].numel() * tensor.element_size() for tensor in cache.pool.values())
    ids, pages, positions = torch.tensor([5, 6]), torch.tensor([2, 1]), torch.tensor([9000, 9000])
    cache.pool["activated_count"].fill_(5000)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        cache.step(model, ids, pages, positions)
    taken = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert taken < page / 4
    assert addresses == [tensor.data_ptr() for tensor in cache.pool.values()]


def settings(**changes):
    values = {
        "parallel_config": {"tensor_parallel_size": 1, "pipeline_parallel_size": 1},
        "model_config": {"quantization": None, "runner_type": "generate"},
        "cache_config": {"enable_prefix_caching": False},
        "speculative_config": None,
        "lora_config": None,
    }
    for name, value in changes.items():
        group = next((group for group in values.values() if isinstance(group, dict) and name in group), values)
        group[name] = value
    return SimpleNamespace(**{k: SimpleNamespace(**v) if isinstance(v, dict) else v for k, v in values.items()})


def test_settings_that_run_are_taken():
    refuse(settings())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensor_parallel_size": 4}, "tensor_parallel_size=4"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2"),
        ({"enable_prefix_caching": True}, "enable_prefix_caching=True"),
        ({"speculative_config": object()}, "speculative_config"),
        ({"lora_config": object()}, "enable_lora=True"),
        ({"quantization": "fp8"}, "quantization='fp8'"),
        ({"runner_type": "pooling"}, "runner_type='pooling'"),
        ({"lora_config": object(), "quantization": "awq"}, "enable_lora=True.*; nor with quantization='awq'"),
    ],
)
def test_settings_that_do_not_run_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        refuse(settings(**change))
