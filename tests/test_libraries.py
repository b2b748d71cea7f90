"""Where other libraries meet the model: what Trainer, TRL, PEFT, Accelerate and pipelines read off it, pass to it, and
expect of it, beside what a Llama gives them."""

import copy
import tempfile

import pytest
import torch
from peft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from small_models import SMALL, pad_left, random_ids, small_lm
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from modeling_seqboat import (
    SeqBoatCache,
    SeqBoatConfig,
    SeqBoatForMaskedLM,
    SeqBoatForQuestionAnswering,
    SeqBoatForSequenceClassification,
    SeqBoatForTokenClassification,
    SeqBoatModel,
    build_byte_tokenizer,
)

IDS = random_ids(2, 20)
ENCODER = {**SMALL, "bidirectional": True}


def trainer_of(model: nn.Module, rows: list[dict], **options) -> Trainer:
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        per_device_train_batch_size=2,
        **options,
    )
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


# Names that libraries look up


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "peft"])
def test_label_smoothing_scores_the_next_token(adapted):
    model = small_lm()
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["in_proj"], task_type="CAUSAL_LM")).eval()
    trainer = trainer_of(model, [{"input_ids": row, "labels": row} for row in IDS], label_smoothing_factor=1e-7)
    with torch.no_grad():
        smoothed = trainer.compute_loss(model, {"input_ids": IDS, "labels": IDS})
        torch.testing.assert_close(smoothed, model(input_ids=IDS, labels=IDS).loss, rtol=1e-4, atol=1e-4)


def test_label_smoothing_of_heads_that_do_not_shift():
    torch.manual_seed(0)
    model = SeqBoatForMaskedLM(SeqBoatConfig(**ENCODER)).eval()
    trainer = trainer_of(model, [{"input_ids": row, "labels": row} for row in IDS], label_smoothing_factor=1e-7)
    with torch.no_grad():
        smoothed = trainer.compute_loss(model, {"input_ids": IDS, "labels": IDS})
        torch.testing.assert_close(smoothed, model(input_ids=IDS, labels=IDS).loss, rtol=1e-4, atol=1e-4)


def test_evaluation_takes_labels_alone_for_its_labels():
    metrics = trainer_of(small_lm(), [{"input_ids": row, "labels": row} for row in IDS]).evaluate()
    assert metrics["eval_loss"] > 0


def test_sizes_stand_in_the_dictionary_and_not_in_the_file():
    config = SeqBoatConfig(**SMALL)
    values = config.to_dict()
    assert (values["num_attention_heads"], values["hidden_size"], values["num_hidden_layers"]) == (1, 16, 2)
    assert not {"num_attention_heads", "auto_map"} & set(config.to_diff_dict())
    assert SeqBoatConfig(**values).to_dict() == values and SeqBoatConfig(**(values | {"qk_head_dim": 6})).head_dim == 6
    assert config.auto_map == {} and SeqBoatConfig().auto_map is not config.auto_map


def test_tools_may_set_a_number_of_heads():
    config = SeqBoatConfig(**SMALL, num_attention_heads=4)
    assert config.num_attention_heads == 1
    config.num_attention_heads = 2
    assert config.num_attention_heads == 1


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (lambda: SeqBoatModel(SeqBoatConfig(**{**ENCODER, "input_type": "values"})), "input_values"),
        (lambda: SeqBoatModel(SeqBoatConfig(**SMALL)), "input_ids"),
        (small_lm, "input_ids"),
    ],
    ids=["values", "tokens", "lm"],
)
def test_the_main_input_is_what_the_model_reads(model, name):
    assert model().main_input_name == name


# Attributes that are read off modules which another library has wrapped


@pytest.mark.parametrize(
    "settings",
    [
        LoraConfig(r=2, target_modules=["embed_tokens", "in_proj"]),
        LoraConfig(r=2, target_modules=["in_proj"], modules_to_save=["embed_tokens"]),
        LoraConfig(r=2, target_modules=["in_proj"], trainable_token_indices=[3, 4]),
        TrainableTokensConfig(token_indices=[3, 4], target_modules=["embed_tokens"]),
    ],
    ids=["lora", "saved", "lora and tokens", "tokens"],
)
def test_adapters_in_the_place_of_the_embeddings(settings):
    model = get_peft_model(small_lm(), settings)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    with pytest.raises(ValueError, match="must lie in 0..39, got 40"):
        model(input_ids=torch.tensor([[3, 40]]))


