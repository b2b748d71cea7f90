"""The promises on the GPU path: Triton kernels, padding, packing, chunks, static decoding. Skipped without a GPU."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from graphed_steps import check_that_an_overflow_is_computed_again, gradients, set_rates
from transformers import TrainerCallback, TrainingArguments

from modeling_seqboat import SeqBoatCache, SeqBoatConfig, SeqBoatForCausalLM, SeqBoatForSequenceClassification
from modeling_seqboat.graphed_step_seqboat import GraphedStep, GraphedUpdate
from modeling_seqboat.optimizer_seqboat import MuonAdamW
from modeling_seqboat.training_seqboat import RouterBudget, SeqBoatTrainer, parameter_groups

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def build(seed=0, **overrides):
    torch.manual_seed(seed)
    fields = {
        "hidden_size": 88, "num_hidden_layers": 3, "state_size": 16, "qk_head_dim": 32, "v_head_dim": 176,
        "memory_size": 64,
    }  # fmt: skip
    model = SeqBoatForCausalLM(SeqBoatConfig(**(fields | overrides))).eval().cuda()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router.weight" in name:
                parameter.normal_(0, 1)
            if "qk_scale" in name:
                parameter.normal_(0, 1)
    return model


def ids_of(rows, length, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, length), generator=generator).cuda()


def with_backend(model, backend):
    other = copy.deepcopy(model)
    other.config.kernel_backend = backend
    for module in other.modules():
        if hasattr(module, "config"):
            module.config.kernel_backend = backend
    return other


@pytest.mark.parametrize("attention", ["softmax", "relu2"])
@pytest.mark.parametrize("positions", ["rotary", "simple", "local"])
def test_fast_and_torch_path_agree_on_a_whole_model(attention, positions):
    model = build(attention_activation=attention, position_embedding_type=positions)
    ids = ids_of(3, 500)
    results = []
    for backend in ("triton", "torch"):
        chosen = with_backend(model, backend)
        out = chosen(ids, labels=ids, output_router_probs=True)
        out.loss.backward()
        grads = {name: p.grad for name, p in chosen.named_parameters()}
        results.append((out, grads))
    (fast, fast_grads), (slow, slow_grads) = results
    for a, b in zip(fast.router_probs, slow.router_probs, strict=True):
        assert ((a > 0) == (b > 0)).all()
    torch.testing.assert_close(fast.logits, slow.logits, atol=1e-3, rtol=1e-3)
    for name, grad in slow_grads.items():
        error = (fast_grads[name] - grad).norm() / grad.norm().clamp_min(1e-6)
        assert error < 2e-3, (name, float(error))


def test_decisions_in_bfloat16_differ_rarely_and_only_near_one_half():
    model = build()
    ids = ids_of(2, 2000)
    with torch.no_grad():
        exact = model.double()
        exact.config.kernel_backend = "torch"
        want = exact(ids, output_router_probs=True).router_probs[0]
        model = build()
        with torch.autocast("cuda", torch.bfloat16):
            got = model(ids, output_router_probs=True).router_probs[0]
    differ = (want > 0) != (got > 0)
    assert differ.float().mean() <= 0.005
    near = torch.maximum(want, got.double())[differ]
    assert ((near - 0.5).abs() < 0.01).all()


def test_padding_batches_and_packing_change_nothing():
    model = build()
    rows = [ids_of(1, n, seed=n) for n in (1, 63, 64, 65, 200)]
    alone = [model(row).logits for row in rows]
    width = 231
    batch = torch.zeros(len(rows), width, dtype=torch.long, device="cuda")
    mask = torch.zeros_like(batch)
    generator = torch.Generator().manual_seed(3)
    places = []
    for i, row in enumerate(rows):
        at = torch.randperm(width, generator=generator)[: row.shape[1]].sort().values.cuda()
        batch[i, at] = row[0]
        mask[i, at] = 1
        places.append(at)
    out = model(batch, attention_mask=mask)
    for i, at in enumerate(places):
        torch.testing.assert_close(out.logits[i, at], alone[i][0], atol=1e-3, rtol=1e-3)
    packed = torch.cat(rows, dim=1)
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None].cuda()
    logits = model(packed, position_ids=positions).logits
    torch.testing.assert_close(logits, torch.cat(alone, dim=1), atol=1e-3, rtol=1e-3)


def test_chunks_and_single_tokens_give_the_same_logits_and_cache():
    model = build()
    ids = ids_of(2, 400)
    with torch.no_grad():
        whole = model(ids, use_cache=True)
        cache = SeqBoatCache(model.config)
        parts = []
        for start, end in ((0, 129), (129, 130), (130, 131), (131, 390), *((i, i + 1) for i in range(390, 400))):
            parts.append(model(ids[:, start:end], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.logits, atol=1e-3, rtol=1e-3)
    for (name, a), (_, b) in zip(cache.tensors(), whole.past_key_values.tensors(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3, msg=name)


def test_static_generation_compiles_and_equals_the_run_without_a_cache():
    model = build()
    ids = ids_of(2, 70)
    arguments = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    want = model.generate(ids, use_cache=False, **arguments)
    assert torch.equal(model.generate(ids, **arguments), want)
    assert torch.equal(model.generate(ids, cache_implementation="static", **arguments), want)


def test_forward_repeats_bit_for_bit():
    model = build()
    ids = ids_of(2, 1000)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        first, second = (model(ids, output_router_probs=True) for _ in range(2))
    assert torch.equal(first.logits, second.logits)


def test_chunked_prefill_takes_constant_memory():
    model = build()
    peaks = []
    for length in (20_000, 100_000):
        cache = SeqBoatCache(model.config)
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            for start in range(0, length, 4096):
                model(ids_of(1, min(4096, length - start)), past_key_values=cache, logits_to_keep=1)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] - peaks[0] < 1 << 20


def _with_decisions(model, decisions):
    """Routers that activate these tokens, (B, L) bool a layer, whatever their logits say."""
    for layer, active in zip(model.model.layers, decisions, strict=True):

        def forward(x, real, places=None, route=None, router=layer.router, active=active):
            with torch.autocast("cuda", enabled=False):
                wide = x if x.dtype == torch.float64 else x.float()
                skip, run = torch.nn.functional.linear(wide, router.weight, router.bias).unbind(-1)
                confidence = torch.sigmoid((run - skip) * torch.exp(-router.log_temperature))
            return torch.where(active, confidence, 0), active, None

        layer.router.forward = forward
    return model


def test_with_decisions_forced_equal_both_paths_are_as_close_to_float64_as_bfloat16_allows():
    ids = ids_of(2, 1500)
    decisions = [probs > 0 for probs in build()(ids, output_router_probs=True).router_probs]

    def run(backend, dtype):
        model = _with_decisions(with_backend(build(), backend), decisions)
        model = model.double() if dtype == torch.float64 else model
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = model(ids, labels=ids)
        out.loss.backward()
        return out.logits.double(), {
            name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None
        }

    exact, exact_grads = run("torch", torch.float64)
    errors = {}
    for backend in ("torch", "triton"):
        logits, grads = run(backend, torch.bfloat16)
        errors[backend] = {"logits": float((logits - exact).norm() / exact.norm())}
        for name, grad in exact_grads.items():
            errors[backend][name] = float((grads[name] - grad).norm() / grad.norm().clamp_min(1e-9))
    for name, error in errors["triton"].items():
        # bfloat16 keeps 8 bits: what the torch path loses to it is the measure.
        assert error < max(1.5 * errors["torch"][name], 0.02), (name, error, errors["torch"][name])


def test_dropout_and_checkpointing_take_the_fused_path_too():
    model = build(hidden_dropout=0.1).train()
    ids = ids_of(2, 300)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(4)
        loss = model(ids, labels=ids).loss
        loss.backward()
        found.append((loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    assert found[0][0] == found[1][0]
    for once, twice in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(twice, once, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("truncation", [None, 40])
def test_a_bidirectional_model_agrees_on_both_paths(truncation):
    torch.manual_seed(0)
    config = SeqBoatConfig(
        hidden_size=88, num_hidden_layers=2, qk_head_dim=32, v_head_dim=176, memory_size=64, bidirectional=True,
        ssm_truncation=truncation,
    )  # fmt: skip
    model = SeqBoatForSequenceClassification(config).cuda()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.router.weight)
    ids, mask = ids_of(2, 400), torch.ones(2, 400, dtype=torch.long, device="cuda")
    mask[0, 350:] = 0
    found = []
    for backend in ("triton", "torch"):
        chosen = with_backend(model, backend)
        out = chosen(ids, attention_mask=mask, labels=torch.tensor([0, 1], device="cuda"))
        out.loss.backward()
        found.append((out.logits, [p.grad for p in chosen.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-3, rtol=1e-3)
    for fast, slow in zip(found[0][1], found[1][1], strict=True):
        assert (fast - slow).norm() < 2e-3 * slow.norm().clamp_min(1e-6)


def test_a_graphed_step_gives_the_gradients_of_an_eager_one():
    model = build().train()
    step = GraphedStep(model, divisor=2)
    for turn in range(4):
        batches = [ids_of(2, 500, seed=10 * turn + part) for part in range(2)]
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            for ids in batches:
                loss = step(input_ids=ids, labels=ids)
        found = gradients(model)
        model.zero_grad(set_to_none=turn % 2 == 0)
        with torch.autocast("cuda", torch.bfloat16):
            for ids in batches:
                expected = model(ids, labels=ids, use_cache=False).loss
                (expected / 2).backward()
        torch.testing.assert_close(loss, expected.detach(), atol=1e-5, rtol=1e-5)
        for name, grad in gradients(model).items():
            assert (found[name] - grad).norm() < 1e-2 * grad.norm().clamp_min(1e-6), (turn, name)
        with torch.no_grad():
            for p in model.parameters():
                # The graph must read the weights as they are now.
                p.add_(0.01 * torch.randn_like(p))
    assert step.captures == 1 and step.overflows == 0


def test_a_graphed_step_with_more_tokens_than_room_is_computed_again():
    model = build().train()
    step = GraphedStep(model, headroom=1.0)
    ids = ids_of(2, 2000)
    check_that_an_overflow_is_computed_again(step, model, ids, few=4.0, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("update_in_a_graph", [False, True])
def test_a_budget_in_a_graph_moves_routers_as_in_an_eager_training(update_in_a_graph):
    """Over captures, replays and an overflow, with Muon on the matrices, rates that fall and clipping."""
    eager = build(router_target_rate=0.2).train()
    graphed = copy.deepcopy(eager)
    step, sides = GraphedStep(graphed, headroom=1.0), []
    for model in (eager, graphed):
        rates = dict(router_learning_rate=1e-4, muon_learning_rate=1e-3, qk_learning_rate=4e-4)
        optimizer = MuonAdamW(parameter_groups(model, 0.1, **rates, muon_split=True), lr=1e-4, row_beta=0.95)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda turn: 1 - turn / 20)
        sides.append((model, optimizer, schedule, RouterBudget(model, gain=0.05)))
    update = GraphedUpdate(sides[1][1], 0.5, [sides[1][3].step])
    for turn in range(12):
        ids = ids_of(2, 2000, seed=turn)
        for model, optimizer, schedule, budget in sides:
            if turn == 6:
                set_rates(model, -30.0)
            if model is graphed:
                step(input_ids=ids, labels=ids)
            else:
                model(ids, labels=ids).loss.backward()
            if model is graphed and update_in_a_graph:
                update()
            else:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                budget.step()
            optimizer.zero_grad()
            schedule.step()
        for one, other in zip(eager.model.layers, graphed.model.layers, strict=True):
            torch.testing.assert_close(other.router.bias, one.router.bias, atol=1e-3, rtol=0)
        # A sum that rounds another way turns a small gradient's step around.
        torch.testing.assert_close(graphed.state_dict(), eager.state_dict(), atol=2e-3, rtol=0)
    assert step.captures >= 2 and step.overflows >= 1
    assert not update_in_a_graph or update.captures >= 2


def test_the_trainer_replays_steps_and_optimizer_as_it_would_run_them(tmp_path):
    data = [{"input_ids": row, "labels": row} for row in ids_of(32, 500).cpu()]
    losses, captures = [], []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer, **kwargs):
            captures.append(getattr(optimizer.optimizer.step, "captures", 0))

    for graphs in (False, True):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=8, per_device_train_batch_size=2, logging_steps=1, report_to="none", seed=3,
            save_strategy="no", disable_tqdm=True, gradient_accumulation_steps=2, warmup_steps=3,
        )  # fmt: skip
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1
        model = build(router_target_rate=0.4)
        optimizer = MuonAdamW(parameter_groups(model, 0.1, muon_learning_rate=1e-3), lr=1e-4)
        run = SeqBoatTrainer(
            model, arguments, train_dataset=data, optimizers=(optimizer, None), cuda_graphs=graphs, router_gain=0.1,
            callbacks=[Watch()],
        )  # fmt: skip
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert len(losses[0]) == 8 and losses[0][-1] < losses[0][0]
    # A sum that rounds another way turns a small gradient's step around.
    assert losses[0] == pytest.approx(losses[1], abs=2e-2)
    assert captures[7] == 0 and captures[-1] >= 1


def test_a_graphed_step_draws_dropout_anew_and_takes_another_shape():
    model = build(hidden_dropout=0.2).train()
    step = GraphedStep(model)
    ids = ids_of(2, 300)
    losses = [float(step(input_ids=ids, labels=ids)) for _ in range(4)]
    assert len(set(losses)) == 4
    longer = ids_of(3, 400)
    model.eval()
    assert float(step(input_ids=longer, labels=longer)) == float(model(longer, labels=longer, use_cache=False).loss)
    assert step.captures == 1


def test_a_graphed_step_refuses_a_model_without_fused_kernels():
    ids = ids_of(1, 100)
    with pytest.raises(ValueError, match="fused kernels in every layer"):
        GraphedStep(build(attention_activation="laplace").train())(input_ids=ids, labels=ids)


@pytest.mark.timeout(500)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_sequence_cut_over_two_gpus_is_read_as_on_one(tmp_path):
    """In float32 but for rounding; under bfloat16 autocast no farther from float32 than one GPU is."""
    root, report_file = Path(__file__).resolve().parent.parent, tmp_path / "report.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*command, str(root / "tests/context_gpu_worker.py"), str(report_file)],
        cwd=root, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    for name, found in json.loads(report_file.read_text("utf-8")).items():
        assert found["prefill"] < 1e-3, name
        exact, half = found["float32 parts"], found["bfloat16 whole"]
        assert exact["loss"] < 1e-5 and exact["gradient"] < 2e-3 and exact["flipped"] < 1e-3, (name, exact)
        for kind in ("bfloat16 parts", "bfloat16 parts, checkpointed"):
            parts = found[kind]
            assert parts["loss"] < 2 * half["loss"] + 1e-3, (name, kind, parts, half)
            assert parts["gradient"] < 2 * half["gradient"] + 1e-3, (name, kind, parts, half)
            assert parts["flipped"] < 2 * half["flipped"] + 1e-3, (name, kind, parts, half)
