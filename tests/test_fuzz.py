"""Files of anybody: 2,000 mutations each of what the readers read end in what was written, in something valid, or in
the documented error."""

import copy
import importlib
import io
import json
import os
import random
import resource
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hub_upload.build import read_config
from hub_upload.card_sources import read_sources
from hub_upload.convert import convert_checkpoint
from hub_upload.errors import HubUploadError
from modeling_seqboat import SeqBoatCache, SeqBoatConfig, SeqBoatForCausalLM

ROOT = Path(__file__).resolve().parent.parent
COUNT = 2_000
# What stands where a value of JSON stood.
VALUES = (
    None, True, False, 0, 1, -1, 7, 2**31, 10**30, 0.5, -0.0, float("nan"), float("inf"), "", "x", "../../x", "1",
    "\ud800",
    [], [1], [[]], {}, {"a": 1}, [None], {"": None}, "\u202e", "a" * 5000,
)  # fmt: skip
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def bounded_memory():
    """A reader that believes a size in a file fails here instead of filling the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def examples(monkeypatch):
    """A function that imports the examples' modules; they are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name in {path.stem for path in (ROOT / "examples").glob("*.py")}:
            del sys.modules[name]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One to three changes: a bit, a byte, a cut, a piece that is left out, doubled or overwritten."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        # Half of them in the first part, where headers are.
        at = rng.randrange(max(1, len(data) if rng.random() < 0.5 else min(len(data), 600)))
        length = rng.choice((1, 1, 2, 8, 64))
        kind = rng.randrange(6)
        if kind == 0 and data:
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + rng.randbytes(length) + data[at + length :]
        elif kind == 2:
            data = data[:at]
        elif kind == 3:
            data = data[:at] + data[at + length :]
        elif kind == 4:
            data = data[:at] + data[at : at + length] + data[at:]
        else:
            data = (
                data[:at] + rng.choice((b"\0", b"\xff", b"[", b'"', b"\n", b"{", b"\xe2\x80\xa8")) * length + data[at:]
            )
    return data


def places(value, path=()):
    """Where in a JSON value something can be put."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def altered(value, rng: random.Random):
    """A copy of a JSON value with one to three places changed, left out or doubled."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        path = rng.choice(list(places(value)))
        new = copy.deepcopy(rng.choice(VALUES))
        if not path:
            value = new if rng.random() < 0.1 else value
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        kind = rng.randrange(4)
        if kind == 0:
            del parent[path[-1]]
        elif kind == 1 and isinstance(parent, dict):
            parent[rng.choice(("", "x", "../x", "\u2028"))] = new
        else:
            parent[path[-1]] = new
    return value


def anew(path: Path) -> Path:
    """A file that is not there: to write over another one waits for the disk."""
    path.unlink(missing_ok=True)
    return path


