"""Half precision, extreme parameters, files, errors before work, and threads."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from small_models import SMALL, pad_left, random_ids, small_lm
from transformers import DynamicCache, set_seed

from modeling_seqboat import SeqBoatCache, SeqBoatConfig, SeqBoatForCausalLM, SeqBoatModel
from modeling_seqboat.router_seqboat import SeqBoatRouter
from modeling_seqboat.ssm_seqboat import Before, SeqBoatEMA


def is_finite(model) -> bool:
    return all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("weights", "compute", "activation", "layers"),
    [
        (torch.float32, torch.bfloat16, "softmax", 2),
        (torch.float32, torch.float16, "relu2", 1),
        (torch.bfloat16, None, "softmax", 2),
        (torch.bfloat16, None, "laplace", 1),
    ],
)
def test_two_hundred_steps_in_half_precision_stay_finite_and_learn(weights, compute, activation, layers):
    shape = {"num_hidden_layers": layers, "attention_activation": activation}
    model = small_lm(**shape, hidden_dropout=0.1).to(weights).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = random_ids(1, 8, seed=1).repeat(2, 3)
    losses = []
    for _ in range(200):
        with torch.autocast("cpu", dtype=compute or torch.bfloat16, enabled=compute is not None):
            loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        assert torch.cat([p.grad.flatten() for p in model.parameters()]).isfinite().all()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert is_finite(model)
    assert torch.isfinite(torch.tensor(losses)).all()
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_router_and_ema_are_float32_under_autocast(dtype):
    model, ids = small_lm(), random_ids(2, 20)
    x = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(0))
    layer = model.model.layers[0]
    confidence, active, _ = layer.router(x, None)
    context = {}
    layer.ssm.register_forward_pre_hook(lambda _, args: context.update(value=args[1]))
    model(ids)
    before = Before(torch.randn(2, 16, 2), None, False)
    y, state, replay = layer.ssm(x, context["value"], before)
    with torch.autocast("cpu", dtype=dtype):
        routed = layer.router(x, None)
        assert torch.equal(routed[0], confidence) and torch.equal(routed[1], active)
        again, same_state, _ = layer.ssm(x, context["value"], before)
        outputs = model(ids, use_cache=True, output_router_probs=True)
    assert torch.equal(again, y) and torch.equal(same_state, state)
    torch.testing.assert_close(replay(x, None, None, before.state, None), state)
    assert all(probs.dtype == torch.float32 for probs in outputs.router_probs)
    assert all(state.ssm_state.dtype == torch.float32 for state in outputs.past_key_values.layers)
    assert all(state.keys.dtype == dtype for state in outputs.past_key_values.layers)


@torch.no_grad()
def test_router_and_ema_are_float32_in_a_bfloat16_model():
    model, ids = small_lm().to(torch.bfloat16), random_ids(2, 20)
    seen = {}

    def keep(module, args, output):
        seen[type(module)] = (module, args, output)

    for module in (model.model.layers[0].ssm, model.model.layers[0].router):
        module.register_forward_hook(keep)
    outputs = model(ids, use_cache=True, output_router_probs=True)
    router, (x, *_), (confidence, active, _) = seen[SeqBoatRouter]
    assert x.dtype == torch.bfloat16 and confidence.dtype == torch.float32
    logits = x.float() @ router.weight.float().T + router.bias.float()
    assert torch.equal(active, logits[..., 1] > logits[..., 0])
    winner = torch.softmax(logits / router.log_temperature.float().exp(), -1)[..., 1]
    torch.testing.assert_close(confidence, torch.where(active, winner, 0), atol=1e-6, rtol=1e-5)
    ema, (x, context, before), (y, state, _) = seen[SeqBoatEMA]
    wide = SeqBoatEMA(model.config)
    wide.load_state_dict({name: value.float() for name, value in ema.state_dict().items()})
    exact, exact_state, _ = wide(x.float(), context, before)
    torch.testing.assert_close(y, exact.to(torch.bfloat16))
    assert torch.equal(state, exact_state)
    state = outputs.past_key_values.layers[0]
    assert state.ssm_state.dtype == torch.float32 and state.keys.dtype == torch.bfloat16


@pytest.mark.parametrize("delta", [-1e4, -40.0, 40.0, 1e4])
@pytest.mark.parametrize("alpha", [-1e4, -40.0, 40.0, 1e4])
@pytest.mark.parametrize("truncation", [None, 5])
def test_extreme_ema_parameters_stay_finite(delta, alpha, truncation):
    model, ids = small_lm(ssm_truncation=truncation), random_ids(2, 70)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with torch.no_grad():
        for layer in model.model.layers:
            layer.ssm.delta.fill_(delta)
            layer.ssm.alpha.fill_(alpha)
    outputs = model(ids, attention_mask=mask, labels=ids)
    outputs.loss.backward()
    assert torch.isfinite(outputs.logits).all() and torch.isfinite(outputs.loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("temperature", [-1e3, -90.0, -15.0, 15.0, 90.0, 1e3])
@pytest.mark.parametrize("activation", ["softmax", "relu2", "laplace"])
def test_extreme_temperatures_and_scores_stay_finite(temperature, activation):
    model, ids = small_lm(attention_activation=activation), random_ids(2, 30)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.router.log_temperature.fill_(temperature)
            layer.attention.qk_scale.mul_(30)
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    assert torch.isfinite(outputs.logits).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def assert_same_tensors(found, expected) -> None:
    for kind in ("named_parameters", "named_buffers"):
        pairs = dict(getattr(found, kind)()), dict(getattr(expected, kind)())
        assert pairs[0].keys() == pairs[1].keys()
        for name, tensor in pairs[1].items():
            assert pairs[0][name].dtype == tensor.dtype, name
            assert pairs[0][name].device.type == "cpu"
            assert torch.equal(pairs[0][name], tensor), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", [None, "3KB"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"position_embedding_type": "simple", "norm_type": "scalenorm", "intermediate_size": 24},
        {"position_embedding_type": "t5", "norm_type": "rmsnorm", "norm_first": False, "router_type": "always"},
    ],
    ids=["rotary", "simple", "t5"],
)
def test_files_restore_every_tensor(tmp_path, tied, shard, options):
    model = small_lm(tie_word_embeddings=tied, **options)
    model.save_pretrained(tmp_path, **({} if shard is None else {"max_shard_size": shard}))
    assert (tmp_path / "model.safetensors.index.json").exists() is (shard is not None)
    loaded = SeqBoatForCausalLM.from_pretrained(tmp_path)
    assert_same_tensors(loaded, model)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    ids = random_ids(2, 20)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_the_base_model_and_the_language_model_read_each_other(tmp_path):
    model = small_lm()
    model.save_pretrained(tmp_path / "lm")
    assert_same_tensors(SeqBoatModel.from_pretrained(tmp_path / "lm"), model.model)
    model.model.save_pretrained(tmp_path / "base")
    assert_same_tensors(SeqBoatForCausalLM.from_pretrained(tmp_path / "base"), model)


@torch.no_grad()
def test_an_encoder_with_running_statistics_is_restored(tmp_path):
    config = SeqBoatConfig(**SMALL, bidirectional=True, norm_type="batchnorm")
    model = SeqBoatModel(config)
    model(random_ids(2, 12))
    model.save_pretrained(tmp_path)
    assert any(name.endswith("running_var") for name, _ in model.named_buffers())
    assert_same_tensors(SeqBoatModel.from_pretrained(tmp_path), model)


def test_dtypes_survive_a_file(tmp_path):
    model = small_lm()
    model.save_pretrained(tmp_path / "wide")
    half = SeqBoatForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.bfloat16)
    assert_same_tensors(half, model.to(torch.bfloat16))
    half.save_pretrained(tmp_path / "half")
    assert_same_tensors(SeqBoatForCausalLM.from_pretrained(tmp_path / "half", dtype="auto"), half)


def test_weights_offloaded_by_accelerate_reach_every_part(tmp_path):
    model, ids = small_lm(position_embedding_type="simple", intermediate_size=24), random_ids(2, 12)
    model.save_pretrained(tmp_path / "model")
    places = {"model.layers.0": "disk", "model.layers.1": "cpu", "model.embed_tokens": "cpu"}
    offloaded = SeqBoatForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map=places | {"model.final_norm": "cpu", "lm_head": "cpu"},
        offload_folder=tmp_path / "disk",
    )
    assert offloaded.model.layers[0].attention.qk_scale.is_meta
    expected = model.generate(ids, max_new_tokens=6)
    assert torch.equal(offloaded.generate(ids, max_new_tokens=6), expected)
    assert torch.equal(cpu_offload(model, torch.device("cpu")).generate(ids, max_new_tokens=6), expected)


def test_a_missing_tensor_gets_its_initial_value(tmp_path):
    model = small_lm()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    missing = ["router.log_temperature", "ssm.beta", "attention.qk_offset", "attention.in_proj.weight"]
    missing = [f"model.layers.0.{name}" for name in missing]
    for name in missing:
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = SeqBoatForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(missing)
    layer = loaded.model.layers[0]
    torch.testing.assert_close(layer.router.log_temperature.data, torch.tensor([4.0]).log())
    assert not layer.attention.qk_offset.any()
    assert (layer.ssm.beta[:, 0] > 0.9).all() and (layer.ssm.beta[:, 1] < -0.9).all()
    assert 0 < layer.attention.in_proj.weight.abs().max() <= 0.04 + 1e-6
    assert torch.equal(layer.router.weight, model.model.layers[0].router.weight)


def test_a_config_file_with_contradictory_values_is_refused(tmp_path):
    small_lm().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"attention_activation": "sparsemax"}))
    with pytest.raises(ValueError, match="attention_activation='sparsemax'"):
        SeqBoatForCausalLM.from_pretrained(tmp_path)
    path.write_text(json.dumps(config | {"norm_type": "batchnorm"}))
    with pytest.raises(ValueError, match="norm_type='batchnorm' contradicts bidirectional=False"):
        SeqBoatForCausalLM.from_pretrained(tmp_path)


IDS = random_ids(2, 6)
REFUSED = {
    "pages": (dict(input_ids=IDS, cache=object(), read_index=torch.zeros(1)), "continuous batching"),
    "something else as the cache": (dict(input_ids=IDS, cache=object()), "cache must be a SeqBoatCache, got object"),
    "ids of another dtype": (dict(input_ids=IDS.float()), "input_ids must be of dtype int64, got torch.float32"),
    "fractional positions": (
        dict(input_ids=IDS, position_ids=torch.arange(6.0)[None]),
        "position_ids must be integers",
    ),
    "a mask that numbers texts": (
        dict(input_ids=IDS, attention_mask=torch.tensor([[1, 1, 1, 2, 2, 2]] * 2)),
        "seq_idx",
    ),
    "a mask to be added": (
        dict(input_ids=IDS, attention_mask=torch.tensor([[0.0, 0, 0, 0, -1e9, -1e9]] * 2)),
        "1 at real tokens and 0 at padding, got -1000000000.0",
    ),
    "a mistyped argument": (dict(input_ids=IDS, output_router_prob=True), "nearest is 'output_router_probs'"),
    "another library's borders": (dict(input_ids=IDS, cu_seqlens=torch.tensor([0, 6])), "nearest is 'cu_seq_lens_q'"),
    "token types": (dict(input_ids=IDS, token_type_ids=torch.ones_like(IDS)), "token_type_ids must be all 0"),
    "read_index": (dict(input_ids=IDS, read_index=torch.zeros(1)), "read_index"),
    "write_index": (dict(input_ids=IDS, write_index=torch.zeros(1)), "write_index"),
    "block_table": (dict(input_ids=IDS, block_table=torch.zeros(1)), "block_table"),
    "attentions": (dict(input_ids=IDS, output_attentions=True), "output_attentions"),
    "foreign cache": (dict(input_ids=IDS, past_key_values=DynamicCache()), "SeqBoatCache, got DynamicCache"),
    "4D mask": (dict(input_ids=IDS, attention_mask=torch.ones(2, 1, 6, 6)), r"\(2, 1, 6, 6\)"),
    "narrow mask": (dict(input_ids=IDS, attention_mask=torch.ones(2, 5)), r"\(2, 5\)"),
    "wide mask": (dict(input_ids=IDS, attention_mask=torch.ones(2, 7)), "7 columns; expected 6"),
    "mask of other rows": (dict(input_ids=IDS, attention_mask=torch.ones(3, 6)), r"\(3, 6\)"),
    "large id": (dict(input_ids=torch.tensor([[3, 40]])), r"0\.\.39, got 40"),
    "negative id": (dict(input_ids=torch.tensor([[3, -1]])), r"0\.\.39, got -1"),
    "no columns": (dict(input_ids=IDS[:, :0]), "length >= 1"),
    "one dimension": (dict(input_ids=IDS[0]), "input_ids must be of shape"),
    "no rows": (dict(input_ids=IDS[:0]), "batch >= 1"),
    "embeddings without columns": (dict(inputs_embeds=torch.zeros(2, 0, 16)), r"length >= 1, 16\), got \(2, 0, 16\)"),
    "embeddings of another width": (dict(inputs_embeds=torch.zeros(2, 6, 15)), r"got \(2, 6, 15\)"),
    "flat embeddings": (dict(inputs_embeds=torch.zeros(6, 16)), r"got \(6, 16\)"),
    "both inputs": (dict(input_ids=IDS, inputs_embeds=torch.zeros(2, 6, 16)), "exactly one"),
    "no input": ({}, "exactly one"),
    "positions": (dict(input_ids=IDS, position_ids=torch.arange(5)[None]), "position_ids must be of shape"),
    "segments": (dict(input_ids=IDS, seq_idx=torch.zeros(2, 5).long()), "seq_idx must be of shape"),
    "fractional segments": (dict(input_ids=IDS, seq_idx=torch.zeros(2, 6)), "seq_idx must be integers"),
}


@pytest.fixture
def idle_model(monkeypatch):
    """A model whose layers must not run: errors come before any work."""
    model = small_lm()

    def runs(*args, **kwargs):
        raise AssertionError("a layer ran")

    monkeypatch.setattr(model.model.layers[0], "forward", runs)
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured_is_refused_before_any_work(idle_model, case):
    arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        idle_model(**arguments)
    if "cache" not in arguments:
        with pytest.raises(ValueError, match=message):
            idle_model.model(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(labels=IDS[:, :5]), r"labels must be of shape \(2, 6\), got \(2, 5\)"),
        (dict(labels=IDS[:1]), r"labels must be of shape \(2, 6\), got \(1, 6\)"),
        (dict(labels=IDS, logits_to_keep=2), "logits_to_keep=0, got 2"),
    ],
    ids=["columns", "rows", "logits_to_keep"],
)
def test_labels_that_do_not_fit_are_refused_before_any_work(idle_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        idle_model(IDS, **arguments)


def test_embeddings_are_not_resized_below_a_special_id():
    model = small_lm(eos_token_id=30)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for settings in ({"new_num_tokens": 30}, {"new_num_tokens": 21, "pad_to_multiple_of": 8}):
        with pytest.raises(ValueError, match="eos_token_id=30 contradicts vocab_size="):
            model.resize_token_embeddings(**settings)
    assert model.config.vocab_size == model.vocab_size == 40
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.resize_token_embeddings(25, pad_to_multiple_of=8)
    assert model.config.vocab_size == model.lm_head.weight.shape[0] == 32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    values = SeqBoatModel(SeqBoatConfig(**SMALL, bidirectional=True, input_type="values"))
    with pytest.raises(ValueError, match="input_type='values' has no token embeddings"):
        values.resize_token_embeddings(50)


def test_the_checkpoint_of_another_architecture_is_refused(tmp_path):
    model = small_lm()
    model.config.save_pretrained(tmp_path)
    save_file({"transformer.h.0.weight": torch.zeros(3)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for kind in (SeqBoatForCausalLM, SeqBoatModel):
        with pytest.raises(ValueError, match="no tensor of a SeqBoat layer: it has transformer.h.0.weight"):
            kind.from_pretrained(tmp_path)


def test_a_standard_deviation_of_zero_starts_linears_at_zero():
    model = SeqBoatForCausalLM(SeqBoatConfig(**SMALL, initializer_range=0))
    assert not model.model.layers[0].hidden_proj.weight.any()


def test_scales_of_queries_and_keys_and_routers_may_start_otherwise_than_linears():
    width = {"hidden_size": 64, "v_head_dim": 64, "qk_head_dim": 64}
    own = {"initializer_range": 0.04, "qk_initializer_range": 0.3, "router_initializer_range": 0.0}
    for ranges, wanted in ((own, (0.04, 0.3, 0.0)), ({"initializer_range": 0.1}, (0.1, 0.1, 0.1))):
        torch.manual_seed(0)
        (layer, *_) = SeqBoatForCausalLM(SeqBoatConfig(**{**SMALL, **width, **ranges})).model.layers
        found = layer.attention.in_proj.weight, layer.attention.qk_scale, layer.router.weight
        # Cut at two deviations, a normal keeps 0.88 of one.
        for tensor, std in zip(found, wanted, strict=True):
            assert tensor.std().item() == pytest.approx(0.88 * std, rel=0.2)
            assert tensor.abs().max().item() <= 2 * std


def test_a_mask_that_does_not_fit_a_filled_cache_is_refused():
    model = small_lm()
    cache = model(IDS).past_key_values
    before = {name: tensor.clone() for name, tensor in cache.tensors()}
    with pytest.raises(ValueError, match="9 columns; expected 2 .* or 8"):
        model(IDS[:, :2], attention_mask=torch.ones(2, 9), past_key_values=cache)
    with pytest.raises(ValueError, match="6 columns; expected 1 .* or 7"):
        model(IDS[:, :1], attention_mask=torch.ones(2, 6), past_key_values=cache)
    for name, tensor in cache.tensors():
        assert torch.equal(tensor, before[name])
    assert cache.get_seq_length() == 6


def test_generation_refuses_what_it_cannot_honour(idle_model):
    with pytest.raises(NotImplementedError, match="continuous batching"):
        idle_model.generate_batch(inputs=[[3, 4]])
    with pytest.raises(NotImplementedError, match="continuous batching"):
        idle_model.init_continuous_batching()
    with pytest.raises((ValueError, NotImplementedError), match="paged"):
        idle_model.generate(IDS, cache_implementation="paged", max_new_tokens=2)
    with pytest.raises(ValueError, match="output_attentions"):
        idle_model.generate(IDS, output_attentions=True, return_dict_in_generate=True, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"0\.\.39, got 77"):
        idle_model.generate(torch.tensor([[3, 77]]), max_new_tokens=2)
    with pytest.raises(ValueError, match="SeqBoatCache"):
        idle_model.generate(IDS, past_key_values=DynamicCache(), max_new_tokens=2)
    with pytest.raises(ValueError, match="router_probs"):
        idle_model.generate(IDS, output_router_probs=True, max_new_tokens=2)


def test_generation_refuses_the_mask_of_another_prompt(idle_model):
    # transformers leaves out a mask that is all ones, whatever its shape.
    rows, width = IDS.shape
    for shape in ((rows, width - 1), (rows, width + 2), (rows + 1, width), (1, width)):
        mask = torch.ones(shape, dtype=torch.long)
        for given in ({"input_ids": IDS}, {"inputs_embeds": idle_model.get_input_embeddings()(IDS)}):
            with pytest.raises(
                ValueError, match=rf"attention_mask must be of shape \({rows}, {width}\), as {[*given][0]}"
            ):
                idle_model.generate(**given, attention_mask=mask, max_new_tokens=2)
        with pytest.raises(ValueError, match="attention_mask must be of shape"):
            idle_model.generate(IDS, attention_mask=mask, max_new_tokens=2)


def test_a_draft_model_is_left_out_where_transformers_says_so():
    model = small_lm()
    options = {"num_beams": 2, "max_new_tokens": 3, "do_sample": False}
    found = model.generate(IDS[:1], assistant_model=model, **options)
    assert torch.equal(found, model.generate(IDS[:1], **options))


def test_a_bidirectional_model_has_no_cache():
    config = SeqBoatConfig(**SMALL, bidirectional=True)
    model = SeqBoatModel(config).eval()
    assert model(IDS).past_key_values is None
    with pytest.raises(ValueError, match="bidirectional"):
        model(IDS, use_cache=True)
    with pytest.raises(ValueError, match="bidirectional"):
        model(IDS, past_key_values=SeqBoatCache(SeqBoatConfig(**SMALL)))
    with pytest.raises(ValueError, match="bidirectional"):
        SeqBoatCache(config)
    with pytest.raises(ValueError, match="bidirectional"):
        SeqBoatForCausalLM(config)


def attributes(model) -> dict[str, dict[str, int]]:
    """Which object stands under every attribute of every module, and how often each tensor was written."""
    found = {}
    for name, module in model.named_modules():
        found[name] = {key: id(value) for key, value in vars(module).items()}
        for kind in ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"):
            found[f"{name}.{kind}"] = {key: id(value) for key, value in vars(module)[kind].items()}
        found[f"{name} versions"] = {key: value._version for key, value in module.named_parameters(recurse=False)}
    found["config"] = model.config.to_dict()
    found["generation_config"] = model.generation_config.to_dict()
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}, {"do_sample": True}],
)
def test_generation_leaves_no_trace_in_the_model(options):
    model, inputs = small_lm(), pad_left([random_ids(1, 9)[0], random_ids(1, 4)[0]])
    before = attributes(model)
    model.generate(**inputs, max_new_tokens=4, **options)
    assert attributes(model) == before
    draft = small_lm(seed=1)
    model.generate(random_ids(1, 9), max_new_tokens=6, assistant_model=draft)
    assert attributes(model) == before


def test_two_threads_generate_with_one_model():
    model = small_lm()
    prompts = [random_ids(2, length, seed=length) for length in (5, 30, 17, 9)]
    options = [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}]
    set_seed(0)

    def run(case: int) -> torch.Tensor:
        return model.generate(prompts[case % 4], max_new_tokens=20, do_sample=False, **options[case % 4])

    alone = [run(case) for case in range(4)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, range(8)))
    for case, tokens in enumerate(together):
        assert torch.equal(tokens, alone[case % 4])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"position_ids": torch.arange(5)[None] + 0.5}, "position_ids must be integers"),
        ({"seq_idx": torch.zeros(1, 5) + 0.5}, "seq_idx must be integers, got dtype torch.float32"),
        ({"cu_seq_lens_q": torch.tensor([0, 2.5, 5])}, "cu_seq_lens_q must be integers, got dtype torch.float32"),
        ({"logits_to_keep": -1}, "logits_to_keep must be at least 0"),
        ({"logits_to_keep": 1.5}, "logits_to_keep must be an integer"),
        ({"logits_to_keep": torch.tensor([1.5])}, "logits_to_keep must be an integer or int64 indices"),
        ({"input_ids": torch.ones(1, 5)}, "input_ids must be of dtype int64"),
        ({"labels": torch.full((1, 5), 10**6)}, "labels must be -100 or lie in"),
    ],
)
def test_numbers_of_another_kind_are_refused_by_name(arguments, words):
    model = SeqBoatForCausalLM(SeqBoatConfig.from_preset("tiny")).eval()
    with pytest.raises(ValueError, match=words):
        model(**{"input_ids": torch.ones(1, 5, dtype=torch.long), **arguments})
