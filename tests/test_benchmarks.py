"""The benchmark at toy size on the CPU: every part runs, nothing measured is lost, and targets are judged by their
rows."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from forks import torchrun

ROOT = Path(__file__).resolve().parent.parent
PNGS = ("time_against_length.png", "memory_against_length.png")


@pytest.fixture(scope="module")
def bench():
    kept = list(sys.path)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import bench_models

        yield bench_models
    finally:
        sys.path[:] = kept


@pytest.fixture(scope="module")
def report(bench):
    import result_files

    return result_files


@pytest.fixture(scope="module")
def whole_run(bench, tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark") / "out"
    bench.main(["--toy", "--output", str(folder)])
    return folder


def measured(rows):
    return [row for row in rows if row["part"] != "run"]


def test_every_part_runs_and_writes_tables_and_plots(whole_run, report):
    rows = measured(report.read_rows(whole_run / "results.csv"))
    assert {row["part"] for row in rows} == {"roofline", "step", "train", "decode", "forward", "prefill"}
    for row in rows:
        if row["model"] in ("mamba2", "gla", "kda", "gated_deltanet"):
            assert row["status"] == "ok" or (
                row["status"] == "not installed" and "which is not installed" in row["note"]
            )
        else:
            assert row["status"] == "ok", row
    assert all(row["ms"] > 0 and row["tokens_per_s"] > 0 for row in rows if row["status"] == "ok" and row["length"])
    assert {row["active"] for row in rows if row["part"] == "train" and row["model"] == "seqboat"} == {0, 0.1, 0.5, 1}
    caches = {row["cache_mib"] for row in rows if row["part"] in ("decode", "prefill") and row["model"] == "seqboat"}
    assert len({round(size, 6) for size in caches}) == 2, "the cache's size depends on the batch alone"
    text = (whole_run / "results.md").read_text()
    assert f"torch {torch.__version__}" in text and str(whole_run) not in text
    assert "python benchmarks/bench_models.py --toy --output FOLDER" in text
    for title in ("Targets", "Whole step", "Training step", "Decoding", "Forward", "Prefill in chunks", "Roofline"):
        assert f"## {title}" in text
    for name in PNGS:
        assert (whole_run / name).read_bytes().startswith(b"\x89PNG")


def test_tables_and_plots_come_again_from_the_csv(bench, whole_run, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "plan", None)
    bench.main(["--from-csv", str(whole_run / "results.csv"), "--output", str(tmp_path / "again")])
    again = (tmp_path / "again" / "results.md").read_text()
    assert again == (whole_run / "results.md").read_text()
    assert all((tmp_path / "again" / name).exists() for name in PNGS)


def test_rows_after_the_budget_are_skipped_and_named(bench, report, tmp_path):
    bench.main(["--toy", "--parts", "decode,forward", "--minutes", "1e-9", "--output", str(tmp_path)])
    rows = measured(report.read_rows(tmp_path / "results.csv"))
    assert rows and {row["status"] for row in rows} == {"skipped"}
    text = (tmp_path / "results.md").read_text()
    assert "* decode: seqboat compiled, 1 × 8, 50% active: skipped, after 1e-09 minutes" in text
    assert "forward: llama eager, 1 × 16: skipped" in text


def test_rows_that_fail_are_recorded_and_the_run_goes_on(bench, report, tmp_path, monkeypatch):
    rows = bench.plan(bench.TOY, ["forward"])[1:]
    on_disk = []

    def fail(bench, row):
        raise RuntimeError("no such\nkernel")

    def exhaust(bench, row):
        raise torch.cuda.OutOfMemoryError("tried to allocate")

    def watch(bench, row):
        on_disk.append((tmp_path / "results.csv").read_text())
        return {"ms": 2.0, "tokens_per_s": 8000.0}

    rows[0].measure, rows[1].measure, rows[2].measure = fail, exhaust, watch
    monkeypatch.setattr(bench, "plan", lambda scale, parts, models: rows)
    bench.main(["--toy", "--output", str(tmp_path)])
    found = measured(report.read_rows(tmp_path / "results.csv"))
    assert [row["status"] for row in found[:3]] == ["failed", "out of memory", "ok"]
    assert found[0]["note"] == "RuntimeError: no such kernel"
    assert "RuntimeError: no such kernel" in on_disk[0] and "out of memory" in on_disk[0], "not yet in the file"
    text = (tmp_path / "results.md").read_text()
    assert "| seqboat | eager | 1 × 40 | 50% | out of memory |" in text
    assert "2.000 ms" in text


def test_bad_arguments_are_refused_before_anything_is_written(bench, tmp_path, capsys):
    out = tmp_path / "out"
    for given, said in (
        (["--parts", "train,sleep"], "got sleep"),
        (["--models", "llama,rwkv"], "got rwkv"),
        (["--minutes", "0"], "must be above 0, got 0.0"),
        (["--from-csv", str(tmp_path / "none.csv")], "names no file"),
    ):
        with pytest.raises(SystemExit):
            bench.main(["--output", str(out), *given])
        assert said in capsys.readouterr().err
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not a CSV of this benchmark"):
        bench.main(["--output", str(out), "--from-csv", str(tmp_path / "other.csv")])
    assert not out.exists()


def gpu_rows():
    def row(part, model, mode, batch, length, active=None, **numbers):
        empty = {"status": "ok", "note": None, "repeats": 5, "seconds": 1.0}
        fields = {"part": part, "model": model, "mode": mode, "batch": batch, "length": length, "active": active}
        return {**dict.fromkeys(("ms", "tokens_per_s", "peak_gib", "cache_mib")), **empty, **fields, **numbers}

    graph, long = "CUDA graph", 1 << 20
    rows = [
        row("train", "seqboat", "eager", 4, 8192, 0.5, ms=30.0, peak_gib=6.9),
        row("train", "seqboat", graph, 4, 8192, 0.5, ms=20.0, tokens_per_s=1.6e6, peak_gib=8.0),
        row("train", "llama", "eager", 4, 8192, ms=90.0),
        row("train", "llama", graph, 4, 8192, ms=59.0),
        row("train", "seqboat", graph, 4, 8192, 0.0, ms=10.0),
        row("train", "seqboat", graph, 4, 8192, 0.1, ms=12.0),
        row("train", "seqboat", graph, 4, 8192, 1.0, ms=30.0),
        row("train", "seqboat", graph, 1, 32768, 0.5, tokens_per_s=1.45e6),
        row("train", "seqboat", graph, 1, 131072, 0.5, tokens_per_s=1.43e6),
        row("train", "seqboat", "eager", 1, 32768, 0.5, peak_gib=6.0),
        row("train", "seqboat", "eager", 1, 131072, 0.5, peak_gib=30.0),
    ]
    rows += [
        row("step", "seqboat", "eager", 4, 8192, 0.5, ms=64.0, peak_gib=7.1),
        row("step", "seqboat", graph, 4, 8192, 0.5, ms=37.0),
        row("step", "llama", "eager", 4, 8192, ms=100.0),
        row("forward", "seqboat", "eager, cache by default", 1, 8192, 0.5, ms=11.0),
        row("prefill", "seqboat", "chunks of 131,072", 1, long, 0.5, ms=599.0),
    ]
    rows += [
        row("forward", "seqboat", "eager", 1, length, 0.5, ms=10.0, tokens_per_s=length * 100)
        for length in (8192, 131072)
    ]
    for length, rate, peak in ((8192, 5e6, 1.0), (131072, 5.2e6, 1.05), (long, 5.4e6, 1.06)):
        rows.append(row("forward", "seqboat", graph, 1, length, 0.5, tokens_per_s=rate))
        rows.append(row("prefill", "seqboat", "eager", 1, length, 0.5, ms=5000.0, peak_gib=peak))
    for context, ms in ((1024, 0.96), (32768, 0.97), (long, 1.0)):
        rows.append(row("decode", "seqboat", "compiled", 1, context, 0.5, ms=ms))
    rows.append(row("decode", "seqboat", "compiled", 64, 32768, 0.5, tokens_per_s=50_001.0))
    rows.append(row("decode", "llama", "compiled", 1, 32768, ms=1.9))
    return rows


def test_targets_are_judged_by_their_thresholds(report, bench):
    from targets import judge

    verdicts = {target.text: target for target in judge(gpu_rows(), "cuda")}

    def verdict(*words):
        return next(target for text, target in verdicts.items() if all(word in text for word in words))

    for words, met in (
        (("≤ 22 ms", "op by op"), False),
        (("≤ 22 ms", "CUDA graph"), True),
        (("≥ 3 ×", "Llama launched op by op"), True),
        (("≥ 3 ×", "Llama as a CUDA graph"), False),
        (("whole step", "op by op"), True),
        (("whole step", "CUDA graph"), False),
        (("whole step", "≤ 7 GiB"), False),
        (("training step", "≤ 7 GiB"), True),
        (("≤ 1.1 ×",), True),
        (("≤ 600 ms",), True),
        (("forward, 8k", "op by op"), None),
        (("forward, 8k", "CUDA graph"), True),
        (("memory linear",), False),
        (("memory constant",), True),
        (("independent of context",), True),
        (("≤ 1 ms",), True),
        (("50,000",), True),
        (("≥ 2 × the Llama",), False),
        (("1 × 32,768",), True),
        (("1 × 131,072",), False),
        (("10 % against 100 %",), True),
    ):
        assert verdict(*words).met is met, verdict(*words)
    assert len(verdicts) == 21
    assert verdict("≥ 3 ×", "Llama as a CUDA graph").measured == "2.95 × (59.0 against 20.0 ms)"
    assert verdict("10 % against 100 %").measured == "10.0% (2.0 of 20.0 ms)"


def test_the_markdown_of_a_gpu_run_names_card_and_verdicts(report):
    facts = {"card": "NVIDIA H200", "device": "cuda", "size": "enwik8", "torch": "2.11.0", "command": "python x"}
    rows = [
        {**dict.fromkeys(report.COLUMNS), "part": "run", "model": name, "note": note} for name, note in facts.items()
    ]
    full = [{**dict.fromkeys(report.COLUMNS), "tokens_per_s": 1.0, **row} for row in gpu_rows()]
    for row in full:
        row["tokens_per_s"] = row["tokens_per_s"] or 1.0
    text = report.markdown(rows + full)
    assert text.startswith("# SeqBoat and models of equal size on NVIDIA H200\n")
    assert "| training step, peak memory: ≤ 7 GiB | 6.90 GiB | yes |" in text
    assert "59.0 against 20.0 ms) | **no** |" in text and "| not measured | — |" in text


def test_a_row_of_a_failed_measurement_meets_no_target(bench):
    from targets import judge

    rows = gpu_rows()
    rows[1]["status"] = "failed"
    verdicts = [target for target in judge(rows, "cuda") if "≤ 22 ms" in target.text]
    assert [target.met for target in verdicts] == [False, None]


def test_the_roofline_counts_what_its_formula_says(bench):
    from roofline import least_ms, visible_pairs

    from modeling_seqboat import SeqBoatConfig

    assert [visible_pairs(n, 3) for n in (0, 1, 4, 5, 6)] == [0, 1, 10, 14, 18]
    config = SeqBoatConfig(hidden_size=4, num_hidden_layers=2, qk_head_dim=2, v_head_dim=6, memory_size=3)
    # 10 tokens of which 5 are activated: 2 * 2 bytes * (3 * 4 * 10 + (2 + 18 + 4) * 5) moved in a layer.
    moved = 4 * (120 + 120)
    # hidden_proj, router, the two linears, and 14 pairs of queries and keys.
    flops = 10 * 2 * 16 + 10 * 16 + 5 * 2 * 4 * 20 + 14 * 2 * 8
    found = least_ms(config, 10, 0.5, 2, 1e3, 1e3)
    assert found == pytest.approx(1e3 * 2 * (moved + flops) / 1e3)


def test_one_compiled_step_serves_every_context(bench):
    from torch._dynamo.utils import counters
    from workloads import Workbench

    torch._dynamo.reset()
    counters.clear()
    bench_ = Workbench(torch.device("cpu"), bench.TOY)
    rows = [row for row in bench.plan(bench.TOY, ["decode"]) if row.mode == "compiled" and row.batch == 1]
    for row in rows:
        if row.model == "seqboat":
            row.measure(bench_, row)
    assert counters["stats"]["unique_graphs"] == 1
    bench_.model("llama")
    assert not bench_.compiled and not bench_.states, "caches would count for the memory of the next row"


def test_every_context_decodes_the_same_varied_tokens(bench):
    """One token over and over would be skipped, or not, in all steps of a context."""
    import workloads

    bench_ = workloads.Workbench(torch.device("cpu"), bench.CPU)
    fed = []
    bench_.decoder = lambda name, model, mode: lambda input_ids, **rest: fed.append(input_ids.tolist())
    bench_.model = lambda *args, **kwargs: model
    model = workloads.build("seqboat", torch.device("cpu"), "toy")
    cache = workloads.SeqBoatCache(model.config)
    model.eval()(torch.tensor([[1]]), past_key_values=cache)
    bench_.seqboat_state = lambda model, context: dict(cache.tensors())
    rows = [row for row in bench.plan(bench.CPU, ["decode"]) if row.model == "seqboat" and row.batch == 1]
    sequences = []
    for row in rows:
        row.measure(bench_, row)
        sequences.append(fed[: bench.CPU.eager_steps])
        fed.clear()
    assert len(rows) == 3 and sequences[0] == sequences[1] == sequences[2]
    assert len({str(token) for token in sequences[0]}) > 20


def test_a_llama_decodes_op_by_op_without_plans_and_as_pytorch_chooses(bench):
    """A plan for each number of keys would be most of the time of a token."""
    import workloads

    bench_, allowed = workloads.Workbench(torch.device("cpu"), bench.TOY), []
    bench_.decoder = lambda *args: lambda **inputs: allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
    rows = [row for row in bench.plan(bench.TOY, ["decode"]) if row.model == "llama" and "eager" in row.mode]
    seen = []
    for row in rows:
        row.measure(bench_, row)
        seen.append(set(allowed))
        allowed.clear()
    assert seen == [{False}, {True}] and torch.backends.cuda.cudnn_sdp_enabled()


def test_the_state_before_decoding_is_that_of_the_whole_context(bench):
    import workloads

    from modeling_seqboat import SeqBoatCache

    bench_ = workloads.Workbench(torch.device("cpu"), bench.TOY)
    model = bench_.model("seqboat", 0.5, (1, 16), half=True).eval()
    tokens = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    given = iter(tokens.split(1, dim=1))
    bench_.ids = lambda batch, length: torch.cat([next(given) for _ in range(length)], dim=1)
    with torch.no_grad():
        bench_.seqboat_state(model, 24)
        row = next(row for row in bench.plan(bench.TOY, ["decode"]) if row.batch == 3)
        row.length = 40
        found = workloads.seqboat_cache(bench_, model, row)
        expected = SeqBoatCache(model.config)
        model(tokens.expand(3, -1), past_key_values=expected)
    assert found.get_seq_length() == 40
    for (name, tensor), (_, wanted) in zip(found.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(tensor, wanted, atol=1e-4, rtol=1e-4, msg=name)


def test_the_llama_without_a_mask_computes_the_same(bench):
    """As a CUDA graph it is timed in this form, since transformers would give it a mask while a graph is captured."""
    from competitors import UNMASKED, build

    model = build("llama", torch.device("cpu"), "toy")
    ids = torch.randint(0, 256, (2, 30))
    losses = []
    for implementation in ("sdpa", UNMASKED):
        model.set_attn_implementation(implementation)
        losses.append(model(input_ids=ids, labels=ids).loss)
    torch.testing.assert_close(*losses)


def test_graph_rows_measure_streams_of_fixed_capacity(bench, monkeypatch):
    """Without a GPU the graph is a plain call, and the kernels are interpreted."""
    pytest.importorskip("triton")
    import workloads

    capacities = []

    def uncaptured(run):
        run()
        capacities.append([layer.stream_capacity for layer in boat.model.layers])
        return run

    monkeypatch.setenv("SEQBOAT_KERNEL_BACKEND", "triton")
    monkeypatch.setattr(workloads, "captured", uncaptured)
    bench_ = workloads.Workbench(torch.device("cpu"), bench.TOY)
    boat = bench_.model("seqboat")
    row = workloads.Row("forward", "seqboat", "CUDA graph", 1, 40, workloads.measure_forward, repeats=1, warmups=0)
    found = row.measure(bench_, row)
    assert found["tokens_per_s"] == pytest.approx(40e3 / found["ms"])
    assert all(capacity >= 512 and capacity % 256 == 0 for capacity in capacities[0])
    assert all(layer.stream_capacity is None for layer in boat.model.layers)


def test_graph_rows_of_training_take_each_models_own_graph(bench, monkeypatch):
    """Without a GPU the graphs are plain calls; what is looked at is which one a model gets, and with which
    attention."""
    import workloads

    seen = []

    class Ungraphed:
        def __init__(self, model):
            self.model = model

        def __call__(self, **batch):
            seen.append("GraphedStep")
            self.model(**batch).loss.backward()

    def uncaptured(run):
        seen.append(bench_.models["llama"].config._attn_implementation)
        return run

    monkeypatch.setattr(workloads, "GraphedStep", Ungraphed)
    monkeypatch.setattr(workloads, "captured", uncaptured)
    bench_ = workloads.Workbench(torch.device("cpu"), bench.TOY)
    for model, active in (("seqboat", 0.5), ("llama", None)):
        row = workloads.Row("train", model, "CUDA graph", 2, 16, workloads.measure_training, active, repeats=1)
        found = row.measure(bench_, row)
        assert found["tokens_per_s"] == pytest.approx(32e3 / found["ms"]) and "forward_ms" not in found
    # Twice while the peak is taken, a warm-up, a timed one.
    assert seen == ["GraphedStep"] * 4 + ["unmasked_sdpa"]
    assert bench_.models["llama"].config._attn_implementation == "sdpa"


def test_the_csv_opens_with_the_standard_reader(whole_run):
    with (whole_run / "results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["model"] for row in rows if row["part"] == "run"} >= {
        "card",
        "date",
        "torch",
        "transformers",
        "command",
    }


def test_the_plans_name_each_row_once_and_headlines_first(bench):
    for scale in (bench.GPU, bench.CPU, bench.TOY):
        rows = bench.plan(scale, list(bench.PARTS))
        names = [row.name for row in rows]
        assert len(set(names)) == len(names)
        ranks = [row.rank for row in rows]
        assert ranks == sorted(ranks) and set(ranks) == {0, 1, 2}
    names = [row.name for row in bench.plan(bench.GPU, list(bench.PARTS))]
    assert "decode: seqboat compiled, 1 × 1,048,576, 50% active" in names
    assert sum("compiled" in name for name in names) == 5


def test_one_model_is_measured_beside_seqboat(bench, report, tmp_path, monkeypatch):
    rows = bench.plan(bench.GPU, ["roofline", "step", "forward"], ["seqboat", "gla"])
    assert {row.model for row in rows} == {"copy", "matmul", "seqboat", "gla"}
    assert [row.name for row in rows if row.part == "step"] == [
        "step: seqboat eager, 4 × 8,192, 50% active", "step: seqboat CUDA graph, 4 × 8,192, 50% active",
        "step: gla eager, 4 × 8,192",
    ]  # fmt: skip
    # What compiles for minutes keeps no other row waiting that comes first.
    assert [row.model for row in rows if row.rank < 2].count("gla") == 0
    bench.main(["--toy", "--parts", "step,forward", "--models", "llama", "--output", str(tmp_path)])
    found = measured(report.read_rows(tmp_path / "results.csv"))
    assert [(row["part"], row["model"], row["status"]) for row in found] == [
        ("step", "llama", "ok"), ("forward", "llama", "ok")
    ]  # fmt: skip


@pytest.mark.parametrize("part", ["step", "train", "forward"])
def test_kernels_are_tuned_before_memory_and_time_are_taken(bench, monkeypatch, part):
    import workloads

    runs, peaks = [], []
    bench_ = workloads.Workbench(torch.device("cpu"), bench.TOY)
    llama = workloads.build("llama", torch.device("cpu"), "toy")
    llama.register_forward_hook(lambda *given: runs.append(1))
    bench_.model = lambda *args, **kwargs: llama

    def peak(run, device):
        peaks.append(len(runs))
        run()

    monkeypatch.setattr(workloads, "peak_gib", peak)
    for name in ("llama", "gla"):
        runs.clear()
        row = next(row for row in bench.plan(bench.TOY, [part], ["gla"]) if row.model == "gla")
        row.model = name
        row.measure(bench_, row)
    assert peaks == [0, 1]


def rows_of_two_processes(script: str, output: Path, lengths: str, capfd) -> list[dict]:
    """What a benchmark of several processes writes at toy sizes; its table must be what it prints."""
    flags = ("--toy", "--output", str(output), "--lengths", lengths, "--repeats", "1")
    torchrun(2, ROOT / "benchmarks" / script, *flags)
    assert (output / "results.md").read_text("utf-8") in capfd.readouterr().out
    return json.loads((output / "results.json").read_text("utf-8"))["rows"]


@pytest.mark.slow
def test_a_row_in_parts_is_timed_beside_one_process(tmp_path, capfd):
    rows = rows_of_two_processes("bench_context_parallel.py", tmp_path, "64,100", capfd)
    assert [(row["length"], row["processes"]) for row in rows] == [(64, 1), (64, 2), (100, 1), (100, 2)]
    assert all(row["seconds"] > 0 for row in rows)


@pytest.mark.slow
def test_steps_over_processes_are_timed(tmp_path, capfd):
    rows = rows_of_two_processes("bench_scaling.py", tmp_path, "16", capfd)
    assert [(row["model"], row["processes"]) for row in rows] == [
        ("seqboat-enwik8", 1), ("seqboat-enwik8", 2), ("seqboat-toy", 2), ("llama-toy", 2)
    ]  # fmt: skip
    assert all(row["tokens_per_s"] > 0 and row["flops"] > 0 for row in rows)


def test_a_step_over_pages_tells_where_its_time_goes(bench, tmp_path, capsys):
    import bench_paged_step

    bench_paged_step.main(["--toy", "--rows", "2", "--repeats", "2", "--kernels", "3", "--output", f"{tmp_path}/x"])
    lines = (tmp_path / "x").read_text("utf-8").splitlines()
    assert [line.split("|")[-2].strip() for line in lines if line.startswith("| 2 |")] == ["0.0e+00"]
    printed = capsys.readouterr().out.splitlines()
    (head,) = [place for place, line in enumerate(printed) if line.endswith(" all")]
    whole, *parts = (float(line.split()[0]) for line in printed[head : head + 4])
    assert sorted(parts, reverse=True) == parts and sum(parts) < whole
