"""Trains one model from a recipe and measures it: quality, activation rates, attention spans, saved FLOPs and
speed."""

import contextlib
import gc
import math
import platform
import time
from pathlib import Path
from typing import Any

import optimizers
import torch
import transformers
from run_data import Batch, LabelledRows, Sources, TextData, load_data
from run_recipe import RunRecipe
from torch.nn import functional as F
from transformers import PreTrainedModel, set_seed

import modeling_seqboat
from modeling_seqboat import SeqBoatForCausalLM, SeqBoatForImageClassification, SeqBoatForSequenceClassification
from modeling_seqboat.analysis_seqboat import ActivationReport, analyse_activations
from modeling_seqboat.graphed_step_seqboat import GraphedStep, GraphedUpdate
from modeling_seqboat.ssm_seqboat import Recurrence
from modeling_seqboat.training_seqboat import RouterBudget

MODELS = {
    "lm": SeqBoatForCausalLM,
    "pathfinder": SeqBoatForImageClassification,
    "listops": SeqBoatForSequenceClassification,
}
Data = TextData | LabelledRows
# Recurrences whose training steps are captured as CUDA graphs.
GRAPHED = ("ema", "rglru")


def autocast(recipe: RunRecipe, device: torch.device):
    if recipe.precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def rate_factor(recipe: RunRecipe, step: int) -> float:
    """Learning rate of step `step` (from 0) as a part of its peak."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    fall = done if recipe.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * done))
    return 1 - (1 - recipe.final_rate) * fall


def optimizer_of(recipe: RunRecipe, model: PreTrainedModel) -> torch.optim.Optimizer:
    """AdamW, or with Muon for the layers' matrices; routers and recurrences at rates of their own."""
    groups = optimizers.groups_of(recipe, model)
    if recipe.ssm_learning_rate is not None:
        modules = [module for module in model.modules() if isinstance(module, Recurrence)]
        own = {id(parameter): parameter for module in modules for parameter in module.parameters()}
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        groups = [group for group in groups if group["params"]]
        groups.append({"params": list(own.values()), "weight_decay": 0.0, "lr": recipe.ssm_learning_rate})
    return optimizers.optimizer_of(recipe, groups, (0.9, recipe.beta2), recipe.muon_row_beta, model.device)


