"""How much two models' choices of tokens have in common, and models that are made to take another choice.

Letters: n layers, m layers of another model, T tokens, C classes of tokens.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from run_data import Batch
from runs import Data
from torch import Tensor
from transformers import PreTrainedModel


def counted_together(first: Tensor, second: Tensor, classes: Tensor, count: int) -> Tensor:
    """How many tokens of each class a layer of each model activates, both of them: (C, n, m) float64.

    Args:
        first: (n, T) bool; second: (m, T) bool; classes: (T,) int64 below `count`.
    """
    members = torch.nn.functional.one_hot(classes, count).T.bool()
    return torch.stack([first[:, own].double() @ second[:, own].double().T for own in members])


def kappa(together: Tensor, first: Tensor, second: Tensor, tokens: int) -> Tensor:
    """Cohen's kappa of all pairs of layers: how much more they agree than layers of their rates do that choose by lot,
    as a share of how much more they could. 0 is chance, 1 the same tokens; NaN where two layers of these rates cannot
    but agree.

    Args:
        together: (n, m), tokens that both activate; first: (n,), second: (m,), tokens that each does; of `tokens`.
    """
    p, q, both = first[:, None] / tokens, second[None] / tokens, together / tokens
    by_chance = p * q + (1 - p) * (1 - q)
    return torch.where(by_chance < 1, (1 - p - q + 2 * both - by_chance) / (1 - by_chance), math.nan)


def lift(together: Tensor, first: Tensor, second: Tensor, tokens: int) -> Tensor:
    """Tokens that both layers activate, over how many there would be by chance; NaN where there would be none."""
    return together * tokens / (first[:, None] * second[None])


def best_assignment(worth: Sequence[Sequence[float]]) -> list[int]:
    """For each row of a square table another column, so that the sum of the entries is the largest (the Hungarian
    method). NaN counts as 0."""
    size = len(worth)
    cost = [[0.0 if math.isnan(value) else -value for value in row] for row in worth]
    row_price, column_price, taken = [0.0] * (size + 1), [0.0] * (size + 1), [-1] * (size + 1)
    for row in range(size):
        # A column beside the table begins the path along which the rows change their columns.
        column, taken[size] = size, row
        least, before, seen = [math.inf] * size, [size] * size, [False] * (size + 1)
        while taken[column] >= 0:
            seen[column], own = True, taken[column]
            for other in range(size):
                if not seen[other]:
                    price = cost[own][other] - row_price[own] - column_price[other]
                    if price < least[other]:
                        least[other], before[other] = price, column
            nearest = min((other for other in range(size) if not seen[other]), key=least.__getitem__)
            step = least[nearest]
            for other in range(size + 1):
                if seen[other]:
                    row_price[taken[other]] += step
                    column_price[other] -= step
                elif other < size:
                    least[other] -= step
            column = nearest
        while column != size:
            taken[column] = taken[before[column]]
            column = before[column]
    found = [0] * size
    for column in range(size):
        found[taken[column]] = column
    return found


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, equal values sharing the mean of their ranks; NaN where all values of one side are equal."""
    ranks = torch.tensor([_ranks(first), _ranks(second)], dtype=torch.float64)
    ranks = ranks - ranks.mean(1, keepdim=True)
    size = ranks.norm(dim=1).prod()
    return float(ranks.prod(0).sum() / size) if size > 0 else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2
            for value in values]  # fmt: skip


def by_lot(pattern: Tensor, classes: Tensor, seed: int) -> Tensor:
    """(n, T) bool: as many tokens of each class in each layer as in `pattern`, drawn by lot.

    Args:
        classes: (T,) int64; all zeros where only the layers' rates are to be kept.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.zeros_like(pattern)
    for label in classes.unique():
        own = (classes == label).nonzero()[:, 0]
        for layer, count in enumerate(pattern[:, own].sum(1).tolist()):
            drawn[layer, own[torch.randperm(len(own), generator=generator)[:count]]] = True
    return drawn


class Imposed:
    """A model's validation data, whose routers activate given tokens while a `with` block lasts, whatever they would
    choose.

    Where a router would have activated a token as well, its own confidence weighs the attention's output; elsewhere a
    weight of the layer does. So a model on which its own choice is imposed is the model as it is, bit by bit.

    Args:
        pattern: (n, T) bool, the tokens of all validation rows in order.
        weights: n numbers.
    """

    def __init__(self, model: PreTrainedModel, data: Data, pattern: Tensor, weights: Sequence[float]):
        self.layers, self.data, self.pattern, self.weights = model.model.layers, data, pattern, weights
        self._now: Tensor | None = None

    def evaluation(self) -> Iterator[Batch]:
        first = 0
        for batch in self.data.evaluation():
            ids = batch["input_ids"]
            chosen = self.pattern[:, first : first + ids.numel()]
            first += ids.numel()
            self._now = chosen.reshape(len(chosen), *ids.shape).to(ids.device)
            yield batch

    def _hook(self, layer: int):
        def impose(router, arguments, output):
            confidence, own, rate = output
            active = self._now[layer]
            weight = confidence.new_tensor(self.weights[layer])
            return torch.where(active, torch.where(own, confidence, weight), 0), active, rate

        return impose

    def __enter__(self):
        self._handles = [block.router.register_forward_hook(self._hook(i)) for i, block in enumerate(self.layers)]
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