class Steered(nn.Module):
    """A layer in a module of the user's own, as libraries for steering and probing make them."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        hidden, *rest = self.block(*args, **kwargs)
        return (hidden + 0.1, *rest)


def test_a_layer_in_a_wrapper_generates_with_a_cache():
    model = small_lm()
    model.model.layers[0] = Steered(model.model.layers[0])
    expected = model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), expected)


# Arguments that are honoured


def test_targets_that_are_shifted_already():
    model = small_lm()
    shifted = torch.cat([IDS[:, 1:], random_ids(2, 1, seed=5)], dim=1)
    logits = model(IDS).logits
    expected = F.cross_entropy(logits.flatten(0, 1), shifted.flatten())
    torch.testing.assert_close(model(IDS, shift_labels=shifted).loss, expected)
    torch.testing.assert_close(model(IDS, labels=IDS, shift_labels=shifted).loss, expected)
    counted = model(IDS, shift_labels=shifted, num_items_in_batch=80).loss
    torch.testing.assert_close(counted, expected * shifted.numel() / 80)


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32])
def test_labels_of_another_dtype_are_refused(name, dtype):
    with pytest.raises(ValueError, match=f"{name} must be of dtype int64, got {dtype}"):
        small_lm()(IDS, **{name: IDS.to(dtype)})


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
@pytest.mark.parametrize("value", [40, -1, 10**6])
def test_labels_outside_the_vocabulary_are_refused(name, value):
    labels = IDS.clone()
    labels[0, 1] = value
    with pytest.raises(ValueError, match=rf"{name} must be -100 or lie in 0\.\.39, got {value}"):
        small_lm()(IDS, **{name: labels})


def test_a_number_of_logits_that_is_none_is_refused():
    with pytest.raises(ValueError, match="logits_to_keep must be at least 0"):
        small_lm()(IDS, logits_to_keep=-1)
    for shape in ((), (1, 1)):
        with pytest.raises(ValueError, match=r"indices of columns, of shape \(n,\)"):
            small_lm()(IDS, logits_to_keep=torch.ones(shape, dtype=torch.long))


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0)], ids=["none", "0", "tensor"])
def test_a_batch_without_labels_costs_nothing(count):
    """Also where Trainer counts the labels of all batches of a step, and finds none."""
    model = small_lm(router_target_rate=None if count is None else 0.5).train()
    loss = model(IDS, labels=torch.full_like(IDS, -100), num_items_in_batch=count).loss
    loss.backward()
    assert loss == 0
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("chosen", [0, -1, [0, 2], [-2], [1, 7]])
def test_hidden_states_by_index(chosen):
    model = small_lm()
    every = model(IDS, output_hidden_states=True).hidden_states
    found = model(IDS, output_hidden_states=chosen).hidden_states
    wanted = {index % 3 for index in ([chosen] if isinstance(chosen, int) else chosen) if -3 <= index < 3}
    assert len(found) == len(every) == 3
    for index, (state, expected) in enumerate(zip(found, every, strict=True)):
        assert torch.equal(state, expected) if index in wanted else state is None


@pytest.mark.parametrize("chosen", ["all", 1.5, [True], [0, "1"]])
def test_hidden_states_by_anything_else_are_refused(chosen):
    with pytest.raises(ValueError, match="output_hidden_states must be True, False, an index or a list of indices"):
        small_lm()(IDS, output_hidden_states=chosen)


def test_arguments_that_say_nothing_new_may_come_along():
    model = small_lm()
    plain = model(IDS).logits
    for extra in (
        {"token_type_ids": torch.zeros_like(IDS)},
        {"cache_position": torch.arange(20)},
        {"max_length_q": 20},
    ):
        assert torch.equal(model(IDS, **extra).logits, plain)


@pytest.mark.parametrize("head", [SeqBoatForSequenceClassification, SeqBoatForTokenClassification, SeqBoatForMaskedLM])
def test_heads_refuse_what_they_would_ignore(head):
    torch.manual_seed(0)
    model = head(SeqBoatConfig(**ENCODER))
    with pytest.raises(ValueError, match="nearest is 'output_router_probs'"):
        model(IDS, output_router_probss=True)
    with pytest.raises(ValueError, match="nearest is 'labels'"):
        model(IDS, label=IDS)


# The state against what the caller says of the past


def padded(length: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = pad_left([random_ids(1, length)[0], random_ids(1, length - 3, seed=1)[0]])
    return inputs["input_ids"], inputs["attention_mask"]


@pytest.mark.parametrize("change", ["a pad made real", "a real token made a pad"])
@pytest.mark.parametrize("by", ["forward", "generate"])
def test_a_mask_that_contradicts_what_was_read_is_refused(change, by):
    model = small_lm()
    ids, mask = padded()
    first = model(ids, attention_mask=mask)
    other = mask.clone()
    other[(1, 0) if change == "a pad made real" else (0, 4)] = (
        1 - other[(1, 0) if change == "a pad made real" else (0, 4)]
    )
    new = random_ids(2, 5, seed=9)
    whole = torch.cat([other, torch.ones_like(new)], dim=1)
    with pytest.raises(ValueError, match=r"took \d for real \(row"):
        if by == "forward":
            model(new, attention_mask=whole, past_key_values=first.past_key_values)
        else:
            model.generate(torch.cat([ids, new], 1), attention_mask=whole, past_key_values=first.past_key_values)
    # Nothing was read.
    assert first.past_key_values.get_seq_length() == 8


def test_the_mask_of_the_whole_text_goes_on_being_accepted():
    model = small_lm()
    ids, mask = padded()
    new = random_ids(2, 5, seed=9)
    expected = model(torch.cat([ids, new], 1), attention_mask=torch.cat([mask, torch.ones_like(new)], 1)).logits[:, 8:]
    cache = model(ids, attention_mask=mask).past_key_values
    found = [
        model(
            new[:, [i]], attention_mask=torch.cat([mask, torch.ones_like(new[:, : i + 1])], 1), past_key_values=cache
        )
        for i in range(5)
    ]
    torch.testing.assert_close(torch.cat([out.logits for out in found], 1), expected, rtol=1e-4, atol=1e-4)


def test_a_row_that_started_a_new_text_may_have_read_more_than_the_state_counts():
    model = small_lm()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]] * 2)
    ids, _ = padded()
    cache = model(ids, position_ids=positions).past_key_values
    model(ids[:, :2], attention_mask=torch.ones(2, 10), past_key_values=cache)
    with pytest.raises(ValueError, match="the state cannot leave out"):
        model(ids[:, :2], attention_mask=torch.cat([torch.zeros(2, 10), torch.ones(2, 2)], 1), past_key_values=cache)


def test_a_second_turn_after_a_row_ended_early_is_refused():
    model = small_lm()
    prompt = random_ids(2, 8)
    free = model.generate(prompt, max_new_tokens=12, do_sample=False)[:, 8:]
    end = next(token for token in free[0].tolist()[:8] if token not in free[1].tolist())
    first = model.generate(
        prompt, max_new_tokens=12, do_sample=False, eos_token_id=end, pad_token_id=0, return_dict_in_generate=True
    )
    text = first.sequences
    mask = torch.ones_like(text)
    mask[0, 8 + free[0].tolist().index(end) + 1 :] = 0
    turn = random_ids(2, 6, seed=3)
    text, mask = torch.cat([text, turn], 1), torch.cat([mask, torch.ones_like(turn)], 1)
    with pytest.raises(ValueError, match="read the whole text anew"):
        model.generate(text, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=2)


@pytest.mark.parametrize(
    "settings",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    ],
    ids=["prompt tuning", "p-tuning"],
)
@pytest.mark.parametrize("rows", ["plain", "padded"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_learned_prompts_generate_with_a_cache(settings, rows, static):
    torch.manual_seed(0)
    model = get_peft_model(small_lm(), copy.deepcopy(settings)).eval()
    ids, mask = padded()
    inputs = {"input_ids": ids, "attention_mask": mask} if rows == "padded" else {"input_ids": ids}
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=False)
    options = {"cache_implementation": "static"} if static else {}
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False, **options), expected)


def test_prefix_tuning_is_refused_by_name():
    model = get_peft_model(
        small_lm(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_attention_heads=1)
    )
    with pytest.raises(ValueError, match="prefix tuning"):
        model(input_ids=IDS)


def test_fewer_layers_than_the_config_says():
    model = small_lm(num_hidden_layers=4)
    ids = random_ids(1, 24)
    model.model.layers = model.model.layers[:2]
    model(ids, use_cache=False)
    for given in ({"past_key_values": SeqBoatCache(model.config)}, {"use_cache": True}):
        with pytest.raises(ValueError, match="the model has 2 layers, the cache 4"):
            model(ids[:, :12], **given)
    model.config.num_hidden_layers = 2
    expected = model(ids, use_cache=False).logits[:, 12:]
    cache = SeqBoatCache(model.config)
    model(ids[:, :12], past_key_values=cache)
    torch.testing.assert_close(model(ids[:, 12:], past_key_values=cache).logits, expected, rtol=1e-4, atol=1e-4)


def test_early_exit_runs_the_first_layers():
    model = small_lm(num_hidden_layers=4)
    ids = random_ids(1, 13)
    model.config.num_hidden_layers = 2
    early = model(ids, output_hidden_states=True)
    model.config.num_hidden_layers = 4
    states = model(ids, output_hidden_states=True).hidden_states
    assert len(early.hidden_states) == 3
    torch.testing.assert_close(early.hidden_states[1], states[1])
    expected = model.generate(ids, max_new_tokens=10, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=10, do_sample=False, assistant_early_exit=2), expected)


def test_a_draft_model_with_another_tokenizer():
    letters = build_byte_tokenizer()
    words = letters.train_new_from_iterator(["the quick brown fox jumps over the lazy dog hello world "] * 5, 300)
    draft = small_lm(vocab_size=264, pad_token_id=256, bos_token_id=257)
    torch.manual_seed(0)
    target = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            pad_token_id=words.pad_token_id, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        )
    ).eval()  # fmt: skip
    prompt = words("hello world", return_tensors="pt")["input_ids"]
    expected = target.generate(prompt, max_new_tokens=24, do_sample=False)
    found = target.generate(
        prompt, max_new_tokens=24, do_sample=False, assistant_model=draft, tokenizer=words, assistant_tokenizer=letters
    )
    assert torch.equal(found, expected)


# Modules in the place of linear layers


def wide(model: nn.Module) -> nn.Module:
    """With adapters that change the logits."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    return model.eval()


