"""Training: gradients under checkpointing, Trainer, Accelerate, accumulation, weight decay groups, router reports."""

import copy
import warnings

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from modeling_seqboat import SeqBoatConfig, SeqBoatForCausalLM
from modeling_seqboat.training_seqboat import (
    CollapseWarning,
    RouterCallback,
    RouterMonitor,
    RouterStatistics,
    SeqBoatTrainer,
    decay_parameter_names,
    parameter_groups,
)


def make_model(seed: int = 0, **overrides) -> SeqBoatForCausalLM:
    torch.manual_seed(seed)
    return SeqBoatForCausalLM(SeqBoatConfig.from_preset("tiny", **overrides))


def set_routers(model, value: float) -> None:
    """Activate every token (value > 0) or none (value < 0) in all layers."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.router.weight.zero_()
            layer.router.bias.copy_(torch.tensor([0.0, value]))


def rows(count: int = 8, length: int = 24, seed: int = 1) -> list[dict]:
    """Rows of a learnable pattern, with -100 labels on a prefix that differs from row to row."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        start = int(torch.randint(0, 8, (1,), generator=generator))
        ids = (torch.arange(length) + start) % 8 + 97
        labels = ids.clone()
        labels[: 2 * (index % 5)] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def stack(items: list[dict]) -> dict:
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def arguments(folder, **overrides) -> TrainingArguments:
    defaults = dict(
        output_dir=str(folder), per_device_train_batch_size=2, per_device_eval_batch_size=2, max_steps=4,
        learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True, seed=7, dataloader_pin_memory=False,
    )  # fmt: skip
    return TrainingArguments(**{**defaults, **overrides})


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(autocast, reentrant):
    dropouts = dict.fromkeys(("hidden_dropout", "attention_dropout", "value_dropout", "activation_dropout"), 0.2)
    model = make_model(intermediate_size=48, **dropouts).train()
    batch = stack(rows())
    seen = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
        seen.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_does_not_stand_in_the_way_of_generation(reentrant):
    model = make_model()
    ids = stack(rows())["input_ids"]
    options = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    expected = model.eval().generate(ids, use_cache=False, **options).logits
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.generate(ids, **options).logits
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), atol=1e-4, rtol=1e-4)
    assert cache.get_seq_length() == ids.shape[1]
    with pytest.raises(ValueError, match="under gradient checkpointing"):
        model(ids, past_key_values=cache, labels=ids)


def test_backward_under_autocast_gives_the_same_gradients():
    model = make_model(intermediate_size=48).train()
    batch = stack(rows())
    seen = []
    for inside in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch).loss
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            loss.backward()
        seen.append(gradients(model))
    torch.testing.assert_close(seen[0], seen[1], rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("value", [-100.0, 100.0])
def test_every_parameter_gets_a_gradient_in_every_step(value):
    """All parameters get a gradient in every step, also when nothing activates."""
    model = make_model().train()
    set_routers(model, value)
    model(**stack(rows())).loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())


def test_ignored_labels_cost_nothing_and_the_loss_is_a_mean_over_the_others():
    model = make_model().eval()
    batch = stack(rows())
    with torch.no_grad():
        out = model(**batch)
    logits, targets = out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    kept = targets != -100
    torch.testing.assert_close(out.loss, F.cross_entropy(logits[kept], targets[kept]))
    with torch.no_grad():
        halved = model(**batch, num_items_in_batch=2 * kept.sum()).loss
    torch.testing.assert_close(halved, out.loss / 2)


