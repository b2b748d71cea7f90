"""Long-context example: curriculum, credit for kept tokens, training, evaluation through the cache, queue of runs."""

import importlib
import json
import shutil
import sys
from types import SimpleNamespace

import forks
import pytest
import torch
import yaml
from example_scripts import EXAMPLES, imported
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from modeling_seqboat import SeqBoatCache, SeqBoatConfig, SeqBoatForCausalLM
from modeling_seqboat.generation_seqboat import CACHE_NAME

MODULES = (
    "recall_tasks", "mixed_stream", "recall_models", "reading", "curriculum", "routing", "evaluate_recall", "recipes",
    "text_data",
)  # fmt: skip
RECIPES = EXAMPLES.parent / "configuration" / "recipes" / "long_context"
TINY = ["--hidden_size", "16", "--memory_size", "8", "--pairs", "2", "--queries", "2", "--cpu", "True"]


@pytest.fixture(autouse=True)
def folder(monkeypatch):
    """The scripts import each other as scripts do, from their own folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "long_context"))


@pytest.fixture
def train(monkeypatch):
    yield from imported(monkeypatch, "train_recall", *MODULES)


@pytest.fixture
def queue(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield from imported(monkeypatch, "run_queue", "recipes")


def modules(train):
    """The scripts' modules that `train` has imported."""
    import curriculum
    import evaluate_recall
    import reading
    import recall_models
    import recall_tasks
    import routing

    return SimpleNamespace(
        curriculum=curriculum, evaluate=evaluate_recall, reading=reading, models=recall_models, tasks=recall_tasks,
        routing=routing,
    )  # fmt: skip


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def curriculum(train, routed=True, **settings):
    c = modules(train).curriculum
    values = {"start_length": 40, "stop_length": 100, "window": 2, "good": 0.9, "bad": 0.5, "grow": 2.0, "shrink": 0.5}
    return c.Curriculum(c.CurriculumArguments(**(values | settings)), routed, memory_size=64, needed=20)


def test_the_budget_falls_and_texts_grow_on_accuracy_alone(train):
    c = curriculum(train)
    assert [c.record(0.2, 40, 1.0) for _ in range(50)] == [None] * 50 and c.phase == "dense"
    c.record(1.0, 40, 1.0)
    assert c.record(1.0, 40, 1.0) == "open" and c.budget == 1
    assert [c.record(1.0, 40, 1.0) for _ in range(2)] == [None, "lower"] and c.budget == 0.5
    # The routers have not followed: a window of right answers is not enough.
    assert [c.record(1.0, 40, 0.9) for _ in range(4)] == [None] * 4
    # A wrong window takes the step back.
    c.record(0.1, 40, 0.9)
    assert c.record(0.1, 40, 0.9) == "raise" and c.budget == 1
    # What fits into half of the memory lets texts grow, up to the last length.
    assert [c.record(1.0, 32, 0.5) for _ in range(4)] == [None, "grow", None, "grow"] and c.length == 100
    assert [c.record(1.0, 10, 0.1) for _ in range(10)].count("lower") == 2 and c.done


def test_routers_take_over_at_a_length_of_their_own(train):
    c = curriculum(train, open_length=70)
    changes = [c.record(1.0, c.length, 1.0) for _ in range(6)]
    assert changes == [None, "grow", None, "open", None, "lower"] and c.length == 70, "70 tokens do not fit"
    with pytest.raises(ValueError, match="open_length 101 must be 0, or from start_length 40 to stop_length 100"):
        modules(train).curriculum.CurriculumArguments(start_length=40, stop_length=100, open_length=101).check()


def test_a_model_without_routers_only_has_longer_texts(train):
    c = curriculum(train, routed=False)
    assert [c.record(1.0, 40, 1.0) for _ in range(6)] == [None, "grow", None, "grow", None, "done"]
    assert c.budget == 1 and c.phase == "dense"


def test_a_curriculum_goes_on_from_its_state(train):
    c, other = curriculum(train), curriculum(train)
    for _ in range(5):
        c.record(1.0, 40, 1.0)
    other.load_state_dict(json.loads(json.dumps(c.state_dict())))
    for _ in range(9):
        assert c.record(0.95, 20, 0.3) == other.record(0.95, 20, 0.3)
    assert (c.length, c.budget, c.phase) == (other.length, other.budget, other.phase)


def small_model(router_type="gumbel_straight_through"):
    torch.manual_seed(0)
    config = SeqBoatConfig(
        vocab_size=264, hidden_size=16, num_hidden_layers=2, v_head_dim=16, qk_head_dim=8, state_size=2, memory_size=8,
        position_embedding_type="none", router_type=router_type,
    )  # fmt: skip
    return SeqBoatForCausalLM(config)