def test_rows_of_a_batch_have_an_adapter_each():
    settings = {"r": 2, "target_modules": ["hidden_proj", "in_proj", "out_proj"]}
    model = get_peft_model(small_lm(), LoraConfig(**settings))
    model.add_adapter("other", LoraConfig(**settings))
    model.base_model.set_adapter(["default", "other"])
    wide(model)
    names = ["default", "other", "__base__"]
    ids = random_ids(3, 20)
    with torch.no_grad():
        found = model(input_ids=ids, adapter_names=names).logits
        for row, name in enumerate(names[:2]):
            model.set_adapter(name)
            expected = model(input_ids=ids[row : row + 1]).logits
            torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            torch.testing.assert_close(found[2:], model(input_ids=ids[2:]).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gralora", "c3a"])
def test_adapters_that_look_at_whole_texts_see_them(kind):
    import peft

    settings = {
        "gralora": lambda: peft.GraloraConfig(r=4, gralora_k=2, target_modules=["in_proj", "out_proj"]),
        "c3a": lambda: peft.C3AConfig(block_size=8, target_modules=["out_proj"]),
    }[kind]()
    model = wide(get_peft_model(small_lm(), settings))
    with torch.no_grad():
        whole = model(input_ids=IDS, use_cache=False).logits
        cache = SeqBoatCache(model.config)
        parts = [model(input_ids=part, past_key_values=cache).logits for part in IDS.split([9, 1, 10], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_hooks_of_ones_own_see_the_activated_tokens_alone():
    model, rows = small_lm(), []
    model.model.layers[0].attention.in_proj.register_forward_hook(lambda module, args, output: rows.append(args[0]))
    probs = model(IDS, output_router_probs=True).router_probs[0]
    assert rows[0].shape == ((probs > 0).sum(), 16) and 0 < rows[0].shape[0] < IDS.numel()


def closed(model: nn.Module) -> nn.Module:
    """With routers that let no token through."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.router.bias.copy_(torch.tensor([1e4, -1e4]))
    return model


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_no_linear_layer_is_given_no_rows(training):
    model, rows = closed(small_lm()).train(training), []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            forward = module.forward
            module.forward = lambda x, forward=forward: rows.append((x.numel(), x.is_contiguous())) or forward(x)
    loss = model(IDS, labels=IDS).loss
    if training:
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    else:
        model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert rows and all(count > 0 and contiguous for count, contiguous in rows)


def test_dynamic_int8_with_closed_routers():
    quantization = pytest.importorskip("torchao.quantization")
    model = closed(small_lm(hidden_size=32, v_head_dim=32))
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 23)


def test_adapters_initialised_from_activations():
    from peft import EvaConfig, initialize_lora_eva_weights

    model = get_peft_model(
        small_lm(),
        LoraConfig(
            r=2, target_modules=["hidden_proj", "in_proj"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0),
            task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    rows = [random_ids(2, 30, seed=seed) for seed in range(8)]
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in rows]
    initialize_lora_eva_weights(model, data, show_progress_bar=False)
    model(input_ids=IDS, labels=IDS).loss.backward()


def test_caches_of_several_devices_are_joined(monkeypatch):
    from torch.nn.parallel import scatter_gather

    def joined(device, dim, *parts):
        return torch.cat([part if part.ndim else part[None] for part in parts])

    # nn.DataParallel with two replicas, but for the copies between devices.
    monkeypatch.setattr(scatter_gather.Gather, "apply", staticmethod(joined))
    model = small_lm()
    outputs = scatter_gather.gather([model(row[None]) for row in IDS], 0)
    expected = model(IDS)
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-4, atol=1e-4)
    new = random_ids(2, 5, seed=4)
    torch.testing.assert_close(
        model(new, past_key_values=outputs.past_key_values).logits,
        model(new, past_key_values=expected.past_key_values).logits,
        rtol=1e-4,
        atol=1e-4,
    )
    replica = copy.copy(model.model)
    replica._is_replica = True
    assert replica(IDS).past_key_values is None and replica(IDS, use_cache=True).past_key_values is not None


@pytest.mark.parametrize("ssm_type", ["ema", "s4d"])
def test_second_derivatives_are_refused(ssm_type):
    model = small_lm(ssm_type=ssm_type)
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    loss = model(inputs_embeds=embeds, labels=IDS).loss
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(loss, embeds, create_graph=True)


# Names that body and head share


NAMED = ["hidden_proj", "in_proj", "out_proj"]


@pytest.mark.parametrize(
    ("head", "task", "labels", "targets"),
    [
        # PEFT itself makes an adapter of a token classifier's head, and a module to save, under "all-linear".
        (SeqBoatForTokenClassification, "TOKEN_CLS", IDS % 2, NAMED),
        (SeqBoatForSequenceClassification, "SEQ_CLS", torch.tensor([0, 1]), NAMED),
        (SeqBoatForSequenceClassification, "SEQ_CLS", torch.tensor([0, 1]), "all-linear"),
    ],
    ids=["tokens", "rows", "rows, all"],
)
def test_adapters_of_a_classifier_load_again(head, task, labels, targets, tmp_path):
    from peft import PeftModel

    torch.manual_seed(0)
    head(SeqBoatConfig(**ENCODER, num_labels=2, classifier_hidden_size=6)).save_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        head.from_pretrained(tmp_path / "base"), LoraConfig(task_type=task, r=2, target_modules=targets)
    )
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    adapted(input_ids=IDS, labels=labels).loss.backward()
    optimizer.step()
    expected = adapted.eval()(input_ids=IDS).logits
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(head.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, expected)


# Conventions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_state_is_float32_whatever_the_default_dtype(dtype):
    model = small_lm()
    expected = model(IDS).logits
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        cache = SeqBoatCache(model.config)
        found = torch.cat([model(part, past_key_values=cache).logits for part in IDS.split(7, dim=1)], 1)
        training = copy.deepcopy(model).train()
        training(IDS, labels=IDS).loss.backward()
    finally:
        torch.set_default_dtype(before)
    assert all(layer.ssm_state.dtype == torch.float32 for layer in cache.layers)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    model.train()(IDS, labels=IDS).loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), training.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def answers(mask: torch.Tensor, start: int, end: int):
    torch.manual_seed(0)
    model = SeqBoatForQuestionAnswering(SeqBoatConfig(**ENCODER)).eval()
    ids, _ = padded()
    return model(
        ids, attention_mask=mask, start_positions=torch.tensor([5, start]), end_positions=torch.tensor([6, end])
    ).loss


def test_answers_that_point_at_padding_are_refused():
    _, mask = padded()
    for start, end, name in ((0, 5, "start_positions"), (4, 2, "end_positions")):
        with pytest.raises(ValueError, match=f"{name} is .* in row 1, where attention_mask has padding"):
            answers(mask, start, end)
    with pytest.raises(ValueError, match="end_positions must be at least 0"):
        answers(mask, 4, -1)
    assert answers(mask, 4, 6) < 100
    assert torch.isfinite(answers(mask, 8, 8))


def test_special_ids_may_be_taken_over_before_their_row_exists(tmp_path):
    model = small_lm()
    model.config.pad_token_id = 41
    with pytest.raises(ValueError, match="pad_token_id=41 contradicts vocab_size=40"):
        model.save_pretrained(tmp_path / "early")
    model.resize_token_embeddings(42)
    model.save_pretrained(tmp_path / "late")
    assert type(model).from_pretrained(tmp_path / "late").config.pad_token_id == 41
    with pytest.raises(ValueError, match="pad_token_id=41 contradicts vocab_size=40"):
        model.config.vocab_size = 40


@pytest.mark.parametrize("multiple", [1.3, 0, -8, True])
def test_a_multiple_must_be_a_positive_integer(multiple):
    with pytest.raises(ValueError, match="pad_to_multiple_of must be an integer of at least 1"):
        small_lm().resize_token_embeddings(50, pad_to_multiple_of=multiple)


def test_loading_info_reports_a_foreign_checkpoint(tmp_path):
    from safetensors.torch import save_file

    model = small_lm()
    model.save_pretrained(tmp_path)
    save_file({"encoder.weight": torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="holds no tensor of a SeqBoat layer"):
        type(model).from_pretrained(tmp_path)
    _, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert info["unexpected_keys"] and info["missing_keys"]


def test_a_long_text_is_no_exception(caplog):
    import transformers

    transformers.logging.enable_propagation()
    try:
        model = small_lm(max_position_embeddings=8)
        model.generate(random_ids(1, 30), max_new_tokens=3, do_sample=False)
    finally:
        transformers.logging.disable_propagation()
    assert "maximum length" not in caplog.text


def test_chats_of_parts_and_new_roles():
    tokenizer = build_byte_tokenizer()

    def text(*messages: tuple[str, object]) -> str:
        return tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in messages], tokenize=False)

    parts = [{"type": "text", "text": "two and "}, {"type": "text", "text": "two?"}]
    assert text(("user", parts)) == text(("user", "two and two?")) == text(("user", ["two and ", "two?"]))
    assert text(("developer", "be brief"), ("user", "?")) == text(("system", "be brief"), ("user", "?"))
    with pytest.raises(Exception, match="a part of a content must be"):
        text(("user", [{"type": "image", "url": "x"}]))
    with pytest.raises(Exception, match="a content must be a text"):
        text(("user", {"text": "x"}))
    assert build_byte_tokenizer(chat=False).chat_template is None


def test_what_cannot_be_traced_says_so():
    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = small_lm()

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    with pytest.raises(Exception, match="SeqBoat cannot be traced"):
        torch.jit.trace(Logits(), (IDS,), check_trace=False)


def test_another_models_cache_is_refused():
    with pytest.raises(ValueError, match="past_key_values must be a SeqBoatCache, got DynamicCache"):
        small_lm()(IDS, past_key_values=DynamicCache())


def test_what_fsdp2_casts_for_a_layer_leaves_its_context_alone():
    """Rotary tables stay float32, and one context serves all layers: FSDP2 casts what it finds in a layer's arguments
    to the dtype of its parameters, and in torch 2.11 not again where a checkpoint runs the layer a second time."""
    from torch.distributed.utils import _apply_to_tensors

    model, seen = small_lm(position_embedding_type="rotary"), []

    def cast(module, args, kwargs):
        args, kwargs = _apply_to_tensors(lambda t: t.bfloat16() if t.is_floating_point() else t, (args, kwargs))
        seen.extend(a for a in (*args, *kwargs.values()) if hasattr(a, "segment_bounds"))

    for layer in model.model.layers:
        layer.register_forward_pre_hook(cast, with_kwargs=True)
    model(random_ids(1, 9))
    assert len(seen) == len(model.model.layers) > 1
    assert all(context is seen[0] for context in seen) and seen[0].cos.dtype == torch.float32
