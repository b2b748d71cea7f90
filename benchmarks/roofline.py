"""The least time that a SeqBoat could take on a device whose copy bandwidth and matmul rate are known.

    time = bytes / copy bandwidth + FLOPs / matmul rate

Bytes: every tensor that one matrix product of a layer hands to the next is written once and read once, L tokens of
which M are activated: 2 x bytes of an element x [3 D L + (Z + 3 V + D) M] a layer. These are the layer's input, the
output of the recurrence and `hidden_proj` (D each), and of activated tokens the projection (Z + 2 V), the gated values
(V) and the output (D). FLOPs: the products of `layer_flops`, the recurrence left out. A training step is three times a
forward. The embedding, the output matrix and the weights are left out. Letters: D hidden width, Z query/key width, V
value width.
"""

import torch
from measuring import median_ms

from modeling_seqboat import SeqBoatConfig
from modeling_seqboat.flops_seqboat import layer_flops


def copy_bytes_per_second(device: torch.device) -> float:
    """Bytes read plus bytes written a second by a copy too large for any cache."""
    size = 1 << (30 if device.type == "cuda" else 26)
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / (median_ms(lambda: target.copy_(source), device, 5) / 1e3)


def matmul_flops_per_second(device: torch.device) -> float:
    """Of a square product, in bfloat16 on a GPU and float32 on a CPU."""
    width, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    left, right = (torch.randn(width, width, dtype=dtype, device=device) for _ in range(2))
    return 2 * width**3 / (median_ms(lambda: left @ right, device, 5) / 1e3)


def visible_pairs(activated: int, window: int) -> int:
    """Keys seen, summed over `activated` tokens of one row: each sees itself and the `window` before it."""
    full = max(activated - window - 1, 0)
    rising = activated - full
    return rising * (rising + 1) // 2 + full * (window + 1)


def least_ms(
    config: SeqBoatConfig, length: int, rate: float, element_bytes: int, bytes_per_s: float, flop_per_s: float
) -> float:
    """The least time of a forward over one row of `length` tokens, in milliseconds; see the formula above."""
    activated = round(rate * length)
    flops = layer_flops(config, length, activated, visible_pairs(activated, config.memory_size))
    width, query, value = config.hidden_size, config.qk_head_dim, config.v_head_dim
    moved = 2 * element_bytes * (3 * width * length + (query + 3 * value + width) * activated)
    seconds = moved / bytes_per_s + (flops.total - flops.ssm) / flop_per_s
    return 1e3 * config.num_hidden_layers * seconds