def test_credit_makes_the_decisions_of_a_text_answered_worse_less_likely(train):
    model = small_model().train()
    ids = torch.randint(0, 264, (2, 12), generator=torch.Generator().manual_seed(1))
    with modules(train).routing.RouterWatch(model) as watch:
        model(input_ids=ids)
        logits, active = watch.logits[1], watch.active[1]
        logits.retain_grad()
        watch.credit(torch.tensor([3.0, 1.0])).backward()
    probability = torch.sigmoid(logits.detach())
    # d/du of log p(decision) is decision - p; surplus losses are +1 and -1, averaged over two texts.
    expected = (active.float() - probability) * torch.tensor([[0.5], [-0.5]])
    torch.testing.assert_close(logits.grad, expected)
    assert active.any() and not active.all()


def test_the_pull_closes_sure_routers_above_the_budget_and_opens_below_it(train):
    model = small_model().train()
    routing = modules(train).routing
    ids = torch.randint(0, 264, (2, 12))
    with torch.no_grad():
        model.model.layers[0].router.bias.copy_(torch.tensor([-20.0, 20.0]))
    with routing.RouterWatch(model) as watch:
        for budget, sign in ((0.1, 1), (0.99, -1)):
            model(input_ids=ids)
            for logits in watch.logits:
                logits.retain_grad()
            rate = watch.rate().item()
            assert 0.6 < rate < 0.9
            watch.pull(budget).backward()
            assert all((sign * logits.grad >= 0).all() for logits in watch.logits)
            if sign > 0:
                # The open layer has the full force although its share no longer depends on its logits.
                force = torch.log(torch.tensor(rate / budget)) / rate / (2 * 24)
                torch.testing.assert_close(watch.logits[0].grad, force.expand(2, 12), rtol=1e-3, atol=1e-6)


def test_dense_training_attends_everywhere_until_the_routers_are_released(train):
    model, routing = small_model().train(), modules(train).routing
    routing.open_routers(model, -6.0)
    ids = torch.randint(0, 264, (2, 12))
    with routing.RouterWatch(model) as watch:
        model(input_ids=ids)
        assert watch.kept() == [12, 12]
        routing.release_routers(model)
        model(input_ids=ids)
        assert max(watch.kept()) < 6


@pytest.mark.parametrize("kind", ["routed", "always", "never", "mistral", "llama"])
def test_reading_in_chunks_scores_as_one_forward_does(train, kind):
    m = modules(train)
    torch.manual_seed(0)
    shape = m.models.ModelArguments(model=kind, hidden_size=16, memory_size=8, router_type="tempered_softmax")
    model = m.models.build_model(shape, 264).eval()
    task = m.tasks.RecallTask(pairs=3, queries=2)
    batch = m.tasks.batch_of(lambda number: m.tasks.example_of(task, 61, 0, number), range(2))
    reading = m.reading.read_texts(model, batch, len(task.kinds), chunk_size=7)
    tokens, answers = torch.from_numpy(batch.tokens), torch.from_numpy(batch.answers)
    with torch.no_grad():
        logits = model(input_ids=tokens[:, :-1]).logits
    rows = torch.arange(2)[:, None]
    chosen, target = logits[rows, answers[:, :, 0] - 1], tokens[rows, answers[:, :, 0]]
    bits = torch.nn.functional.cross_entropy(chosen.transpose(1, 2), target, reduction="none") / 0.6931471805599453
    torch.testing.assert_close(reading.bits, bits.double(), rtol=1e-4, atol=1e-4)
    assert torch.equal(reading.right, chosen.argmax(-1) == target)
    assert int(reading.tokens.sum()) == 120


def test_a_span_is_the_distance_to_the_key_weighed_most(train):
    m, model = modules(train), small_model("always").eval()
    with torch.no_grad():
        for layer in model.model.layers:
            # Weights that differ by more than rounding.
            layer.attention.in_proj.weight.mul_(30)
            layer.attention.qk_scale.fill_(1.0)
    task = m.tasks.RecallTask(pairs=3, queries=2)
    batch = m.tasks.batch_of(lambda number: m.tasks.example_of(task, 40, 0, number), range(3))
    reading = m.reading.read_texts(model, batch, len(task.kinds), chunk_size=5)
    assert reading.spans.shape == (2, 6) and reading.spans.max() <= 8
    # By the definition: scores of the last layer of one forward, over the window.
    seen = {}
    attention = model.model.layers[1].attention
    handle = attention.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(batch.tokens[:, :-1]), use_cache=False)
        z = torch.nn.functional.silu(attention.in_proj(seen["x"]))[..., :8]
        q, k = (z * scale + offset for scale, offset in zip(attention.qk_scale, attention.qk_offset, strict=True))
    handle.remove()
    expected = []
    for row in range(3):
        for column in batch.answers[row, :, 0] - 1:
            window = k[row, max(0, column - 8) : column + 1] @ q[row, column]
            expected.append(float(len(window) - 1 - window.argmax()))
    assert reading.spans[1].tolist() == expected


