"""One pass over what other libraries touch: forward, generate, a Trainer step, LoRA, a Hub folder in a process of its
own.

    python .ci/smoke.py

Run by `.ci/run` on the versions of constraints.txt, where it must pass, and on the newest ones that the package index
has, where it tells what breaks. Each part reports for itself; the exit status is the number of parts that failed.
"""

import subprocess
import sys
import tempfile
import traceback
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import modeling_seqboat
from modeling_seqboat import SeqBoatConfig, SeqBoatForCausalLM, build_byte_tokenizer

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


def model() -> SeqBoatForCausalLM:
    torch.manual_seed(0)
    return SeqBoatForCausalLM(SeqBoatConfig.from_preset("tiny", eos_token_id=None)).eval()


def forward_and_generate() -> None:
    built = model()
    with torch.no_grad():
        whole = built(IDS, use_cache=False).logits
        first = built(IDS[:, :10])
        rest = built(IDS[:, 10:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, whole[:, 10:], rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = built.generate(IDS, use_cache=False, **options)
    for other in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 7}, {"num_beams": 2}):
        found = built.generate(IDS, **options, **other)
        assert found.shape == expected.shape and ("num_beams" in other or torch.equal(found, expected)), other
    assert torch.equal(built.generate(IDS[:1], assistant_model=model(), **options), expected[:1])


def trainer_step() -> None:
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, max_steps=2, report_to="none", use_cpu=True, save_strategy="no")
        trainer = Trainer(model(), arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        assert trainer.evaluate()["eval_loss"] > 0


def lora() -> None:
    adapted = get_peft_model(
        model(), LoraConfig(r=2, target_modules=["hidden_proj", "in_proj", "out_proj"], task_type="CAUSAL_LM")
    )
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    expected = adapted.eval()(input_ids=IDS).logits
    torch.testing.assert_close(adapted.merge_and_unload()(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def hub_folder() -> None:
    with tempfile.TemporaryDirectory() as folder:
        saved, built = Path(folder) / "saved", Path(folder) / "built"
        model().save_pretrained(saved)
        build_byte_tokenizer().save_pretrained(saved)
        # `verify` loads the folder in a process that lacks this package, generates, trains and saves it again.
        for command in (["build", "--model", str(saved), "--output", str(built)], ["verify", str(built)]):
            done = subprocess.run(
                [sys.executable, "-m", "hub_upload", *command],
                capture_output=True,
                text=True,
                cwd=Path(__file__).parent.parent,
            )
            assert done.returncode == 0, done.stdout + done.stderr
        AutoModelForCausalLM.from_pretrained(built)


def main() -> int:
    names = ("torch", "transformers", "accelerate", "peft", "huggingface_hub", "tokenizers")
    print(f"seqboat {modeling_seqboat.__version__} with", ", ".join(f"{name} {version(name)}" for name in names))
    failed = 0
    for part in (forward_and_generate, trainer_step, lora, hub_folder):
        try:
            part()
            print(f"{part.__name__}: works")
        except Exception:
            failed += 1
            print(f"{part.__name__}: BROKEN\n{traceback.format_exc(limit=-3)}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
