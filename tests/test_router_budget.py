"""A budget for the whole model: `RouterBudget` holds the rate by the routers' biases, exactly however a step is cut
(P22)."""

import copy

import pytest
import torch
from helpers import tiny_lm, token_ids
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from modeling_seqboat import SeqBoatForCausalLM
from modeling_seqboat.training_seqboat import RouterBudget, RouterMonitor, SeqBoatTrainer, parameter_groups


def set_thresholds(model: SeqBoatForCausalLM, *biases: float) -> None:
    """The bias of each layer against activation, with weights so small that it decides."""
    with torch.no_grad():
        for layer, bias in zip(model.model.layers, biases, strict=True):
            layer.router.weight.mul_(0.1)
            layer.router.bias.copy_(torch.tensor([bias, 0.0]))


def biases(model: torch.nn.Module) -> torch.Tensor:
    return torch.stack([layer.router.bias.detach() for layer in model.model.layers])


def train(model, steps: int, **options) -> torch.Tensor:
    """Rates (steps, layers) of a short training under a budget."""
    ids = token_ids(8, 60)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1, router_learning_rate=1e-3), lr=2e-2)
    seen = []
    with RouterBudget(model, **options) as budget:
        for _ in range(steps):
            optimizer.zero_grad()
            outputs = model(ids, labels=ids, output_router_probs=True)
            outputs.loss.backward()
            optimizer.step()
            budget.step()
            seen.append([(probs > 0).float().mean() for probs in outputs.router_probs])
    return torch.tensor(seen)


@pytest.mark.parametrize("start", [4.0, -4.0])
@pytest.mark.parametrize("scope", ["model", "layer"])
def test_the_rate_is_reached_from_either_end_and_held(scope, start):
    model = tiny_lm(router_target_rate=0.3, router_target_scope=scope).train()
    set_thresholds(model, start, start)
    rates = train(model, 70, gain=0.5)
    assert (rates[0] == float(start < 0)).all()
    mean = rates.mean(1)
    assert ((mean[-40:] - 0.3).abs() < 0.06).all(), mean[-40:]
    if scope == "layer":
        assert ((rates[-40:].mean(0) - 0.3).abs() < 0.05).all()


def test_layers_share_the_budget_of_the_model_out_among_themselves():
    model = tiny_lm(router_target_rate=0.5).train()
    set_thresholds(model, -20.0, 20.0)
    before = biases(model)
    with RouterBudget(model, gain=1.0, floor=0.0) as budget:
        model(token_ids(4, 30))
        budget.step()
    # One layer at 1 and one at 0 are a half: nothing to move.
    torch.testing.assert_close(biases(model), before)


def test_a_layer_that_has_shut_is_reopened():
    for floor, opens in ((0.0, False), (0.1, True)):
        model = tiny_lm(router_target_rate=0.5).train()
        set_thresholds(model, -2.0, 2.0)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for layer in model.model.layers:
            layer.router.bias.requires_grad_()
        with RouterBudget(model, gain=1.0, floor=floor) as budget:
            for _ in range(60):
                outputs = model(token_ids(4, 30), output_router_probs=True)
                budget.step()
        first, last = ((probs > 0).float().mean() for probs in outputs.router_probs)
        assert bool(last > 0) == opens and bool(first < 1) == opens, (floor, first, last)


@pytest.mark.parametrize("side", ["shut", "open"])
def test_no_layer_collapses_whatever_the_loss_wants(side):
    """The loss of this training shuts the first router, or opens it entirely, which it can without a floor."""
    last = []
    for floor in (0.0, 0.05):
        model, ids = tiny_lm(router_target_rate=0.5).train(), token_ids(2, 60)
        set_thresholds(model, 0.0, 0.0)
        bias = model.model.layers[0].router.bias
        optimizer = torch.optim.AdamW([bias], lr=5e-2)
        with RouterBudget(model, gain=0.1, floor=floor) as budget:
            seen = []
            for _ in range(90):
                optimizer.zero_grad()
                with torch.no_grad():
                    outputs = model(ids, output_router_probs=True)
                (bias[1] if side == "shut" else -bias[1]).backward()
                optimizer.step()
                budget.step()
                seen.append((outputs.router_probs[0] > 0).float().mean())
        last.append(torch.stack(seen[-30:]).mean())
    free, kept = (rate if side == "shut" else 1 - rate for rate in last)
    assert free < 0.002 and kept > 0.015, (free, kept)


def test_the_loss_has_no_term_for_the_rate_while_a_budget_holds_it():
    model, ids = tiny_lm(router_target_rate=0.9, router_target_weight=10.0).train(), token_ids(2, 20)
    pulled = model(ids, labels=ids)
    with RouterBudget(model):
        held = model(ids, labels=ids)
    assert held.router_penalty is None and pulled.router_penalty > 0
    torch.testing.assert_close(held.loss + pulled.router_penalty, pulled.loss)
    torch.testing.assert_close(model(ids, labels=ids).loss, pulled.loss)


def packed(lengths: list[int], first: int) -> dict[str, torch.Tensor]:
    """One row of several texts, and its positions."""
    ids = token_ids(1, sum(lengths), seed=first)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"input_ids": ids, "position_ids": positions, "labels": ids}


def padded(lengths: list[int], first: int) -> dict[str, torch.Tensor]:
    """The same texts, one a row, padded on the right."""
    whole = packed(lengths, first)
    texts = whole["input_ids"][0].split(lengths)
    ids, mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long), torch.zeros(len(lengths), max(lengths))
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
        mask[row, : len(text)] = 1
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids}