@pytest.mark.parametrize("script", ["measure_spans", "lm_eval_tasks"])
def test_a_percent_sign_in_a_help_is_shown(train, monkeypatch, capsys, script):
    monkeypatch.delitem(sys.modules, script, raising=False)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).main(["--help"])
    assert ended.value.code == 0 and " 5 %" in " ".join(capsys.readouterr().out.split())


def test_how_far_attention_looks_in_a_text(train, monkeypatch, tmp_path, capsys):
    """The last layer's three distances by their definitions, from one forward of the whole text."""
    monkeypatch.delitem(sys.modules, "measure_spans", raising=False)
    import measure_spans

    model = small_model().eval()
    attention = model.model.layers[1].attention
    with torch.no_grad():
        for layer in model.model.layers:
            layer.router.weight.normal_(0, 1)
            layer.attention.in_proj.weight.mul_(30)
            layer.attention.qk_scale.fill_(1.0)
    model.save_pretrained(tmp_path / "model")
    text = torch.randint(32, 127, (100,), generator=torch.Generator().manual_seed(0))
    (tmp_path / "text").write_bytes(bytes(2000 - 100) + bytes(text.tolist()))
    arguments = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "text"), "--cpu", "True"]
    arguments += ["--output", str(tmp_path / "spans.json")]
    found = measure_spans.main([*arguments, "--length", "100", "--every", "5", "--warm", "30"])

    seen = {}
    handle = attention.register_forward_pre_hook(lambda module, args: seen.update(x=args[0][0], active=args[1][0]))
    with torch.no_grad():
        model(input_ids=text[None], use_cache=False)
        z = torch.nn.functional.silu(attention.in_proj(seen["x"]))[:, :8]
        q, k = (z * scale + offset for scale, offset in zip(attention.qk_scale, attention.qk_offset, strict=True))
    handle.remove()
    most, mean, oldest = [], [], []
    for column in range(34, 100, 5):
        if seen["active"][column]:
            keys = seen["active"][: column + 1].nonzero()[:, 0][-9:]
            weights = (k[keys] @ q[column] * attention.scale).softmax(0)
            most.append(float(column - keys[weights.argmax()]))
            mean.append(float(weights @ (column - keys).float()))
            oldest.append(float(column - keys[0]))
    assert 3 < len(most) < 14 and found[1]["samples"] == len(most)
    assert found[1]["activation_rate"] == pytest.approx(float(seen["active"].float().mean()))
    for name, values in (("most_weighed", most), ("mean", mean), ("oldest", oldest)):
        values = torch.tensor(values, dtype=torch.float64)
        expected = [float(values.quantile(q)) for q in (0.5, 0.9, 1.0)]
        assert found[1][name] == pytest.approx(expected, rel=1e-3), name
    assert json.loads((tmp_path / "spans.json").read_text())["layers"] == found
    assert f"{max(oldest):,.0f} |" in capsys.readouterr().out
    # One token in two, not each, though all are read alone.
    found = measure_spans.main([*arguments, "--length", "100", "--every", "2", "--warm", "30"])
    assert found[1]["samples"] == int(seen["active"][31::2].sum())
    LlamaConfig(vocab_size=264).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="llama' is a 'llama' with 264 ids"):
        measure_spans.main([*arguments, "--model", str(tmp_path / "llama"), "--length", "90", "--every", "5",
                            "--warm", "30"])  # fmt: skip
    with pytest.raises(ValueError, match="have 100 bytes, length 101 asks for more"):
        measure_spans.main([*arguments, "--length", "101", "--every", "5", "--warm", "30"])


def test_spans_are_missing_where_no_layer_attends(train):
    m = modules(train)
    task = m.tasks.RecallTask(pairs=2, queries=2)
    batch = m.tasks.batch_of(lambda number: m.tasks.example_of(task, 30, 0, number), range(2))
    reading = m.reading.read_texts(small_model("never"), batch, len(task.kinds))
    assert reading.spans.shape == (2, 4) and reading.spans.isnan().all()
    assert reading.activated.sum() == 0


def test_constant_memory_whatever_the_length(train):
    m, task = modules(train), modules(train).tasks.RecallTask(pairs=2, queries=2)
    sizes = []
    for length in (64, 3000):
        batch = m.tasks.batch_of(lambda number, length=length: m.tasks.example_of(task, length, 0, number), range(1))
        sizes.append(m.reading.read_texts(small_model("always"), batch, len(task.kinds), chunk_size=256).cache_bytes)
    assert sizes[0] == sizes[1]


