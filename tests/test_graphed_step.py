"""GraphedStep's bookkeeping, what it refuses, and the Trainer's use of it; what needs a GPU is in test_gpu.py."""

import copy
from types import SimpleNamespace

import pytest
import torch
from graphed_steps import (
    CUDA_STAND_INS,
    EmulatedGraph,
    EmulatedUpdate,
    check_that_an_overflow_is_computed_again,
    gradients,
    set_rates,
)
from small_models import random_ids, small_lm
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback, TrainingArguments
from triton_interpreter import DEVICE  # before anything imports triton

from modeling_seqboat import (
    SeqBoatCache,
    SeqBoatConfig,
    SeqBoatForSequenceClassification,
    graphed_step_seqboat,
    training_seqboat,
)
from modeling_seqboat.graphed_step_seqboat import GraphedStep, GraphedUpdate
from modeling_seqboat.optimizer_seqboat import MuonAdamW
from modeling_seqboat.training_seqboat import RouterBudget, RouterMonitor, SeqBoatTrainer, parameter_groups


class OnAnyDevice(GraphedStep):
    """Writes down what it would do in place of capturing and replaying."""

    def __init__(self, model):
        self.given = self.model = model
        self.parallel, self.divisor, self.headroom, self.device = None, 1.0, 1.2, torch.device("cpu")
        self._modules = list(model.modules())
        self.captures = self.overflows = self._calls = 0
        self._peaks = self._other = None
        self._forget()
        self.log: list[str] = []

    def _backward(self, batch, model=None, check=False):
        self.log.append("plain")

    def _eager(self, batch):
        self.log.append("measure")
        self._peaks = [1]

    def _capture(self, batch):
        self.log.append("capture")
        self._graph = object()

    def _replay(self, batch):
        self.log.append("replay")


def batch_of(rows):
    return {"input_ids": random_ids(rows, 8), "labels": random_ids(rows, 8)}


def did(step, *calls):
    step.log.clear()
    for batch in calls:
        step(**batch)
    return step.log


def test_a_short_batch_at_the_end_of_an_epoch_keeps_the_graph():
    step, whole, short = OnAnyDevice(small_lm()), batch_of(4), batch_of(3)
    assert did(step, whole, whole, whole) == ["measure", "capture", "replay", "replay"]
    for _ in range(3):
        assert did(step, short, whole, whole) == ["plain", "replay", "replay"]
    assert did(step, short, short, short) == ["plain", "measure", "capture", "replay"]


@pytest.mark.parametrize("change", ["mode", "autocast", "frozen", "memory", "hook", "argument"])
def test_a_call_under_other_circumstances_does_not_replay(change):
    model = small_lm().train()
    step, batch = OnAnyDevice(model), batch_of(4)
    did(step, batch, batch)
    weight = model.model.layers[0].hidden_proj.weight
    if change == "mode":
        model.eval()
    elif change == "frozen":
        weight.requires_grad_(False)
    elif change == "memory":
        weight.data = weight.detach().clone()
    elif change == "hook":
        model.model.register_forward_hook(lambda *args: None)
    elif change == "argument":
        batch["use_cache"] = False
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        assert did(step, batch, batch, batch) == ["plain", "measure", "capture", "replay"]


