"""A million-token prompt in constant memory."""

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CHUNK = 8192
TOKENS = (100_000, 1_000_000)
ALLOWANCE = 50 * 2**20

# Peak memory is that of a process, so every measurement has one of its own. The allocator must give freed chunks back.
CHILD = """
import json, resource, sys
import torch
from modeling_seqboat import SeqBoatCache, SeqBoatConfig, SeqBoatForCausalLM

how, tokens, chunk = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
model = SeqBoatForCausalLM(SeqBoatConfig.from_preset("tiny", eos_token_id=None)).eval()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

with torch.no_grad():
    if how == "forward":
        # Chunks are drawn as they are fed: nothing but the model's own memory is measured.
        cache = SeqBoatCache(model.config)
        for start in range(0, tokens, chunk):
            ids = torch.randint(0, 256, (1, min(chunk, tokens - start)))
            model(ids, past_key_values=cache, logits_to_keep=1)
        for _ in range(8):
            model(torch.randint(0, 256, (1, 1)), past_key_values=cache)
        seen = cache.get_seq_length() - 8
    else:
        ids = torch.randint(0, 256, (1, tokens))
        out = model.generate(
            ids, do_sample=False, max_new_tokens=8, prefill_chunk_size=chunk, return_dict_in_generate=True
        )
        cache, seen = out.past_key_values, out.past_key_values.get_seq_length() - 7
print(json.dumps({"peak": peak(), "seen": seen, "cache": cache.memory_bytes()}))
"""


def measured(how: str, tokens: int) -> dict[str, int]:
    command = [sys.executable, "-c", CHILD, how, str(tokens), str(CHUNK)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=1500)
    return json.loads(done.stdout.splitlines()[-1])


def test_the_forward_with_its_cache_takes_no_more_memory_for_a_million_tokens():
    short, long = (measured("forward", tokens) for tokens in TOKENS)
    assert (short["seen"], long["seen"]) == TOKENS
    assert short["cache"] == long["cache"]
    assert long["peak"] - short["peak"] < ALLOWANCE


def test_generate_takes_no_more_than_its_copies_of_ids_mask_and_positions():
    short, long = (measured("generate", tokens) for tokens in TOKENS)
    assert (short["seen"], long["seen"]) == TOKENS
    assert short["cache"] == long["cache"]
    # int64 ids, mask and positions of one row, and at most three copies of each alive at a time.
    copies = 3 * 3 * 8 * (TOKENS[1] - TOKENS[0])
    assert long["peak"] - short["peak"] < ALLOWANCE + copies
