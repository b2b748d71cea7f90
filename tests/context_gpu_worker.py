"""Started by test_gpu.py under torchrun: a sequence cut over two GPUs against the same model on one, in float32 and
under bfloat16 autocast. Without GPUs it runs over gloo, to try the script.

Usage: context_gpu_worker.py REPORT.json
"""

import json
import os
import sys

import torch
import torch.distributed as dist

from modeling_seqboat import SeqBoatConfig, SeqBoatForCausalLM
from modeling_seqboat.parallel_seqboat import context_parallel, sequence_part

ROWS, LENGTH = 2, 3001
CASES = {
    "softmax": {},
    "relu2": {"attention_activation": "relu2", "position_embedding_type": "local"},
    "truncated": {"ssm_truncation": 500},
    "s4d": {"ssm_type": "s4d"},
    "pulled": {"router_target_rate": 0.3},
}


def build(device: torch.device, **overrides) -> SeqBoatForCausalLM:
    torch.manual_seed(0)
    fields = {
        "hidden_size": 88, "num_hidden_layers": 3, "qk_head_dim": 32, "v_head_dim": 176, "memory_size": 64,
    }  # fmt: skip
    model = SeqBoatForCausalLM(SeqBoatConfig(**(fields | overrides))).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router.weight" in name or "qk_scale" in name:
                parameter.normal_(0, 1)
    return model.to(device)


def batch_on(device: torch.device) -> dict[str, torch.Tensor]:
    """Packed, and one row padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 256, (ROWS, LENGTH), generator=generator)
    number = (torch.rand(ROWS, LENGTH, generator=generator) < 0.002).cumsum(1)
    mask = torch.ones_like(ids)
    mask[1, :700] = 0
    batch = {"input_ids": ids, "labels": ids, "seq_idx": number, "attention_mask": mask}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def results(model, batch: dict, half: bool) -> dict[str, torch.Tensor]:
    """Loss, and the gradients in one vector."""
    model.zero_grad()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
        outputs = model(**batch, output_router_probs=True)
    outputs.loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return {"loss": outputs.loss.detach(), "gradient": gradient, "probs": torch.stack(outputs.router_probs)}


def parts(model, batch: dict, half: bool) -> dict[str, torch.Tensor]:
    """`results` of the cut sequence, put together."""
    group = dist.group.WORLD
    with context_parallel(model, group):
        found = results(model, sequence_part(batch, group), half)
    dist.all_reduce(found["gradient"])
    found["gradient"] /= group.size()
    lengths = [LENGTH // group.size() + (rank < LENGTH % group.size()) for rank in range(group.size())]
    whole = found["probs"].new_zeros(*found["probs"].shape[:2], LENGTH)
    first = sum(lengths[: group.rank()])
    whole[:, :, first : first + lengths[group.rank()]] = found["probs"]
    dist.all_reduce(whole)
    return {**found, "probs": whole}


@torch.no_grad()
def prefilled(model, batch: dict) -> float:
    """How far a token behind a prompt that was read in parts is from the same behind the whole, in every process."""
    model.eval()
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    whole = model(**prompt, use_cache=True).past_key_values
    with context_parallel(model, dist.group.WORLD):
        found = model(**sequence_part(prompt, dist.group.WORLD), use_cache=True).past_key_values
    following = [model(batch["input_ids"][:, :1], past_key_values=cache).logits for cache in (whole, found)]
    model.train()
    error = (following[1] - following[0]).abs().max()
    dist.all_reduce(error, dist.ReduceOp.MAX)
    return float(error)


def errors(found: dict, expected: dict) -> dict[str, float]:
    gradient = (found["gradient"] - expected["gradient"]).norm() / expected["gradient"].norm()
    flipped = ((found["probs"] > 0) != (expected["probs"] > 0)).float().mean()
    loss = (found["loss"] - expected["loss"]).abs() / expected["loss"]
    return {"loss": float(loss), "gradient": float(gradient), "flipped": float(flipped)}


def main(path: str) -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    report = {}
    batch = batch_on(device)
    for name, overrides in CASES.items():
        model = build(device, **overrides)
        exact = results(model, batch, half=False)
        report[name] = {
            "float32 parts": errors(parts(model, batch, half=False), exact),
            "prefill": prefilled(model, batch),
            "bfloat16 whole": errors(results(model, batch, half=True), exact),
            "bfloat16 parts": errors(parts(model, batch, half=True), exact),
        }
        model.gradient_checkpointing_enable({"use_reentrant": False})
        report[name]["bfloat16 parts, checkpointed"] = errors(parts(model, batch, half=True), exact)
    if dist.get_rank() == 0:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
