"""Experiments at toy size: what must hold of rates, FLOPs and tables, and that finished runs are not made again."""

import importlib
import json
import sys
from pathlib import Path

import forks
import pytest
import torch
from torch import nn

from modeling_seqboat import configuration_seqboat, ssm_seqboat

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
EXPERIMENTS = EXAMPLES / "experiments"
FOLDERS = (EXAMPLES, EXAMPLES / "classification", EXPERIMENTS)
TEXT = EXAMPLES / "data/tinyshakespeare.txt"
NAMES = (
    "activation_patterns", "memory_size", "configurators", "recurrences", "activation_rate", "scale", "agreement",
    "memory_span", "fair_recurrences", "early_attention",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _importable():
    """The experiments' modules, which find each other in the script's folder; this process forgets them afterwards."""
    before, threads = list(sys.path), torch.get_num_threads()
    sys.path[:0] = map(str, reversed(FOLDERS))
    yield
    sys.path[:] = before
    torch.set_num_threads(threads)
    for folder in FOLDERS:
        for path in folder.glob("*.py"):
            sys.modules.pop(path.stem, None)
    ssm_seqboat.RECURRENCES.pop("rglru", None)
    configuration_seqboat.SSM_TYPES[:] = [name for name in configuration_seqboat.SSM_TYPES if name != "rglru"]


def module(name):
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All experiments at toy size, in one go: the output folder."""
    output = tmp_path_factory.mktemp("experiments")
    module("run_all").main(["--toy", "--device", "cpu", "--output", str(output)])
    return output


@pytest.fixture(scope="module")
def rows(finished):
    """For each experiment the (labels, record) of its runs."""
    experiment, run_all, tables = module("experiment"), module("run_all"), module("tables")
    records = module("plan").Results(finished / "results.jsonl").records
    bases = experiment.Bases(experiment.RECIPES / "toy", True)
    plans = {name: run_all.EXPERIMENTS[name].grid(bases) for name in NAMES}
    found = {name: tables.finished(plan, records) for name, plan in plans.items()}
    assert {name: len(plan) for name, plan in plans.items()} == {name: len(made) for name, made in found.items()}
    return found


def learnt(rows):
    return [row for made in rows.values() for row in made if "quality" in row[1]]


# What is measured


def test_rates_and_shares_are_shares(rows):
    for _, record in learnt(rows):
        assert all(0 <= rate <= 1 for rate in record["rates"])
        assert record["mean_rate"] == pytest.approx(sum(record["rates"]) / len(record["rates"]))
        assert record["share_saved"] < 1 and record["quality"] and record["tokens_per_second"] > 0
        for rate, span, context in zip(record["rates"], record["spans"], record["contexts"], strict=True):
            assert (span is None) == (rate == 0)
            assert span is None or 0 <= span <= context
        assert record["history"][-1]["step"] == record["recipe"]["steps"]


def test_routers_do_what_their_names_say(rows):
    by_router = {labels["router"]: record for labels, record in rows["configurators"]}
    assert set(by_router["always"]["rates"]) == {1.0} and by_router["always"]["share_saved"] == 0
    assert set(by_router["never"]["rates"]) == {0.0} and by_router["never"]["mean_span"] is None
    assert by_router["never"]["share_saved"] == max(record["share_saved"] for record in by_router.values())


def test_the_random_router_runs_at_the_rate_of_the_learned_one():
    """With enough tokens, for the draw is one of tokens, the same in each row."""
    plan, runs, run_data = module("plan"), module("runs"), module("run_data")
    experiment = module("experiment")
    like = experiment.Bases(experiment.RECIPES / "toy", True).lm.changed(sequence_length=1024, steps=1, batch_size=1)
    sources, device = run_data.Sources(str(TEXT)), torch.device("cpu")
    records = {like.key: runs.execute(like, sources, device)}
    planned = plan.Planned({}, like.changed(router_type="random"), rate_like=like)
    found = runs.execute(planned.resolved(records), sources, device)
    assert found["recipe"]["router_random_rate"] == records[like.key]["mean_rate"]
    # Three standard deviations of 2 * 1,024 draws.
    assert found["mean_rate"] == pytest.approx(records[like.key]["mean_rate"], abs=0.035)


@pytest.mark.parametrize("task", ["lm", "pathfinder"])
def test_saved_flops_agree_with_a_count_by_hooks(task, finished):
    """Rows that the attention's linears get, and keys that the routers' decisions leave to each query."""
    runs, run_data, experiment = module("runs"), module("run_data"), module("experiment")
    recipe = experiment.Bases(experiment.RECIPES / "toy", True).task(task)
    sources = run_data.Sources(str(TEXT), None, str(finished / "data"))
    data = run_data.load_data(recipe, sources, torch.device("cpu"))
    model = runs.Run(recipe, data, torch.device("cpu")).model
    config = model.config
    width = config.memory_size
    saved = [0] * config.num_hidden_layers

    def pairs(active) -> int:
        total = 0
        for count in active.sum(1).tolist():
            for place in range(count):
                after = min(count - 1 - place, width) if config.bidirectional else 0
                total += min(place, width) + 1 + after
        return total

    def hook_router(layer):
        def count(router, arguments, output):
            active = output[1]
            fewer = pairs(torch.ones_like(active)) - pairs(active)
            saved[layer] += 2 * (config.qk_head_dim + config.v_head_dim) * fewer
            saved[layer] -= 2 * router.weight.numel() * active.numel()
            saved[layer] += 2 * active.numel() * linears(layer)

        return count

    def linears(layer) -> int:
        attention = model.model.layers[layer].attention
        return attention.in_proj.weight.numel() + attention.out_proj.weight.numel()

    def hook_linear(layer):
        def count(linear, arguments, output):
            saved[layer] -= 2 * linear.weight.numel() * output.numel() // linear.out_features

        return count

    for layer, block in enumerate(model.model.layers):
        block.router.register_forward_hook(hook_router(layer))
        for linear in (block.attention.in_proj, block.attention.out_proj):
            assert isinstance(linear, nn.Linear)
            linear.register_forward_hook(hook_linear(layer))
    _, report = runs.measure(model, recipe, data)
    assert report.flops_saved == saved
    assert 0 < report.rates.mean() < 1
    record = runs.describe(report)
    assert record["flops_saved"] == saved
    always_on = report.always_on_flops.total * config.num_hidden_layers
    assert record["share_saved"] == pytest.approx(sum(saved) / always_on)


def test_bits_per_byte_are_those_of_the_second_halves():
    """Against one row at a time and the definition."""
    runs, run_data, experiment = module("runs"), module("run_data"), module("experiment")
    recipe = experiment.Bases(experiment.RECIPES / "toy", True).lm
    data = run_data.load_data(recipe, run_data.Sources(str(TEXT)), torch.device("cpu"))
    model = runs.Run(recipe, data, torch.device("cpu")).model.eval()
    quality, _ = runs.measure(model, recipe, data)
    text = TEXT.read_bytes()
    text = text[len(text) - int(len(text) * 0.05) :]
    losses = []
    for start in (0, 32):
        row = torch.tensor([list(text[start : start + 64])])
        with torch.no_grad():
            logs = model(row).logits[0].log_softmax(-1)
        losses += [-logs[place - 1, row[0, place]] for place in range(32, 64)]
    assert quality["bits_per_byte"] == pytest.approx(float(sum(losses)) / 64 / 0.6931471805599453, rel=1e-5)


def test_equal_seeds_give_equal_runs_and_read_equal_rows():
    runs, run_data, experiment = module("runs"), module("run_data"), module("experiment")
    recipe = experiment.Bases(experiment.RECIPES / "toy", True).lm
    sources, device = run_data.Sources(str(TEXT)), torch.device("cpu")
    first, second = (runs.execute(recipe, sources, device) for _ in range(2))
    assert first["quality"] == second["quality"] and first["rates"] == second["rates"]
    assert first["quality"] != runs.execute(recipe.changed(seed=1), sources, device)["quality"]
    orders = []
    for changes in ({}, {"memory_size": 3, "router_type": "never"}):
        data = run_data.load_data(recipe.changed(**changes), sources, device)
        orders.append(data.batch(torch.Generator().manual_seed(5))["input_ids"])
    assert torch.equal(*orders)


def test_recurrences_have_about_equally_many_parameters(rows):
    counts = [record["parameters"] for _, record in rows["recurrences"]]
    assert max(counts) < 1.01 * min(counts)


# Grids, tables, pictures


def test_shared_runs_are_made_once(finished, rows):
    keys = [json.loads(line)["key"] for line in (finished / "results.jsonl").read_text().splitlines()]
    assert len(keys) == len(set(keys)) < sum(map(len, rows.values()))


def test_the_full_grids_are_valid_and_begin_with_each_first_seed():
    experiment, run_all, plan = module("experiment"), module("run_all"), module("plan")
    bases = experiment.Bases(experiment.RECIPES, False)
    planned = [run for name in NAMES for run in run_all.EXPERIMENTS[name].grid(bases)]
    runs = plan.in_order(planned)
    assert len({run.key for run in planned}) == len(runs)
    seeds = [run.recipe.seed for run in runs]
    assert seeds == sorted(seeds) and set(seeds) == {0, 1, 2}
    assert [run.alone for run in runs] == sorted((run.alone for run in runs), reverse=True)
    keys = [run.key for run in runs]
    likes = [run for run in runs if run.rate_like is not None]
    assert likes and all(keys.index(run.rate_like.key) < keys.index(run.key) for run in likes)
    parameters = [5, 10, 20, 40, 100]
    with torch.device("meta"):
        sizes = [run for run in run_all.EXPERIMENTS["scale"].grid(bases) if run.recipe.seed == 0]
        for run, millions in zip(sizes, parameters, strict=True):
            model = module("runs").MODELS["lm"](run.recipe.config())
            assert model.num_parameters() == pytest.approx(1e6 * millions, rel=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_pages_have_a_row_for_each_run_and_a_picture(name, finished, rows):
    text = (finished / f"{name}.md").read_text("utf-8")
    tables = {part.split("\n")[0]: part for part in text.split("## ")[1:]}
    quiet = [row for row in rows[name] if "quality" in row[1]]
    lines = [line for line in tables["Runs"].splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + len(quiet)
    columns = len(lines[0].split(" | "))
    assert all(len(line.split(" | ")) == columns for line in lines)
    for (labels, record), line in zip(quiet, lines[2:], strict=True):
        assert all(f" {value} " in line for value in labels.values())
        quality = record["quality"].get("bits_per_byte", record["quality"].get("accuracy"))
        assert f"{quality:.4f}" in line and f"{record['mean_rate']:.1%}" in line
    timed = [
        line for line in tables.get("Speed, nothing else on the device", "").splitlines() if line.startswith("| ")
    ]
    assert len(timed) == (2 + len(rows[name]) - len(quiet) if len(rows[name]) > len(quiet) else 0)
    assert (finished / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert f"]({name}.png)" in text and "tinyshakespeare.txt" in text and "planned runs were not made" not in text


@pytest.mark.parametrize("name", ["memory_size", "configurators", "recurrences", "activation_rate"])
def test_committed_pages_are_those_of_the_committed_records(name):
    experiment, run_all, tables = module("experiment"), module("run_all"), module("tables")
    folder = experiment.ROOT / "docs/experiments"
    plan = run_all.EXPERIMENTS[name].grid(experiment.Bases(experiment.RECIPES, False))
    rows = tables.finished(plan, module("plan").Results(folder / "results.jsonl").records)
    assert len(rows) == len(plan)
    assert (folder / f"{name}.md").read_text("utf-8") == experiment.page(run_all.EXPERIMENTS[name], rows)


def test_mean_and_deviation_over_seeds():
    tables = module("tables")
    rows = []
    for seed, (bits, rate) in enumerate([(2.0, 0.25), (3.0, 0.5), (None, None)]):
        record = {
            "quality": {"bits_per_byte": bits}, "mean_rate": rate, "mean_span": 10.0, "share_saved": 0.5,
            "recipe": {"task": "lm"},
        }  # fmt: skip
        rows.append(({"router": "x", "seed": seed}, record))
    line = tables.settings_table(rows).splitlines()[2]
    assert line == "| x | 3 | bits per byte | 2.5000 ± 0.7071 | 37.5% ± 17.7% | 10 ± 0 | 50.0% |"


# The driver


def test_finished_runs_are_skipped_and_a_cut_line_is_made_again(finished, tmp_path, capsys):
    run_all = module("run_all")
    lines = (finished / "results.jsonl").read_text("utf-8").splitlines()
    recurrences = {run.key for run in run_all.EXPERIMENTS["recurrences"].grid(toy())}
    kept = [line for line in lines if json.loads(line)["key"] in recurrences]
    (tmp_path / "results.jsonl").write_text("\n".join(kept[:-1]) + "\n" + kept[-1][:40], "utf-8")
    run_all.main(["recurrences", "--toy", "--device", "cpu", "--output", str(tmp_path)])
    assert f"{len(kept)} runs, {len(kept) - 1} of them made before" in capsys.readouterr().out
    again = (tmp_path / "results.jsonl").read_text("utf-8").splitlines()
    assert again[:-1] == kept[:-1] and json.loads(again[-1])["key"] == json.loads(kept[-1])["key"]
    run_all.main(["recurrences", "--toy", "--device", "cpu", "--output", str(tmp_path)])
    assert (tmp_path / "results.jsonl").read_text("utf-8").splitlines() == again


def toy():
    experiment = module("experiment")
    return experiment.Bases(experiment.RECIPES / "toy", True)


def test_pages_come_from_a_results_file_alone(finished, tmp_path):
    arguments = ["scale", "--toy", "--from-results", str(finished / "results.jsonl"), "--write-docs", str(tmp_path)]
    module("run_all").main(arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"scale.md", "scale.png"}
    assert (tmp_path / "scale.md").read_text("utf-8") == (finished / "scale.md").read_text("utf-8")


def test_two_processes_share_a_plan(tmp_path, monkeypatch):
    driver, plan, run_data = module("driver"), module("plan"), module("run_data")
    if forks.FORKS:
        monkeypatch.setattr(driver.subprocess, "Popen", forks.Command)
    base = toy().lm
    planned = [plan.Planned({"seed": seed}, base.changed(seed=seed)) for seed in (0, 1)]
    planned.append(plan.Planned({}, base.changed(router_type="random"), rate_like=base))
    # Refused by the worker, which is replaced.
    planned.insert(0, plan.Planned({}, base.changed(sequence_length=2_000_000)))
    settings = driver.Settings(run_data.Sources(str(TEXT)), jobs=2)
    results = driver.make_runs(planned, tmp_path, settings, "a command")
    assert set(results.records) == {run.key for run in planned[1:]}
    assert {record["jobs"] for record in results.records.values()} == {2}
    failure = json.loads((tmp_path / "failures.jsonl").read_text("utf-8"))
    assert failure["key"] == planned[0].key and "sequence_length 2000000" in failure["error"]
    alone = module("runs").execute(base, settings.sources, torch.device("cpu"))
    assert results.records[base.key]["quality"] == alone["quality"]


def test_no_run_starts_after_the_time_is_up(tmp_path, capsys):
    driver, plan, run_data = module("driver"), module("plan"), module("run_data")
    settings = driver.Settings(run_data.Sources(str(TEXT)), minutes=1e-9)
    results = driver.make_runs([plan.Planned({}, toy().lm)], tmp_path, settings, "a command")
    assert not results.records and "1 runs were not started" in capsys.readouterr().out


def test_timed_runs_have_the_device_to_themselves():
    driver, plan, run_data = module("driver"), module("plan"), module("run_data")
    base = toy().lm
    timed, other = plan.Planned({}, base.changed(timed_steps=1)), plan.Planned({}, base)

    class Nothing:
        records: dict = {}

        def add(self, record):
            pass

    queue = driver.Queue([timed, other], Nothing(), driver.Settings(run_data.Sources(), minutes=1))
    assert queue.take() is timed
    assert queue._ready() is None
    queue.finish(timed, {}, None)
    assert queue.take() is other


def test_a_run_without_the_run_it_depends_on_is_named(tmp_path):
    driver, plan, run_data = module("driver"), module("plan"), module("run_data")
    planned = plan.Planned({}, toy().lm.changed(router_type="random"), rate_like=toy().lm)
    driver.make_runs([planned], tmp_path, driver.Settings(run_data.Sources(str(TEXT))), "a command")
    assert toy().lm.key in json.loads((tmp_path / "failures.jsonl").read_text("utf-8"))["error"]


def test_the_plan_names_experiments_recipes_and_arguments_that_exist(tmp_path):
    queue, run_all, train = module("run_queue"), module("run_all"), module("train")
    path = module("experiment").RECIPES / "plan.yaml"
    data = ["experiments.train_file=enwik8", *(f"{task}.data_path=file" for task in ("text", "image", "speech"))]
    runs = queue.read_plan(str(path), [], [*data, "image.labels_path=labels"])
    assert {run.subject for run in runs if run.script == "experiments"} == {
        "agreement", "scale", "fair_recurrences", "memory_span", "early_attention",
    }  # fmt: skip
    for run in runs:
        words = queue.command(run, tmp_path / run.name, "0")[2:]
        if run.script == "experiments":
            assert run_all.parse(words).experiments == [run.subject]
            continue
        arguments = module("recipes").parse_arguments(train.ClassificationArguments, words)
        train.check_arguments(arguments)
        train.build_config(arguments)
        assert arguments.data_path and arguments.max_minutes == run.minutes and arguments.task in run.name


def test_a_queue_goes_on_with_a_classification(tmp_path, monkeypatch):
    import yaml
    from classification_tasks import ROOT, TINY, run, write_reviews

    queue = module("run_queue")
    monkeypatch.setattr(queue.subprocess, "Popen", forks.Command)
    recipe = ROOT / "configuration/recipes/classification/half-hour/lra-text.yaml"
    overrides = TINY | {"router_target_rate": 0.5}
    settings = {"max_steps": 2, "eval_steps": 1, "batch_size": 4, "validation_size": 4, "warmup_steps": 1,
                "num_workers": 0, **write_reviews(tmp_path)}  # fmt: skip
    output = tmp_path / "out/text-0/run"
    before = run("half-hour/lra-text", output, {"router_target_rate": 0.5}, **settings)
    entry = {"name": "text-0", "script": "classification", "recipe": str(recipe), "eval_batch_size": 4,
             "logging_steps": 1, "config_overrides": json.dumps(overrides)}  # fmt: skip
    entry |= {name: value if isinstance(value, int) else str(value) for name, value in settings.items()}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump([entry]))
    call = [str(tmp_path / "plan.yaml"), "--output_dir", str(tmp_path / "out"), "--gpus", "cpu"]
    assert queue.main(call) == {"text-0": "there already"}
    (output / "results.json").unlink()
    assert queue.main(call) == {"text-0": "done"}
    again = json.loads((output / "results.json").read_text("utf-8"))
    assert again["arguments"]["resume_from_checkpoint"] == "latest" and again["trained_tokens"] == 0
    assert again["confusion_matrix"] == before["confusion_matrix"]


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lerning_rate": 1e-3}, "'lerning_rate' is neither a field of a run"),
        ({"task": "poetry"}, "task must be one of lm, pathfinder, listops, got 'poetry'"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'"),
        ({"muon_split": 1}, "muon_split must be true or false, got 1"),
        ({"muon_row_beta": 1.0}, "muon_row_beta must be from 0 up to, but not including, 1, got 1.0"),
        ({"learning_rate": 0}, "learning_rate must be above 0, got 0.0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": True}, "steps must be an integer, got True"),
        ({"warmup_steps": 9}, "warmup_steps must be from 0 to steps 3, got 9"),
        ({"precision": "fp8"}, "precision must be one of bf16, float32, got 'fp8'"),
        ({"memory_size": 0}, "memory_size=0 is not valid"),
        ({"router_type": "majority"}, "router_type='majority' is not valid"),
        ({"preset": "enormous"}, "no preset 'enormous'"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, muon, got 'sgd'"),
        ({"router_gain": 0.1}, "router_gain 0.1 needs a router_target_rate"),
        ({"model": {}}, "'model' is neither a field of a run"),
    ],
)
def test_bad_recipes_are_refused_by_name(change, message, tmp_path):
    import yaml

    run_recipe = module("run_recipe")
    path = tmp_path / "lm.yaml"
    path.write_text(yaml.safe_dump(toy().lm.flat() | change), "utf-8")
    with pytest.raises(ValueError, match=message) as refused:
        run_recipe.load_recipe(path)
    assert str(path) in str(refused.value)


def test_other_bad_input_is_said_without_a_traceback(finished, tmp_path):
    run_all = module("run_all")
    output = ["--device", "cpu", "--output", str(tmp_path / "out")]

    def refused(*arguments) -> str:
        with pytest.raises(SystemExit) as exit:
            run_all.main([*arguments, *output])
        return str(exit.value)

    assert "give --train_file" in refused("scale")
    assert "there is no text file 'nowhere.txt'" in refused("scale", "--toy", "--train_file", "nowhere.txt")
    assert "jobs must be at least 1, got 0" in refused("scale", "--toy", "--jobs", "0")
    assert "minutes must be above 0" in refused("scale", "--toy", "--minutes", "0")
    assert "there is no recipe" in refused("scale", "--recipes", str(tmp_path))
    assert "there is no file" in refused("scale", "--from-results", "nowhere.jsonl")
    assert not (tmp_path / "out").exists()
    (tmp_path / "short.txt").write_text("short", "utf-8")
    other = ["scale", "--toy", "--train_file", str(tmp_path / "short.txt"), "--output", str(finished)]
    with pytest.raises(
        SystemExit, match="has runs on \\['tinyshakespeare.txt', None\\], not on \\['short.txt', None\\]"
    ):
        run_all.main(other)


def test_a_results_file_of_something_else_is_refused(tmp_path):
    plan = module("plan")
    (tmp_path / "results.jsonl").write_text('{"key": "a"}\nnot json\n', "utf-8")
    with pytest.raises(ValueError, match="line 2 of .* is no record of a run"):
        plan.Results(tmp_path / "results.jsonl")


def test_finished_classifications_are_measured_on_their_test_rows(finished, tmp_path):
    from classification_tasks import run, write_recordings, write_reviews

    patterns = module("activation_patterns")
    made = {
        "text": run("lra-text", tmp_path / "text", **write_reviews(tmp_path)),
        "speech": run("speech-commands", tmp_path / "speech", **write_recordings(tmp_path)),
    }
    options = ["--toy", "--device", "cpu", "--output", str(tmp_path / "out")]
    patterns.main([*(f"--model={task}={tmp_path / task}" for task in made), *options])
    page = (tmp_path / "out/activation_patterns.md").read_text("utf-8")
    for task, results in made.items():
        line = next(line for line in page.splitlines() if line.startswith(f"| {task} | {task} | 0"))
        assert f"| {results['test_accuracy']:.4f} |" in line
        assert f"| {', '.join(f'{rate:.0%}' for rate in results['activation_rate_by_layer'])} |" in line
    assert "reviews.tar.xz" in page and "words.npz.xz" in page
    with pytest.raises(SystemExit, match="is of task 'text', not 'image'"):
        patterns.main(["--model", f"image={tmp_path / 'text'}", *options])


def test_few_rows_of_generated_data_are_none_of_the_run(finished, tmp_path, monkeypatch):
    """--rows draws by the next seed, beside what was measured before; the page is made again of the records alone."""
    from classification_tasks import draw_little, run, write_generated

    patterns = module("activation_patterns")
    draw_little(monkeypatch)
    run("lra-listops", tmp_path / "listops", **write_generated(tmp_path))
    options, model = ["--toy", "--device", "cpu", "--output", str(tmp_path / "out")], f"--model=listops={tmp_path}/"
    patterns.main([model + "listops", *options])
    (tmp_path / "listops").rename(tmp_path / "again")
    patterns.main([model + "again", "--rows", "3", *options])
    assert len(list((tmp_path / "generated").glob("listops-seed1-*"))) == 1
    page = (tmp_path / "out/activation_patterns.md").read_text("utf-8")
    assert "| listops | listops | 0" in page and "| listops | again | 0" in page
    records = str(tmp_path / "out/activation_patterns.jsonl")
    patterns.main(["--from-results", records, "--write-docs", str(tmp_path / "docs")])
    assert (tmp_path / "docs/activation_patterns.md").read_text("utf-8") == page
    with pytest.raises(SystemExit, match="--rows must be at least 1, got 0"):
        patterns.main([model + "again", "--rows", "0", *options])


def test_folders_of_models_are_measured(finished, tmp_path, capsys):
    runs, run_data, patterns = module("runs"), module("run_data"), module("activation_patterns")
    recipe = toy().lm
    data = run_data.load_data(recipe, run_data.Sources(str(TEXT)), torch.device("cpu"))
    model = runs.Run(recipe, data, torch.device("cpu")).model
    model.save_pretrained(tmp_path / "model")
    options = ["--toy", "--device", "cpu", "--output", str(tmp_path / "out")]
    patterns.main(["--model", f"lm={tmp_path / 'model'}", *options])
    _, report = runs.measure(model, recipe, data)
    table = (tmp_path / "out/activation_patterns.md").read_text("utf-8")
    assert f"| lm | model | {runs.measure(model, recipe, data)[0]['bits_per_byte']:.4f} |" in table
    assert ", ".join(f"{rate:.0%}" for rate in report.rates.tolist()) in table
    assert (tmp_path / "out/activation_patterns.png").is_file()
    with pytest.raises(SystemExit, match="holds no results.json"):
        patterns.main(["--model", f"pathfinder={tmp_path / 'model'}", *options])
    with pytest.raises(SystemExit, match="holds no config.json"):
        patterns.main(["--model", f"lm={tmp_path}", *options])
    with pytest.raises(SystemExit):
        patterns.main(["--model", str(tmp_path), *options])
    assert "is not TASK=FOLDER" in capsys.readouterr().err


# The budget


def test_a_budget_holds_the_rate_under_muon():
    runs, run_data = module("runs"), module("run_data")
    recipe = toy().budget.changed(steps=60, router_gain=0.3, evaluation_rows=16)
    for target in (0.2, 0.8):
        held = recipe.changed(router_target_rate=target)
        found = runs.execute(held, run_data.Sources(str(TEXT)), torch.device("cpu"))
        assert found["mean_rate"] == pytest.approx(target, abs=0.15)
    assert runs.rate_factor(recipe, 0) == 1 and runs.rate_factor(recipe, 60) == 0
    assert runs.rate_factor(recipe.changed(warmup_steps=0), 30) == pytest.approx(0.5)


def test_recurrences_learn_at_a_rate_of_their_own():
    runs = module("runs")
    recipe = toy().budget.changed(ssm_learning_rate=1e-3, ssm_type="s4d")
    model = runs.MODELS["lm"](recipe.config())
    rates = {
        id(parameter): (group["lr"], group["muon"], group["weight_decay"])
        for group in runs.optimizer_of(recipe, model).param_groups
        for parameter in group["params"]
    }
    assert len(rates) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        rate, muon, decay = rates[id(parameter)]
        if ".ssm." in name:
            assert (rate, muon, decay) == (1e-3, False, 0.0)
        elif ".router." in name:
            assert (rate, muon, decay) == (3e-5, False, 0.0)
        else:
            matrix = parameter.ndim == 2 and ".layers." in name and "proj" in name
            assert muon == matrix and rate == (0.02 if matrix else 4e-3)


def test_settings_younger_than_the_records_leave_keys_as_they_were():
    recipe = toy().lm
    assert recipe.changed(optimizer="adamw", router_gain=0.0).key == recipe.key
    assert recipe.changed(optimizer="muon").key != recipe.key


# Choices of tokens


def test_kappa_and_lift_are_those_of_their_definitions():
    overlap = module("overlap")
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(2, 3, 400, generator=generator) < torch.tensor([0.1, 0.5, 0.9])[:, None]).unbind()
    second[1] = first[1]
    classes = torch.arange(400) % 2
    together = overlap.counted_together(first, second, classes, 2)
    assert torch.equal(together[1], first[:, 1::2].double() @ second[:, 1::2].double().T)
    counts = first.sum(1), second.sum(1)
    kappas, lifts = (f(together.sum(0), *counts, 400) for f in (overlap.kappa, overlap.lift))
    assert kappas[1, 1] == pytest.approx(1) and float(kappas[0, 1].abs()) < 0.1
    p, q = float(first[0].float().mean()), float(second[2].float().mean())
    agreed, chance = float((first[0] == second[2]).float().mean()), p * q + (1 - p) * (1 - q)
    assert float(kappas[0, 2]) == pytest.approx((agreed - chance) / (1 - chance), abs=1e-5)
    assert float(lifts[0, 2]) == pytest.approx(float((first[0] & second[2]).float().mean()) / (p * q), rel=1e-5)
    nothing = torch.zeros(1, dtype=torch.long)
    assert overlap.kappa(torch.zeros(1, 1, dtype=torch.double), nothing, nothing, 400).isnan().all()


def test_the_best_assignment_is_that_of_all_permutations():
    import itertools

    overlap = module("overlap")
    for size in (1, 2, 5):
        for seed in range(8):
            worth = torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).tolist()
            best = max(
                itertools.permutations(range(size)),
                key=lambda order, worth=worth: sum(worth[row][column] for row, column in enumerate(order)),
            )
            assert overlap.best_assignment(worth) == list(best)
    assert overlap.best_assignment([[float("nan"), -1.0], [1.0, 5.0]]) == [0, 1]


def test_ranks_of_rates():
    correlate = module("overlap").rank_correlation
    assert correlate([0.1, 0.9, 0.5], [1, 30, 2]) == pytest.approx(1)
    assert correlate([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # Ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3.
    assert correlate([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert correlate([1, 1], [1, 2]) != correlate([1, 1], [1, 2])


def test_tokens_by_lot_are_as_many_in_each_layer_and_class():
    overlap = module("overlap")
    pattern = torch.rand(2, 500, generator=torch.Generator().manual_seed(0)) < 0.3
    classes = torch.arange(500) % 3
    for kept in (classes, torch.zeros_like(classes)):
        drawn = overlap.by_lot(pattern, kept, 1)
        assert torch.equal(drawn.sum(1), pattern.sum(1)) and not torch.equal(drawn, pattern)
        assert torch.equal(drawn, overlap.by_lot(pattern, kept, 1))
    drawn = overlap.by_lot(pattern, classes, 1)
    assert all(torch.equal(drawn[:, classes == c].sum(1), pattern[:, classes == c].sum(1)) for c in range(3))


def test_a_model_takes_exactly_the_tokens_that_it_is_given():
    runs, run_data, agreement, overlap = module("runs"), module("run_data"), module("agreement"), module("overlap")
    recipe, device = toy().budget, torch.device("cpu")
    data = run_data.load_data(recipe, run_data.Sources(str(TEXT)), device)
    model = runs.Run(recipe, data, device).model
    pattern, confidence = agreement.choice(model, recipe, data)
    free, _ = runs.measure(model, recipe, data)
    with overlap.Imposed(model, data, pattern, confidence) as imposed:
        assert runs.measure(model, recipe, imposed)[0] == free
    for other in (~pattern, torch.ones_like(pattern), torch.zeros_like(pattern)):
        with overlap.Imposed(model, data, other, confidence) as imposed:
            quality, report = runs.measure(model, recipe, imposed)
        assert report.activated.tolist() == other.sum(1).tolist() and quality != free
    # All tokens, each with weight 1: a model whose routers are always on.
    with overlap.Imposed(model, data, torch.ones_like(pattern), [1.0, 1.0]) as imposed:
        for block in model.model.layers:
            torch.nn.init.zeros_(block.router.weight)
            block.router.bias.data = torch.tensor([1.0, 0.0])
        given, _ = runs.measure(model, recipe, imposed)
    always = runs.MODELS["lm"](recipe.changed(router_type="always", router_gain=0.0, router_target_rate=None).config())
    always.load_state_dict(model.state_dict(), strict=False)
    assert runs.measure(always, recipe, data)[0]["bits_per_byte"] == pytest.approx(given["bits_per_byte"], rel=1e-6)
    assert runs.measure(model, recipe, data)[1].activated.tolist() == [0, 0]


def test_choices_are_measured_once_and_models_that_are_lost_are_made_again(finished, tmp_path, capsys):
    import shutil

    agreement = module("agreement")
    for name in ("results.jsonl", "agreement.jsonl"):
        shutil.copy(finished / name, tmp_path)
    shutil.copytree(finished / "models", tmp_path / "models")
    measured = (tmp_path / "agreement.jsonl").read_text("utf-8")
    # Four runs, and each one's two partners.
    assert len(measured.splitlines()) == 4 + 4 * 2
    lost = next((tmp_path / "models").iterdir())
    shutil.rmtree(lost)
    (tmp_path / "agreement.jsonl").write_text("\n".join(measured.splitlines()[:-1]) + "\n", "utf-8")
    agreement.main([agreement.EXPERIMENT], ["--toy", "--device", "cpu", "--output", str(tmp_path)])
    assert "4 runs, 3 of them made before" in capsys.readouterr().out
    again = (tmp_path / "agreement.jsonl").read_text("utf-8")
    assert again == measured and (lost / "config.json").is_file()
    page = (tmp_path / "agreement.md").read_text("utf-8")
    assert page.count("| another seed | same | 2 |") == 1 and "| by lot in each class | 4 |" in page
