"""Muon for the layers' matrices and AdamW for the rest in one optimizer: it equals torch's two, and goes wherever one
optimizer goes."""

import copy

import pytest
import torch
from accelerate import Accelerator
from helpers import tiny_lm, token_ids
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from modeling_seqboat import optimizer_seqboat
from modeling_seqboat.optimizer_seqboat import MuonAdamW, orthogonalized
from modeling_seqboat.training_seqboat import SeqBoatTrainer, parameter_groups

RATES = {"router_learning_rate": 1e-4, "muon_learning_rate": 0.02}


def build(model, **overrides) -> MuonAdamW:
    return MuonAdamW(parameter_groups(model, 0.1, **RATES), **{"lr": 4e-3, "betas": (0.9, 0.95), **overrides})


def train(model, optimizer, steps: int = 4, first: int = 0, schedule=None) -> None:
    for step in range(first, first + steps):
        ids = token_ids(4, 24, seed=step)
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8), (2, 6, 6)])
def test_orthogonalized_matrices_keep_their_singular_vectors(shape):
    torch.manual_seed(0)
    left, values, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    found = left.mT @ orthogonalized((left * values[:, None].clamp_min(0.5)) @ right).float() @ right.mT
    diagonal = found.diagonal(dim1=1, dim2=2)
    assert ((diagonal > 0.6) & (diagonal < 1.3)).all()
    assert (found - torch.diag_embed(diagonal)).abs().max() < 0.1


def test_a_cpu_keeps_the_dtype():
    """There bfloat16 would be slower, and is no better."""
    matrices = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))
    found = orthogonalized(matrices)
    torch.testing.assert_close(found.double(), orthogonalized(matrices.double()), rtol=0, atol=1e-4)
    assert orthogonalized(matrices.bfloat16()).dtype == torch.bfloat16


def test_the_update_is_torchs(monkeypatch):
    def in_bfloat16(matrices, steps):
        """As torch's does on a CPU, too."""
        return orthogonalized(matrices.bfloat16(), steps)

    monkeypatch.setattr(optimizer_seqboat, "orthogonalized", in_bfloat16)
    model = tiny_lm(intermediate_size=24).train()
    other = copy.deepcopy(model)
    train(model, build(model))
    groups = parameter_groups(other, 0.1, **RATES)
    matrices = [group for group in groups if group.get("muon")]
    rest = [group for group in groups if not group.get("muon")]
    muon = torch.optim.Muon(
        [{"params": group["params"], "lr": group["lr"], "weight_decay": group["weight_decay"]} for group in matrices],
        momentum=0.95, nesterov=True, ns_steps=5,
    )  # fmt: skip
    adamw = torch.optim.AdamW(rest, lr=4e-3, betas=(0.9, 0.95))
    for step in range(4):
        ids = token_ids(4, 24, seed=step)
        other.zero_grad()
        other(ids, labels=ids).loss.backward()
        muon.step()
        adamw.step()
    # bfloat16 rounds differently where matrices are multiplied together.
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=2e-4)


def test_muon_takes_the_matrices_of_the_layers_and_nothing_else():
    model = tiny_lm(intermediate_size=24, tie_word_embeddings=False, ssm_type="s5")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    (group,) = [group for group in parameter_groups(model, 0.1, **RATES) if group.get("muon")]
    layer = ("attention.in_proj", "attention.out_proj", "ffn.fc1", "ffn.fc2", "hidden_proj")
    found = {names[id(parameter)] for parameter in group["params"]}
    assert {name.split(".", 3)[3] for name in found} == {f"{part}.weight" for part in layer}
    assert len(found) == len(layer) * model.config.num_hidden_layers
    assert group["lr"] == 0.02 and group["weight_decay"] == 0.1
    held = [id(parameter) for group in parameter_groups(model, 0.1, **RATES) for parameter in group["params"]]
    assert sorted(held) == sorted(names)


def test_a_projection_that_is_three_is_a_group_that_says_so():
    model = tiny_lm()
    config, units = model.config, [layer.attention for layer in model.model.layers]
    options = {**RATES, "muon_split": True, "qk_learning_rate": 1e-2}
    groups = parameter_groups(model, 0.1, **options)
    (split,) = [group for group in groups if "sections" in group]
    assert split["sections"] == (config.qk_head_dim, config.v_head_dim, config.v_head_dim)
    assert list(map(id, split["params"])) == [id(unit.in_proj.weight) for unit in units]
    assert split["muon"] and split["lr"] == 0.02 and split["weight_decay"] == 0.1
    (scales,) = [group for group in groups if group.get("lr") == 1e-2]
    assert {id(p) for p in scales["params"]} == {id(p) for unit in units for p in (unit.qk_scale, unit.qk_offset)}
    assert scales["weight_decay"] == 0 and not scales.get("muon")
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))
    wider = torch.nn.ModuleList([model, tiny_lm(qk_head_dim=model.config.qk_head_dim + 2)])
    assert len({group["sections"] for group in parameter_groups(wider, 0.1, **options) if "sections" in group}) == 2
    with pytest.raises(ValueError, match="give muon_learning_rate, got None"):
        parameter_groups(model, 0.1, muon_split=True)


