"""The cache: constant size, exact rollback, row operations, files, and what it says about itself."""

import copy
import os

import forks
import pytest
import torch
from small_models import random_ids, small_lm
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from modeling_seqboat import SeqBoatCache, SeqBoatForCausalLM, cache_file_seqboat
from modeling_seqboat.cache_seqboat import SeqBoatCacheLayer

KINDS = [("rotary", None), ("simple", None), ("local", None), ("rotary", 5)]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def model_of(position: str = "rotary", truncation: int | None = None, **overrides):
    return small_lm(position_embedding_type=position, ssm_truncation=truncation, **overrides)


def state_of(cache: SeqBoatCache) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in cache.tensors()}


def assert_same_state(cache: SeqBoatCache, expected: dict[str, torch.Tensor], exact: bool = False) -> None:
    found = dict(cache.tensors())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if exact or not value.is_floating_point():
            assert torch.equal(found[name], value), name
        else:
            torch.testing.assert_close(
                found[name], value, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
            )


def fed(model, *pieces: torch.Tensor, record: bool = False, masks=None, static: bool = False) -> SeqBoatCache:
    cache = SeqBoatCache(model.config, static=static)
    if record:
        cache.activate_past_recording()
    for index, piece in enumerate(pieces):
        mask = None if masks is None else masks[index]
        model(piece, attention_mask=mask, past_key_values=cache)
    return cache


def test_generate_and_the_model_make_the_same_kind_of_cache():
    model, ids = model_of(), random_ids(2, 9)
    made = model(ids).past_key_values
    generated = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True).past_key_values
    for cache in (made, generated):
        assert isinstance(cache, SeqBoatCache) and isinstance(cache, Cache)
        assert len(cache) == 2 and cache.batch_size == 2
    assert made.get_seq_length() == 9 and generated.get_seq_length() == 10
    assert_same_state(generated, state_of(fed(model, ids, model.generate(ids, max_new_tokens=2)[:, 9:10])))


def test_a_text_that_is_scored_fills_no_cache_unless_one_is_asked_for():
    model, ids = model_of(), random_ids(2, 9)
    assert model(ids).past_key_values is not None
    assert model(ids, labels=ids).past_key_values is None
    asked = model(ids, labels=ids, use_cache=True).past_key_values
    assert_same_state(asked, state_of(fed(model, ids)), exact=True)
    cache = fed(model, ids[:, :4])
    assert model(ids[:, 4:], labels=ids[:, 4:], past_key_values=cache).past_key_values is cache
    assert_same_state(cache, state_of(asked))


@pytest.mark.parametrize(("position", "truncation"), KINDS)
@pytest.mark.parametrize("static", [False, True])
def test_buffers_are_bounded(position, truncation, static):
    """Those of a static cache have full size from the first token; a dynamic one's memory grows up to W tokens."""
    model = model_of(position, truncation)
    cache = fed(model, random_ids(1, 1), static=static)
    shapes = {name: tensor.shape for name, tensor in cache.tensors()}
    size, full = cache.memory_bytes(), fed(model, random_ids(1, 1), static=True).memory_bytes()
    assert size == full if static else size <= full
    for length in (1, 100, 1, 3, 500, 1):
        model(random_ids(1, length, seed=length), past_key_values=cache)
        assert {name: tensor.shape for name, tensor in cache.tensors()} == shapes
        assert cache.memory_bytes() == size if static else size <= cache.memory_bytes() <= full
        size = cache.memory_bytes()
        for layer in cache.layers:
            for name, tensor in layer._buffers().items():
                # A buffer that is a window of a larger tensor would keep all of it alive.
                assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name
    assert size == full


