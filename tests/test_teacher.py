"""Distillation by `teacher_labels.py` and `train_lm.py --teacher_labels`: the labels are the teacher's predictions,
each of its token, and the loss is the mixture that it says."""

import json

import numpy as np
import pytest
import torch
from example_scripts import imported
from test_train_lm import SIBLINGS, TEXT, forget_accelerator, logged, run
from torch.nn import functional as F

from modeling_seqboat import SeqBoatConfig, SeqBoatForCausalLM, build_byte_tokenizer

BYTES = np.frombuffer(TEXT.read_bytes()[:6000], dtype=np.uint8)[:5700]  # what a run of max_bytes=6000 trains on


@pytest.fixture
def examples(monkeypatch):
    forget_accelerator()
    yield from imported(monkeypatch, "train_lm", "lm_teacher", "teacher_labels", *SIBLINGS)
    forget_accelerator()


@pytest.fixture
def teacher_labels(examples):
    import teacher_labels

    return teacher_labels


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(0)
    model = SeqBoatForCausalLM(SeqBoatConfig.from_preset("tiny")).eval()
    model.save_pretrained(tmp_path / "teacher")
    build_byte_tokenizer().save_pretrained(tmp_path / "teacher")
    return model


def write(folder, tokens: np.ndarray, probabilities: np.ndarray, text=BYTES):
    from lm_teacher import checksum

    folder.mkdir()
    np.save(folder / "tokens.npy", tokens.astype(np.uint8))
    np.save(folder / "probabilities.npy", probabilities.astype(np.float16))
    record = {"teacher": "none", "vocab_size": 256, "checksum": checksum(text)}
    (folder / "teacher.json").write_text(json.dumps(record), "utf-8")


def certain(folder, text=BYTES):
    """Labels of a teacher that is sure of each token of the text."""
    write(folder, text[:, None], np.ones((len(text), 1)), text)
    return folder