def test_the_hooks_that_a_graph_writes_for_live_as_long_as_it(monkeypatch):
    """A monitor that was closed must not leave the graph with freed memory to count in."""
    model = small_lm().train()
    with RouterMonitor(model):
        step = OnAnyDevice(model)
        hooks = step._forward_hooks()
    assert len(hooks) == model.config.num_hidden_layers and step._forward_hooks() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.gradient_checkpointing_enable({"use_reentrant": False}), "gradient checkpointing"),
        (lambda model: model.compile(), "a compiled model"),
        (lambda model: model.requires_grad_(False), "no parameter is trainable"),
        (lambda model: model.lm_head.weight.register_hook(lambda grad: grad), "hooks on parameters"),
        (lambda model: setattr(model.config, "loss_implementation", "liger"), "'liger' waits for the device"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused_by_name(change, message):
    model = small_lm().train()
    change(model)
    with pytest.raises(ValueError, match=message):
        OnAnyDevice(model)._refuse(batch_of(2))


def test_batch_norm_under_a_mask_is_refused():
    config = SeqBoatConfig(hidden_size=16, num_hidden_layers=1, bidirectional=True, norm_type="batchnorm")
    step = OnAnyDevice(SeqBoatForSequenceClassification(config).train())
    inputs = {"input_ids": random_ids(2, 8), "labels": torch.zeros(2, dtype=torch.long)}
    step._refuse(inputs)
    with pytest.raises(ValueError, match="leave the mask out"):
        step._refuse(inputs | {"attention_mask": torch.ones(2, 8)})


def test_float16_is_refused():
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="use bfloat16"):
        OnAnyDevice(small_lm().train())._refuse(batch_of(2))


class Stub:
    """A graphed step that is not one."""

    captures = overflows = 0
    captured = True

    def __init__(self, model, divisor=1.0):
        self.given = self.model = model
        self.divisor, self.calls = divisor, 0

    def __call__(self, **batch):
        self.calls += 1
        loss = self.model(**batch).loss
        (loss / self.divisor).backward()
        return loss.detach()


def trainer(tmp_path, kind=SeqBoatTrainer, gradient_accumulation_steps=1, **options):
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, logging_steps=1, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, seed=3, gradient_accumulation_steps=gradient_accumulation_steps,
    )  # fmt: skip
    # Batches of one step have different numbers of labels.
    data = [{"input_ids": row, "labels": row.index_fill(0, torch.arange(n), -100)}
            for n, row in enumerate(random_ids(10, 12))]  # fmt: skip
    return kind(model=small_lm(router_target_rate=0.3), args=arguments, train_dataset=data, **options)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_takes_the_losses_of_graphed_steps(tmp_path, monkeypatch, accumulation):
    """And the gradients: the last step of an epoch accumulates over fewer batches."""
    monkeypatch.setattr(training_seqboat, "GraphedStep", Stub)
    found, weights = [], []
    for graphs in (False, True):
        run = trainer(tmp_path, gradient_accumulation_steps=accumulation)
        run.cuda_graphs = graphs
        run.train()
        found.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
        weights.append(run.model.state_dict())
    assert found[0] == pytest.approx(found[1])
    assert run._graphed.calls == (3 if accumulation == 1 else 5)
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=1e-5)


def test_auto_graphs_are_nothing_on_a_cpu_and_end_where_they_cannot_be_had(tmp_path, monkeypatch, caplog):
    assert trainer(tmp_path, cuda_graphs="auto").cuda_graphs is False
    with pytest.raises(ValueError, match="cuda_graphs must be True, False or 'auto', got 'always'"):
        trainer(tmp_path, cuda_graphs="always")

    class Refusing(Stub):
        def __call__(self, **batch):
            raise ValueError("GraphedStep cannot run this: hooks")

    class Recapturing(Stub):
        captures = property(lambda self: self.calls + 4)

    plain = trainer(tmp_path)
    plain.train()
    for kind in (Refusing, Recapturing):
        monkeypatch.setattr(training_seqboat, "GraphedStep", kind)
        run = trainer(tmp_path)
        run.cuda_graphs = run._graphs_are_optional = True
        run.train()
        assert run.cuda_graphs is False
        torch.testing.assert_close(run.model.state_dict(), plain.model.state_dict(), atol=1e-6, rtol=1e-5)