def test_the_state_of_a_short_text_is_small_and_does_not_depend_on_how_it_grew(tmp_path):
    model, ids = model_of(memory_size=1024), random_ids(2, 200)
    whole = fed(model, ids)
    assert whole.memory_bytes() < 0.3 * fed(model, ids, static=True).memory_bytes()
    for pieces in (ids.split(1, dim=1), ids.split((3, 150, 1, 46), dim=1)):
        cache = fed(model, *pieces)
        assert_same_state(cache, state_of(whole))
        assert cache.memory_bytes() < 0.3 * fed(model, ids, static=True).memory_bytes()
    static = fed(model, ids, static=True)
    assert_same_state(static, state_of(whole))
    # The file is of full size, whichever cache it is from; what it is read into is not.
    for cache in (whole, static):
        cache.save(tmp_path / "state.safetensors")
        loaded = SeqBoatCache.load(tmp_path / "state.safetensors", model.config)
        assert_same_state(loaded, state_of(cache), exact=True)
        assert loaded.memory_bytes() == cache.memory_bytes()
    assert (tmp_path / "state.safetensors").stat().st_size > static.memory_bytes()
    more = random_ids(2, 1900, seed=5)
    expected = model(torch.cat([ids, more], dim=1)).logits[:, 200:]
    torch.testing.assert_close(model(more, past_key_values=whole).logits, expected, atol=1e-4, rtol=1e-4)
    assert whole.memory_bytes() == fed(model, ids, static=True).memory_bytes()


def test_rows_may_be_chosen_and_taken_back_while_the_memory_grows():
    model, ids = model_of(memory_size=256), random_ids(3, 120)
    cache = fed(model, ids[:, :10])
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.activate_past_recording()
    for piece in ids[[2, 0], 10:].split((20, 1, 60, 29), dim=1):
        model(piece, past_key_values=cache)
    cache.crop(-70)
    assert_same_state(cache, state_of(fed(model, ids[[2, 0], :50])))
    model(ids[[2, 0], 50:], past_key_values=cache)
    assert_same_state(cache, state_of(fed(model, ids[[2, 0]])))


@pytest.mark.parametrize("static", [False, True])
def test_reset_leaves_no_trace(static):
    model, ids = model_of(truncation=5), random_ids(2, 20)
    cache = fed(model, random_ids(2, 33, seed=4), static=static)
    addresses = {name: tensor.data_ptr() for name, tensor in cache.tensors()}
    cache.reset()
    assert cache.get_seq_length() == 0
    first = model(ids, past_key_values=cache).logits
    assert torch.equal(first, model(ids, past_key_values=SeqBoatCache(model.config, static=static)).logits)
    assert_same_state(cache, state_of(fed(model, ids)), exact=True)
    if static:
        assert {name: tensor.data_ptr() for name, tensor in cache.tensors()} == addresses
    # Other rows may follow a reset only where the buffers may be made anew.
    if not static:
        cache.reset()
        model(random_ids(3, 4), past_key_values=cache)
        assert cache.batch_size == 3


@pytest.mark.parametrize("static", [False, True])
def test_static_and_dynamic_hold_the_same(static):
    model, ids = model_of(truncation=5), random_ids(2, 30)
    pieces = (ids[:, :17], ids[:, 17:18], ids[:, 18:19], ids[:, 19:])
    assert_same_state(fed(model, *pieces, static=static), state_of(fed(model, ids)))


def test_a_static_cache_is_updated_in_place():
    model, ids = model_of(truncation=5), random_ids(2, 30)
    cache = fed(model, ids[:, :9], static=True)
    addresses = {name: tensor.data_ptr() for name, tensor in cache.tensors()}
    for column in range(9, 20):
        model(ids[:, column : column + 1], past_key_values=cache)
    model(ids[:, 20:], past_key_values=cache)
    assert {name: tensor.data_ptr() for name, tensor in cache.tensors()} == addresses


def test_row_operations_move_everything():
    model, ids, more = model_of(truncation=5), random_ids(3, 20), random_ids(3, 5, seed=8)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    cache = fed(model, ids, masks=[mask])

    def rows(order, repeated_cache):
        order = torch.tensor(order)
        assert repeated_cache.batch_size == len(order)
        expected = fed(model, ids[order], masks=[mask[order]])
        assert_same_state(repeated_cache, state_of(expected))
        new = more[order]
        torch.testing.assert_close(
            model(new, past_key_values=repeated_cache).logits, model(new, past_key_values=expected).logits
        )

    reordered = copy.deepcopy(cache)
    reordered.reorder_cache(torch.tensor([2, 2, 1]))
    rows([2, 2, 1], reordered)
    by_list = copy.deepcopy(cache)
    by_list.batch_select_indices([2, 0])
    rows([2, 0], by_list)
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(2)
    rows([0, 0, 1, 1, 2, 2], repeated)
    chosen = copy.deepcopy(cache)
    chosen.batch_select_indices(torch.tensor([2, 0]))
    rows([2, 0], chosen)
    masked = copy.deepcopy(cache)
    masked.batch_select_indices(torch.tensor([False, True, False]))
    rows([1], masked)


