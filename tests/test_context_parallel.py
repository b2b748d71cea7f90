"""Context parallelism: a sequence cut over 2 and 4 gloo processes gives what one process gives, and a wrong part on
one process is an error on all (promise P22)."""

import json
from pathlib import Path
from types import SimpleNamespace

import forks
import pytest
import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from helpers import tiny_config, tiny_encoder, tiny_lm, token_ids
from test_recurrences import GatedAverage
from torch import nn

from modeling_seqboat import SeqBoatForSequenceClassification, SeqBoatForTokenClassification
from modeling_seqboat.configuration_seqboat import SSM_TYPES
from modeling_seqboat.parallel_seqboat import context_parallel, sequence_part
from modeling_seqboat.ssm_seqboat import RECURRENCES, register_recurrence
from modeling_seqboat.training_seqboat import SeqBoatTrainerMixin, refuse_other_parallelism

ROOT = Path(__file__).resolve().parent.parent


def run_worker(report_file: Path, *rounds: int) -> dict:
    worker = str(ROOT / "tests/context_worker.py")
    done = forks.run(
        forks.run_script, worker, str(report_file), *map(str, rounds), timeout=280 * len(rounds), OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(report_file.read_text("utf-8"))


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    return run_worker(tmp_path_factory.mktemp("context") / "report.json", 0)


def assert_equal_to_one_process(errors: dict[str, float]) -> None:
    # NaN and infinities compare as larger.
    assert {name: value for name, value in errors.items() if not value < 1e-6} == {}


def test_parts_equal_the_whole(report):
    """Losses, logits, confidences, penalties and every gradient: all recurrences, activations and positions, rates of
    0, 50 and 100 %, padding, packing, uneven parts, gradient checkpointing; caches and what follows them; with data
    parallelism and a RouterBudget."""
    assert_equal_to_one_process(report["errors"])
    for processes in (2, 4):
        mine = [name for name in report["errors"] if name.startswith(f"{processes} processes")]
        assert len(mine) > 30 and any("generate" in name for name in mine)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_more_parts_equal_the_whole(tmp_path):
    """Others than in each run of the tests, and parts that the interpreted kernels read."""
    assert_equal_to_one_process(run_worker(tmp_path / "report.json", 1, 2)["errors"])


@pytest.mark.parametrize(
    ("wrong", "first", "last"),
    [
        ("id", "refused its part of the sequence: ValueError: input_ids must lie in", "input_ids must lie in"),
        ("label", "refused its part of the sequence: ValueError: labels must be", "labels must be"),
        ("mask", "refused its part of the sequence: ValueError: attention_mask must", "attention_mask must"),
        ("no columns", "refused its part of the sequence: ValueError: input_ids must", "input_ids must be of shape"),
        ("unknown", "refused its part of the sequence: ValueError: 'attention'", "'attention' is not an argument"),
        ("rows", "must agree on the number of rows: process 0 has 2", None),
        ("no labels", "must agree on the targets: process 0 has labels", None),
        ("shift_labels", "must agree on the targets: process 0 has labels", None),
        ("position_ids", "must agree on position_ids being given: process 0 has False", None),
        ("count", "must agree on num_items_in_batch being given: process 0 has False", None),
        ("eval", "must agree on model.training: process 0 has True", None),
        ("disagreeing", "position_ids and seq_idx disagree on whether a segment starts at part 1", None),
        ("cu_seq_lens_q", "cu_seq_lens_q cannot be cut over processes", None),
        ("filled cache", "needs an empty past_key_values", None),
    ],
)
def test_a_wrong_part_is_an_error_on_every_process(report, wrong, first, last):
    for said in report["refusals"].values():
        assert first in said[wrong][0]
        assert (last or first) in said[wrong][1]


def test_a_refused_part_leaves_the_group_usable(report):
    assert [said["afterwards"] for said in report["refusals"].values()] == [["True"], ["True"]]


@pytest.fixture
def group(tmp_path):
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_one_part_is_the_whole(group):
    model, ids = tiny_lm().train(), token_ids(2, 20)
    expected = model(ids, labels=ids).loss
    with context_parallel(model, group):
        found = model(**sequence_part({"input_ids": ids, "labels": ids}, group)).loss
    torch.testing.assert_close(found, expected)
    # And the model is as it was.
    torch.testing.assert_close(model(ids, labels=ids).loss, expected, rtol=0, atol=0)


def test_models_that_cannot_be_cut_are_refused_by_name(group):
    register_recurrence("gated_average", GatedAverage)
    try:
        gated = tiny_lm(ssm_type="gated_average")
    finally:
        del RECURRENCES["gated_average"]
        SSM_TYPES.remove("gated_average")
    compiled = tiny_lm()
    compiled.compile()
    models = {
        "bidirectional=True": tiny_encoder(),
        "SeqBoatForSequenceClassification": SeqBoatForSequenceClassification(tiny_config()),
        "SeqBoatForTokenClassification": SeqBoatForTokenClassification(tiny_config()),
        "ssm_type='gated_average': GatedAverage has no `decayed`": gated,
        "torch.compile": compiled,
        "nn.DataParallel": nn.DataParallel(tiny_lm()),
    }
    for reason, model in models.items():
        with (
            pytest.raises(ValueError, match="context parallelism cannot run") as error,
            context_parallel(model, group),
        ):
            pass
        assert reason in str(error.value)


@pytest.mark.parametrize("kind", ["cp", "tp"])
def test_parallelism_of_accelerate_is_refused_by_name(kind):
    class Launched:
        """What a Trainer has made of a launch of several processes."""

        def __init__(self):
            self.accelerator = SimpleNamespace(parallelism_config=ParallelismConfig(**{f"{kind}_size": 2}))

    with pytest.raises(ValueError, match=f"ParallelismConfig {kind}_size=2 cannot be used.*context_parallel"):
        type("Mixed", (SeqBoatTrainerMixin, Launched), {})()
    refuse_other_parallelism(ParallelismConfig(dp_shard_size=2))


def test_contexts_do_not_nest_and_an_error_inside_ends_them(group):
    model = tiny_lm()
    with pytest.raises(ValueError, match="in a context_parallel"), context_parallel(model, group):
        with context_parallel(model, group):
            pass
    with pytest.raises(ValueError, match="input_ids must lie in 0..31, got 99"), context_parallel(model, group):
        model(torch.full((1, 3), 99))
    assert model.model.parts is None
    model(token_ids(1, 3))


def test_a_batch_that_cannot_be_cut_is_refused(group):
    ids = token_ids(2, 6)
    with pytest.raises(ValueError, match=r"6 columns cannot be cut into the 1 parts of lengths \[5\]"):
        sequence_part({"input_ids": ids}, group, [5])
    with pytest.raises(ValueError, match=r"cannot cut labels of shape \(2, 5\)"):
        sequence_part({"input_ids": ids, "labels": ids[:, :5]}, group)
    with pytest.raises(ValueError, match=r"cannot cut pair_input_ids"):
        sequence_part({"input_ids": ids, "pair_input_ids": ids}, group)
    with pytest.raises(ValueError, match="needs input_ids or inputs_embeds, got labels"):
        sequence_part({"labels": ids}, group)
    with pytest.raises(ValueError, match="takes a DeviceMesh of one dimension or a process group, got 'context'"):
        sequence_part({"input_ids": ids}, "context")