def test_auto_graphs_leave_losses_alone_that_are_not_the_models(tmp_path):
    class Own(SeqBoatTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    assert trainer(tmp_path)._computes_the_models_loss()
    assert not trainer(tmp_path, Own)._computes_the_models_loss()


def test_the_trainer_refuses_graphs_where_there_can_be_none(tmp_path):
    with pytest.raises(ValueError, match="cuda_graphs cannot be used: it needs a GPU"):
        trainer(tmp_path, cuda_graphs=True)


def test_a_step_in_place_does_not_touch_what_backward_needs(monkeypatch):
    ids, found = random_ids(2, 8).to(DEVICE), []
    models = [small_lm(num_hidden_layers=1).to(DEVICE).train() for _ in range(2)]
    monkeypatch.setenv("SEQBOAT_KERNEL_BACKEND", "triton")
    for goes_on, model in zip((False, True), models, strict=True):
        cache = SeqBoatCache(model.config)
        model(ids[:, :5], past_key_values=cache)
        loss = model(ids[:, 5:6], past_key_values=cache).logits.square().sum()
        if goes_on:
            with torch.no_grad():
                model(ids[:, 6:7], past_key_values=cache)
        loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for alone, followed in zip(*found, strict=True):
        torch.testing.assert_close(followed, alone, atol=1e-6, rtol=1e-6)


@pytest.fixture
def emulated(monkeypatch):
    if DEVICE == "cuda":
        pytest.skip("stands in for a GPU; test_gpu.py has the real thing")
    for name, stand_in in CUDA_STAND_INS.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return small_lm(num_hidden_layers=1, kernel_backend="triton").train()


def test_the_trainer_replays_the_optimizer(emulated, tmp_path, monkeypatch, recwarn):
    """With rates that fall and clipping; a second training goes on with the same one."""

    class Steps(EmulatedUpdate, training_seqboat._OptimizerSteps):
        pass

    monkeypatch.setattr(training_seqboat, "GraphedStep", EmulatedGraph)
    monkeypatch.setattr(training_seqboat, "_OptimizerSteps", Steps)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=1, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, max_grad_norm=0.1,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in random_ids(4, 6)]
    weights, seen = [], []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append(None)

        def on_step_end(self, args, state, control, optimizer, **kwargs):
            seen[-1] = optimizer.optimizer.step

    for graphs in (False, True):
        model = copy.deepcopy(emulated)
        optimizer = MuonAdamW(parameter_groups(model, 0.1, muon_learning_rate=1e-2), lr=1e-3, fused=True)
        for _ in range(2):
            run = SeqBoatTrainer(
                model=model, args=arguments, train_dataset=data, optimizers=(optimizer, None), callbacks=[Watch()]
            )
            run.cuda_graphs = graphs
            run.train()
            # Nothing of a graph stays with what lives longer than the Trainer.
            assert isinstance(seen[-1], Steps) == graphs and not isinstance(optimizer.step, GraphedUpdate)
        weights.append(model.state_dict())
    # One step as usual each time, since a new graph has other gradients.
    assert all(steps.captures == 1 and steps.replays >= 2 for steps in seen[2:])
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=1e-4)
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


class Counting(torch.optim.AdamW):
    """Of somebody else, who does more in a step than a graph holds."""


class Wrapper(torch.optim.Optimizer):
    """Has nothing of a torch optimizer but its groups, as wrappers do that others write."""

    def __init__(self, inner):
        self.param_groups, self.inner = inner.param_groups, inner

    def step(self, closure=None):
        return self.inner.step(closure)


def test_the_trainer_leaves_optimizers_alone_that_cannot_be_captured(emulated):
    parameters = list(emulated.parameters())
    patched = torch.optim.AdamW(parameters, capturable=True)
    patched.step = lambda closure=None: None
    for optimizer in (
        torch.optim.AdamW(parameters), torch.optim.SGD(parameters, lr=0.1), Counting(parameters, capturable=True),
        Wrapper(torch.optim.AdamW(parameters, capturable=True)), patched,
    ):  # fmt: skip
        step = optimizer.step
        training_seqboat._OptimizerSteps.install(optimizer)
        assert optimizer.step == step
    watched = torch.optim.AdamW(parameters, capturable=True)
    watched.register_step_post_hook(lambda *args: None)
    training_seqboat._OptimizerSteps.install(watched)
    assert not isinstance(watched.step, GraphedUpdate)