@pytest.mark.parametrize(("position", "truncation"), KINDS)
@pytest.mark.parametrize("remove", [0, 1, 4, 6, 9, 15, 16])
def test_crop_takes_forwards_back_whole_and_in_part(position, truncation, remove):
    model, ids = model_of(position, truncation), random_ids(2, 46)
    cache = fed(model, ids[:, :30])
    cache.activate_past_recording()
    # Several forwards before one crop: of 10, 1 and 5 columns.
    for piece in (ids[:, 30:40], ids[:, 40:41], ids[:, 41:46]):
        model(piece, past_key_values=cache)
    cache.crop(-remove)
    assert cache.get_seq_length() == 46 - remove
    assert_same_state(cache, state_of(fed(model, ids[:, : 46 - remove])))
    more = random_ids(2, 7, seed=3)
    torch.testing.assert_close(
        model(more, past_key_values=cache).logits,
        model(torch.cat([ids[:, : 46 - remove], more], dim=1)).logits[:, -7:],
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize("truncation", [None, 5])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_crop_with_routers_at_the_extremes(truncation, share):
    model, ids = model_of(truncation=truncation), random_ids(2, 40)
    for layer in model.model.layers:
        layer.router.bias.copy_(torch.tensor([0.0, 1e4]) if share else torch.tensor([1e4, 0.0]))
    # 20 activated tokens in one forward write each slot of a memory of 8 more than once.
    cache = fed(model, ids[:, :11], ids[:, 11:31], ids[:, 31:], record=True)
    cache.crop(-22)
    assert_same_state(cache, state_of(fed(model, ids[:, :18])))


def test_crop_with_padding_and_segments():
    model, ids = model_of(truncation=5), random_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[0, 22:27] = 0
    mask[1, :3] = 0
    positions = torch.stack([torch.arange(40), torch.arange(40)])
    # A new segment in row 0 at column 33 and one in row 1 at column 12.
    positions[0, 33:] = torch.arange(7)
    positions[1, 12:] = torch.arange(28)
    cuts = [(0, 10), (10, 25), (25, 40)]

    def feed(cache, first, end):
        model(
            ids[:, first:end],
            attention_mask=mask[:, first:end],
            position_ids=positions[:, first:end],
            past_key_values=cache,
        )

    for remove in (0, 3, 7, 15, 20, 30, 35):
        cache = SeqBoatCache(model.config)
        cache.activate_past_recording()
        for first, end in cuts:
            feed(cache, first, end)
        cache.crop(-remove)
        expected = SeqBoatCache(model.config)
        for first, end in cuts:
            if min(end, 40 - remove) > first:
                feed(expected, first, min(end, 40 - remove))
        assert_same_state(cache, state_of(expected))


def test_crop_of_everything_leaves_an_empty_state():
    model, ids = model_of(), random_ids(2, 12)
    cache = fed(model, ids, record=True)
    cache.crop(-12)
    assert cache.get_seq_length() == 0
    assert all(not tensor.any() for _, tensor in cache.tensors())
    more = random_ids(2, 9, seed=1)
    torch.testing.assert_close(model(more, past_key_values=cache).logits, model(more).logits)


@pytest.mark.parametrize("columns", [1, 4])
def test_a_forward_that_is_not_recorded_ends_what_can_be_taken_back(columns):
    model, ids = model_of(), random_ids(2, 12)
    cache = fed(model, ids[:, :8], record=True)
    for layer in cache.layers:
        layer.record_past = False
    model(ids[:, 8 : 8 + columns], past_key_values=cache)
    before = state_of(cache)
    with pytest.raises(RuntimeError, match="0 are recorded"):
        cache.crop(-1)
    assert_same_state(cache, before, exact=True)


def test_a_crop_too_far_is_an_error_and_changes_nothing():
    model, ids = model_of(), random_ids(2, 30)
    cache = fed(model, ids[:, :20])
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-1)
    cache.activate_past_recording()
    model(ids[:, 20:26], past_key_values=cache)
    before = state_of(cache)
    with pytest.raises(RuntimeError, match="cannot take 7 columns back: 6 are recorded"):
        cache.crop(-7)
    assert_same_state(cache, before, exact=True)
    assert cache.get_seq_length() == 26
    with pytest.raises(ValueError, match="negative"):
        cache.crop(3)
    cache.crop(-6)
    assert_same_state(cache, state_of(fed(model, ids[:, :20])))
    with pytest.raises(RuntimeError, match="cannot take 1 columns back: 0 are recorded"):
        cache.crop(-1)


