"""Trains a model to answer from far back: attention everywhere first, then less of it and longer texts, step by step.

    python examples/long_context/train_recall.py configuration/recipes/long_context/recall-toy.yaml \
        --output_dir outputs/routed --seed 0
    python examples/long_context/train_recall.py configuration/recipes/long_context/recall-toy.yaml \
        --model always --output_dir outputs/always

Texts are made as they are needed, none twice. `curriculum.py` says when texts grow and when the budget for attention
falls; `routing.py` says what makes the routers keep what is asked for later. Writes to `output_dir`: `metrics.jsonl`,
`checkpoint-N/` to go on from with `--resume True`, and when it ends `final/`, a model folder with the task in
`recall.json`, which `evaluate_recall.py` reads.
"""

import sys
from pathlib import Path

# The examples share modules, which lie one folder up.
sys.path.append(str(Path(__file__).resolve().parent.parent))
import script_start  # noqa: F401, before torch

# isort: split
import json
import math
import shutil
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import BinaryIO

import numpy as np
import torch
from curriculum import DENSE, Curriculum, CurriculumArguments
from evaluate_recall import RECALL_FILE, distance_bucket, summary
from reading import read_texts
from recall_models import (
    ModelArguments,
    TaskArguments,
    build_model,
    build_task,
    check_kernels,
    chosen_device,
    parameter_count,
)
from recall_tasks import Batch, batch_of, example_of
from recipes import parse_arguments
from routing import RouterWatch, open_routers, release_routers
from run_folder import (
    PARTIAL,
    RunFolder,
    check_free,
    latest_checkpoint,
    open_log,
    take_folder,
    verify_checkpoint,
)
from safe_files import write_json
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import set_seed

from modeling_seqboat import SeqBoatForCausalLM
from modeling_seqboat.training_seqboat import parameter_groups

VALIDATION_SEED = 2**31
STATE_FILE = "state.safetensors"


@dataclass
class TrainArguments(CurriculumArguments, ModelArguments, TaskArguments):
    output_dir: str = field(default="", metadata={"help": "must be new or empty, unless resuming"})
    batch_size: int = field(default=32, metadata={"help": "texts a step"})
    max_batch_tokens: int = field(
        default=2**20, metadata={"help": "fewer texts a step where they are longer; at least 2"}
    )
    learning_rate: float = field(default=4e-3)
    router_learning_rate: float = field(default=4e-3)
    beta2: float = field(default=0.98)
    weight_decay: float = field(default=0.01)
    warmup_steps: int = field(default=50)
    max_grad_norm: float = field(default=1.0)
    router_start: float = field(
        default=4.0, metadata={"help": "difference of the routers' logits when they take over"}
    )
    credit: float = field(default=1.0, metadata={"help": "weight of the credit for kept tokens, 0 for none"})
    pull: float = field(default=0.1, metadata={"help": "weight of the pull to the budget"})
    text_loss: float = field(default=0.0, metadata={"help": "weight of the cross entropy of all tokens"})
    settle_steps: int = field(
        default=200, metadata={"help": "steps after the last goal is reached, the rate run down"}
    )
    squeeze: float = field(
        default=0.3, metadata={"help": "factor of the budget in these steps: what nobody misses is closed for good"}
    )
    max_steps: int = field(default=20_000)
    max_minutes: float = field(default=math.inf, metadata={"help": "end after this much training time of all calls"})
    logging_steps: int = field(default=50)
    eval_steps: int = field(default=1000)
    eval_texts: int = field(default=32)
    save_steps: int = field(default=1000)
    mixed_precision: bool = field(default=False, metadata={"help": "bfloat16 where autocast allows it"})
    cpu: bool = field(default=False)
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint where there is one"})
    overwrite_output_dir: bool = field(default=False)
    seed: int = field(default=0)