@pytest.mark.parametrize("change", ["hook", "hook of all", "settings"])
def test_a_replayed_optimizer_steps_as_usual_after_a_change(emulated, change):
    """A hook that a replay would not run; a checkpoint of an optimizer that was not fused."""

    class Steps(EmulatedUpdate, training_seqboat._OptimizerSteps):
        pass

    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = torch.optim.AdamW(parameters[:1], lr=0.1, fused=True)
    plain = torch.optim.AdamW(parameters[1:], lr=0.1, fused=True)
    Steps.install(optimizer)
    for parameter in parameters:
        parameter.grad = torch.ones(3)
    runs, handles = [], []

    def hook(stepped, args, kwargs):
        runs.append(stepped is optimizer)

    for step in range(6):
        if step == 3 and change == "settings":
            for one in (optimizer, plain):
                one.param_groups[0]["fused"] = None
        elif step == 3:
            register = optimizer.register_step_post_hook if change == "hook" else register_optimizer_step_post_hook
            handles.append(register(hook))
        optimizer.step()
        plain.step()
    for handle in handles:
        handle.remove()
    assert optimizer.step.replays == 2 and sum(runs) == (0 if change == "settings" else 3)
    torch.testing.assert_close(parameters[0], parameters[1])
    # A graph that is not replayed keeps no gradients.
    assert not optimizer.step._held


def test_a_trainer_that_leaves_its_graphs_frees_their_gradients(emulated, tmp_path):
    run = SeqBoatTrainer(
        model=emulated, args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
        optimizers=(torch.optim.AdamW(emulated.parameters(), capturable=True), None),
    )  # fmt: skip
    step = run.optimizer.step
    training_seqboat._OptimizerSteps.install(run.optimizer)
    assert isinstance(run.optimizer.step, GraphedUpdate)
    run._run_op_by_op("batches change their shape")
    assert run.optimizer.step == step


def test_gradients_are_those_of_plain_steps_however_they_are_cleared(emulated):
    model, divisor = emulated, 2
    step = EmulatedGraph(model, divisor)
    for turn in range(2):
        batches = [random_ids(1, 16, seed=7 * turn + part) for part in range(divisor)]
        model.zero_grad(set_to_none=turn == 0)
        losses = [step(input_ids=ids, labels=ids) for ids in batches]
        found = gradients(model)
        model.zero_grad(set_to_none=turn == 0)
        for ids, loss in zip(batches, losses, strict=True):
            expected = model(ids, labels=ids, use_cache=False).loss
            (expected / divisor).backward()
            torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(found, gradients(model), atol=1e-6, rtol=1e-5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.ones_like(parameter))
    assert step.captures == 1 and step.overflows == 0


@pytest.fixture
def tight(monkeypatch):
    """Room for hardly more tokens than were seen."""
    monkeypatch.setattr(graphed_step_seqboat, "_STEP", 4)
    monkeypatch.setattr(graphed_step_seqboat, "_SPARE", 0)


def test_a_budget_counts_every_batch_once_captured_or_computed_again(emulated, tight):
    emulated.config.router_target_rate = 0.3
    plain = copy.deepcopy(emulated)
    # A graph needs the kernels; their twins in torch are faster here, and activate the same tokens.
    plain.config.kernel_backend = "torch"
    step = EmulatedGraph(emulated, headroom=1.0)
    with RouterBudget(emulated, gain=0.5) as graphed, RouterBudget(plain, gain=0.5) as eager:
        for turn, threshold in enumerate((2.0, 2.0, 2.0, -30.0, -30.0)):
            ids = random_ids(1, 16, seed=turn)
            for model in (emulated, plain):
                set_rates(model, threshold)
            step(input_ids=ids, labels=ids)
            plain(ids, labels=ids).loss.backward()
            graphed.step()
            eager.step()
            torch.testing.assert_close(emulated.state_dict(), plain.state_dict())
    assert step.captures == 2 and step.overflows == 1


def test_more_tokens_than_room_are_computed_again(emulated, tight):
    model, step, ids = emulated, EmulatedGraph(emulated, headroom=1.0), random_ids(1, 16)
    check_that_an_overflow_is_computed_again(step, model, ids, few=2.0)