STEP = [([5, 17], 1), ([40], 2), ([9, 3, 4], 3)]


def joined() -> list[dict]:
    """All texts of a step in one padded batch."""
    parts = [padded(lengths, first) for lengths, first in STEP]
    width = max(part["input_ids"].shape[1] for part in parts)
    stretched = [
        {
            name: torch.nn.functional.pad(value, (0, width - value.shape[1]))
            for name, value in part.items()
        }
        for part in parts
    ]  # fmt: skip
    return [{name: torch.cat([part[name] for part in stretched]) for name in stretched[0]}]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("scope", ["model", "layer"])
def test_a_step_is_the_same_however_it_is_cut(scope, checkpointing):
    """Micro-batches of unequal size, padding or packing: the weights of one plain batch, in float64 to 1e-6."""
    options = dict(router_target_rate=0.2, router_target_scope=scope)
    whole, micro, pack = (tiny_lm(**options).double().train() for _ in range(3))
    if checkpointing:
        micro.gradient_checkpointing_enable({"use_reentrant": False})
    cuts = [
        (whole, joined()),
        (micro, [padded(lengths, first) for lengths, first in STEP]),
        (pack, [packed(lengths, first) for lengths, first in STEP]),
    ]
    items = sum(length - 1 for lengths, _ in STEP for length in lengths)
    before = biases(whole)
    for model, batches in cuts:
        optimizer = torch.optim.SGD(parameter_groups(model, 0.1), lr=0.3)
        with RouterBudget(model, gain=0.5) as budget:
            for _ in range(5):
                for batch in batches:
                    model(**batch, num_items_in_batch=torch.tensor(items)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                budget.step()
    assert (biases(whole) - before).abs().min() > 1e-3
    for model, _ in cuts[1:]:
        torch.testing.assert_close(model.state_dict(), whole.state_dict(), rtol=0, atol=1e-6)


def test_nothing_counted_moves_nothing():
    model = tiny_lm(router_target_rate=0.2).train()
    before = biases(model)
    with RouterBudget(model) as budget:
        budget.step()
        with torch.no_grad():
            model.eval()(token_ids(2, 20))
        budget.step()
    assert torch.equal(biases(model), before)


def test_budget_and_monitor_count_side_by_side():
    model = tiny_lm(router_target_rate=0.2).train()
    with RouterMonitor(model) as monitor, RouterBudget(model) as budget:
        outputs = model(token_ids(2, 20), output_router_probs=True)
        budget.step()
        seen = monitor.read()
    for layer, probs in enumerate(outputs.router_probs):
        assert seen[layer].activation_rate == pytest.approx(float((probs > 0).float().mean()))
    assert not any(layer.router._forward_hooks or layer.router.written_by_hooks for layer in model.model.layers)


def test_what_cannot_be_held_is_refused():
    with pytest.raises(ValueError, match="needs a config with router_target_rate, got None"):
        RouterBudget(tiny_lm())
    model = tiny_lm(router_target_rate=0.2)
    for options, message in (({"gain": 0.0}, "gain must be above 0, got 0.0"), ({"floor": 0.5}, "got 0.5")):
        with pytest.raises(ValueError, match=message):
            RouterBudget(model, **options)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="biases, which are frozen"):
        RouterBudget(adapted)
    assert not any(layer.router.rate_is_held for layer in model.model.layers)


# Trainer


def arguments(folder, **overrides) -> TrainingArguments:
    defaults = dict(
        output_dir=str(folder), per_device_train_batch_size=2, max_steps=4, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, seed=7, dataloader_pin_memory=False,
    )  # fmt: skip
    return TrainingArguments(**{**defaults, **overrides})


DATA = [{"input_ids": row, "labels": row} for row in token_ids(8, 24)]


def trained(folder, resume: bool = False, **overrides) -> SeqBoatForCausalLM:
    model = tiny_lm(seed=3 if resume else 0, router_target_rate=0.2, hidden_dropout=0.0)
    trainer = SeqBoatTrainer(model=model, args=arguments(folder, **overrides), train_dataset=DATA, router_gain=0.5)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    assert not model.model.layers[0].router.rate_is_held
    return model


def test_trainer_steps_are_the_same_under_accumulation(tmp_path):
    sgd = dict(optim="sgd", learning_rate=0.3, max_steps=2)
    whole = trained(tmp_path, per_device_train_batch_size=4, **sgd)
    parts = trained(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, **sgd)
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=1e-4, atol=1e-5)
    assert (biases(whole) - biases(tiny_lm())).abs().max() > 0.05


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path):
    options = dict(save_strategy="steps", save_steps=2)
    whole = trained(tmp_path, **options)
    resumed = trained(tmp_path, resume=True, **options)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_trainer_refuses_at_once_what_cannot_be_held(tmp_path):
    with pytest.raises(ValueError, match="needs a config with router_target_rate"):
        SeqBoatTrainer(model=tiny_lm(), args=arguments(tmp_path), train_dataset=DATA, router_gain=0.1)


def test_a_copy_of_the_model_is_counted_on_its_own():
    """Weight averaging copies a model with its hooks."""
    model = tiny_lm(router_target_rate=0.2).train()
    with RouterBudget(model) as budget:
        model(token_ids(2, 20))
        copied = copy.deepcopy(model).eval()
        copied(token_ids(2, 20, seed=1))
        layers, table = budget._counter.take()
    assert layers == [0, 1] and table[:, 1].tolist() == [40, 40]