def check_arguments(a: TrainArguments) -> None:
    """Raises ValueError for values that no run can use, naming them."""
    a.check()
    for name in ("batch_size", "max_steps", "logging_steps", "eval_steps", "eval_texts", "save_steps", "settle_steps"):
        if getattr(a, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(a, name)}")
    if not 0 < a.squeeze <= 1:
        raise ValueError(f"squeeze must lie in (0, 1], got {a.squeeze}")
    if not a.output_dir:
        raise ValueError("output_dir must be given")
    if not 0 <= a.seed < 2**31:
        raise ValueError(f"seed must be from 0 to 2^31 - 1, got {a.seed}: validation and tests have those above")
    if a.credit and a.model == "routed" and not a.router_type.startswith("gumbel"):
        raise ValueError(
            f"credit {a.credit} is for routers that draw, router_type {a.router_type!r} does not: use gumbel, "
            "gumbel_straight_through or credit 0"
        )


def run_batch(a: TrainArguments, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of the texts (B,), their answers' correctness (B, Q) bool, and the cross entropy of all tokens ()."""
    device = next(model.parameters()).device
    tokens, answers = torch.from_numpy(batch.tokens).to(device), torch.from_numpy(batch.answers).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=a.mixed_precision):
        hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        rows = torch.arange(len(tokens), device=device)[:, None, None]
        logits = model.lm_head(hidden[rows, answers - 1]).float()
        text = logits.new_zeros(())
        if a.text_loss:
            text = F.cross_entropy(model.lm_head(hidden).float().flatten(0, 1), tokens[:, 1:].flatten())
    target = tokens[rows, answers]
    losses = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none").view(target.shape)
    return losses.mean((1, 2)), (logits.argmax(-1) == target).all(-1), text


class Counts:
    """Answers by distance and activations by kind of token since the last line of the log."""

    def __init__(self, kinds: tuple[str, ...]):
        self.kinds = kinds
        self.clear()

    def clear(self) -> None:
        self.hits, self.losses = defaultdict(list), []
        self.activated: list[np.ndarray] | None = None
        self.tokens = np.zeros(len(self.kinds), np.int64)

    def add(self, batch: Batch, right: Tensor, loss: float, active: list[Tensor]) -> None:
        self.losses.append(loss)
        for distance, hit in zip(batch.distances.flatten(), right.flatten().tolist(), strict=True):
            self.hits[int(distance_bucket(distance))].append(hit)
        kinds = batch.kinds[:, :-1]
        self.tokens += np.bincount(kinds.flatten(), minlength=len(self.kinds))
        new = [np.bincount(kinds[marks.cpu().numpy()], minlength=len(self.kinds)) for marks in active]
        self.activated = new if self.activated is None else [x + y for x, y in zip(self.activated, new, strict=True)]

    def line(self) -> dict:
        every = [hit for hits in self.hits.values() for hit in hits]
        seen = [place for place, count in enumerate(self.tokens) if count]
        return {
            "loss": float(np.mean(self.losses)),
            "accuracy": float(np.mean(every)),
            "by_distance": {str(key): float(np.mean(self.hits[key])) for key in sorted(self.hits)},
            "activation_rates": [float(layer.sum() / self.tokens.sum()) for layer in self.activated],
            "rates_by_kind": {
                self.kinds[place]: [float(layer[place] / self.tokens[place]) for layer in self.activated]
                for place in seen
            },
        }


