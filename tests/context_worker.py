"""Started by test_context_parallel.py: parts of a sequence in 2 and in 4 processes over gloo against one process that
reads the whole, in float64.

Usage: context_worker.py REPORT.json ROUND [ROUND ...]

Each round draws other cases. Round 0 has what is not drawn, too; with others come the kernels.
"""

import json
import os
import random
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import contextmanager

import triton_interpreter  # noqa: F401, before anything imports triton

# isort: split
import torch
import torch.distributed as dist
from helpers import tiny_config, tiny_lm, tiny_model, token_ids
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from modeling_seqboat import SeqBoatForCausalLM, SeqBoatModel
from modeling_seqboat.parallel_seqboat import context_parallel, sequence_part
from modeling_seqboat.ssm_seqboat import Recurrence, register_recurrence
from modeling_seqboat.training_seqboat import RouterBudget, RouterMonitor

PROCESSES = 4


class LeakySum(Recurrence):
    """A recurrence of a user's own, of which the protocol alone is known: s_t = a*s_{t-1} + x_t, y_t = s_t."""

    def __init__(self, config):
        super().__init__(config)
        self.rate = nn.Parameter(torch.empty(config.hidden_size))

    @staticmethod
    def state_shape(config):
        return (config.hidden_size,)

    @staticmethod
    def flops(config):
        return 2 * config.hidden_size

    @torch.no_grad()
    def draw_initial_values(self):
        self.rate.normal_()

    def run(self, rate, x, real, reset, state, history=None):
        ys = []
        for t in range(x.shape[1]):
            is_real = torch.ones_like(x[:, t, :1], dtype=torch.bool) if real is None else real[:, t, None]
            before = state if reset is None else torch.where(reset[:, t, None] & is_real, 0, state)
            state = torch.where(is_real, torch.sigmoid(rate) * before + x[:, t], state)
            ys.append(torch.where(is_real, state, 0))
        return torch.stack(ys, dim=1), state

    def forward(self, x, context, before=None):
        state = x.new_zeros(x.shape[0], x.shape[2]) if before is None else before.state
        y, state = self.run(self.rate, x, context.real, context.reset, state)
        y = self.activation(y)
        if before is None:
            return y, None, None
        return y, state, lambda *columns: self.run(self.rate.detach(), *columns)[1]

    def decayed(self, state, tokens):
        return state * torch.sigmoid(self.rate) ** tokens[:, None]


register_recurrence("leaky_sum", LeakySum)

RECURRENCES = [
    {"ssm_type": "ema"},
    {"ssm_type": "ema", "ssm_truncation": 3},
    {"ssm_type": "ema", "ssm_truncation": 20},
    {"ssm_type": "s4d"},
    {"ssm_type": "s5"},
    {"ssm_type": "leaky_sum"},
]
ATTENTIONS = ["softmax", "relu2", "laplace"]
POSITIONS = ["rotary", "simple", "local", "t5", "none"]
OTHERS = [{}, {"norm_first": False}, {"intermediate_size": 14}, {"norm_type": "scalenorm"}, {"norm_type": "rmsnorm"}]
PADDINGS = ["none", "left", "right", "interior", "part", "row"]
PACKINGS = ["none", "position_ids", "seq_idx", "cu_seq_lens_q"]


def double_lm(seed: int, rate: float, **overrides):
    # Each is another one: there is nothing to keep.
    return tiny_model(SeqBoatForCausalLM, tiny_config(**overrides), seed, rate).double().train()


def random_cuts(draw: random.Random, length: int, size: int) -> list[int]:
    """Lengths of `size` parts, some of a single column."""
    borders = sorted(draw.sample(range(1, length), size - 1))
    return [end - begin for begin, end in zip([0, *borders], [*borders, length], strict=True)]