@pytest.mark.parametrize(("context", "stride"), [(64, 24), (64, None), (9000, None)])
def test_labels_are_what_the_teacher_expects_at_each_token(tmp_path, teacher_labels, teacher, context, stride):
    flags = ["--context", str(context), "--top", "5", *(["--stride", str(stride)] if stride else [])]
    command = [
        str(tmp_path / "teacher"),
        "--data",
        str(TEXT),
        "--max_bytes",
        "6000",
        "--output",
        str(tmp_path / "labels"),
    ]
    folder = teacher_labels.main(command + flags)
    tokens, probabilities = (np.load(folder / name) for name in ("tokens.npy", "probabilities.npy"))
    assert tokens.shape == probabilities.shape == (len(BYTES), 5)
    assert (probabilities[0] == 0).all()
    np.testing.assert_allclose(probabilities[1:].sum(1), 1, atol=3e-3)
    context = min(context, len(BYTES))
    stride = stride or context // 2
    for place in (1, 40, 63, 64, 65, 100, 5698, 5699):
        # The window that labels this token: the first that reaches it.
        end = min(len(BYTES), context + max(0, -(-(place + 1 - context) // stride)) * stride)
        ids = torch.tensor(BYTES[end - context : place].astype(np.int64))[None]
        with torch.no_grad():
            expected = teacher(ids).logits[0, -1, :256].softmax(-1)
        best = expected.topk(5)
        assert set(tokens[place].tolist()) == set(best.indices.tolist()), place
        np.testing.assert_allclose(probabilities[place], (best.values / best.values.sum()).numpy(), atol=2e-3)


def test_the_loss_is_the_mixture(examples):
    from lm_teacher import TeacherLabels, TeacherLoss

    torch.manual_seed(0)
    logits, targets = torch.randn(2, 5, 11), torch.randint(11, (2, 5))
    targets[:, -1] = -100
    tokens, probabilities = torch.randint(11, (2, 5, 3)), torch.rand(2, 5, 3)

    def own(logits, labels, shift_labels, **options):
        return F.cross_entropy(logits.flatten(0, 1), shift_labels.flatten(), ignore_index=-100)

    labels = TeacherLabels(np.zeros((9, 3), np.uint8), np.zeros((9, 3), np.float16), "none")
    loss = TeacherLoss(own, 0.3, labels, 2, 5, torch.device("cpu"))
    loss.take({"teacher_tokens": tokens, "teacher_probabilities": probabilities})
    naive = []
    for row in range(2):
        for column in range(4):
            log_p = logits[row, column].log_softmax(-1)
            said = sum(p * log_p[t] for t, p in zip(tokens[row, column], probabilities[row, column], strict=True))
            naive.append(-0.7 * log_p[targets[row, column]] - 0.3 * said)
    torch.testing.assert_close(loss(logits=logits, labels=targets, shift_labels=targets), torch.stack(naive).mean())


def test_a_certain_teacher_teaches_what_the_text_does(tmp_path, examples):
    labels = certain(tmp_path / "labels")
    losses = []
    for name, options in {"alone": {}, "taught": {"teacher_labels": labels, "teacher_share": 1.0}}.items():
        run(examples, tmp_path / name, **options)
        losses.append([entry["train/loss"] for entry in logged(tmp_path / name).values()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_another_teacher_teaches_something_else_and_a_resumed_run_goes_on(tmp_path, examples):
    rng = np.random.default_rng(0)
    write(tmp_path / "labels", rng.integers(0, 256, (len(BYTES), 2)), np.full((len(BYTES), 2), 0.5))
    options = {"teacher_labels": tmp_path / "labels", "teacher_share": 0.5}
    run(examples, tmp_path / "alone")
    run(examples, tmp_path / "taught", **options)
    run(examples, tmp_path / "resumed", resume_from_checkpoint=tmp_path / "taught/checkpoint-3", **options)
    alone, taught, resumed = (logged(tmp_path / name) for name in ("alone", "taught", "resumed"))
    assert taught[6]["train/loss"] > alone[6]["train/loss"] + 0.5
    for step in (4, 5, 6):
        assert resumed[step]["train/loss"] == taught[step]["train/loss"]
    assert json.loads((tmp_path / "taught/training_record.json").read_text("utf-8"))["teacher_share"] == 0.5


def test_what_cannot_teach_is_refused_before_work(tmp_path, examples, teacher_labels, teacher, capsys):
    other = BYTES.copy()
    other[100] ^= 1
    short = certain(tmp_path / "b", BYTES[:50])
    cases = (
        (FileNotFoundError, "there is no file", {"teacher_labels": tmp_path / "nothing"}),
        (ValueError, "of 5700 tokens, the training text has 5700", {"teacher_labels": certain(tmp_path / "a", other)}),
        (ValueError, "of 50 tokens, the training text has 5700", {"teacher_labels": short}),
        (ValueError, "they are for SeqBoat", {"teacher_labels": tmp_path / "a", "model_type": "llama"}),
        (ValueError, "teacher_share must be", {"teacher_labels": tmp_path / "a", "teacher_share": 1.5}),
        (ValueError, "'liger' has no logits", {
            "teacher_labels": tmp_path / "a", "config_overrides": '{"loss_implementation": "liger"}'}),
    )  # fmt: skip
    for kind, message, options in cases:
        with pytest.raises(kind, match=message):
            run(examples, tmp_path / "run", **options)
        assert not (tmp_path / "run").exists()
    command = [str(tmp_path / "teacher"), "--data", str(TEXT), "--output", str(tmp_path / "labels")]
    for flags, message in (
        (["--stride", "8192"], "--stride must be from 1 to 8191"),
        (["--top", "0"], "--top must be at least 1, got 0"),
        (["--output", str(tmp_path / "a")], "exists already"),
    ):
        with pytest.raises(SystemExit):
            teacher_labels.main(command + flags)
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="top must be at most the vocabulary's size, 256, got 257"):
        teacher_labels.main([*command, "--top", "257"])
    assert not (tmp_path / "labels").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_a_graphed_run_learns_from_the_predictions_of_each_batch(tmp_path, examples):
    rng = np.random.default_rng(0)
    write(tmp_path / "labels", rng.integers(0, 256, (len(BYTES), 2)), np.full((len(BYTES), 2), 0.5))
    options = {"teacher_labels": tmp_path / "labels", "cpu": None, "mixed_precision": "bf16"}
    losses = []
    for graphs in (False, True):
        run(examples, tmp_path / str(graphs), cuda_graphs=graphs, **options)
        losses.append([entry["train/loss"] for entry in logged(tmp_path / str(graphs)).values()])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