class Run:
    """A model in training."""

    def __init__(self, recipe: RunRecipe, data: Data, device: torch.device):
        self.recipe, self.data, self.device = recipe, data, device
        set_seed(recipe.seed)
        self.model = MODELS[recipe.task](recipe.config()).to(device)
        self.optimizer = optimizer_of(recipe, self.model)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: rate_factor(recipe, step))
        config = recipe.config()
        graphs = device.type == "cuda" and config.ssm_type in GRAPHED and config.kernel_backend == "auto"
        # Attached before the step is captured, whose graph counts for it.
        self.budget = RouterBudget(self.model, recipe.router_gain) if recipe.router_gain else None
        self.graphed = self.update = None
        if graphs:
            self.graphed = GraphedStep(self.model)
            then = [] if self.budget is None else [self.budget.step]
            self.update = GraphedUpdate(self.optimizer, recipe.max_grad_norm, then)
        # Runs with the same seed read the same rows in the same order, whatever else differs.
        self.order = torch.Generator().manual_seed(recipe.seed)

    def step(self, launched: bool = False) -> None:
        """One step of training; `launched` kernel by kernel, or as a CUDA graph where there can be one."""
        batch = self.data.batch(self.order)
        with autocast(self.recipe, self.device):
            if launched or self.graphed is None:
                loss = self.model(**batch).loss
            else:
                self.graphed(**batch)
                loss = None
        if loss is None:
            self.update()
        else:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
            self.optimizer.step()
            if self.budget is not None:
                self.budget.step()
        self.optimizer.zero_grad()
        self.schedule.step()

    def close(self) -> None:
        """Gives the graphs' memory back, that the next run of the process may have it."""
        if self.update is not None:
            self.update.forget()
            self.graphed = self.update = None
            gc.collect()

    def wait(self) -> float:
        """The time once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def train(self) -> dict[str, Any]:
        """All steps; the clock starts after the first ones, in which kernels are compiled, and stops for measuring."""
        recipe = self.recipe
        untimed = recipe.steps // 5
        every = max(1, recipe.steps // recipe.history_points)
        history, seconds = [], 0.0
        self.model.train()
        started = self.wait()
        for step in range(1, recipe.steps + 1):
            self.step()
            if step == untimed:
                started = self.wait()
                seconds = 0.0
            if step % every == 0:
                seconds += self.wait() - started
                quality, report = measure(self.model, recipe, self.data, batches=1)
                history.append({"step": step, **quality, "rates": finite(report.rates.tolist())})
                self.model.train()
                started = self.wait()
        seconds += self.wait() - started
        return {"history": history, "tokens_per_second": (recipe.steps - untimed) * self.data.tokens_a_step / seconds}

    def time_steps(self) -> dict[str, Any]:
        """Speed alone, of a model that has hardly learnt anything: about half of the tokens are activated."""
        self.model.train()
        for _ in range(self.recipe.timed_steps):
            self.step(launched=True)
        started = self.wait()
        for _ in range(self.recipe.timed_steps):
            self.step(launched=True)
        seconds = (self.wait() - started) / self.recipe.timed_steps
        return {"tokens_per_second": self.data.tokens_a_step / seconds, "seconds_a_step": seconds}


def finite(value: Any) -> Any:
    """NaN and infinities as None, which JSON has a word for."""
    if isinstance(value, list):
        return [finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


@torch.no_grad()
def measure(
    model: PreTrainedModel, recipe: RunRecipe, data: Data, batches: int | None = None
) -> tuple[dict[str, float | None], ActivationReport]:
    """Bits per byte of the second half of each validation row (lm), or loss and accuracy; and the routers' report.

    Args:
        batches: measure on so many of the validation batches, on all when not given.
    """
    model.eval()
    losses, scored, correct, report = 0.0, 0, 0, None
    for number, batch in enumerate(data.evaluation()):
        if number == batches:
            break
        labels = batch.pop("labels")
        with autocast(recipe, labels.device):
            output = model(**batch, output_router_probs=True)
        if recipe.task == "lm":
            context = labels.shape[1] // 2
            logits, labels = output.logits[:, context - 1 : -1].flatten(0, 1), labels[:, context:].flatten()
        else:
            logits = output.logits
        losses += F.cross_entropy(logits.float(), labels, reduction="sum").item()
        correct += int((logits.argmax(-1) == labels).sum())
        scored += len(labels)
        found = report_of(output.router_probs, model.config, batch)
        report = found if report is None else report + found
    quality = {"loss": losses / scored, "accuracy": correct / scored}
    if recipe.task == "lm":
        quality = {"bits_per_byte": losses / scored / math.log(2)}
    return {name: finite(value) for name, value in quality.items()}, report


def report_of(router_probs, config, batch: Batch) -> ActivationReport:
    texts = not config.bidirectional
    return analyse_activations(
        router_probs,
        config,
        input_ids=batch["input_ids"] if texts else None,
        attention_mask=batch.get("attention_mask"),
        # Buckets of batches that are padded to other lengths have to add up.
        bucket_size=128,
    )


def describe(report: ActivationReport) -> dict[str, Any]:
    """What a record keeps of the routers. Spans are means over activated tokens, and None where there are none."""
    activated = int(report.activated.sum())
    classes = report.class_rates
    return {
        "rates": finite(report.rates.tolist()),
        "mean_rate": finite(float(report.rates.mean())),
        "spans": finite(report.spans.tolist()),
        "mean_span": float(report.distance.sum()) / activated if activated else None,
        "contexts": finite(report.contexts.tolist()),
        "flops_saved": report.flops_saved,
        "share_saved": finite(report.share_saved),
        "class_rates": {name: finite(classes[:, place].tolist()) for place, name in enumerate(report.class_names)},
        "measured_tokens": report.tokens,
    }


def execute(
    recipe: RunRecipe, sources: Sources, device: torch.device, keep: str | Path | None = None
) -> dict[str, Any]:
    """Trains and measures, or times. Returns a record that JSON can hold.

    Args:
        keep: a folder for the trained model.
    """
    data = load_data(recipe, sources, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    run = Run(recipe, data, device)
    parameters = run.model.num_parameters()
    if recipe.timed_steps:
        found = run.time_steps()
    else:
        found = run.train()
        quality, report = measure(run.model, recipe, data)
        found |= {"quality": quality, **describe(report), "trained_tokens": recipe.steps * data.tokens_a_step}
        if keep is not None:
            run.model.save_pretrained(keep)
    run.close()
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return {
        "recipe": recipe.flat(), "parameters": parameters, **found, "seconds": time.perf_counter() - began,
        "memory_gib": memory, **identity(device),
    }  # fmt: skip


def identity(device: torch.device) -> dict[str, Any]:
    """What a record says of where it was made."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU",
        "versions": {
            "modeling_seqboat": modeling_seqboat.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
