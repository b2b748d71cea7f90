"""FLOPs of a layer from its shape and from how many tokens it activates.

Letters: D hidden width, N states a channel, Z query/key width, V value width, F feed-forward width.
"""

from dataclasses import dataclass

from .configuration_seqboat import LEARNED_ROUTERS, SeqBoatConfig
from .ssm_seqboat import RECURRENCES


@dataclass(frozen=True)
class LayerFlops:
    """FLOPs of one layer's forward by part; see `layer_flops` for the formulas."""

    ssm: int
    hidden_proj: int
    router: int
    attention_linears: int
    attention_scores: int
    ffn: int

    @property
    def attention(self) -> int:
        """What the router can save."""
        return self.attention_linears + self.attention_scores

    @property
    def total(self) -> int:
        return self.ssm + self.hidden_proj + self.router + self.attention + self.ffn


def layer_flops(config: SeqBoatConfig, tokens: int, activated: int, pairs: int, *, router: bool = True) -> LayerFlops:
    """FLOPs that one layer needs in a forward; a multiplication with its addition counts 2.

    Per real token: the recurrence, twice that when bidirectional, + 2 D for the skip. EMA: 5 N D (q*s + g*x is 3, the
    read-out 2), 7 N D with `ssm_truncation`. S4D: 14 N D (6 for a*s, 4 to add g*x, the real part read out 4). S5:
    4 N D to write, 6 N for a*s, 4 N D to read. Then `hidden_proj` 2 D^2; the router 2 D 2; the feed-forward block 4 D
    F. Per activated token: `in_proj` 2 D (Z + 2V) and `out_proj` 2 V D. Per pair of a query and a key that it sees:
    the score 2 Z and the weighted value 2 V. Norms, activations, softmax, gates, dropout and the model's embedding and
    output are left out. Blocked implementations spend more on pairs that they compute and then mask.

    Args:
        tokens: real tokens; activated: those that attend; pairs: keys seen, summed over the activated tokens.
        router: False for the same layer with attention always on, which decides nothing.
    """
    width, query, value = config.hidden_size, config.qk_head_dim, config.v_head_dim
    directions = 2 if config.bidirectional else 1
    decides = router and config.router_type in LEARNED_ROUTERS
    return LayerFlops(
        ssm=tokens * (directions * RECURRENCES[config.ssm_type].flops(config) + 2 * width),
        hidden_proj=tokens * 2 * width**2,
        router=tokens * 4 * width if decides else 0,
        attention_linears=activated * 2 * width * (query + 3 * value),
        attention_scores=pairs * 2 * (query + value),
        ffn=tokens * 4 * width * config.intermediate_size,
    )