def test_the_trained_model_answers_from_a_hundred_thousand_tokens_back(train, tmp_path):
    m, folder = modules(train), EXAMPLES / "long_context" / "pretrained" / "recall-toy"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2e6
    model = SeqBoatForCausalLM.from_pretrained(folder)
    arguments = m.evaluate.trained_task(str(folder))
    arguments.within = 0.1
    task = m.models.build_task(arguments, "test")
    batch = m.tasks.batch_of(lambda number: m.tasks.example_of(task, 100_000, 5, number), range(1))
    reading = m.reading.read_texts(model, batch, len(task.kinds), chunk_size=16_384)
    assert reading.right.all() and reading.right.numel() == 6
    assert batch.distances.min() > 85_000 and model.config.memory_size == 64
    # Nothing but what is asked for is kept, and attention reaches back to it.
    assert reading.activated[:, m.tasks.NOISE].sum() < 64
    assert reading.spans.nan_to_num().max(0).values.median() > 85_000

    # By generate(), and by one that goes on from the cache of the first, saved and read again.
    tokens, answers = torch.from_numpy(batch.tokens), batch.answers[0, :, 0]
    asked = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "prefill_chunk_size": 16_384}
    first = model.generate(tokens[:, : answers[0]], **asked)
    first.past_key_values.save(tmp_path / "cache.safetensors")
    cache = SeqBoatCache.load(tmp_path / "cache.safetensors", model.config)
    second = model.generate(tokens[:, : answers[1]], past_key_values=cache, **asked)
    assert [int(o.sequences[0, -1]) for o in (first, second)] == tokens[0, answers[:2]].tolist()


@pytest.mark.parametrize("kind", ["always", "never", "mistral", "llama"])
def test_models_that_are_compared_are_of_one_size(train, kind):
    m = modules(train).models
    for width in (32, 64):
        counts = [
            m.parameter_count(m.build_model(m.ModelArguments(model=k, hidden_size=width), 264))
            for k in ("routed", kind)
        ]
        assert counts[1] == pytest.approx(counts[0], rel=0.02)


