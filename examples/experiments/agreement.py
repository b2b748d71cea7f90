"""Experiment 7: is the pattern of activated tokens the task's, or the optimiser's?

    python examples/experiments/agreement.py --train_file enwik8.xz --output outputs/agreement

Models of one recipe, their routers held to one budget, differ in their seed or in their learning rates. On the same
validation bytes their choices are compared layer by layer, and each model is run with the choice of the others, with
tokens drawn by lot, and with all tokens. Models lie in `models/` of the output folder, what is measured on them in
`agreement.jsonl`; the same command goes on with what is missing.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from driver import MODELS as FOLDER
from driver import Settings
from experiment import Bases, Experiment, Sequel, main
from figures import panels, save
from overlap import Imposed, best_assignment, by_lot, counted_together, kappa, lift, rank_correlation
from plan import Planned, Results
from run_data import load_data
from run_recipe import RunRecipe, from_flat
from runs import MODELS, Data, autocast, finite, measure
from tables import Row, markdown, mean, mean_and_spread, number
from torch import Tensor
from transformers import PreTrainedModel

from modeling_seqboat.analysis_seqboat import BYTE_CLASSES

MEASURED = "agreement.jsonl"
# All learning rates but the routers' are multiplied by these; the last seed is for the recipe's own rates alone.
FACTORS = (1.0, 0.5, 2.0)
SEEDS = (0, 1, 2)
# What the output of attention is weighed with at tokens that the model would not have chosen: what it weighs its own
# tokens with on average, or the least that it weighs one with.
WEIGHTS = ("mean", "least")
AGREEMENT = ("layers", "pairs", "kappa", "largest", "within classes", "lift", "ranks of rates")
KINDS = {"seed": "another seed", "rate": "other learning rates"}


def grid(bases: Bases) -> list[Planned]:
    base = bases.budget
    return [
        Planned(
            {"rates": f"x {factor:g}", "seed": seed},
            base.changed(
                seed=seed,
                learning_rate=factor * base.learning_rate,
                muon_learning_rate=factor * base.muon_learning_rate,
            ),
            rank=10 * place + (0 if factor == 1 else 1),
            keep=True,
        )
        for place, seed in enumerate(bases.few(SEEDS))
        for factor in bases.few(FACTORS if place < 2 else FACTORS[:1])
    ]


@torch.no_grad()
def choice(model: PreTrainedModel, recipe: RunRecipe, data: Data) -> tuple[Tensor, list[float]]:
    """What a model activates on the validation rows, (n, T) bool on the CPU, and the mean weight of each layer's
    activated tokens (1/2, the least there is, where there are none)."""
    model.eval()
    patterns, sums = [], 0.0
    for batch in data.evaluation():
        with autocast(recipe, batch["input_ids"].device):
            weights = torch.stack(model(batch["input_ids"], output_router_probs=True).router_probs).flatten(1)
        patterns.append((weights > 0).cpu())
        sums = sums + weights.double().sum(1).cpu()
    pattern = torch.cat(patterns, dim=1)
    counts = pattern.sum(1)
    return pattern, torch.where(counts > 0, sums / counts.clamp_min(1), 0.5).tolist()


class Chooser:
    """One run's model, and what it costs it to take another choice."""

    def __init__(self, record: dict[str, Any], folder: Path, data: Data, device: torch.device):
        self.recipe, self.data = from_flat(record["recipe"]), data
        self.model = MODELS["lm"].from_pretrained(folder / FOLDER / record["key"]).to(device)
        self.pattern, self.confidence = choice(self.model, self.recipe, data)

    def bits(self, pattern: Tensor, weights: str) -> float:
        given = self.confidence if weights == "mean" else [0.5] * len(self.confidence)
        with Imposed(self.model, self.data, pattern, given) as imposed:
            return measure(self.model, self.recipe, imposed)[0]["bits_per_byte"]