def test_saved_caches(tmp_path):
    rng = random.Random(0)
    torch.manual_seed(0)
    config = SeqBoatConfig(
        vocab_size=23, hidden_size=6, num_hidden_layers=2, state_size=2, qk_head_dim=4, v_head_dim=5, memory_size=3,
        ssm_truncation=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model, path = SeqBoatForCausalLM(config).eval(), tmp_path / "state"
    cache = SeqBoatCache(config)
    with torch.no_grad():
        model(torch.randint(0, 23, (2, 9)), past_key_values=cache)
    cache.save(path)
    data, expected = path.read_bytes(), dict(cache.tensors())
    loaded = 0
    for _ in range(COUNT):
        anew(path).write_bytes(damaged(data, rng))
        try:
            found = SeqBoatCache.load(path, config)
        except ValueError:
            continue
        # The checksum lets nothing through but what was saved.
        loaded += 1
        assert found.get_seq_length() == 9
        for name, tensor in found.tensors():
            assert torch.equal(tensor, expected[name]), name
    assert loaded < COUNT / 10
    # Files of an earlier version have no checksum: what is in them is checked all the same.
    path.write_bytes(data)
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    tensors = load_file(path)
    meta.pop("sha256")
    for _ in range(COUNT):
        changed = dict(tensors)
        name = rng.choice(sorted(tensors))
        old = tensors[name]
        changed[name] = rng.choice(
            (
                old.double(), old.half(), old.to(torch.int8), old.flatten(), old[:1].clone(), old[:0].clone(),
                old - 50,
                torch.full_like(old, float("nan")) if old.is_floating_point() else -old - 1, old.new_zeros(()),
            )
        )  # fmt: skip
        save_file(
            changed, anew(path), {**meta, rng.choice(sorted(meta)): rng.choice(("", "x", "1", "[]", "9" * 30, "True"))}
        )
        try:
            found = SeqBoatCache.load(path, config)
        except ValueError:
            continue
        with torch.no_grad():
            assert model(torch.tensor([[3], [4]]), past_key_values=found).logits.isfinite().all()


OPTIONS = VALUES + (torch.zeros(2), [1, [2]], 1e300, -(10**400), 10**6, 2, 3, "slag", "rotary", "simple", "relu2", 1.0)


def test_published_checkpoints(tmp_path):
    rng = random.Random(1)
    with torch.serialization.safe_globals([Namespace]):
        good = torch.load(ROOT / "tests/goldens/lm_rotary.pt", weights_only=True)
    args, weights = vars(good["args"]), good["model"]
    checkpoint, output = tmp_path / "x.pt", tmp_path / "out"
    buffer = io.BytesIO()
    torch.save(good, buffer)

    def tensor_like(old):
        return rng.choice(
            (
                old.double(), old.half(), old.to(torch.int32), old.to(torch.complex64), old.flatten(), old[:0],
                old.new_zeros(()),
                old.to_sparse(), torch.full_like(old, float("nan")), old.t() if old.ndim == 2 else old, old.to("meta"),
                torch.zeros(1).expand(10**5, 10**5), torch.zeros(old.shape, dtype=torch.bool),
                old.to(torch.float8_e4m3fn),
            )
        )  # fmt: skip

    converted = 0
    for number in range(COUNT):
        kind = number % 3
        if kind == 0:
            anew(checkpoint).write_bytes(damaged(buffer.getvalue(), rng))
        else:
            options, model = dict(args), dict(weights)
            for _ in range(rng.choice((1, 1, 2))):
                name = rng.choice(sorted(model, key=str))
                if kind == 1:
                    options[rng.choice(sorted(options))] = rng.choice(OPTIONS)
                elif rng.random() < 0.2:
                    model[rng.choice((f"{name}x", "decoder.layers.99999999999999999999.slag_layer.gamma", 1))] = (
                        model.pop(name)
                    )
                elif isinstance(model[name], torch.Tensor):
                    model[name] = tensor_like(model[name])
            torch.save({"args": Namespace(**options), "model": model}, anew(checkpoint))
        try:
            convert_checkpoint(checkpoint, output)
        except HubUploadError:
            assert not output.exists()
            continue
        converted += 1
        loaded = load_file(output / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in loaded.values())
        shutil.rmtree(output)
    assert 0 < converted < COUNT / 2
    assert sorted(os.listdir(tmp_path)) == ["x.pt"]


def test_configs(tmp_path):
    """Read by SeqBoatConfig (OSError says that a file is no JSON), by `hub_upload build` and by the scripts that
    resume."""
    rng = random.Random(2)
    SeqBoatForCausalLM(SeqBoatConfig.from_preset("tiny")).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_bytes()) | {
        "num_labels": 3,
        "id2label": {"0": "a", "1": "b", "2": "c"},
        "problem_type": None,
    }
    data = json.dumps(values).encode()
    for number in range(COUNT):
        if number % 2:
            anew(path).write_bytes(damaged(data, rng))
        else:
            anew(path).write_text(json.dumps(altered(json.loads(data), rng)), "utf-8")
        try:
            SeqBoatConfig.from_pretrained(tmp_path)
        except (ValueError, OSError):
            pass
        try:
            read_config(tmp_path)
        except HubUploadError:
            pass