@pytest.mark.parametrize(("position", "truncation"), KINDS)
@pytest.mark.parametrize("removes", [(2, 3), (0, 4), (5, 6, 4), (1, 1, 1), (7, 9)])
def test_crops_in_a_row_reach_back_further(position, truncation, removes):
    model, ids = model_of(position, truncation), random_ids(2, 46)
    cache = fed(model, ids[:, :30])
    cache.activate_past_recording()
    for piece in (ids[:, 30:40], ids[:, 40:41], ids[:, 41:46]):
        model(piece, past_key_values=cache)
    left = 46
    for remove in removes:
        cache.crop(-remove)
        left -= remove
        assert cache.get_seq_length() == left
        assert_same_state(cache, state_of(fed(model, ids[:, :left])))
    with pytest.raises(RuntimeError, match=f"{left - 30} are recorded"):
        cache.crop(-17)


def recorded_bytes(cache: SeqBoatCache) -> int:
    total = 0
    for layer in cache.layers:
        for entry in layer._journal:
            held = [*vars(entry.columns).values(), *entry.before.values(), *entry.overwritten.values()]
            held += entry.columns.replay.args[0]
            total += sum(t.untyped_storage().nbytes() for t in held if isinstance(t, torch.Tensor))
    return total


@pytest.mark.parametrize("truncation", [None, 5])
def test_recording_keeps_only_what_a_crop_can_need(monkeypatch, truncation):
    monkeypatch.setattr(SeqBoatCacheLayer, "rollback_limit", 16)
    model, ids = model_of(truncation=truncation), random_ids(1, 3000)
    cache = fed(model, ids[:, :100], record=True)
    bound = recorded_bytes(cache)
    model(ids[:, 100:2960], past_key_values=cache)
    assert recorded_bytes(cache) < 2 * bound
    for column in range(2960, 3000):
        model(ids[:, column : column + 1], past_key_values=cache)
    assert sum(entry.columns.length for entry in cache.layers[0]._journal) <= 32
    assert recorded_bytes(cache) < 8 * bound
    longest = copy.deepcopy(cache)
    longest.crop(-16)
    assert_same_state(longest, state_of(fed(model, ids[:, :2984])))
    before = state_of(cache)
    with pytest.raises(RuntimeError, match="at most 16"):
        cache.crop(-40)
    assert_same_state(cache, before, exact=True)


def test_a_crop_right_after_a_long_recorded_prefill(monkeypatch):
    monkeypatch.setattr(SeqBoatCacheLayer, "rollback_limit", 16)
    model, ids = model_of(truncation=5), random_ids(2, 70)
    mask = torch.ones_like(ids)
    mask[0, 40:60] = 0
    cache = fed(model, ids, record=True, masks=[mask])
    assert_same_state(cache, state_of(fed(model, ids, masks=[mask])))
    cache.crop(-13)
    assert_same_state(cache, state_of(fed(model, ids[:, :57], masks=[mask[:, :57]])))


def test_what_a_cache_says_about_itself():
    model, ids = model_of(), random_ids(1, 5)
    dynamic, static = SeqBoatCache(model.config), SeqBoatCache(model.config, static=True)
    assert dynamic.is_croppable and not dynamic.is_compileable
    assert static.is_compileable and not static.is_croppable
    assert not dynamic.is_initialized and dynamic.batch_size == -1 and dynamic.get_seq_length() == 0
    assert dynamic.get_max_length() == -1
    with pytest.raises(ValueError, match="static"):
        static.activate_past_recording()
    model(ids, past_key_values=dynamic)
    assert dynamic.is_initialized and dynamic.get_seq_length() == 5
    for implementation, expected in ((None, False), ("dynamic", False), ("static", True)):
        made = model.generate(
            ids, max_new_tokens=2, return_dict_in_generate=True, cache_implementation=implementation
        ).past_key_values
        assert made.is_compileable is expected


@pytest.mark.parametrize("implementation", ["offloaded", "quantized", "offloaded_static", "sliding_window"])
def test_other_cache_implementations_are_refused_by_name(implementation):
    with pytest.raises(ValueError, match=implementation):
        model_of().generate(random_ids(1, 4), max_new_tokens=2, cache_implementation=implementation)


