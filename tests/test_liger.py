"""The language model's loss without logits: equal to torch's, and refused with a reason where it cannot run.

A stand-in for the package tests the wiring; where liger-kernel is installed, its kernels run too.
"""

import importlib.util
import sys
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_models import random_ids, small_lm
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from modeling_seqboat import SeqBoatConfig, SeqBoatForCausalLM, SeqBoatModel
from modeling_seqboat.graphed_step_seqboat import GraphedStep

needs_package = pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def put_in_place(monkeypatch, loss: type) -> None:
    package, module = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.transformers")
    module.LigerFusedLinearCrossEntropyLoss = loss
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)


@pytest.fixture
def calls(monkeypatch):
    """A stand-in that computes the loss naively; what it was called with."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = []

    class Loss(nn.Module):
        def __init__(self, reduction="mean", accum_dtype=None):
            super().__init__()
            self.settings = {"reduction": reduction, "accum_dtype": accum_dtype}

        def forward(self, lin_weight, _input, target, bias=None):
            found.append({"weight": lin_weight, "input": _input, "target": target, "bias": bias, **self.settings})
            logits = F.linear(_input, lin_weight, bias).float()
            return F.cross_entropy(logits, target, reduction=self.settings["reduction"])

    put_in_place(monkeypatch, Loss)
    return found


@pytest.fixture(params=["stand-in", pytest.param("package", marks=needs_package)])
def device(request) -> str:
    """Where the stand-in and, in the interpreter or on a GPU, the package run."""
    if request.param == "package":
        return "cuda" if torch.cuda.is_available() else "cpu"
    request.getfixturevalue("calls")
    return "cpu"


def moved(inputs: dict, device: str) -> dict:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def both(device: str, inputs: dict, autocast: bool = False, prepare=None, **overrides) -> list:
    """Loss and gradients with torch and with Liger, of a model in training."""
    results, inputs = [], moved(inputs, device)
    for implementation in ("torch", "liger"):
        model = small_lm(loss_implementation=implementation, **overrides).to(device).train()
        if prepare is not None:
            prepare(model)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            out = model(**inputs)
        assert (out.logits is None) == (implementation == "liger")
        out.loss.backward()
        results.append((out.loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    return results


def assert_equal(results: list, **tolerances) -> None:
    (loss, grads), (found, found_grads) = results
    torch.testing.assert_close(found, loss, **tolerances)
    assert found_grads.keys() == grads.keys() and grads
    for name, grad in grads.items():
        torch.testing.assert_close(
            found_grads[name], grad, msg=lambda text, name=name: f"{name}: {text}", **tolerances
        )


def batch(kind: str) -> dict:
    ids = random_ids(3, 12)
    labels = ids.clone()
    if kind == "ignored":
        labels[:, :5] = -100
    if kind == "padded":
        mask = torch.ones_like(ids)
        mask[0, :4], mask[1, 9:], mask[2, 5] = 0, 0, 0
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if kind == "packed":
        positions = torch.cat([torch.arange(7), torch.arange(5)]).expand(3, 12)
        return {"input_ids": ids, "position_ids": positions, "labels": labels}
    counts = {"items": 20, "items tensor": torch.tensor(20)}
    return {"input_ids": ids, "labels": labels, **({"num_items_in_batch": counts[kind]} if kind in counts else {})}


@pytest.mark.parametrize("kind", ["plain", "ignored", "padded", "packed", "items", "items tensor"])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_those_of_torch(device, kind, tied):
    assert_equal(both(device, batch(kind), tie_word_embeddings=tied), atol=1e-5, rtol=1e-3)


def test_the_router_penalty_is_added(device):
    results = both(device, batch("items"), router_target_rate=0.1)
    without = both(device, batch("items"))
    assert_equal(results, atol=1e-5, rtol=1e-3)
    assert results[1][0] > without[1][0] + 1e-3


def test_autocast_rounds_as_it_does_for_a_linear_layer(device):
    assert_equal(both(device, batch("ignored"), autocast=True), atol=2e-3, rtol=2e-2)


def test_a_frozen_body_leaves_the_output_matrix_its_gradient(device):
    results = both(
        device, batch("plain"), tie_word_embeddings=False, prepare=lambda model: model.model.requires_grad_(False)
    )
    assert results[1][1].keys() == {"lm_head.weight"}
    assert_equal(results, atol=1e-5, rtol=1e-3)


def test_a_frozen_output_matrix_gets_none(device):
    results = both(
        device, batch("plain"), tie_word_embeddings=False, prepare=lambda model: model.lm_head.requires_grad_(False)
    )
    assert "lm_head.weight" not in results[1][1]
    assert_equal(results, atol=1e-5, rtol=1e-3)


def test_no_label_at_all_costs_nothing_as_in_torch(device):
    labels = torch.full((1, 6), -100)
    model = small_lm(loss_implementation="liger").to(device).train()
    assert model(random_ids(1, 6).to(device), labels=labels.to(device)).loss == 0


def test_liger_gets_hidden_states_and_the_matrix_and_sums_in_float32(calls):
    model = small_lm(loss_implementation="liger").train()
    inputs = batch("ignored")
    model(**inputs)
    (call,) = calls
    assert call["weight"] is model.lm_head.weight and call["bias"] is None
    assert call["input"].shape == (36, 16)
    assert (call["reduction"], call["accum_dtype"]) == ("sum", torch.float32)
    expected = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    assert torch.equal(call["target"].view(3, 12), expected)
    with torch.autocast("cpu", torch.bfloat16):
        model(**inputs)
    assert calls[1]["weight"].dtype == calls[1]["input"].dtype == torch.bfloat16


def test_logits_are_there_in_evaluation_without_labels_and_on_request(calls):
    model = small_lm(loss_implementation="liger")
    inputs = batch("plain")
    plain = small_lm()(**inputs)
    found = model(**inputs)
    assert torch.equal(found.logits, plain.logits) and torch.equal(found.loss, plain.loss)
    assert model.train()(inputs["input_ids"]).logits is not None
    assert model(**inputs, skip_logits=False).logits is not None
    assert not calls
    skipped = model.eval()(**inputs, skip_logits=True)
    assert skipped.logits is None
    torch.testing.assert_close(skipped.loss, plain.loss)
    assert len(calls) == 1
    with pytest.raises(ValueError, match="logits_to_keep"):
        model.train()(**inputs, logits_to_keep=1)


@pytest.mark.parametrize("use_liger_kernel", [False, True])
def test_the_trainer_accumulates_gradients_to_the_same_weights(calls, tmp_path, monkeypatch, use_liger_kernel):
    """Rows with different numbers of labels, so that a mean a micro-batch would not do; use_liger_kernel, which leaves
    an unknown architecture alone, makes the evaluation ask for no logits."""
    if use_liger_kernel:
        monkeypatch.setattr("transformers.trainer.apply_liger_kernel", lambda *args: None)
    rows = []
    for index in range(8):
        ids = random_ids(1, 12, seed=index)[0]
        rows.append({"input_ids": ids, "labels": torch.where(torch.arange(12) < index, -100, ids)})
    weights, losses = [], []
    for implementation in ("torch", "liger"):
        model = small_lm(loss_implementation=implementation, router_target_rate=0.1)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True, seed=0, prediction_loss_only=True,
            use_liger_kernel=use_liger_kernel,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        before = len(calls)
        losses.append(trainer.evaluate()["eval_loss"])
        weights.append(list(model.parameters()))
    assert before == 4
    assert len(calls) == (5 if use_liger_kernel else 4)
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    for expected, found in zip(*weights, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


def refusal(model: nn.Module, monkeypatch) -> str:
    """What a training forward is refused with, before any layer runs."""
    monkeypatch.setattr(SeqBoatModel, "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    ids = random_ids(1, 6).to(next(model.parameters()).device)
    with pytest.raises(ValueError, match="loss_implementation='liger' cannot run") as refused:
        model.train()(input_ids=ids, labels=ids)
    return str(refused.value)


def test_a_cpu_is_refused(calls, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "tensors are on cpu" in refusal(small_lm(loss_implementation="liger"), monkeypatch)


def test_float64_is_refused(calls, monkeypatch):
    assert "torch.float64" in refusal(small_lm(loss_implementation="liger").double(), monkeypatch)


def test_a_missing_package_is_refused(calls, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    assert "liger-kernel is not installed" in refusal(small_lm(loss_implementation="liger"), monkeypatch)


def test_a_package_that_cannot_sum_in_float32_is_refused(monkeypatch):
    class OldLoss(nn.Module):
        def __init__(self, reduction="mean"):
            super().__init__()

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    put_in_place(monkeypatch, OldLoss)
    assert "older than 0.6.2" in refusal(small_lm(loss_implementation="liger"), monkeypatch)


@pytest.mark.parametrize("settings", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_an_output_layer_of_peft_is_refused(calls, monkeypatch, settings):
    model = small_lm(loss_implementation="liger", tie_word_embeddings=False)
    settings = {"target_modules": ["in_proj"], **settings}
    model = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **settings))
    assert "lm_head must be a plain linear layer, got" in refusal(model, monkeypatch)


def test_a_sharded_matrix_is_refused(calls, monkeypatch):
    model = small_lm(loss_implementation="liger", tie_word_embeddings=False)
    model.lm_head.weight.data = torch.empty(0)
    assert "lm_head.weight must be of shape (40, 16), got (0,)" in refusal(model, monkeypatch)


def test_adapters_elsewhere_train_as_with_torch(device):
    def adapted(implementation):
        model = small_lm(loss_implementation=implementation)
        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=["in_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(model, config).to(device).train()
        loss = model(**moved(batch("plain"), device)).loss
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    assert_equal([adapted("torch"), adapted("liger")], atol=1e-5, rtol=1e-3)


def test_encoders_have_no_such_loss():
    with pytest.raises(ValueError, match="loss_implementation='liger' contradicts bidirectional=True"):
        SeqBoatConfig(bidirectional=True, loss_implementation="liger")
    with pytest.raises(ValueError, match="did you mean 'liger'"):
        SeqBoatConfig(loss_implementation="ligr")


def test_the_choice_is_saved_with_the_model(tmp_path):
    small_lm(loss_implementation="liger").save_pretrained(tmp_path)
    assert SeqBoatForCausalLM.from_pretrained(tmp_path).config.loss_implementation == "liger"


@needs_gpu
@needs_package
@pytest.mark.parametrize("autocast", [False, True])
def test_a_gpu_gives_the_loss_of_torch_in_a_fraction_of_the_memory(autocast):
    vocabulary, rows, length = 50_000, 4, 2048
    ids = random_ids(rows, length, vocab_size=vocabulary).cuda()
    results, peaks = [], []
    for implementation in ("torch", "liger"):
        model = small_lm(loss_implementation=implementation, vocab_size=vocabulary, hidden_size=256).cuda().train()
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids).loss
        loss.backward()
        peaks.append(torch.cuda.max_memory_allocated())
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        del model, loss
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-3, rtol=1e-3)
    for name, grad in results[0][1].items():
        error = (results[1][1][name] - grad).norm() / grad.norm().clamp_min(1e-9)
        assert error < (3e-2 if autocast else 2e-3), (name, float(error))
    assert peaks[0] - peaks[1] > rows * length * vocabulary * 4


@needs_gpu
@needs_package
def test_a_cuda_graph_is_refused_with_the_reason():
    step = GraphedStep(small_lm(loss_implementation="liger").cuda().train())
    ids = random_ids(2, 64).cuda()
    with pytest.raises(
        ValueError, match="loss_implementation='liger' waits for the device in every step; use 'torch'"
    ):
        step(input_ids=ids, labels=ids)
