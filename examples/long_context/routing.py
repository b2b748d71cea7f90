"""What training adds to the loss so that routers keep what a later answer needs, and nothing else.

A router's own gradient says whether a token's *attention output* was of use. It does not say whether it was of use
that
the token was kept: a key in the memory changes what later tokens read, and the decision to keep it is not
differentiable. A pair's value in the last layer is an extreme case: nothing reads its output, everything depends on
its being kept.

With a router that draws at random in training (`router_type` gumbel or gumbel_straight_through) the missing gradient
can
be estimated: texts that were answered worse than others of the batch make the decisions that were drawn for them less
likely (REINFORCE with the batch's mean as its baseline). Together with a pull to a budget, tokens that are not missed
go.

Letters: B texts, L columns, n layers.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeling_seqboat import SeqBoatForCausalLM

# Added to the logit for skipping, so that no drawn noise keeps a token from attending.
OPEN = -1e4
# Tokens are pushed on until the difference of their logits is this far below 0. Sure decisions are what a text of a
# million tokens needs: one token of noise in a thousand that is kept would fill a memory of 64 sixteen times.
MARGIN = 4.0


class RouterWatch:
    """Keeps what the routers decided in the last forward, with gradients. Use it as a context manager.

    Attributes:
        logits: n tensors (B, L), u_1 - u_0 without noise; active: n bool tensors (B, L).
    """

    def __init__(self, model: nn.Module):
        self.logits: list[Tensor] = []
        self.active: list[Tensor] = []
        routers = [layer.router for layer in model.model.layers] if isinstance(model, SeqBoatForCausalLM) else []
        self.learned = bool(routers) and routers[0].learned
        self._handles = [router.register_forward_hook(self._note) for router in routers]

    def _note(self, router: nn.Module, arguments: tuple, output: tuple) -> None:
        if router.layer_idx == 0:
            self.logits, self.active = [], []
        self.active.append(output[1])
        if router.learned:
            x, difference = arguments[0].float(), router.weight[1] - router.weight[0]
            with torch.autocast(x.device.type, enabled=False):
                self.logits.append(x @ difference.float() + (router.bias[1] - router.bias[0]).float())

    def kept(self) -> list[float]:
        """Activated tokens of a text by layer; empty for a model without routers."""
        return [float(active.float().sum(1).mean()) for active in self.active]

    def credit(self, losses: Tensor) -> Tensor:
        """A term whose gradient makes decisions less likely that came with a higher loss than the batch's mean.

        Args:
            losses: (B,), of each text; no gradient goes through them here.
        """
        surplus = (losses - losses.mean()).detach()
        chance = sum(
            F.logsigmoid(torch.where(active, logits, -logits)).sum(1)
            for logits, active in zip(self.logits, self.active, strict=True)
        )
        return (surplus * chance).mean()

    def pull(self, budget: float) -> Tensor:
        """A two-sided pull of the share of tokens that all layers together activate to a budget, which they share as
        they like. Its force is |log(share / budget)|: as strong from 2 to 1 % as from 80 to 40 %.

        Above the budget the open tokens share the force evenly, however sure their router is: the gradient of the
        logarithm itself would vanish where routers are sure, and a layer that is open everywhere would stay so. Below
        it that gradient opens the tokens that routers are least sure of.
        """
        rate = self.rate()
        known = rate.detach().clamp_min(1e-6)
        force = torch.log(known / budget)
        closing = torch.stack([F.softplus(logits + MARGIN).mean() for logits in self.logits]).mean() / known
        return force.clamp_min(0) * closing + force.clamp_max(0) * torch.log(rate.clamp_min(1e-6))

    def rate(self) -> Tensor:
        """The expected share of tokens that all layers together activate, with its gradient."""
        return torch.stack([torch.sigmoid(logits).mean() for logits in self.logits]).mean()

    def __enter__(self) -> "RouterWatch":
        return self

    def __exit__(self, *error) -> None:
        for handle in self._handles:
            handle.remove()


def open_routers(model: nn.Module, bias: float) -> None:
    """Lets every token attend until `release_routers`, and starts the routers at this difference of their logits."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.router.bias.copy_(torch.tensor([-bias / 2, bias / 2]))
    model.config.activation_bias = OPEN


def release_routers(model: nn.Module) -> None:
    model.config.activation_bias = 0.0