@pytest.fixture
def fla(monkeypatch):
    """In the place of flash-linear-attention, which need not be installed and computes on GPUs alone: its names, with
    a Llama for each model."""

    def config(kind):
        def make(num_heads, head_dim=None, expand_k=None, expand_v=None, **shape):
            heads = {"num_attention_heads": num_heads, "num_key_value_heads": num_heads}
            made = LlamaConfig(**shape, **heads, head_dim=shape["hidden_size"] // num_heads)
            # Of the object alone: the class stays a Llama's.
            made.model_type, made.widths = kind, (num_heads, head_dim, expand_k, expand_v)
            return made

        return make

    models = SimpleNamespace(
        GLAForCausalLM=LlamaForCausalLM, GLAConfig=config("gla"), GatedDeltaNetForCausalLM=LlamaForCausalLM,
        GatedDeltaNetConfig=config("gated_deltanet"), KDAForCausalLM=LlamaForCausalLM, KDAConfig=config("kda"),
    )  # fmt: skip
    utils = SimpleNamespace(Cache=DynamicCache)
    for name, module in (("fla", SimpleNamespace(models=models)), ("fla.models", models), ("fla.models.utils", utils)):
        monkeypatch.setitem(sys.modules, name, module)
    return utils


@pytest.mark.parametrize("kind", ["gated_deltanet", "gla", "kda"])
def test_linear_recurrences_get_as_many_parameters(train, fla, kind):
    m = modules(train).models
    for width, heads in ((64, 1), (256, 2)):
        models = [m.build_model(m.ModelArguments(model=k, hidden_size=width), 264) for k in ("routed", kind)]
        assert m.parameter_count(models[1]) == pytest.approx(m.parameter_count(models[0]), rel=0.02)
        # Keys of half the width, in heads of at most 64 channels; values of the whole, or of half for kda.
        head_dim, values = width // 2 // heads, 1.0 if kind == "kda" else 2.0
        widths = (heads, None, 0.5, 1.0) if kind == "gla" else (heads, head_dim, None, values)
        assert models[1].config.widths == widths
    for width in (16, 96, 192):
        with pytest.raises(ValueError, match=f"must be 32, 64 or a multiple of 128 .* of {kind}, got {width}"):
            m.build_model(m.ModelArguments(model=kind, hidden_size=width), 264)


@pytest.mark.parametrize("kind", ["gated_deltanet", "gla", "kda"])
def test_linear_recurrences_need_a_package_and_a_gpu(train, tmp_path, monkeypatch, request, kind):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": kind}))
    arguments = [*TINY, "--model", kind, "--hidden_size", "64", "--output_dir", str(tmp_path / "run")]
    evaluation = ["--models", str(model), "--output_dir", str(tmp_path / "results"), "--cpu", "True"]
    monkeypatch.setitem(sys.modules, "fla", None)
    missing = pytest.raises(ModuleNotFoundError, match=f"{kind} needs flash-linear-attention .pip install flash")
    with missing:
        train.main(arguments)
    with missing:
        modules(train).evaluate.main(evaluation)
    request.getfixturevalue("fla")
    for run, given in ((train.main, arguments), (modules(train).evaluate.main, evaluation)):
        with pytest.raises(ValueError, match=f"model {kind} needs a CUDA device, got cpu"):
            run(given)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_linear_recurrence_is_read_through_its_packages_cache(train, fla, monkeypatch):
    m, caches, calls = modules(train), [], []
    monkeypatch.setattr(fla, "Cache", lambda: caches.append(DynamicCache()) or caches[-1])
    model = m.models.build_model(m.models.ModelArguments(model="gla", hidden_size=32), 264)
    forward = model.forward

    def watch(past_key_values, **given):
        calls.append((past_key_values, given["input_ids"].shape[1]))
        return forward(**{CACHE_NAME: past_key_values}, **given)

    # The package's models ignore a cache of another name.
    monkeypatch.setattr(model, "forward", watch)
    task = m.tasks.RecallTask(pairs=2, queries=2)
    batch = m.tasks.batch_of(lambda number: m.tasks.example_of(task, 60, 0, number), range(2))
    reading = m.reading.read_texts(model, batch, len(task.kinds), chunk_size=16)
    assert len(caches) == 1 and all(cache is caches[0] for cache, _ in calls)
    assert [size for _, size in calls[:2]] == [16, 16] and calls[-1][1] == 1
    assert caches[0].get_seq_length() == batch.tokens.shape[1] - 1
    whole = m.reading.read_texts(model, batch, len(task.kinds), chunk_size=1000)
    assert torch.allclose(reading.bits, whole.bits, atol=1e-4)


def test_bytes_of_a_state_with_a_convolution(train):
    state = {
        "recurrent_state": torch.zeros(2, 1, 4, 8), "attn_state": None, "ffn_state": None,
        "conv_state": (torch.zeros(2, 4, 4, dtype=torch.bfloat16), None),
    }  # fmt: skip
    cache = SimpleNamespace(layers=[SimpleNamespace(state=state)] * 3)
    assert modules(train).models.cache_bytes(cache) == 3 * (64 * 4 + 32 * 2)


EASY = [*TINY, "--start_length", "20", "--stop_length", "30", "--batch_size", "4", "--good", "0.01", "--bad", "0.0",
        "--window", "1", "--eval_texts", "2", "--logging_steps", "4", "--eval_steps", "10", "--save_steps",
        "4"]  # fmt: skip


@pytest.mark.parametrize(
    "task", [[], ["--task", "copy"], ["--task", "needle", "--start_length", "60", "--stop_length", "70"]]
)
def test_a_run_logs_what_is_asked_of_it_and_its_model_is_evaluated(train, tmp_path, task):
    run = tmp_path / "run"
    result = train.main([*EASY, "--max_steps", "12", "--output_dir", str(run), *task])
    log = lines(run / "metrics.jsonl")
    trained = next(line for line in log if "by_distance" in line)
    assert {"step", "seconds", "length", "budget", "phase", "loss", "accuracy", "activation_rates"} <= set(trained)
    assert set(trained["rates_by_kind"]) >= {"noise", "value", "query"}
    assert all(len(rates) == 2 for rates in trained["rates_by_kind"].values())
    assert any("validation" in line and len(line["validation"]["spans"]) == 2 for line in log)
    assert json.loads((run / "result.json").read_text())["steps"] == result["steps"] == 12
    evaluate = modules(train).evaluate
    arguments = ["--models", str(run / "final"), "--lengths", "100", "300", "--texts", "2", "--cpu", "True"]
    arguments += ["--output_dir", str(tmp_path / "results"), "--chunk_size", "64"]
    results = evaluate.main(arguments)
    assert [r["length"] for r in results] == [100, 300] and all(r["answers"] >= 4 for r in results)
    assert results[0]["cache_bytes"] == results[1]["cache_bytes"]
    page = (tmp_path / "results" / "results.md").read_text()
    assert f"{100 * results[1]['accuracy']:.1f} ({results[1]['answers']})" in page
    assert (tmp_path / "results" / "accuracy.png").stat().st_size > 1000
    # What is there is not computed again.
    before = (tmp_path / "results" / "results.jsonl").read_text()
    evaluate.main(arguments)
    assert (tmp_path / "results" / "results.jsonl").read_text() == before


def test_models_are_compared_over_their_seeds(monkeypatch, tmp_path, capsys):
    monkeypatch.delitem(sys.modules, "compare", raising=False)
    import compare

    def result(model, length, accuracy, pairs=6):
        return {
            "model": f"somewhere/{model}/final", "length": length, "pairs": pairs, "seed": 0, "task": {},
            "chance": 0.1, "accuracy": accuracy, "answers": 20, "by_distance": {"64": [accuracy, 20]},
            "by_group": {"recall": accuracy}, "activation_rates": [0.1, 0.0], "rates_by_kind": {"noise": [0.02, 0.0]},
            "cache_bytes": 1, "memory_size": 8,
            "spans": [{"median": length / 2, "upper": 1.0, "longest": float(length)}, None],
        }  # fmt: skip

    results = [
        result("recall-routed-0", 64, 1.0), result("recall-routed-1", 64, 0.5), result("recall-routed-0", 4096, 1.0),
        result("recall-llama-0", 64, 0.25), result("copy-routed-0", 64, 0.75),
        result("recall-routed-0", 4096, 0.125, pairs=12),
    ]  # fmt: skip
    for number in range(2):
        lines = "".join(json.dumps(r) + "\n" for r in results[number::2])
        (tmp_path / f"{number}.jsonl").write_text(lines)
    files = [str(tmp_path / f"{number}.jsonl") for number in range(2)]
    # A file that is named twice counts once.
    compare.main(["--results", *files, files[0], "--output_dir", str(tmp_path / "out")])
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert page.strip() == capsys.readouterr().out.strip()
    recall, copy = page[page.index("## recall") :], page[page.index("## copy") :]
    assert "| routed | 2 | 75.0 (50.0 to 100.0) | 100.0 |" in recall and "| llama | 1 | 25.0 |  |" in recall
    # One model was read with other numbers of pairs, at one length.
    assert "## recall: by number of pairs, at 4,096 tokens" in recall and "| routed | 1 | 100.0 | 12.5 |" in recall
    assert "| routed, seed 0 | 4,096 | 2.00 0.00 | 2,048, 4,096; – | 8 |" in recall
    # All answers of the stand-ins lie 64 tokens back.
    assert "| model | from 64 |" in recall and "| routed | 83.3 (60) |" in recall and "| llama | 25.0 (20) |" in recall
    assert "| routed | 1 | 75.0 |" in copy
    assert (tmp_path / "out" / "accuracy.png").stat().st_size > 1000
    (tmp_path / "0.jsonl").write_text(json.dumps(result("other", 64, 1.0)) + "\n")
    with pytest.raises(ValueError, match="other/final' must lie in a folder named TASK-KIND-SEED"):
        compare.main(["--results", *files, "--output_dir", str(tmp_path / "out")])


def test_an_interrupted_run_ends_as_one_that_was_not(train, tmp_path):
    whole = train.main([*EASY, "--max_steps", "12", "--output_dir", str(tmp_path / "whole")])
    part = ["--output_dir", str(tmp_path / "part"), "--resume", "True"]
    train.main([*EASY, "--max_steps", "8", *part])
    again = train.main([*EASY, "--max_steps", "12", *part])
    assert {k: v for k, v in whole.items() if k != "seconds"} == {k: v for k, v in again.items() if k != "seconds"}
    with pytest.raises(ValueError, match="of another run: pull is 0.1 there and 0.2 here"):
        train.main([*EASY, "--max_steps", "12", "--pull", "0.2", *part])


def test_a_model_trains_on_mixed_streams(train, tmp_path):
    from test_long_context_tasks import write_data

    arguments = [*EASY, "--task", "mixed", "--data", str(write_data(tmp_path / "data")), "--clips", "0"]
    arguments += ["--pictures", "2", "--queries", "1", "--start_length", "100", "--stop_length", "120"]
    result = train.main([*arguments, "--max_steps", "4", "--text_loss", "0.5", "--output_dir", str(tmp_path / "run")])
    assert set(result["by_group"]) == {"fact", "picture"}
    saved = json.loads((tmp_path / "run" / "final" / "recall.json").read_text())
    assert saved["data"] == "data", "no other folders are published"


def test_runs_that_cannot_be_are_refused_before_they_start(train, tmp_path):
    for arguments, message in (
        (["--model", "rwkv"], "one of routed, always, never, mistral, llama, gated_deltanet, gla, kda, got 'rwkv'"),
        (["--task", "sums"], "task must be one of recall, copy, needle, mixed, got 'sums'"),
        (["--task", "mixed"], "task mixed needs data"),
        (["--router_type", "tempered_softmax"], "credit 1.0 is for routers that draw"),
        (["--good", "0.5", "--bad", "0.6"], "bad 0.6 must be below good 0.5"),
        (["--start_length", "9"], "do not fit"),
        (["--eval_steps", "0"], "eval_steps must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            train.main([*TINY, *arguments, "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
    with pytest.raises(FileNotFoundError, match="there is no model"):
        modules(train).evaluate.main(["--models", str(tmp_path / "none"), "--output_dir", str(tmp_path / "r")])


@pytest.mark.parametrize(
    "recipe", sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith("plan"))
)
def test_recipes_are_arguments_that_a_run_accepts(train, recipe):
    arguments = train.parse_arguments(train.TrainArguments, [str(RECIPES / f"{recipe}.yaml"), "--output_dir", "x"])
    train.check_arguments(arguments)
    assert arguments.hidden_size % 8 == 0


@pytest.mark.parametrize("plan", sorted(path.name for path in RECIPES.glob("plan*.yaml")))
def test_plans_name_recipes_and_arguments_that_exist(queue, train, plan, tmp_path):
    runs = queue.read_plan(str(RECIPES / plan), [], [])
    assert runs
    for run in runs:
        words = queue.command(run, tmp_path / run.name, "0")[2:]
        train.check_arguments(train.parse_arguments(train.TrainArguments, words))


def write_plan(folder, entries):
    (folder / "r.yaml").write_text(yaml.safe_dump(dict(zip((w[2:] for w in EASY[::2]), EASY[1::2], strict=True))))
    (folder / "plan.yaml").write_text(yaml.safe_dump(entries))
    return str(folder / "plan.yaml")


def test_a_queue_runs_what_is_not_there_yet_and_goes_on_after_a_failure(queue, tmp_path, monkeypatch):
    monkeypatch.setattr(queue.subprocess, "Popen", forks.Command)
    plan = write_plan(
        tmp_path,
        [
            {"name": "there", "recipe": "r.yaml"},
            {"name": "wrong", "recipe": "r.yaml", "good": 7},
            {"name": "right", "recipe": "r.yaml", "minutes": 5, "max_steps": 2},
        ],
    )
    output = tmp_path / "out"
    (output / "there" / "final").mkdir(parents=True)
    outcomes = queue.main([plan, "--output_dir", str(output), "--gpus", "cpu"])
    assert outcomes == {"there": "there already", "wrong": "failed", "right": "done"}
    assert "good 7.0" in (output / "wrong" / "run.log").read_text()
    assert (output / "right" / "final" / "recall.json").is_file()
    assert [line["run"] for line in lines(output / "queue.jsonl")] == ["there", "wrong", "right"]


def test_an_interrupted_run_is_told_from_one_that_failed(queue, tmp_path):
    plan = write_plan(tmp_path, [{"name": "a", "recipe": "r.yaml", "max_steps": 2}])
    run, folder = queue.read_plan(plan, [], [])[0], tmp_path / "out" / "a"
    assert queue.carry_out(run, folder, "cpu", 60, end=0.0) == "interrupted" and not (folder / "final").exists()
    assert queue.main([plan, "--output_dir", str(tmp_path / "out"), "--stop_after", "1e-9"]) == {}
    with pytest.raises(ValueError, match="stop_after must be above 0, got 0.0"):
        queue.main([plan, "--output_dir", str(tmp_path / "out"), "--stop_after", "0"])


def test_settings_are_for_all_runs_or_for_some(queue, tmp_path):
    entries = [
        {"name": "text-0", "script": "classification", "recipe": "r.yaml", "seed": 3},
        {"name": "textual", "script": "classification", "recipe": "r.yaml"},
        {"name": "scale", "script": "experiments", "experiment": "scale", "jobs": 2},
    ]
    settings = ["threads=1", "text.data_path=a.b/c", "text-0.seed=9", "experiments.train_file=enwik8", "seed=4"]
    runs = queue.read_plan(write_plan(tmp_path, entries), [], settings)
    assert [run.arguments for run in runs] == [
        {"threads": "1", "data_path": "a.b/c", "seed": 3},
        {"threads": "1", "seed": "4"},
        {"threads": "1", "seed": "4", "train_file": "enwik8", "jobs": 2},
    ]
    words = queue.command(runs[2], tmp_path / "scale", "1")[1:]
    assert words[1] == "scale" and words[-4:] == ["--output", str(tmp_path / "scale"), "--device", "cuda"]
    (tmp_path / "text-0/run/checkpoint-5").mkdir(parents=True)
    assert "--resume_from_checkpoint" in queue.command(runs[0], tmp_path / "text-0", "0")
    assert "--resume_from_checkpoint" not in queue.command(runs[1], tmp_path / "textual", "0")


def test_plans_with_mistakes_are_refused_before_anything_runs(queue, tmp_path):
    for entries, message in (
        ({"name": "a"}, "must be a list"),
        ([{"recipe": "r.yaml"}], "each with a name"),
        ([{"name": "a"}], "must have a recipe's file"),
        ([{"name": "a", "script": "experiments"}], "must have an experiment"),
        ([{"name": "a", "script": "play"}], "must be one of recall, classification, lm, experiments, got 'play'"),
        ([{"name": "a", "recipe": "r.yaml"}] * 2, "occur twice"),
        ([{"name": "a", "recipe": "none.yaml"}], "run 'a': there is no recipe"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            queue.main([write_plan(tmp_path, entries), "--output_dir", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="set must be name=value or KIND.name=value, got 'data'"):
        queue.main([write_plan(tmp_path, [{"name": "a", "recipe": "r.yaml"}]), "--output_dir", "x", "--set", "data"])
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_named(train, tmp_path):
    part = [*EASY, "--max_steps", "4", "--save_steps", "2", "--output_dir", str(tmp_path / "run"), "--resume", "True"]
    train.main(part)
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-4" and not list((tmp_path / "run").rglob("*.pt"))
    file = checkpoint / "state.safetensors"
    data = file.read_bytes()
    for damaged in (data[:-1], data[:-1] + bytes([data[-1] ^ 1]), b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="checkpoint-4/state.safetensors' is damaged"):
            train.main(part)
    file.unlink()
    with pytest.raises(ValueError, match="lacks the file 'state.safetensors'"):
        train.main(part)
    train.main([*part, "--resume", "False", "--overwrite_output_dir", "True"])
    assert (tmp_path / "run/replaced-1/checkpoint-4").is_dir() and (tmp_path / "run/final").is_dir()


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(train, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.log").write_text("from a queue")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    train.main([*EASY, "--max_steps", "2", "--output_dir", str(folder), "--resume", "True"])
    assert (folder / "replaced-1/metrics.jsonl").is_file() and (folder / "run.log").is_file()


def test_results_of_an_evaluation_are_read_line_by_line(train, tmp_path):
    train.main([*EASY, "--max_steps", "2", "--output_dir", str(tmp_path / "run")])
    evaluate = modules(train).evaluate
    # A name with a separator that Python's splitlines() cuts at.
    model = tmp_path / "a\u2028b"
    shutil.copytree(tmp_path / "run/final", model)
    arguments = ["--models", str(model), "--lengths", "100", "--texts", "1", "--cpu", "True"]
    arguments += ["--output_dir", str(tmp_path / "results")]
    evaluate.main(arguments)
    path = tmp_path / "results/results.jsonl"
    whole = json.dumps(json.loads(path.read_bytes()), ensure_ascii=False).encode() + b"\n"
    # What a killed evaluation left of its next line is dropped.
    path.write_bytes(whole + b'{"model": "x')
    assert len(evaluate.main(arguments)) == 1
    for content, words in (
        (b"\xff\n", "line 2 of .* is no UTF-8"),
        (b"[1]\n", "line 2 of .* must hold a JSON object"),
        (b'{"model": 1}\n', "line 2 of .* is no result of an evaluation"),
    ):
        path.write_bytes(whole + content)
        with pytest.raises(ValueError, match=words):
            evaluate.main(arguments)
    for content, words in (
        (b"{", "recall.json' is no JSON"),
        (b'{"pairs": "x"}', "pairs must be of type .*, got 'x'"),
    ):
        (model / "recall.json").write_bytes(content)
        with pytest.raises(ValueError, match=words):
            evaluate.main(arguments)


def test_plans_name_no_folder_elsewhere(queue, tmp_path):
    (tmp_path / "recipe.yaml").write_text("pairs: 2\n")
    for entry, words in (
        ("{name: ../out, recipe: recipe.yaml}", "a name must be letters"),
        ("{name: /tmp/out, recipe: recipe.yaml}", "a name must be letters"),
        ("{name: 5, recipe: recipe.yaml}", "a name must be letters"),
        ("{name: a, recipe: recipe.yaml, minutes: -1}", "minutes above 0"),
        ("{name: a, recipe: [1]}", "must have a recipe's file"),
        ("{name: a", "is no YAML"),
    ):
        (tmp_path / "plan.yaml").write_text(f"- {entry}\n")
        with pytest.raises(ValueError, match=words):
            queue.read_plan(str(tmp_path / "plan.yaml"), [], [])