@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config, max_cache_len=32)])
def test_caches_of_another_kind_are_refused(make):
    model, ids = model_of(), random_ids(1, 4)
    foreign = make(config=model.config) if make is DynamicCache else make(model.config)
    with pytest.raises(ValueError, match="SeqBoatCache"):
        model(ids, past_key_values=foreign)
    with pytest.raises(ValueError, match="SeqBoatCache"):
        model.generate(ids, past_key_values=foreign, max_new_tokens=2)


def test_a_cache_is_made_of_a_config():
    for given in (model_of(), {"hidden_size": 16}, None):
        with pytest.raises(ValueError, match=f"made of a SeqBoatConfig .*, got {type(given).__name__}"):
            SeqBoatCache(given)


@pytest.mark.parametrize(
    "other",
    [{"memory_size": 9}, {"hidden_size": 24}, {"num_hidden_layers": 3}, {"ssm_truncation": 4}]
    + [{"position_embedding_type": "simple"}, {"attention_activation": "relu2"}, {"norm_first": False}],
    ids=str,
)
def test_the_cache_of_another_config_is_refused(other, tmp_path):
    model, ids = model_of(), random_ids(1, 4)
    cache = fed(model, ids)
    another = small_lm(**other)
    name = next(iter(other))
    with pytest.raises(ValueError, match=name):
        another(ids, past_key_values=cache)
    cache.save(tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match=name):
        SeqBoatCache.load(tmp_path / "state.safetensors", another.config)


def test_another_number_of_rows_is_refused():
    model = model_of()
    cache = fed(model, random_ids(2, 4))
    before = state_of(cache)
    with pytest.raises(ValueError, match="2 rows, the input has 3"):
        model(random_ids(3, 4), past_key_values=cache)
    assert_same_state(cache, before, exact=True)


@pytest.mark.parametrize("record", [False, True])
def test_deepcopy_is_independent(record):
    model, ids = model_of(truncation=5), random_ids(2, 30)
    cache = fed(model, ids[:, :12], ids[:, 12:20], record=record)
    before, twin = state_of(cache), copy.deepcopy(cache)
    model(ids[:, 20:], past_key_values=twin)
    for column in range(3):
        model(ids[:, column : column + 1], past_key_values=twin)
    assert_same_state(cache, before, exact=True)
    if record:
        cache.crop(-8)
        twin.crop(-13)
        assert_same_state(twin, before)
        assert_same_state(cache, state_of(fed(model, ids[:, :12])))


def test_moving_between_devices_changes_nothing():
    model, ids = model_of(truncation=5), random_ids(2, 20)
    cache = fed(model, ids)
    before = state_of(cache)
    for layer in range(len(cache)):
        cache.offload(layer)
    for layer in range(len(cache)):
        cache.prefetch(layer)
    assert_same_state(cache, before, exact=True)
    assert cache.to("cpu") is cache
    assert_same_state(cache, before, exact=True)
    assert cache.to("meta").layers[0].keys.device.type == "meta"
    SeqBoatCache(model.config).to("cpu")


def test_moving_to_where_it_is_keeps_what_a_rollback_needs():
    model, ids = model_of(), random_ids(2, 12)
    cache = fed(model, ids[:, :8], ids[:, 8:], record=True)
    for layer in cache.layers:
        assert layer.to("cpu", non_blocking=True) is layer
    cache.crop(-4)
    assert_same_state(cache, state_of(fed(model, ids[:, :8])))


@pytest.mark.parametrize("static", [False, True])
def test_a_state_made_in_inference_mode_is_used_outside_of_it(static):
    model, ids = model_of(truncation=5), random_ids(2, 20)
    cache = SeqBoatCache(model.config, static=static)
    with torch.inference_mode():
        model(ids[:, :12], past_key_values=cache)
        if not static:
            cache.activate_past_recording()
            model(ids[:, :3], past_key_values=cache)
    if not static:
        cache.crop(-2)
        cache.reset()
        with torch.inference_mode():
            model(ids[:, :12], past_key_values=cache)
        cache.crop(0)
        cache.layers[0].record_past = cache.layers[1].record_past = False
    for column in range(12, 16):
        model(ids[:, column : column + 1], past_key_values=cache)
    assert_same_state(cache, state_of(fed(model, ids[:, :16])))
    with torch.enable_grad():
        model(ids[:, 16:], past_key_values=cache, labels=ids[:, 16:]).loss.backward()
    assert_same_state(cache, state_of(fed(model, ids)))