def measure_run(one: Chooser, classes: Tensor) -> dict[str, Any]:
    """Bits per byte with the model's own choice, with as many tokens of each layer drawn by lot (of each class of
    bytes as many, too), and with all tokens; and how far each layer's choice is another's of the same model."""
    together = counted_together(one.pattern, one.pattern, classes, len(BYTE_CLASSES.names)).sum(0)
    counts, tokens = one.pattern.sum(1), one.pattern.shape[1]
    own = kappa(together, counts, counts, tokens)
    others = own.clone().fill_diagonal_(-4.0)
    match = best_assignment(others.tolist()) if len(others) > 1 else []
    tries = {
        "by lot": by_lot(one.pattern, torch.zeros_like(classes), 0),
        "by lot in each class": by_lot(one.pattern, classes, 0),
        "all tokens": torch.ones_like(one.pattern),
    }
    return {
        "tokens": tokens,
        "rates": finite((counts / tokens).tolist()),
        "bits": {"own": one.bits(one.pattern, "mean")}
        | {name: {weights: one.bits(pattern, weights) for weights in WEIGHTS} for name, pattern in tries.items()},
        "other layers": finite([float(own[row, column]) for row, column in enumerate(match)]),
    }


def measure_pair(one: Chooser, other: Tensor, classes: Tensor) -> dict[str, Any]:
    """What the choice of `one` has in common with another model's, layer by layer and for layers matched so that their
    kappas' sum is the largest; and bits per byte of `one` with that choice."""
    names = BYTE_CLASSES.names
    by_class = counted_together(one.pattern, other, classes, len(names))
    tokens, layers = one.pattern.shape[1], range(len(other))
    counts = one.pattern.sum(1), other.sum(1)
    kappas, lifts = (f(by_class.sum(0), *counts, tokens) for f in (kappa, lift))
    match = best_assignment(kappas.tolist())
    orders = {"same": list(layers), "matched": match}
    of_classes: dict[str, dict[str, Any]] = {order: {} for order in orders}
    for place, name in enumerate(names):
        members = classes == place
        size = int(members.sum())
        if size:
            within = kappa(by_class[place], one.pattern[:, members].sum(1), other[:, members].sum(1), size)
            for order, columns in orders.items():
                of_classes[order][name] = {"tokens": size, "kappa": finite(within[layers, columns].tolist())}
    return {
        "match": match,
        "kappas": finite(kappas.tolist()),
        "kappa": {order: finite(kappas[layers, columns].tolist()) for order, columns in orders.items()},
        "lift": {order: finite(lifts[layers, columns].tolist()) for order, columns in orders.items()},
        "kappa by class": of_classes,
        "rank correlation": finite(rank_correlation(counts[0].tolist(), counts[1].tolist())),
        "bits": {
            order: {weights: one.bits(other[columns], weights) for weights in WEIGHTS}
            for order, columns in orders.items()
        },
    }