def random_batch(draw: random.Random, seed: int, padding: str, packing: str, cuts: list[int]) -> dict:
    """A whole batch; `part` pads all of one process's part, `row` all but one column of a row."""
    rows, length = (1 if packing == "cu_seq_lens_q" else draw.choice([1, 2, 3])), sum(cuts)
    ids = token_ids(rows, length, seed=seed)
    labels = ids.masked_fill(torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < 0.2, -100)
    batch, real = {"input_ids": ids, "labels": labels}, torch.ones(rows, length, dtype=torch.bool)
    if padding == "left":
        real[0, : draw.randrange(1, length)] = False
    elif padding == "right":
        real[-1, draw.randrange(1, length) :] = False
    elif padding == "interior":
        real = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed + 1)) < 0.6
    elif padding == "part":
        index = draw.randrange(len(cuts))
        real[:, sum(cuts[:index]) : sum(cuts[: index + 1])] = False
    elif padding == "row":
        real[0] = False
        real[0, draw.randrange(length)] = True
    if padding != "none":
        batch["attention_mask"] = real.long()
    starts = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed + 2)) < 0.12
    if draw.random() < 0.5:
        # Where parts meet, too.
        starts[:, cuts[0]] = True
    starts[:, 0] = False
    number = starts.cumsum(1)
    if packing == "seq_idx":
        batch["seq_idx"] = number
    elif packing == "position_ids":
        columns = torch.arange(length).expand(rows, -1)
        batch["position_ids"] = columns - torch.where(starts, columns, 0).cummax(1).values
    elif packing == "cu_seq_lens_q":
        batch["cu_seq_lens_q"] = torch.tensor([0, *starts[0].nonzero()[:, 0].tolist(), length])
    return batch


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def average(model: nn.Module, group) -> None:
    """What DDP does with gradients, in one message."""
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    whole = torch.cat([gradient.flatten() for gradient in found])
    dist.all_reduce(whole, group=group)
    whole /= group.size()
    for gradient, mean in zip(found, whole.split([gradient.numel() for gradient in found]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in units of the largest entry where that is above 1; infinite for NaN."""
    if found.shape != expected.shape:
        return float("inf")
    if found.numel() == 0:
        return 0.0
    scale = expected.abs().max().clamp_min(1)
    return float(((found - expected).detach().abs().max() / scale).nan_to_num(float("inf")))


def compare(
    model, group, batch: dict, cuts: list[int], choose_backend: Callable[[str], None] | None = None
) -> dict[str, float]:
    """Forward and backward of the parts against those of the whole, both by `model`."""
    choose_backend = choose_backend or (lambda backend: None)
    choose_backend("torch")
    whole = model(**batch, output_router_probs=True)
    whole.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    part = sequence_part(batch, group, cuts)
    choose_backend("triton")
    with context_parallel(model, group):
        found = model(**part, output_router_probs=True)
    found.loss.backward()
    average(model, group)
    first = sum(cuts[: group.rank()])
    here = slice(first, first + cuts[group.rank()])
    mask = batch.get("attention_mask", torch.ones(whole.logits.shape[:2]))[:, here].bool()
    errors = {"loss": error(found.loss, whole.loss)}
    errors["logits"] = error(found.logits[mask], whole.logits[:, here][mask])
    pairs = zip(found.router_probs, whole.router_probs, strict=True)
    errors["router_probs"] = max(error(a, b[:, here]) for a, b in pairs)
    found_penalty, expected_penalty = found.router_penalty, whole.router_penalty
    errors["penalty"] = 0.0 if expected_penalty is None else error(found_penalty, expected_penalty)
    own = gradients(model)
    worst = max(own, key=lambda name: error(own[name], expected[name]))
    errors[f"gradient of {worst}"] = error(own[worst], expected[worst])
    return errors


def random_case(index: int, group) -> dict[str, float]:
    """Every kind of recurrence meets every rate; the rest is drawn."""
    draw = random.Random(index * 17 + group.size())
    config = {
        **RECURRENCES[index % len(RECURRENCES)],
        **draw.choice(OTHERS),
        "attention_activation": draw.choice(ATTENTIONS),
        "position_embedding_type": draw.choice(POSITIONS),
    }
    if draw.random() < 0.3:
        config |= {"router_target_rate": 0.3, "router_target_scope": draw.choice(["layer", "model"])}
    elif draw.random() < 0.3:
        config |= {"router_type": draw.choice(["always", "never", "random"])}
    rate = [0, 0.5, 1][index // len(RECURRENCES) % 3]
    model = double_lm(index, rate, **config)
    cuts = random_cuts(draw, draw.choice([group.size(), 9, 30, 61]), group.size())
    batch = random_batch(draw, index, draw.choice(PADDINGS), draw.choice(PACKINGS), cuts)
    if draw.random() < 0.3:
        batch["num_items_in_batch"] = 7
    if draw.random() < 0.3:
        model.gradient_checkpointing_enable({"use_reentrant": draw.random() < 0.5})
    return compare(model, group, batch, cuts)


def kernels_case(index: int, group) -> dict[str, float]:
    """The kernels, interpreted, in the parts, against torch for the whole; float32, in units of its rounding."""
    attention, position = [("softmax", "rotary"), ("relu2", "local"), ("softmax", "none")][index]
    config = {
        "attention_activation": attention,
        "position_embedding_type": position,
        "ssm_truncation": [None, 3, None][index],
    }
    model = tiny_lm(index, 0.5, **config).train()
    cuts = random_cuts(random.Random(index), 18, group.size())
    padding, packing = [("interior", "seq_idx"), ("interior", "none"), ("none", "none")][index]
    batch = random_batch(random.Random(index), index, padding, packing, cuts)

    def with_kernels(backend: str):
        for module in model.modules():
            if hasattr(module, "config"):
                module.config.kernel_backend = backend

    return {what: value / 100 for what, value in compare(model, group, batch, cuts, with_kernels).items()}


def prefill_case(index: int, group) -> dict[str, float]:
    """The cache of all processes, and what follows, are those of one that read the prompt."""
    draw = random.Random(index)
    model = tiny_lm(index, [0, 0.5, 1][index % 3], **RECURRENCES[index % len(RECURRENCES)]).double()
    cuts = random_cuts(draw, draw.choice([9, 40]), group.size())
    batch = random_batch(draw, index, draw.choice(PADDINGS), draw.choice(PACKINGS[:3]), cuts)
    del batch["labels"]
    with torch.no_grad():
        whole = model(**batch, use_cache=True)
        with context_parallel(model, group):
            found = model(**sequence_part(batch, group, cuts), use_cache=True)
        tensors = dict(whole.past_key_values.tensors())
        errors = {}
        for name, tensor in found.past_key_values.tensors():
            errors[name] = error(tensor.double(), tensors[name].double())
        following = token_ids(whole.logits.shape[0], 5, seed=index)
        lengths = [outputs.past_key_values.get_seq_length() for outputs in (whole, found)]
        errors["get_seq_length"] = float(lengths[0] != lengths[1])
        logits = [model(following, past_key_values=outputs.past_key_values).logits for outputs in (whole, found)]
        errors["following logits"] = error(logits[1], logits[0])
    worst = max(errors, key=errors.get)
    return {f"prefill, {worst}": errors[worst]}


def generate_case(group) -> dict[str, float]:
    model = tiny_lm(3)
    prompt = token_ids(2, 21)
    with torch.no_grad(), context_parallel(model, group):
        cache = model(**sequence_part({"input_ids": prompt[:, :-1]}, group), use_cache=True).past_key_values
    options = {"max_new_tokens": 6, "do_sample": False}
    found, expected = model.generate(prompt, past_key_values=cache, **options), model.generate(prompt, **options)
    return {"generate": float(not torch.equal(found, expected))}


def base_model_case(group) -> dict[str, float]:
    """SeqBoatModel without a head, from embeddings, with a loss of one's own: what is differentiated is its mean."""
    model = double_lm(5, 0.5).model
    assert isinstance(model, SeqBoatModel)
    embeds = torch.randn(2, 23, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = embeds.clone().requires_grad_()
    model(inputs_embeds=whole).last_hidden_state.square().sum().backward()
    expected = gradients_of_used(model)
    model.zero_grad()
    part = sequence_part({"inputs_embeds": embeds}, group)["inputs_embeds"].clone().requires_grad_()
    with context_parallel(model, group):
        (model(inputs_embeds=part).last_hidden_state.square().sum() * group.size()).backward()
    average(model, group)
    found = gradients_of_used(model)
    errors = [error(found[name], gradient) for name, gradient in expected.items()]
    here = sequence_part({"inputs_embeds": whole.grad}, group)["inputs_embeds"]
    return {"base model": max(errors), "inputs_embeds": error(part.grad / group.size(), here)}


def gradients_of_used(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def with_data_case(mesh) -> dict[str, float]:
    """Data and context parallel under DDP, with a RouterBudget: steps of one process that sees all rows."""
    data, context = mesh["data"], mesh["context"]
    group = context.get_group()
    model, reference = (double_lm(2, 0.5, router_target_rate=0.3) for _ in range(2))
    wrapped = DistributedDataParallel(model)
    budgets = RouterBudget(wrapped), RouterBudget(reference)
    monitors = RouterMonitor(model), RouterMonitor(reference)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
    errors = []
    for step in range(3):
        rows = [{"input_ids": ids, "labels": ids} for ids in token_ids(data.size(), 2, 19, seed=step)]
        with context_parallel(wrapped, context):
            loss = wrapped(**sequence_part(rows[data.get_local_rank()], group)).loss
            loss.backward()
        for row in rows:
            (reference(**row).loss / len(rows)).backward()
        errors += [error(a.grad, b.grad) for a, b in zip(model.parameters(), reference.parameters(), strict=True)]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        budgets[0].step()
        with single_process():
            budgets[1].step()
    rates = [monitors[0].read()]
    with single_process():
        rates.append(monitors[1].read())
    errors += [abs(rates[0][layer].activation_rate - rates[1][layer].activation_rate) for layer in (0, 1)]
    errors += [error(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True)]
    return {"with data parallelism": max(errors)}


def sharded_case(mesh) -> dict[str, float]:
    """Parameters sharded by FSDP2 over all processes, which average gradients as DDP does."""
    model, reference = (double_lm(4, 0.5) for _ in range(2))
    everyone = init_device_mesh("cpu", (PROCESSES,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=everyone)
    fully_shard(model, mesh=everyone)
    rows = token_ids(mesh["data"].size(), 2, 19)
    ids = rows[mesh["data"].get_local_rank()]
    with context_parallel(model, mesh["context"]):
        model(**sequence_part({"input_ids": ids, "labels": ids}, mesh["context"])).loss.backward()
    for ids in rows:
        (reference(ids, labels=ids).loss / len(rows)).backward()
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    return {"with FSDP2": max(error(a.grad.full_tensor(), b.grad) for a, b in pairs)}


@contextmanager
def single_process():
    """Hides the other processes from what would add up their counts."""
    usual, dist.get_world_size = dist.get_world_size, lambda *args: 1
    try:
        yield
    finally:
        dist.get_world_size = usual


def refusals(group) -> dict[str, list[str]]:
    """What a wrong input on one process makes all of them say, and that they go on."""
    model = double_lm(0, 0.5)
    last = group.rank() == group.size() - 1
    ids = token_ids(2, 6)
    ramp = torch.arange(6).expand(2, -1)

    def wrong(**changes) -> Callable[[], None]:
        def call():
            with context_parallel(model, group):
                model(**({"input_ids": ids, "labels": ids} | (changes if last else {})))

        return call

    def eval_mode():
        try:
            model.train(not last)
            wrong()()
        finally:
            model.train()

    def disagreeing():
        # Inside each part the two say the same.
        with context_parallel(model, group):
            model(ids, position_ids=ramp + 6 * group.rank(), seq_idx=torch.full((2, 6), group.rank()))

    def borders():
        with context_parallel(model, group):
            model(ids[:1], cu_seq_lens_q=torch.tensor([0, 2, 6]))

    def filled_cache():
        with torch.no_grad(), context_parallel(model, group):
            cache = model(ids, use_cache=True).past_key_values
            model(ids, past_key_values=cache)

    calls = {
        "id": wrong(input_ids=ids + 90),
        "label": wrong(labels=ids + 90),
        "mask": wrong(attention_mask=torch.full((2, 6), 3)),
        "no columns": wrong(input_ids=ids[:, :0], labels=None),
        "unknown": wrong(attention=1),
        "rows": wrong(input_ids=ids[:1], labels=ids[:1]),
        "no labels": wrong(labels=None),
        "shift_labels": wrong(labels=None, shift_labels=ids),
        "position_ids": wrong(position_ids=ramp),
        "count": wrong(num_items_in_batch=5),
        "eval": eval_mode,
        "disagreeing": disagreeing,
        "cu_seq_lens_q": borders,
        "filled cache": filled_cache,
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            text = "nothing was raised"
        except ValueError as problem:
            text = str(problem)
        texts = [None] * group.size()
        dist.all_gather_object(texts, text, group=group)
        found[name] = [texts[0], texts[-1]]
    with context_parallel(model, group):
        found["afterwards"] = [str(bool(model(ids, labels=ids).loss.isfinite()))]
    return found


def run(rank: int, path: str, rounds: list[int], store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    report = {"errors": {}, "refusals": {}}
    for shape in ((1, 4), (2, 2)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "context"))
        group, size = mesh["context"].get_group(), shape[1]
        # Two groups of two draw other cases each.
        own, share = mesh["data"].get_local_rank(), 1 if size == 4 else 3
        drawn, prefills = 18 // share, 6 // share
        cases = {}
        for number in rounds:
            first = number * drawn
            cases |= {f"case {i}": (random_case, i + 9 * own, group) for i in range(first, first + drawn)}
            first = number * prefills
            cases |= {f"prefill {i}": (prefill_case, i + 6 * own, group) for i in range(first, first + prefills)}
        if 0 in rounds:
            cases |= {"generate": (generate_case, group), "base": (base_model_case, group)}
            cases |= {"data": (with_data_case, mesh), "sharded": (sharded_case, mesh)}
            report["refusals"][size] = refusals(group)
        else:
            cases |= {f"kernels {i}": (kernels_case, i, group) for i in range(3)}
        for name, (function, *arguments) in cases.items():
            errors = function(*arguments)
            worst = torch.tensor(list(errors.values()), dtype=torch.float64)
            dist.all_reduce(worst, dist.ReduceOp.MAX)
            for what, value in zip(errors, worst.tolist(), strict=True):
                report["errors"][f"{size} processes, {name}: {what}"] = value
    if rank == 0:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(report, file)
    dist.barrier()
    dist.destroy_process_group()


def child(*arguments) -> None:
    try:
        run(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        # At once: others wait for this process, and fail when it is gone.
        os._exit(1)
    os._exit(0)


def main(path: str, *rounds: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # Forked, so that the imports are paid for once.
        children = []
        for rank in range(PROCESSES):
            pid = os.fork()
            if pid == 0:
                child(rank, path, [int(number) for number in rounds], os.path.join(folder, "store"))
            children.append(pid)
        failed = [os.waitpid(pid, 0)[1] for pid in children]
    sys.exit(int(any(failed)))


if __name__ == "__main__":
    main(*sys.argv[1:])