class Training:
    """A run: model, optimizer, curriculum and where it has got to."""

    def __init__(self, a: TrainArguments):
        self.a, self.device = a, chosen_device(a.cpu)
        check_kernels(a.model, self.device)
        self.task = build_task(a, "train")
        self.validation = build_task(a, "validation")
        set_seed(a.seed)
        self.model = build_model(a, self.task.vocabulary).to(self.device)
        self.watch = RouterWatch(self.model)
        self.curriculum = Curriculum(a, self.watch.learned, a.memory_size, self.task.needed / a.layers)
        if self.watch.learned:
            open_routers(self.model, a.router_start)
        # A transformer's parameters decay as a whole; SeqBoat's by the library's rule. flash-linear-attention marks
        # what does not decay.
        parameters, marked = list(self.model.parameters()), "_no_weight_decay"
        groups = [
            {"params": [p for p in parameters if not getattr(p, marked, False)], "weight_decay": a.weight_decay},
            {"params": [p for p in parameters if getattr(p, marked, False)], "weight_decay": 0.0},
        ]
        if isinstance(self.model, SeqBoatForCausalLM):
            rate = a.router_learning_rate if self.watch.learned else None
            groups = parameter_groups(self.model, a.weight_decay, router_learning_rate=rate)
        self.optimizer = torch.optim.AdamW(groups, lr=a.learning_rate, betas=(0.9, a.beta2))
        for group in self.optimizer.param_groups:
            group["peak"] = group["lr"]
        self.step, self.spent, self.done_at = 0, 0.0, None

    def texts(self, task, length: int, seed: int, first: int, count: int) -> Batch:
        return batch_of(lambda number: example_of(task, length, seed, number), range(first, first + count))

    def rate_factor(self) -> float:
        """Warm-up, then constant until the last goal is reached; from there down to a tenth."""
        factor = min(1.0, (self.step + 1) / max(1, self.a.warmup_steps))
        if self.done_at is not None:
            factor *= 1 - 0.9 * (self.step - self.done_at) / self.a.settle_steps
        return factor

    def train_step(self, counts: Counts) -> str | None:
        """One step; what the curriculum changed after it, or None."""
        a, curriculum, model = self.a, self.curriculum, self.model
        model.train()
        size = max(2, min(a.batch_size, a.max_batch_tokens // curriculum.length))
        batch = self.texts(self.task, curriculum.length, a.seed, self.step * a.batch_size, size)
        losses, right, text = run_batch(a, model, batch)
        total = losses.mean() + a.text_loss * text
        if self.watch.learned and curriculum.phase != DENSE:
            if a.credit:
                total = total + a.credit * self.watch.credit(losses)
            squeeze = 1.0 if self.done_at is None else a.squeeze
            total = total + a.pull * self.watch.pull(squeeze * curriculum.budget)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self.rate_factor()
        self.optimizer.zero_grad()
        total.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), a.max_grad_norm)
        if not torch.isfinite(norm):
            raise RuntimeError(f"step {self.step}: the gradient is not finite")
        self.optimizer.step()
        self.step += 1
        counts.add(batch, right.cpu(), losses.mean().item(), self.watch.active)
        kept = self.watch.kept()
        rate = sum(kept) / max(1, len(kept)) / curriculum.length
        change = curriculum.record(float(right.float().mean()), max(kept, default=0.0), rate)
        if change == "open":
            release_routers(model)
        if change == "done":
            self.done_at = self.step
        return change

    def evaluate(self, length: int) -> dict:
        """Accuracy, activations and spans on validation texts, through the cache and without noise in the routers."""
        readings, batches = [], []
        for first in range(0, self.a.eval_texts, 8):
            count = min(8, self.a.eval_texts - first)
            batches.append(self.texts(self.validation, length, VALIDATION_SEED + self.a.seed, first, count))
            readings.append(read_texts(self.model, batches[-1], len(self.task.kinds)))
        return summary(self.validation, readings, batches)

    def save(self, folder: RunFolder) -> None:
        """Writes a checkpoint, in the place of the one before."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, kept in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in kept.items()}
        tensors["random"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["device_random"] = torch.cuda.get_rng_state()
        state = {
            "arguments": asdict(self.a), "curriculum": self.curriculum.state_dict(), "spent": self.spent,
            "done_at": self.done_at,
        }  # fmt: skip
        stage = folder.path / f"{PARTIAL}checkpoint-{self.step}"
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
        # Of their own: a tied weight has another's numbers, which a file has once.
        save_file({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, stage / STATE_FILE)
        folder.seal(stage, self.step, 1, state)
        folder.keep_newest(1)

    def load(self, path: Path) -> None:
        """Raises ValueError where the checkpoint is damaged or of a run with other arguments."""
        manifest = verify_checkpoint(path, 1)
        state, free = (
            manifest["state"],
            ("resume", "overwrite_output_dir", "output_dir", "max_steps", "max_minutes", "cpu", "data"),
        )
        for name, value in json.loads(json.dumps(asdict(self.a))).items():
            if name not in free and state["arguments"].get(name) != value:
                raise ValueError(
                    f"{path} is of another run: {name} is {state['arguments'].get(name)!r} there and {value!r} here"
                )
        try:
            tensors, kept = load_file(path / STATE_FILE), defaultdict(dict)
            self.model.load_state_dict(
                {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
            )
            for name, tensor in tensors.items():
                if name.startswith("optimizer."):
                    _, index, part = name.split(".")
                    kept[int(index)][part] = tensor
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": dict(kept)})
            self.curriculum.load_state_dict(state["curriculum"])
            self.step, self.spent, self.done_at = manifest["step"], state["spent"], state["done_at"]
            torch.set_rng_state(tensors["random"])
            if "device_random" in tensors and self.device.type == "cuda":
                torch.cuda.set_rng_state(tensors["device_random"])
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"checkpoint {str(path)!r} cannot be resumed from: {error}") from error
        if self.watch.learned and self.curriculum.phase != DENSE:
            release_routers(self.model)


def write_model(training: Training, folder: Path) -> None:
    """A model folder, with the task beside the weights."""
    training.model.save_pretrained(folder)
    task = {name: getattr(training.a, name) for name in TaskArguments.__dataclass_fields__}
    # Where the data lay is nobody's business.
    task["data"] = None if task["data"] is None else Path(task["data"]).name
    write_json(folder / RECALL_FILE, task)


def main(argv: list[str] | None = None) -> dict:
    a = parse_arguments(TrainArguments, argv)
    check_arguments(a)
    checkpoint = latest_checkpoint(Path(a.output_dir)) if a.resume else None
    if not a.resume:
        check_free(Path(a.output_dir), False, a.overwrite_output_dir)
    training = Training(a)
    # Texts that are too short for what they must hold are found out here.
    example_of(training.task, a.start_length, a.seed, 0)
    if checkpoint is not None:
        training.load(checkpoint)
    # A run that was ended before its first checkpoint starts anew; what it has logged is moved aside.
    folder = take_folder(a.output_dir, checkpoint, a.overwrite_output_dir or (a.resume and checkpoint is None))
    try:
        with open_log(folder.path / "metrics.jsonl") as log, training.watch:
            result = run(training, log, folder)
            with folder.replacing("final") as stage:
                write_model(training, stage)
            write_json(folder.path / "result.json", result)
    finally:
        folder.close()
    print(
        f"{parameter_count(training.model):,} parameters, {training.step} steps, {training.spent:.0f} s: accuracy "
        f"{result['accuracy']:.3f} at {training.curriculum.length} tokens, budget {training.curriculum.budget:.3f}"
    )
    return result


def run(training: Training, log: BinaryIO, folder: RunFolder) -> dict:
    """The training loop, from `training.step` on."""
    a, counts = training.a, Counts(training.task.kinds)

    def write(**values) -> None:
        place = {"step": training.step, "seconds": round(training.spent, 2), "length": training.curriculum.length}
        budget = {"budget": training.curriculum.budget, "phase": training.curriculum.phase}
        log.write(json.dumps(place | budget | values).encode("utf-8") + b"\n")
        log.flush()

    while training.step < a.max_steps and training.spent < 60 * a.max_minutes:
        if training.done_at is not None and training.step - training.done_at >= a.settle_steps:
            break
        begin = time.perf_counter()
        change = training.train_step(counts)
        training.spent += time.perf_counter() - begin
        if change is not None:
            write(change=change)
        if training.step % a.logging_steps == 0:
            write(**counts.line())
            counts.clear()
        if training.step % a.eval_steps == 0:
            write(validation=training.evaluate(training.curriculum.length))
        if training.step % a.save_steps == 0:
            training.save(folder)
    training.save(folder)
    result = training.evaluate(training.curriculum.length)
    write(validation=result)
    return {
        "steps": training.step, "seconds": training.spent, "parameters": parameter_count(training.model),
        "length": training.curriculum.length, "budget": training.curriculum.budget, "done": training.curriculum.done,
        **result,
    }  # fmt: skip


if __name__ == "__main__":
    main()