def kind_of(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """What two runs' labels differ in, if it is one thing."""
    differ = [name for name in one if one[name] != other[name]]
    return {"seed": "seed", "rates": "rate"}[differ[0]] if len(differ) == 1 else None


def measure_all(rows: list[Row], folder: Path, settings: Settings, end: float) -> None:
    """Adds to `agreement.jsonl` what it lacks of the finished runs and of their pairs."""
    found = Results(folder / MEASURED)
    rows = [row for row in rows if (folder / FOLDER / row[1]["key"] / "config.json").is_file()]
    wanted = [key for _, key, _ in _pairs(rows)] + [record["key"] for _, record in rows]
    if not rows or all(key in found.records for key in wanted):
        return
    device = torch.device(settings.device)
    recipe = from_flat(rows[0][1]["recipe"])
    data = load_data(recipe, settings.sources, device)
    classes = BYTE_CLASSES.assign(torch.cat([batch["input_ids"].flatten().cpu() for batch in data.evaluation()]))
    patterns: dict[str, Tensor] = {}
    for _, record in rows:
        if time.monotonic() < end:
            patterns[record["key"]] = Chooser(record, folder, data, device).pattern
    for _, record in rows:
        key = record["key"]
        partners = [(pair, other) for first, pair, other in _pairs(rows) if first == key and other in patterns]
        todo = [(pair, other) for pair, other in [(key, None), *partners] if pair not in found.records]
        if not todo or time.monotonic() >= end:
            continue
        one = Chooser(record, folder, data, device)
        for pair, other in todo:
            if time.monotonic() >= end:
                break
            measured = measure_run(one, classes) if other is None else measure_pair(one, patterns[other], classes)
            found.add({"key": pair} | measured)
            print(f"measured {pair}: {json.dumps(measured['bits'])}", flush=True)


def _pairs(rows: list[Row]) -> list[tuple[str, str, str]]:
    """Keys of a run, of a pair in which it comes first, and of the other run."""
    return [
        (record["key"], f"{record['key']}-{other['key']}", other["key"])
        for labels, record in rows
        for others, other in rows
        if kind_of(labels, others)
    ]


def read(rows: list[Row], folder: Path) -> list[Row]:
    """Runs with `alone`, what was measured on each, and `pairs`, those in which it comes first; `again` are those that
    the other run, which comes before it, has as well."""
    found, labels = Results(folder / MEASURED).records, {record["key"]: label for label, record in rows}
    order = list(labels)
    joined = []
    for label, record in rows:
        pairs = [
            {"kind": kind_of(label, labels[other]), "again": order.index(other) < order.index(first)} | found[pair]
            for first, pair, other in _pairs(rows)
            if first == record["key"] and pair in found
        ]
        joined.append((label, record | {"alone": found.get(record["key"]), "pairs": pairs}))
    return joined


def _of_kind(rows: list[Row], kind: str) -> list[dict[str, Any]]:
    return [pair for _, record in rows for pair in record["pairs"] if pair["kind"] == kind]


def _within_classes(pair: dict[str, Any], order: str) -> float:
    """Kappa within classes of bytes, a mean over layers and over classes by their tokens."""
    parts = [(mean(found["kappa"]), found["tokens"]) for found in pair["kappa by class"][order].values()]
    known = [(value, tokens) for value, tokens in parts if not math.isnan(value)]
    return sum(value * tokens for value, tokens in known) / sum(tokens for _, tokens in known) if known else math.nan


def _largest(values: list[float | None]) -> float:
    return max((value for value in values if value is not None), default=math.nan)


def tables(rows: list[Row]) -> list[tuple[str, str]]:
    agree, swapped, classes = [], [], []
    for kind, title in KINDS.items():
        # Of the two sides of a pair one says all that they have in common.
        pairs = [pair for pair in _of_kind(rows, kind) if not pair["again"]]
        for order in ("same", "matched") if pairs else ():
            agree.append([
                title, order, len(pairs),
                mean_and_spread([mean(pair["kappa"][order]) for pair in pairs], ".3f"),
                mean_and_spread([_largest(pair["kappa"][order]) for pair in pairs], ".3f"),
                mean_and_spread([_within_classes(pair, order) for pair in pairs], ".3f"),
                mean_and_spread([mean(pair["lift"][order]) for pair in pairs], ".2f"),
                mean_and_spread([pair["rank correlation"] for pair in pairs], ".2f") if order == "same" else "",
            ])  # fmt: skip
            classes.append([title, order, *_class_cells(pairs, order)])
    alone = [record["alone"] for _, record in rows if record["alone"]]
    if alone:
        others = [mean(found["other layers"]) for found in alone]
        agree.append(["none: another layer of the model", "matched", "", mean_and_spread(others, ".3f"), *[""] * 4])
    for name, excess in excesses(rows).items():
        swapped.append([name, len(excess["mean"]), *(mean_and_spread(excess[weights], ".4f") for weights in WEIGHTS)])
    made = [
        ("Agreement", ["models differ in", *AGREEMENT], agree),
        ("Kappa by class of byte", ["models differ in", "layers", *BYTE_CLASSES.names], classes),
        ("Another choice: bits per byte more", ["choice", "models", *(f"weight: {w}" for w in WEIGHTS)], swapped),
    ]
    return [(title, markdown(head, cells)) for title, head, cells in made if cells]


def _class_cells(pairs: list[dict[str, Any]], order: str) -> list[str]:
    found = [pair["kappa by class"][order] for pair in pairs]
    return [
        number(mean([mean(classes[name]["kappa"]) for classes in found if name in classes]), ".3f")
        for name in BYTE_CLASSES.names
    ]


def excesses(rows: list[Row]) -> dict[str, dict[str, list[float]]]:
    """By choice and weights, how many bits per byte more each model takes than with its own choice, the mean over
    its partners."""
    found: dict[str, dict[str, list[float]]] = {}
    for _, record in rows:
        alone = record["alone"]
        if not alone:
            continue
        tries = [(name, bits) for name, bits in alone["bits"].items() if name != "own"]
        for kind, title in KINDS.items():
            for order in ("same", "matched"):
                chosen = [pair["bits"][order] for pair in record["pairs"] if pair["kind"] == kind]
                if chosen:
                    tries.append((f"of {title}, {order} layers", {w: mean([c[w] for c in chosen]) for w in WEIGHTS}))
        for name, bits in tries:
            for weights in WEIGHTS:
                excess = math.nan if bits[weights] is None else bits[weights] - alone["bits"]["own"]
                found.setdefault(name, {}).setdefault(weights, []).append(excess)
    return found


def draw(learnt: list[Row], timed: list[Row], path: Path) -> None:
    """Kappas of the first pair that differs in its seed; kappa by layer; rates by layer; what other choices cost."""
    figure, (first, by_layer, rates, costs) = panels(2, 2)
    pairs = _of_kind(learnt, "seed")
    if pairs:
        shown = first.imshow(
            [[math.nan if value is None else value for value in row] for row in pairs[0]["kappas"]],
            cmap="RdBu_r", vmin=-1, vmax=1,
        )  # fmt: skip
        figure.colorbar(shown, ax=first, label="kappa")
    first.set(title="two seeds", xlabel="layer of one", ylabel="layer of the other")
    for color, (kind, title) in enumerate(KINDS.items()):
        for order, style in (("same", "-"), ("matched", ":")):
            found = [pair["kappa"][order] for pair in _of_kind(learnt, kind)]
            if found:
                heights = [mean(values) for values in zip(*found, strict=True)]
                by_layer.plot(heights, style, marker=".", color=f"C{color}", label=f"{title}, {order} layers")
    by_layer.axhline(0, color="black", linewidth=0.5)
    by_layer.set(xlabel="layer", ylabel="kappa, mean over pairs")
    by_layer.legend(fontsize="x-small", loc="upper right")
    for labels, record in learnt:
        rates.plot(record["rates"], marker=".", alpha=0.8, label=", ".join(f"{k} {v}" for k, v in labels.items()))
    rates.set(xlabel="layer", ylabel="activation rate", ylim=(-0.03, 1.03))
    rates.legend(fontsize="x-small")
    for place, excess in enumerate(excesses(learnt).values()):
        for color, weights in enumerate(WEIGHTS):
            points = excess[weights]
            costs.plot(points, [place + 0.2 * color] * len(points), "o", color=f"C{color}", alpha=0.6,
                       label=f"weight: {weights}" if place == 0 else None)  # fmt: skip
    if excesses(learnt):
        costs.set_yticks(range(len(excesses(learnt))), list(excesses(learnt)), fontsize="small")
        costs.legend(fontsize="small")
    costs.set(xlabel="bits per byte more than with its own choice")
    save(figure, path)


EXPERIMENT = Experiment(
    "agreement",
    "Is the pattern of activated tokens the task's, or the optimiser's? All models are held to one budget, and differ "
    "in their seed or in their learning rates (all but the routers', times a factor). `kappa` (Cohen's) is what two "
    "layers' choices on the same bytes have in common beyond what layers of their rates have by chance: 0 is chance, "
    "1 the same tokens. It is measured for layers of the same number, and for layers matched so that the sum is the "
    "largest; matched layers of one and the same model, each with another one, say what matching alone brings. "
    "`largest` is the layer that agrees most; `within classes` is kappa among bytes of one class, the mean over "
    "classes by size; `lift` is the number of tokens that both activate, over that expected by chance; `ranks of "
    "rates` is Spearman's correlation of the layers' rates. Then each model is run with another choice of tokens, its "
    "attention's output weighed by its own confidence where it would have chosen the token too, and elsewhere by its "
    "mean confidence (`mean`) or the least that it gives (`least`, 1/2). Tokens `by lot` keep the rate of each layer.",
    grid,
    draw,
    Sequel(measure_all, read, tables),
)

if __name__ == "__main__":
    main([EXPERIMENT], description=__doc__)
