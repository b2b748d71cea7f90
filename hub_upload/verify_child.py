"""Run by `verify` in a process of its own: loads a Hub folder as a stranger would, and uses it.

This file imports nothing of the project, and makes the project's packages impossible to import, so that only the code
in the folder can answer. Each check prints one JSON line; the first failure ends the process with status 1.

    python -I verify_child.py FOLDER SAVE_TO {first|again}
"""

import importlib.abc
import json
import os
import sys
import traceback
from pathlib import Path

BLOCKED = ("modeling_seqboat", "hub_upload", "configuration")
PROMPT = "The quick brown fox"
NEW_TOKENS = 8
SEQUENCE = 24


class _Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(
                f"No module named {name!r} (not installed where this folder is loaded)", name=name
            )
        return None


sys.meta_path.insert(0, _Blocker())
# Whatever libraries print goes to stderr, so that only checks are on stdout.
CHECKS = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)

import torch  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoTokenizer  # noqa: E402
from transformers.dynamic_module_utils import get_class_from_dynamic_module  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402


class CheckFailed(Exception):
    """A check's own finding, printed without a traceback."""


def _require(condition, message):
    if not condition:
        raise CheckFailed(message)


def report(check, detail=""):
    print(json.dumps({"check": check, "detail": detail}), file=CHECKS, flush=True)


def check_auto_map(folder, auto_map):
    # save_pretrained copies only the files that the saved class needs: heads kept in others are missing from a folder
    # that was loaded and saved again.
    files = {auto: Path(folder) / f"{reference.split('.')[0]}.py" for auto, reference in auto_map.items()}
    missing = sorted(auto for auto, file in files.items() if not file.is_file())
    found = sorted(set(auto_map) - set(missing))
    for auto in found:
        get_class_from_dynamic_module(auto_map[auto], folder)
    report("auto_map", ", ".join(found) + (f"; no file for {', '.join(missing)}" if missing else ""))


def load(folder):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    _require(
        type(config).__module__.startswith("transformers_modules."),
        f"the config class came from {type(config).__module__}, not from the folder",
    )
    report("AutoConfig", type(config).__name__)
    # The class that was saved decides which head is tried.
    name = config.architectures[0]
    auto = next(key for key, ref in config.auto_map.items() if ref.split(".")[-1] == name and key != "AutoConfig")
    model = getattr(modeling_auto, auto).from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    _require(type(model).__name__ == name, f"{auto} built a {type(model).__name__}, not a {name}")
    report(auto, f"{name}, {sum(p.numel() for p in model.parameters()):,} parameters, {model.dtype}")
    if auto != "AutoModel":
        base = AutoModel.from_pretrained(folder, trust_remote_code=True)
        report("AutoModel", type(base).__name__)
    check_auto_map(folder, config.auto_map)
    tokenizer = None
    if (Path(folder) / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        _require(
            len(tokenizer) <= config.vocab_size,
            f"the tokenizer has {len(tokenizer)} ids, the model's vocab_size is {config.vocab_size}",
        )
        report("AutoTokenizer", f"{len(tokenizer)} ids")
    return config, auto, model, tokenizer


def example_batch(config, tokenizer, auto):
    """One input that a model of this kind accepts, and its labels, both by argument name."""
    generator = torch.Generator().manual_seed(0)
    if auto == "AutoModelForImageClassification":
        batch = {"pixel_values": torch.randn(1, 1, 4, SEQUENCE // 4, generator=generator)}
    elif config.input_type == "values":
        batch = {"input_values": torch.randn(1, SEQUENCE, generator=generator)}
    elif tokenizer is not None:
        batch = {"input_ids": tokenizer(PROMPT, return_tensors="pt")["input_ids"]}
    else:
        batch = {"input_ids": torch.randint(4, max(5, config.vocab_size), (1, SEQUENCE), generator=generator)}
    name = next(iter(batch))
    if auto in ("AutoModelForCausalLM", "AutoModelForMaskedLM"):
        labels = {"labels": batch[name].clone()}
    elif auto == "AutoModelForTokenClassification":
        labels = {"labels": torch.zeros_like(batch[name], dtype=torch.long)}
    elif auto == "AutoModelForQuestionAnswering":
        labels = {"start_positions": torch.tensor([1]), "end_positions": torch.tensor([2])}
    else:
        labels = {"labels": torch.zeros(1, dtype=torch.long)}
    if auto == "AutoModelForSequenceClassification" and config.pair_features != "none":
        batch[f"pair_{name}"] = batch[name].clone()
    return batch, labels


def answers(output):
    """The tensor by which outputs of a head are compared."""
    return next(output[name] for name in ("logits", "start_logits", "last_hidden_state") if name in output)


def check_outputs(model, batch):
    with torch.no_grad():
        logits = answers(model(**batch))
    _require(torch.isfinite(logits).all(), "the outputs are not finite")
    report("forward", f"shape {tuple(logits.shape)}, finite")
    return logits


def check_generation(model, batch, tokenizer):
    ids = batch["input_ids"]
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    _require(new.shape[1] > ids.shape[1], "nothing was generated")
    added = new[0, ids.shape[1] :].tolist()
    report("generation", repr(tokenizer.decode(added)) if tokenizer is not None else str(added))
    return added


def check_lora(folder, auto, batch, labels):
    try:
        import peft
    except ImportError:
        report("LoRA step", "skipped: peft is not installed")
        return
    model = getattr(modeling_auto, auto).from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    names = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    targets = sorted(names & {"hidden_proj", "in_proj", "out_proj", "fc1", "fc2"})
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    before = [parameter.detach().clone() for parameter in trained]
    adapted.train()
    loss = adapted(**batch, **labels).loss
    loss.backward()
    _require(torch.isfinite(loss), f"the loss is {loss.item()}")
    optimizer.step()
    changed = sum(not torch.equal(old, new) for old, new in zip(before, trained, strict=True))
    _require(changed, "a LoRA step changed no adapter weight")
    report("LoRA step", f"loss {loss.item():.4f}, targets {', '.join(targets)}")


def check_saved_again(model, auto, tokenizer, batch, logits, target):
    model.save_pretrained(target)
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
    again = getattr(modeling_auto, auto).from_pretrained(target, trust_remote_code=True, dtype="auto").eval()
    saved = again.state_dict()
    for name, tensor in model.state_dict().items():
        _require(torch.equal(tensor, saved[name]), f"{name} differs after save and reload")
    with torch.no_grad():
        _require(torch.equal(logits, answers(again(**batch))), "the outputs differ after save and reload")
    report("save and reload", f"{len(saved)} tensors bit for bit, equal outputs")


def main(folder, target, stage):
    torch.manual_seed(0)
    config, auto, model, tokenizer = load(folder)
    batch, labels = example_batch(config, tokenizer, auto)
    logits = check_outputs(model, batch)
    if auto == "AutoModelForCausalLM":
        check_generation(model, batch, tokenizer)
    if auto != "AutoModel":
        check_lora(folder, auto, batch, labels)
    if stage == "first":
        check_saved_again(model, auto, tokenizer, batch, logits, target)
    leaked = [name for name in sys.modules if name.split(".")[0] in BLOCKED]
    _require(not leaked, f"modules of the project were imported: {leaked}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except CheckFailed as failure:
        print(json.dumps({"error": str(failure)}), file=CHECKS, flush=True)
        sys.exit(1)
    # Whatever a stranger would meet is the finding; the traceback goes to stderr for whoever looks into it.
    except Exception as failure:
        traceback.print_exc()
        print(json.dumps({"error": f"{type(failure).__name__}: {failure}"}), file=CHECKS, flush=True)
        sys.exit(1)