def steps_of(groups, grads, **options) -> list[torch.Tensor]:
    """The parameters after three steps: with these gradients, with their rows in reverse and with these halved."""
    optimizer = MuonAdamW(groups, lr=0.1, weight_decay=0.1, **options)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for turn in range(3):
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad_of(turn, grad)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def grad_of(turn: int, grad: torch.Tensor) -> torch.Tensor:
    """By columns, so that rows may be taken apart."""
    return (grad, grad.flip(1) * torch.arange(1, 6), 0.5 * grad)[turn]


def test_sections_are_trained_as_matrices_of_their_own():
    torch.manual_seed(0)
    sections, width = (3, 8, 8), 5
    whole, grad = torch.randn(19, width), torch.randn(19, width)
    grad[:3] *= 1e-3  # which would be lost beside the others

    def matrices(tensor):
        return [torch.nn.Parameter(part.clone()) for part in tensor.split(sections)]

    group = {"params": [torch.nn.Parameter(whole.clone())], "muon": True}
    (found,) = steps_of([{**group, "sections": sections}], [grad])
    apart = steps_of([{"params": matrices(whole), "muon": True}], grad.split(sections))
    torch.testing.assert_close(found, torch.cat(apart))
    (together,) = steps_of([{"params": [torch.nn.Parameter(whole.clone())], "muon": True}], [grad])
    assert (together - found)[:3].abs().max() > 0.05
    with pytest.raises(ValueError, match=r"sections \(3, 8\) add up to 11 rows, a matrix has 19"):
        MuonAdamW([{**group, "sections": (3, 8)}])


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_even_rows_are_a_running_mean_and_keep_the_norm(beta):
    torch.manual_seed(0)
    rate, decay = 0.1, 0.1
    start, grads = torch.randn(2, 9, 5), torch.randn(2, 9, 5) * torch.logspace(0, 2, 9)[:, None]
    found = steps_of([{"params": [torch.nn.Parameter(m.clone()) for m in start], "muon": True}], grads, row_beta=beta)
    for matrix, grad, ours in zip(start, grads, found, strict=True):
        wanted, average, mean = matrix.clone(), torch.zeros(9, 5), torch.zeros(9)
        for turn in range(3):
            average = 0.95 * average + 0.05 * grad_of(turn, grad)
            update = orthogonalized((0.95 * average + 0.05 * grad_of(turn, grad))[None])[0] * (9 / 5) ** 0.5
            mean = beta * mean + (1 - beta) * update.square().mean(1)
            even = update / mean.sqrt()[:, None]
            wanted = wanted * (1 - rate * decay) - rate * even * update.norm() / even.norm()
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="row_beta must be from 0 up to, but not including, 1, or None, got 1"):
        MuonAdamW([torch.nn.Parameter(torch.eye(2))], row_beta=1)


def test_the_mean_of_rows_is_float32_after_a_checkpoint_too():
    def build():
        weight = torch.nn.Parameter(torch.eye(3, dtype=torch.bfloat16))
        weight.grad = torch.ones_like(weight)
        return MuonAdamW([{"params": [weight], "muon": True}], lr=0.1, row_beta=0.95)

    optimizer, again = build(), build()
    optimizer.step()
    again.load_state_dict(optimizer.state_dict())
    again.step()
    for one in (optimizer, again):
        (state,) = one.state.values()
        assert state["row_square"].dtype == torch.float32
        assert one.param_groups[0]["params"][0].dtype == torch.bfloat16


def test_the_layers_of_other_models_are_found_too():
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2,
        )
    )  # fmt: skip
    (group,) = [group for group in parameter_groups(llama, 0.1, muon_learning_rate=0.02) if group.get("muon")]
    assert len(group["params"]) == 14
    for options in ({"muon_split": True}, {"qk_learning_rate": 1e-2}):
        with pytest.raises(ValueError, match="are for SeqBoat's attention, got a LlamaForCausalLM"):
            parameter_groups(llama, 0.1, muon_learning_rate=0.02, **options)


