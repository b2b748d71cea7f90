"""Distillation by `teacher_labels.py` and `train_lm.py --teacher_labels`: the labels are the teacher's predictions,
each of its token, and the loss is the mixture that it says."""

import json

import numpy as np
import pytest
import torch
from example_scripts import imported
from test_train_lm import SIBLINGS, TEXT, forget_accelerator, logged, run
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

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
    found = loss(logits=logits, labels=targets, shift_labels=targets, num_items_in_batch=8)
    torch.testing.assert_close(found, torch.stack(naive).mean())


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
    record = json.loads((tmp_path / "taught/training_record.json").read_text("utf-8"))
    assert (record["teacher"], record["teacher_share"]) == ("none", 0.5)
    assert " --teacher_labels labels " in record["command"] and str(tmp_path) not in record["command"]


def by_blocks(folder):
    """Labels of a teacher that says nothing about every other block of 300 tokens: a loss tells its rows."""
    known = (np.arange(len(BYTES)) // 300 % 2).astype(np.float16)
    write(folder, BYTES[:, None], known[:, None])
    return folder


def test_two_micro_batches_learn_what_one_batch_does(tmp_path, examples):
    options = {"teacher_labels": by_blocks(tmp_path / "labels"), "teacher_share": 1.0}
    losses = []
    for rows in (4, 2):
        run(examples, tmp_path / str(rows), batch_size=rows, gradient_accumulation_steps=4 // rows, **options)
        losses.append([entry["train/loss"] for entry in logged(tmp_path / str(rows)).values()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert max(losses[0]) > 1.3 * min(losses[0])


def test_what_cannot_teach_is_refused_before_work(tmp_path, examples, teacher_labels, teacher, capsys):
    other = BYTES.copy()
    other[100] ^= 1
    short, wide, empty = certain(tmp_path / "b", BYTES[:50]), certain(tmp_path / "c"), certain(tmp_path / "d")
    (wide / "teacher.json").write_text((wide / "teacher.json").read_text("utf-8").replace("256", "300"), "utf-8")
    (empty / "tokens.npy").write_bytes(b"")
    cases = (
        (FileNotFoundError, "is no folder that teacher_labels.py wrote", {"teacher_labels": tmp_path / "nothing"}),
        (ValueError, "of 5700 tokens, this run trains on as many", {"teacher_labels": certain(tmp_path / "a", other)}),
        (ValueError, "of 50 tokens, this run trains on 5700", {"teacher_labels": short}),
        (ValueError, "not for model_type 'llama'", {"teacher_labels": tmp_path / "a", "model_type": "llama"}),
        (ValueError, "teacher_share 0.5 needs teacher_labels", {"teacher_share": 0.5}),
        (ValueError, "are of a vocabulary of 300, the model has 264", {"teacher_labels": wide}),
        (ValueError, "tokens.npy of teacher_labels .* is missing or damaged", {"teacher_labels": empty}),
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
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=320, max_position_embeddings=64, **sizes))
    llama.save_pretrained(tmp_path / "llama")
    build_byte_tokenizer().save_pretrained(tmp_path / "llama")
    command[0] = str(tmp_path / "llama")
    with pytest.raises(ValueError, match="context must be at most 64, the longest text of .*, got 65"):
        teacher_labels.main([*command, "--context", "65"])
    # More outputs than the tokenizer has tokens, as many published models have, are no hindrance.
    folder = teacher_labels.main([*command, "--context", "64", "--max_bytes", "200"])
    assert np.load(folder / "tokens.npy").shape == (190, 16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_a_graphed_run_learns_from_the_predictions_of_each_batch(tmp_path, examples):
    labels = by_blocks(tmp_path / "labels")
    options = {"teacher_labels": labels, "teacher_share": 1.0, "cpu": None, "mixed_precision": "bf16"}
    losses = []
    for graphs in (False, True):
        run(examples, tmp_path / str(graphs), cuda_graphs=graphs, **options)
        losses.append([entry["train/loss"] for entry in logged(tmp_path / str(graphs)).values()])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
