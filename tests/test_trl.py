"""TRL's SFTTrainer with packing trains a model, whose texts do not see one another across the borders in a row."""

import json
from pathlib import Path

import pytest
import torch

from modeling_seqboat import SeqBoatConfig, SeqBoatForCausalLM, build_byte_tokenizer
from modeling_seqboat.training_seqboat import RouterCallback, SeqBoatTrainerMixin, decay_parameter_names

pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

PROBLEMS = Path(__file__).resolve().parent.parent / "examples/data/gsm8k_excerpt.jsonl"


class PackingTrainer(SeqBoatTrainerMixin, SFTTrainer):
    pass


def make_trainer(folder, monkeypatch, **changes) -> PackingTrainer:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    torch.manual_seed(0)
    model = SeqBoatForCausalLM(SeqBoatConfig.from_preset("tiny"))
    rows = [json.loads(line) for line in PROBLEMS.read_text("utf-8").splitlines()[:60]]
    prompts = [{"prompt": [{"role": "user", "content": row["question"][:60]}],
                "completion": [{"role": "assistant", "content": row["answer"][:60]}]} for row in rows]  # fmt: skip
    settings = dict(
        output_dir=str(folder / "run"), max_steps=20, per_device_train_batch_size=2, learning_rate=1e-2,
        max_length=256,
        packing=True, weight_decay=0.1, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
        bf16=False,
        disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    return PackingTrainer(
        model=model, args=SFTConfig(**{**settings, **changes}), train_dataset=Dataset.from_list(prompts),
        processing_class=build_byte_tokenizer(),
    )  # fmt: skip


def test_packed_training_lowers_the_loss(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, monkeypatch)
    RouterCallback.attach(trainer)
    groups = trainer.create_optimizer().param_groups
    assert len(groups[0]["params"]) == len(decay_parameter_names(trainer.model))
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 20
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert 0 <= history[-1]["router/activation_rate_0"] <= 1


def test_a_packed_batch_has_the_loss_of_its_texts(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, monkeypatch)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist() + [batch["input_ids"].shape[1]]
    assert len(starts) > 3
    model = trainer.model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        packed = float(model(**batch).loss)
        for start, end in zip(starts, starts[1:], strict=False):
            labels = batch["labels"][:, start:end]
            kept = int((labels[:, 1:] != -100).sum())
            if kept:
                total += kept * float(model(input_ids=batch["input_ids"][:, start:end], labels=labels).loss)
                count += kept
    assert packed == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_routers_are_pulled_to_their_target_though_the_loss_is_not_the_models(tmp_path, monkeypatch, packing):
    trainer = make_trainer(tmp_path, monkeypatch, packing=packing)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    model = trainer.model.train()
    plain = float(trainer.compute_loss(model, dict(batch)))
    model.config.router_target_rate, model.config.router_target_weight = 0.1, 10.0
    expected = model(**batch)
    assert float(expected.router_penalty) > 0.1
    count = (batch["labels"] != -100).sum()
    for items in (None, count, 2 * count):
        loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
        share = 1.0 if items is None else float(count / items)
        assert float(loss) == pytest.approx(share * (plain + float(expected.router_penalty)), rel=1e-4)
    loss.backward()
    assert model.model.layers[0].router.bias.grad.abs().max() > 0
    assert float(trainer.compute_loss(model.eval(), dict(batch))) == pytest.approx(plain, rel=1e-4)