def test_one_schedule_moves_the_rates_of_both_halves():
    model = tiny_lm().train()
    optimizer = build(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    train(model, optimizer, steps=1, schedule=schedule)
    assert [group["lr"] for group in optimizer.param_groups] == [2e-3, 5e-5, 0.01]
    before = copy.deepcopy(model.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, steps=1)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"row_beta": 0.95, "groups": {"muon_split": True, "qk_learning_rate": 1e-2}}])
def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path, options):
    def build(model):
        groups = parameter_groups(model, 0.1, **RATES, **options.get("groups", {}))
        return MuonAdamW(groups, lr=4e-3, betas=(0.9, 0.95), row_beta=options.get("row_beta"))

    whole = tiny_lm().train()
    optimizer = build(whole)
    train(whole, optimizer, steps=2)
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    train(whole, optimizer, steps=3, first=2)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed = tiny_lm(seed=5).train()
    resumed.load_state_dict(saved["model"])
    again = build(resumed)
    again.load_state_dict(saved["optimizer"])
    train(resumed, again, steps=3, first=2)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_copy_steps_as_the_optimizer_does():
    matrix, vector = torch.nn.Parameter(torch.eye(3)), torch.nn.Parameter(torch.ones(3))
    groups = [{"params": [matrix], "muon": True}, {"params": [vector]}]
    optimizer = MuonAdamW(groups, lr=0.1)
    found = []
    for _ in range(2):
        for one in (optimizer, *found[:1]):
            for group in one.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.ones_like(parameter)
            one.step()
        found = found or [copy.deepcopy(optimizer)]
    copies = [group["params"][0] for group in found[0].param_groups]
    assert copies[0] is not matrix
    torch.testing.assert_close(copies, [matrix, vector])


def test_accelerate_accumulates_and_clips_as_a_plain_loop_does():
    plain = tiny_lm().train()
    wrapped = copy.deepcopy(plain)
    optimizer = build(plain)
    for step in range(2):
        optimizer.zero_grad()
        for part in range(2):
            ids = token_ids(2, 20, seed=2 * step + part)
            (plain(ids, labels=ids).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.25)
        optimizer.step()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(wrapped, build(wrapped))
    for part in range(4):
        ids = token_ids(2, 20, seed=part)
        with accelerator.accumulate(model):
            accelerator.backward(model(ids, labels=ids).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.25)
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(accelerator.unwrap_model(model).state_dict(), plain.state_dict())


def test_trainer_takes_it_and_resumes_exactly(tmp_path):
    data = [{"input_ids": row, "labels": row} for row in token_ids(8, 24)]

    def trained(seed: int, checkpoint: str | None = None):
        model = tiny_lm(seed=seed)
        settings = TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=2, save_steps=2, report_to="none", use_cpu=True,
            disable_tqdm=True, lr_scheduler_type="linear", dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = SeqBoatTrainer(model=model, args=settings, train_dataset=data, optimizers=(build(model), None))
        trainer.train(resume_from_checkpoint=checkpoint)
        return model.state_dict()

    whole = trained(0)
    torch.testing.assert_close(trained(1, str(tmp_path / "checkpoint-2")), whole, rtol=0, atol=0)


def test_parameters_without_gradients_and_of_one_half_only():
    matrix, vector = torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(3))
    optimizer = MuonAdamW([{"params": [matrix], "muon": True}], lr=0.1)
    optimizer.step()
    assert torch.equal(matrix, torch.ones(3, 4))
    matrix.grad = torch.eye(3, 4)
    assert float(optimizer.step(lambda: matrix.detach().sum())) == 12
    assert not torch.equal(matrix, torch.ones(3, 4))
    plain = MuonAdamW([vector], lr=0.1)
    vector.grad = torch.ones(3)
    plain.step()
    assert (vector < 1).all()


def test_what_is_no_whole_matrix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Muon takes whole matrices, got a Parameter of shape \(3,\)"):
        MuonAdamW([{"params": [torch.nn.Parameter(torch.ones(3))], "muon": True}])
    for options, message in (({"momentum": 1.0}, "momentum .* got 1.0"), ({"ns_steps": 0}, "ns_steps .* got 0")):
        with pytest.raises(ValueError, match=message):
            MuonAdamW([torch.nn.Parameter(torch.ones(3))], **options)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = torch.nn.Parameter(DTensor.from_local(torch.ones(3, 4), mesh, [Replicate()]))
        with pytest.raises(ValueError, match="sharded training .FSDP2, ZeRO-3. goes with AdamW"):
            MuonAdamW([{"params": [sharded], "muon": True}])
    finally:
        torch.distributed.destroy_process_group()