def test_gradients_travel_also_in_the_step_that_gives_its_graph_up(emulated, tight, monkeypatch):
    """Under data parallelism: a process that left them out would leave the others waiting."""
    sent = []
    monkeypatch.setattr(graphed_step_seqboat, "_WINDOW", 1)
    monkeypatch.setattr(graphed_step_seqboat, "_average", lambda flats, group: sent.append(flats))
    step, ids = EmulatedGraph(emulated, headroom=1.0), random_ids(1, 16)
    options = {"broadcast_buffers": False, "require_backward_grad_sync": True, "process_group": None}
    step.parallel = SimpleNamespace(**options, _comm_hooks=[])
    for bias in (-30.0, -30.0, 2.0, 2.0):
        set_rates(emulated, bias)
        emulated.zero_grad()
        step(input_ids=ids, labels=ids)
    assert step.captures == 1 and step._graph is None
    size = sum(parameter.numel() for parameter in emulated.parameters())
    assert [sum(flat.numel() for flat in flats) for flats in sent] == [size] * 4
    flat = torch.cat(sent[-1])
    torch.testing.assert_close(flat, torch.cat([parameter.grad.flatten() for parameter in emulated.parameters()]))


def muon(model) -> MuonAdamW:
    rates = dict(router_learning_rate=1e-3, muon_learning_rate=0.02, qk_learning_rate=0.016)
    return MuonAdamW(parameter_groups(model, 0.1, **rates, muon_split=True), lr=4e-3, row_beta=0.95, fused=True)


def test_an_update_as_a_graph_is_that_of_plain_calls(emulated, tight):
    """Rates that fall, an overflow on the way, a budget behind it."""
    emulated.config.router_target_rate = 0.3
    plain = copy.deepcopy(emulated)
    plain.config.kernel_backend = "torch"
    models, budgets = (emulated, plain), [RouterBudget(model, gain=0.5) for model in (emulated, plain)]
    optimizers = [muon(model) for model in models]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)) for optimizer in optimizers]
    step, update = EmulatedGraph(emulated, headroom=1.0), EmulatedUpdate(optimizers[0], 0.1, [budgets[0].step])
    for turn, threshold in enumerate((2.0, 2.0, 2.0, 2.0, -30.0, -30.0, -30.0, -30.0)):
        ids = random_ids(1, 16, seed=turn)
        for model in models:
            set_rates(model, threshold)
        step(input_ids=ids, labels=ids)
        update()
        plain(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizers[1].step()
        budgets[1].step()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.zero_grad()
            schedule.step()
        torch.testing.assert_close(emulated.state_dict(), plain.state_dict(), atol=2e-5, rtol=1e-4)
    assert step.overflows == 1 and step.captures == update.captures == 2
    assert update.replays == 4
    assert all(isinstance(group["lr"], float) and not group["capturable"] for group in optimizers[0].param_groups)


def test_an_update_is_captured_again_after_a_change(emulated):
    optimizer = muon(emulated)
    update = EmulatedUpdate(optimizer)
    for parameter in emulated.parameters():
        parameter.grad = torch.ones_like(parameter)

    def captures(calls: int) -> int:
        before = update.captures
        for _ in range(calls):
            update()
        return update.captures - before

    assert captures(3) == 1
    optimizer.param_groups[0]["weight_decay"] = 0.5
    assert captures(1) == 0 and captures(2) == 1
    optimizer.load_state_dict(optimizer.state_dict())
    assert captures(1) == 0 and captures(2) == 1


def test_an_optimizer_that_cannot_be_captured_is_refused():
    parameter = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="cannot capture the steps of LBFGS"):
        GraphedUpdate(torch.optim.LBFGS([parameter]))
    update = GraphedUpdate(torch.optim.RAdam([parameter]))
    parameter.grad = torch.ones(2)
    update()
    with pytest.raises(ValueError, match="this RAdam: make it with fused=True or capturable=True"):
        update()