def test_checkpoints(tmp_path, examples):
    """Everything that decides whether a folder is resumed from."""
    rng = random.Random(3)
    recipes, folders = examples("recipes"), examples("run_folder")
    trainer_runs = examples("trainer_runs")
    config = SeqBoatConfig.from_preset("tiny")
    checkpoint = tmp_path / "checkpoint-2"
    SeqBoatForCausalLM(config).save_pretrained(checkpoint)
    state = {
        "global_step": 2,
        "best_global_step": None,
        "log_history": [{"loss": 1.0, "step": 1}],
        "stateful_callbacks": {},
    }
    (checkpoint / "trainer_state.json").write_text(json.dumps(state), "utf-8")
    torch.save({"a": torch.zeros(3)}, checkpoint / "optimizer.bin")
    values = {"run": "r", "order": 1, "step": 2, "processes": 1, "state": {}}
    folders.write_manifest(checkpoint, values)
    (tmp_path / "run.json").write_text('{"run": "r"}', "utf-8")
    files = sorted(checkpoint.iterdir()) + [tmp_path / "run.json"]
    contents = {file: file.read_bytes() for file in files}
    found = 0
    for _ in range(COUNT):
        file = rng.choice(files)
        data = damaged(contents[file], rng)
        anew(file).write_bytes(data)
        try:
            assert recipes.find_checkpoint("latest", str(tmp_path), config) == checkpoint
            # Whoever can write a checkpoint can write its manifest too; what was written is found again all the same.
            assert data == contents[file] or file.name in ("run.json", "manifest.json")
            found += 1
        except ValueError as error:
            assert file.name in str(error) or file.name == "run.json"
        anew(file).write_bytes(contents[file])
    assert found < COUNT / 4
    # A manifest that fits whatever was put there.
    for _ in range(COUNT // 4):
        for name, value in (("config.json", config.to_diff_dict()), ("trainer_state.json", state)):
            anew(checkpoint / name).write_text(json.dumps(altered(value, rng)), "utf-8")
        folders.write_manifest(checkpoint, values)
        try:
            recipes.find_checkpoint("latest", str(tmp_path), config)
        except ValueError as error:
            assert "checkpoint-2" in str(error)
        try:
            trainer_runs.check_trainer_checkpoint(checkpoint)
        except ValueError as error:
            assert "trainer_state.json" in str(error)


def test_json_lines_and_recipes(tmp_path, examples):
    rng = random.Random(4)
    instructions, plots, lm, recipes = (
        examples(name) for name in ("instruction_data", "plot_training", "lm_arguments", "recipes")
    )
    rows = [{"prompt": f"what is {n}\u2028?", "completion": "a\u0085number"} for n in range(3)]
    rows.append({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    entry = {"run": "r", "step": 1, "train/seconds": 1.0, "train/tokens": 9, "train/loss": 2.0,
             "validation/bits_per_byte": 2.0, "router/activation_rate_0": 0.5}  # fmt: skip
    recipe = b"preset: tiny\nlearning_rate: 1.0e-3\nmax_steps: 5\noutput_dir: out\ntrain_file: x\n"
    jsonl, log, yaml_file = tmp_path / "a.jsonl", tmp_path / "metrics.jsonl", tmp_path / "r.yaml"

    def mutated(values):
        found = altered(values, rng)
        return found if isinstance(found, list) else values

    def lines(values):
        return "\n".join(json.dumps(value, ensure_ascii=rng.random() < 0.5) for value in values).encode(
            "utf-8", "replace"
        )

    for number in range(COUNT):
        data = lines(rows if number % 2 else mutated(rows))
        anew(jsonl).write_bytes(damaged(data, rng) if number % 2 else data)
        try:
            for conversation in instructions.read_instructions(str(jsonl), "prompt", "completion"):
                assert all(isinstance(message["content"], str) for message in conversation)
        except ValueError as error:
            assert "a.jsonl" in str(error)
        entries = [{**entry, "step": step} for step in (1, 2, 3)]
        data = lines(entries if number % 2 else mutated(entries))
        anew(log).write_bytes((damaged(data, rng) if number % 2 else data) + b"\n")
        try:
            run = plots.read_run(f"a={log}")
            plots.table([run])
        except ValueError as error:
            assert "metrics.jsonl" in str(error)
        anew(yaml_file).write_bytes(damaged(recipe, rng))
        try:
            lm.check_arguments(recipes.parse_arguments(lm.TrainArguments, [str(yaml_file)]))
        except (ValueError, SystemExit):
            pass


def test_sources_of_a_card(tmp_path):
    rng = random.Random(5)
    evaluation = {
        "results": [
            {
                "task": "text-generation", "dataset": {"name": "enwik8", "type": "enwik8", "split": "test"},
                "metrics": [{"type": "bits_per_byte", "name": "Bits per byte", "value": 1.2}],
            }
        ],
        "activation_rates": [0.5, 0.25],
        "protocol": {"scored_tokens": 10, "bytes": 10, "context": 4, "stride": 2, "dtype": "float32"},
        "command": "python examples/evaluate_lm.py",
    }  # fmt: skip
    record = {"dataset": "enwik8", "command": "python x", "betas": [0.9, 0.98], "steps": 5, "seed": 0}
    state = {"global_step": 2, "epoch": 0.5, "log_history": [{"loss": 1.0, "learning_rate": 0.1}, {"eval_loss": 1.0}]}
    named = {"evaluation.json": evaluation, "training_record.json": record, "trainer_state.json": state}
    for number in range(COUNT):
        for name, value in named.items():
            text = json.dumps(altered(value, rng)).encode("utf-8", "replace")
            anew(tmp_path / name).write_bytes(text if number % 2 else damaged(json.dumps(value).encode(), rng))
        try:
            read_sources(tmp_path, 2)
        except HubUploadError as error:
            assert str(tmp_path) in str(error)
