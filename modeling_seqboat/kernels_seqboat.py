"""Which op runs where: one table, read once a forward, that says why.

An op is a stage of the layer: a function of tensors that is written in torch and, where there is one, in Triton too,
with the same signature. It is declared where the torch twin is defined:

    @op("gather_rows", triton=gather_rows_triton)
    def gather_rows(x, index, slot): ...

`kernel_backend` of the config asks for `torch`, `triton` or `auto`; the environment variable SEQBOAT_KERNEL_BACKEND
overrides it. `auto` takes Triton wherever the table has nothing against it. Under `triton` an op of the model that
cannot run there is an error that gives the reason. `explain` lists what runs where, so that nothing switches silently.
"""

import functools
import os
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from .configuration_seqboat import LEARNED_ROUTERS, SeqBoatConfig
from .ops_layout_seqboat import is_exporting
from .triton_launch_seqboat import interpreted, triton

BACKENDS = ("auto", "torch", "triton")
ENVIRONMENT_VARIABLE = "SEQBOAT_KERNEL_BACKEND"


class Facts(NamedTuple):
    """What the choice of ops depends on.

    Attributes:
        requested: auto, torch or triton.
        device: the device's type; dtype: of the embeddings.
        compiling: whether a compiler traces.
        interpreted: whether Triton's interpreter runs the kernels.
        routes: whether a learned router decides; noisy: whether it needs more than the tempered softmax of two logits.
        The others are fields of the config, dropouts 0 outside training.
    """

    requested: str
    device: str
    dtype: torch.dtype
    compiling: bool
    interpreted: bool
    routes: bool
    noisy: str | None
    bidirectional: bool
    ssm_type: str
    norm_type: str
    hidden_act: str
    attention_activation: str
    qk_head_dim: int
    attention_dropout: float
    value_dropout: float


# Those that are fields of the config as they are.
_CONFIG_FACTS = ("bidirectional", "ssm_type", "norm_type", "hidden_act", "attention_activation", "qk_head_dim")


class Op(NamedTuple):
    """One entry of the table.

    Attributes:
        torch, triton: the two functions; triton None where there is no kernel.
        compiled: what takes the kernel's place in a compiled graph; None for the torch twin, of which the compiler
            makes kernels itself.
        used: whether a model of these facts has this op at all.
        needs: functions that give the reason where the kernel cannot run, else None.
        parts: other ops of which this one is made: keyword arguments of these names that are given what was chosen.
        missing: the reason where there is no kernel.
    """

    torch: Callable
    triton: Callable | None = None
    compiled: Callable | None = None
    used: Callable[[Facts], bool] = lambda facts: True
    needs: tuple[Callable[[Facts], str | None], ...] = ()
    parts: tuple[str, ...] = ()
    missing: str = "it has no kernel"


class Choice(NamedTuple):
    """Where an op runs: backend torch or triton, and for torch the reason."""

    op: str
    backend: str
    reason: str | None


OPS: dict[str, Op] = {}


def needs_silu(facts: Facts) -> str | None:
    """The reason of an op whose kernel knows no other activation."""
    return None if facts.hidden_act == "silu" else f"hidden_act={facts.hidden_act!r} has no kernel"


def op(name: str, **entry: Any) -> Callable[[Callable], Callable]:
    """Declares the decorated function as the torch twin of an op; entry: the other attributes of `Op`."""

    def declare(function: Callable) -> Callable:
        OPS[name] = Op(function, **entry)
        return function

    return declare


class Ops(SimpleNamespace):
    """The ops of one forward by name, each the function that was chosen.

    Attributes:
        facts: what they were chosen by.
        choices: name -> Choice.
        opaque: whether some run in Triton, which no compiler sees through.
        captures: whether a layer can run without waiting for the device, as a CUDA graph must.
    """

    def runs_triton(self, *names: str) -> bool:
        """Whether all of these ops run in Triton."""
        return all(name in self.choices and self.choices[name].backend == "triton" for name in names)

    def but(self, **facts: Any) -> "Ops":
        """The ops that would be chosen if these facts were others: for another `device`, outside of a compiler's
        graph."""
        changed = self.facts._replace(**facts)
        return self if changed == self.facts else _select(changed)


def requested_backend(config_value: str) -> str:
    """What the environment asks for, else what the config does."""
    value = os.environ.get(ENVIRONMENT_VARIABLE) or config_value
    if value not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(BACKENDS)}, got {value!r}")
    return value