def test_trainer_lowers_the_loss_and_evaluates_with_metrics(tmp_path):
    def metrics(prediction):
        guesses, labels = prediction.predictions.argmax(-1)[:, :-1], prediction.label_ids[:, 1:]
        return {"accuracy": float((guesses == labels)[labels != -100].mean())}

    data = rows(16)
    trainer = SeqBoatTrainer(
        model=make_model(), args=arguments(tmp_path, max_steps=40), train_dataset=data, eval_dataset=data[:5],
        compute_metrics=metrics,
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    assert before["eval_accuracy"] < 0.5 < after["eval_accuracy"] <= 1


def test_gradient_accumulation_equals_one_large_batch(tmp_path):
    """`num_items_in_batch`: rows weigh by their labels, not by the micro-batch they came in."""
    weights, losses = [], []
    for size, steps in ((4, 1), (1, 4)):
        trainer = Trainer(
            model=make_model(),
            args=arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=2,
                           optim="sgd", learning_rate=1.0),
            train_dataset=rows(),
        )  # fmt: skip
        trainer.train()
        weights.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_resuming_from_a_checkpoint_equals_an_uninterrupted_run(tmp_path):
    options = dict(save_strategy="steps", save_steps=2, max_steps=4, lr_scheduler_type="linear")
    whole = SeqBoatTrainer(
        model=make_model(hidden_dropout=0.1), args=arguments(tmp_path, **options), train_dataset=rows()
    )
    whole.train()
    resumed = SeqBoatTrainer(
        model=make_model(seed=5, hidden_dropout=0.1), args=arguments(tmp_path, **options), train_dataset=rows()
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def test_accelerate_loop_trains_as_a_plain_loop_does():
    data = rows()
    plain = make_model().train()
    wrapped = copy.deepcopy(plain)
    plain_optimizer = torch.optim.AdamW(parameter_groups(plain, 0.1), lr=1e-2)
    for start in range(0, 8, 4):
        plain_optimizer.zero_grad()
        for half in (data[start : start + 2], data[start + 2 : start + 4]):
            (plain(**stack(half)).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.25)
        plain_optimizer.step()

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(parameter_groups(wrapped, 0.1), lr=1e-2)
    loader = torch.utils.data.DataLoader(data, batch_size=2, collate_fn=stack)
    model, optimizer, loader = accelerator.prepare(wrapped, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.25)
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(accelerator.unwrap_model(model).state_dict(), plain.state_dict())


def test_weight_decay_is_for_matrices_only():
    model = make_model(intermediate_size=48, tie_word_embeddings=False)
    decaying = set(decay_parameter_names(model))
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        spared = any(part in name for part in ("ssm.", "router.", "norm", "embed_tokens", "qk_", "bias"))
        assert (name in decaying) == (not spared), name
        if name in decaying:
            assert leaf == "weight" and parameter.ndim == 2
    assert "model.embed_tokens.weight" in decay_parameter_names(model, decay_embeddings=True)


def test_groups_hold_every_trainable_parameter_once_and_the_router_may_learn_at_its_own_rate():
    model = make_model()
    model.model.layers[0].hidden_proj.weight.requires_grad_(False)
    groups = parameter_groups(model, 0.1, router_learning_rate=1e-4)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(held) == sorted(trainable)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    assert optimizer.param_groups[2]["lr"] == 1e-4 and len(optimizer.param_groups[2]["params"]) == 6
    with pytest.raises(ValueError, match="weight_decay must be at least 0, got -0.1"):
        parameter_groups(model, -0.1)


def test_trainer_uses_the_groups(tmp_path):
    model = make_model()
    trainer = SeqBoatTrainer(model=model, args=arguments(tmp_path, weight_decay=0.1), train_dataset=rows())
    groups = trainer.create_optimizer().param_groups
    decayed = {id(parameter) for parameter in groups[0]["params"]}
    assert decayed == {id(dict(model.named_parameters())[name]) for name in decay_parameter_names(model)}
    assert groups[1]["weight_decay"] == 0


def test_monitor_counts_real_tokens_of_training_forwards():
    model = make_model().train()
    batch = stack(rows(2))
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :5] = 0
    with RouterMonitor(model) as monitor:
        probs = model(**batch, attention_mask=mask, output_router_probs=True).router_probs
        model.eval()
        model(**batch)
        statistics = monitor.read()
        assert monitor.read() == {}
    assert list(statistics) == [0, 1]
    for layer, prob in enumerate(probs):
        expected = float((prob > 0).sum() / mask.sum())
        assert statistics[layer].activation_rate == pytest.approx(expected)
        assert statistics[layer].temperature == pytest.approx(32**0.5, rel=1e-5)
    model.train()(**batch)
    assert monitor.read() == {}


def test_callback_logs_rates_and_warns_of_a_collapsed_router(tmp_path, caplog):
    model = make_model()
    set_routers(model, -100.0)
    trainer = SeqBoatTrainer(
        model=model, args=arguments(tmp_path, max_steps=2, report_to="tensorboard"), train_dataset=rows()
    )
    RouterCallback.attach(trainer)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["router/activation_rate_0"] == entry["router/activation_rate"] == 0
    assert entry["router/temperature_1"] == pytest.approx(32**0.5, rel=1e-3)
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    written = EventAccumulator(str(events)).Reload().Tags()["scalars"]
    assert "train/router/activation_rate_0" in written
    warned = {record.getMessage() for record in caplog.records if "router of layer" in record.getMessage()}
    assert len(warned) == 2 and all("activates 0.0% of the tokens" in message for message in warned)


def test_collapse_is_reported_once_until_the_router_has_come_back():
    warning = CollapseWarning()

    def check(rate):
        return len(warning.check({3: RouterStatistics(rate, 5.0)}, step=10))

    assert [check(rate) for rate in (0.5, 1.0, 1.0, 0.4, 0.9995, 0.0, 0.0)] == [0, 1, 0, 0, 1, 1, 0]
    warning = CollapseWarning(patience=2)
    assert [check(rate) for rate in (1.0, 0.4, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0)] == [0, 0, 0, 1, 0, 0, 0, 1]
    with pytest.raises(ValueError, match="got low=0.5 and high=0.5"):
        CollapseWarning(0.5, 0.5)
    with pytest.raises(ValueError, match="patience must be at least 1, got 0"):
        CollapseWarning(patience=0)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", ["own", "function", "smoothing"])
def test_the_router_target_is_part_of_every_loss(tmp_path, kind, adapted):
    def by_hand(outputs, labels, num_items_in_batch=None):
        return 2 * F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    model = make_model()
    if adapted:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = SeqBoatTrainer(
        model=model,
        args=arguments(tmp_path, label_smoothing_factor=0.1 if kind == "smoothing" else 0.0),
        train_dataset=rows(),
        compute_loss_func=by_hand if kind == "function" else None,
    )
    config = trainer.model.config
    losses = []
    for target in (None, 0.9):
        config.router_target_rate, config.router_target_weight = target, 10.0
        losses.append(trainer.compute_loss(trainer.model.train(), stack(rows(2))))
    penalty = trainer.model(**stack(rows(2))).router_penalty
    assert float(penalty.detach()) > 0.1
    torch.testing.assert_close(losses[1] - losses[0], penalty, atol=1e-4, rtol=1e-4)
    config.router_target_rate = 0.9
    trainer.model.eval()
    evaluated = trainer.compute_loss(trainer.model, stack(rows(2)))
    config.router_target_rate = None
    torch.testing.assert_close(evaluated, trainer.compute_loss(trainer.model, stack(rows(2))))