@pytest.mark.parametrize("columns", [1, 10])
@pytest.mark.parametrize("truncation", [None, 5])
def test_gradients_with_a_static_cache_are_those_with_a_dynamic_one(truncation, columns):
    gradients = []
    for static in (False, True):
        model, ids = model_of(truncation=truncation), random_ids(2, 20)
        cache = fed(model, ids[:, :10], static=static)
        with torch.enable_grad():
            outputs = model(ids[:, 10 : 10 + columns], past_key_values=cache)
            outputs.logits.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_umask_decides_who_may_read_a_saved_state(tmp_path, mask):
    cache = fed(model_of(), random_ids(1, 5))
    previous = os.umask(mask)
    try:
        cache.save(tmp_path / "state.safetensors")
    finally:
        os.umask(previous)
    assert (tmp_path / "state.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def resume(folder: str, state: str, ids: str, out: str) -> None:
    model = SeqBoatForCausalLM.from_pretrained(folder)
    cache = SeqBoatCache.load(state, model.config)
    with torch.no_grad():
        steps = [model(token, past_key_values=cache).logits for token in torch.load(ids).split(1, dim=1)]
    torch.save({"logits": torch.cat(steps, 1), "seen": cache.get_seq_length(), **dict(cache.tensors())}, out)


def test_another_process_resumes_bit_for_bit(tmp_path):
    ids, more = random_ids(2, 30), random_ids(2, 6, seed=2)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    model_of(truncation=5).save_pretrained(tmp_path / "model")
    # Both processes read the model from the file: where weights lie in memory decides the order of a matrix product.
    model = SeqBoatForCausalLM.from_pretrained(tmp_path / "model")
    cache = fed(model, ids, masks=[mask])
    cache.save(tmp_path / "state.safetensors")
    torch.save(more, tmp_path / "ids.pt")
    paths = [str(tmp_path / name) for name in ("model", "state.safetensors", "ids.pt", "out.pt")]
    done = forks.run(resume, *paths)
    assert done.returncode == 0, done.stderr
    resumed = torch.load(tmp_path / "out.pt")
    expected = torch.cat([model(token, past_key_values=cache).logits for token in more.split(1, dim=1)], dim=1)
    assert torch.equal(resumed.pop("logits"), expected)
    assert resumed.pop("seen") == 36
    assert_same_state(cache, resumed, exact=True)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_cache_is_what_was_saved(tmp_path, static, dtype):
    model = model_of(truncation=5).to(dtype)
    cache = fed(model, random_ids(2, 30), static=static)
    cache.save(tmp_path / "state.safetensors")
    loaded = SeqBoatCache.load(tmp_path / "state.safetensors", model.config)
    assert loaded.is_compileable is static and loaded.get_seq_length() == 30
    assert_same_state(loaded, state_of(cache), exact=True)


def test_a_half_written_file_is_never_left(tmp_path, monkeypatch):
    model = model_of()
    path = tmp_path / "state.safetensors"
    cache = fed(model, random_ids(1, 5))
    cache.save(path)
    content = path.read_bytes()

    def fails(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(cache_file_seqboat, "save_file", fails)
    model(random_ids(1, 5), past_key_values=cache)
    with pytest.raises(OSError, match="disk full"):
        cache.save(path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_are_no_cache_are_refused(tmp_path):
    model = model_of()
    with pytest.raises(ValueError, match="empty"):
        SeqBoatCache(model.config).save(tmp_path / "state.safetensors")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a SeqBoat cache"):
        SeqBoatCache.load(tmp_path / "model.safetensors", model.config)
    cache = fed(model, random_ids(1, 5))
    cache.save(tmp_path / "state.safetensors")
    cut = (tmp_path / "state.safetensors").read_bytes()[:-100]
    (tmp_path / "state.safetensors").write_bytes(cut)
    with pytest.raises(ValueError, match="state.safetensors"):
        SeqBoatCache.load(tmp_path / "state.safetensors", model.config)
    with pytest.raises(FileNotFoundError):
        SeqBoatCache.load(tmp_path / "nothing.safetensors", model.config)