def _choice(name: str, entry: Op, facts: Facts) -> Choice:
    away = f"tensors are on {facts.device}, Triton needs a CUDA device"
    reasons = (
        (facts.requested == "torch", "kernel_backend='torch'"),
        # The interpreter is for tests: it runs only where it is asked for.
        (facts.requested == "auto" and facts.device != "cuda", away),
        (entry.triton is None, entry.missing),
        (triton is None, "the triton package is not installed, or too old"),
        (facts.device != "cuda" and not facts.interpreted, away),
        (facts.dtype == torch.float64, "the kernels have no float64"),
        *((need(facts) is not None, need(facts)) for need in entry.needs),
    )
    reason = next((reason for applies, reason in reasons if applies), None)
    return Choice(name, "triton" if reason is None else "torch", reason)


def _facts(
    config: SeqBoatConfig, device: torch.device, dtype: torch.dtype, training: bool, rate_is_held: bool
) -> Facts:
    noisy = None
    if config.router_target_rate is not None and not rate_is_held:
        noisy = "router_target_rate has no kernel"
    elif config.router_type == "gumbel_straight_through" or (config.router_type == "gumbel" and training):
        noisy = f"router_type={config.router_type!r} has no kernel"
    return Facts(
        # An exported graph runs where there is no Triton.
        requested="torch" if is_exporting() else requested_backend(config.kernel_backend),
        device=device.type,
        dtype=dtype,
        compiling=torch.compiler.is_compiling(),
        interpreted=interpreted(),
        routes=config.router_type in LEARNED_ROUTERS,
        noisy=noisy,
        **{name: getattr(config, name) for name in _CONFIG_FACTS},
        attention_dropout=config.attention_dropout if training else 0.0,
        value_dropout=config.value_dropout if training else 0.0,
    )


# What was chosen, by names: a compiler guards the one attribute that a graph reads, and not those added since.
_SELECTED: dict[Facts, str] = {}
_CHOSEN = SimpleNamespace()
_LOCK = threading.Lock()


# A constant for compilers, since nothing in the choice depends on tensors.
@torch.compiler.assume_constant_result
def _select_name(*values: Any) -> str:
    facts = Facts(*values)
    if facts not in _SELECTED:
        ops = _made(facts)
        with _LOCK:
            name = f"choice_{len(vars(_CHOSEN))}"
            setattr(_CHOSEN, name, ops)
            _SELECTED[facts] = name
    return _SELECTED[facts]


def _select(facts: Facts) -> Ops:
    return getattr(_CHOSEN, _select_name(*facts))


def _made(facts: Facts) -> Ops:
    choices, functions = {}, {}
    for name, entry in OPS.items():
        if not entry.used(facts):
            continue
        choice = _choice(name, entry, facts)
        if facts.requested == "triton" and choice.backend == "torch":
            raise ValueError(f"kernel_backend='triton' cannot run {name}: {choice.reason}; use 'auto' or 'torch'")
        function = entry.triton if choice.backend == "triton" else entry.torch
        if facts.compiling and choice.backend == "triton":
            function = entry.compiled or entry.torch
        choices[name], functions[name] = choice, function
    for name in choices:
        parts = {part: functions[part] for part in OPS[name].parts}
        if parts:
            functions[name] = functools.partial(functions[name], **parts)
    ops = Ops(facts=facts, choices=choices, **functions)
    ops.opaque = any(choice.backend == "triton" for choice in choices.values())
    ops.captures = ops.runs_triton("pack", "gather_rows", "gated_unit", "extract_residual")
    return ops


def select_ops(
    config: SeqBoatConfig, device: torch.device, dtype: torch.dtype, training: bool, rate_is_held: bool = False
) -> Ops:
    """The ops that one forward of such a model takes.

    Args:
        device, dtype: of the embeddings.
        rate_is_held: whether a `RouterBudget` holds `router_target_rate`, so that no loss term pulls to it.

    Raises:
        ValueError: where `triton` is requested and an op of the model cannot run there, with the reason.
    """
    return _select(_facts(config, device, dtype, training, rate_is_held))


def explain(
    config: SeqBoatConfig,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    training: bool = False,
    rate_is_held: bool = False,
) -> list[Choice]:
    """Which op of such a model runs where, and why not in Triton.

    Args:
        device: where the model is; dtype: of its embeddings; training: whether it is in training mode; rate_is_held:
            whether a `RouterBudget` holds its rate.

    Returns:
        One `Choice` an op: its name, `torch` or `triton`, and the reason for torch. Under `triton`, ops with a reason
        are those for which a forward raises ValueError.
    """
    facts = _facts(config, torch.device(device), dtype, training, rate_is_held)
    return [_choice(name, entry, facts) for name, entry in OPS.items() if entry.used(facts)]
