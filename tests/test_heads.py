"""Heads: what each reads and answers, losses, padding, batch mates, packing, files, Trainer and pipelines."""

import functools
import inspect

import numpy as np
import pytest
import torch
import transformers
from helpers import randomise, tiny_config, token_ids
from torch.nn import functional as F
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments, pipeline

import modeling_seqboat
from modeling_seqboat import build_byte_tokenizer

TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM")
VALUE_TASKS = ("ImageClassification", "AudioClassification")
LABELS = 3


def auto_class(task):
    return getattr(transformers, f"AutoModelFor{task}")


def head(task, seed=0, rate=0.5, **overrides):
    """A tiny model in eval mode, built by the Auto class."""
    fields = {"bidirectional": True, "num_labels": LABELS, "classifier_hidden_size": 7}
    if task in VALUE_TASKS:
        fields["input_type"] = "values"
        fields |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(seed)
    model = auto_class(task).from_config(tiny_config(**(fields | overrides)))
    return randomise(model, seed, rate).eval()


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch_for(task, rows=3, length=20):
    """An input and its labels."""
    if task == "ImageClassification":
        return {"pixel_values": values(rows, 1, 4, length // 4), "labels": torch.arange(rows) % LABELS}
    if task == "AudioClassification":
        return {"input_values": values(rows, length), "labels": torch.arange(rows) % LABELS}
    ids = token_ids(rows, length)
    if task == "SequenceClassification":
        return {"input_ids": ids, "labels": torch.arange(rows) % LABELS}
    if task == "TokenClassification":
        return {"input_ids": ids, "labels": ids % LABELS}
    if task == "QuestionAnswering":
        return {"input_ids": ids, "start_positions": torch.arange(rows), "end_positions": torch.arange(rows) + 2}
    return {"input_ids": ids, "labels": ids}


def answers(task, output):
    """Logits, one column a token or a row: (B, L, C) or (B, C)."""
    if task == "QuestionAnswering":
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    return output.logits


@pytest.mark.parametrize("task", TASKS + VALUE_TASKS)
def test_auto_class_builds_the_head_and_the_file_restores_it(task, tmp_path):
    """save_pretrained and from_pretrained restore every tensor bit for bit."""
    model = head(task)
    assert type(model) is getattr(modeling_seqboat, f"SeqBoatFor{task}")
    assert getattr(modeling_seqboat.modeling_seqboat, f"SeqBoatFor{task}") is type(model)
    model.save_pretrained(tmp_path)
    loaded = auto_class(task).from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("hidden", [0, 48])
@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification", *VALUE_TASKS])
def test_classifiers_start_xavier_uniform_unless_loaded(task, hidden, tmp_path):
    """Built, made on the meta device, behind a checkpoint without a head or with half of one; biases are 0."""

    def starts_as_xavier(linear):
        bound = (6 / (linear.in_features + linear.out_features)) ** 0.5
        assert linear.weight.abs().max() <= bound
        assert linear.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)
        assert linear.bias is None or not linear.bias.any()

    model = head(task, classifier_hidden_size=hidden, num_labels=64, hidden_size=32)
    kind, config = type(model), model.config
    model.model.save_pretrained(tmp_path / "headless")
    torch.manual_seed(0)
    with torch.device("meta"):
        late = kind(config)
    late.to_empty(device="cpu").initialize_weights()
    headless = kind.from_pretrained(tmp_path / "headless", classifier_hidden_size=hidden, num_labels=64)
    for fresh in (kind(config), late, headless):
        for linear in filter(None, (fresh.classifier.dense, fresh.classifier.output)):
            starts_as_xavier(linear)
    assert torch.equal(headless.model.layers[0].hidden_proj.weight, model.model.layers[0].hidden_proj.weight)
    if hidden:
        kept = {name: tensor for name, tensor in model.state_dict().items() if name != "classifier.output.weight"}
        model.save_pretrained(tmp_path / "half", state_dict=kept)
        half = kind.from_pretrained(tmp_path / "half").classifier
        starts_as_xavier(half.output)
        assert torch.equal(half.dense.weight, model.classifier.dense.weight)
        assert torch.equal(half.dense.bias, model.classifier.dense.bias)


@pytest.mark.parametrize("task", TASKS + VALUE_TASKS)
def test_what_forward_documents_is_what_trainer_counts(task):
    model = head(task)
    assert model.main_input_name in batch_for(task)
    assert model.main_input_name in inspect.signature(model.forward).parameters


@pytest.mark.parametrize("rate", [0, 0.5, 1])
@pytest.mark.parametrize("task", TASKS + VALUE_TASKS)
def test_every_parameter_gets_a_gradient(task, rate):
    """All parameters get a gradient in every step, also when nothing activates."""
    model = head(task, rate=rate).train()
    output = model(**batch_for(task), output_router_probs=True)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    shares = [float((probs > 0).float().mean()) for probs in output.router_probs]
    assert len(shares) == 2 and (0 < sum(shares) < 2 if rate == 0.5 else shares == [rate, rate])


@pytest.mark.parametrize("task", ["TokenClassification", "QuestionAnswering", "MaskedLM", "AudioClassification"])
def test_padding_and_batch_mates_change_nothing(task):
    """Answers and losses at left, right and interior padding, whatever lies under it, equal the row's alone."""
    model = head(task, attention_activation="laplace", position_embedding_type="simple")
    lengths, width = (1, 2, 7, 19), 24
    name = model.main_input_name
    rows = [
        values(1, n, seed=n) if task == "AudioClassification" else token_ids(1, n, seed=n) for n in lengths
    ]  # fmt: skip
    padded = values(4, width, seed=9) if task == "AudioClassification" else token_ids(4, width, seed=9)
    mask = torch.zeros(4, width, dtype=torch.long)
    places = [torch.tensor([5]), torch.tensor([0, 1]), torch.arange(17, 24), torch.randperm(24)[:19].sort().values]
    for index, at in enumerate(places):
        padded[index, at], mask[index, at] = rows[index][0], 1
    with torch.no_grad():
        together = answers(task, model(**{name: padded}, attention_mask=mask))
        for index, at in enumerate(places):
            alone = answers(task, model(**{name: rows[index]}))[0]
            found = together[index] if task == "AudioClassification" else together[index, at]
            torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)
            if task == "AudioClassification":
                continue
            if task == "QuestionAnswering":
                targets = {"start_positions": at[:1], "end_positions": at[-1:]}
                own = {"start_positions": torch.tensor([0]), "end_positions": torch.tensor([len(at) - 1])}
            else:
                # Labels that a collator left at padding count for nothing.
                targets, own = {"labels": padded[index : index + 1] % LABELS}, {"labels": rows[index] % LABELS}
            one = slice(index, index + 1)
            loss = model(**{name: padded[one]}, attention_mask=mask[one], **targets).loss
            torch.testing.assert_close(loss, model(**{name: rows[index]}, **own).loss, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("task", ["SequenceClassification", "ImageClassification"])
def test_rows_do_not_depend_on_their_batch_mates(task):
    model, batch = head(task), batch_for(task, rows=4)
    batch.pop("labels")
    with torch.no_grad():
        together = model(**batch).logits
        alone = torch.cat([model(**{k: v[i : i + 1] for k, v in batch.items()}).logits for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("task", ["TokenClassification", "MaskedLM"])
def test_packed_rows_equal_separate_rows(task):
    model = head(task, position_embedding_type="simple")
    first, second = token_ids(1, 9, seed=1), token_ids(1, 14, seed=2)
    packed = torch.cat([first, second], dim=1)
    with torch.no_grad():
        want = torch.cat([model(first).logits, model(second).logits], dim=1)
        for how in (
            {"position_ids": torch.cat([torch.arange(9), torch.arange(14)])[None]},
            {"seq_idx": torch.tensor([[0] * 9 + [1] * 14])},
            {"cu_seq_lens_q": torch.tensor([0, 9, 23])},
            # All that DataCollatorWithFlattening can give.
            {"cu_seq_lens_q": torch.tensor([0, 9, 23]), "cu_seq_lens_k": torch.tensor([0, 9, 23]),
             "max_length_q": 14, "max_length_k": 14, "use_cache": False},
        ):  # fmt: skip
            torch.testing.assert_close(model(packed, **how).logits, want, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="cu_seq_lens_k must be given with, and equal, cu_seq_lens_q"):
        model(packed, cu_seq_lens_q=torch.tensor([0, 9, 23]), cu_seq_lens_k=torch.tensor([0, 8, 23]))


@pytest.mark.parametrize("task", ["QuestionAnswering", "ImageClassification", "AudioClassification"])
def test_heads_with_one_answer_a_row_refuse_packing(task):
    with pytest.raises(ValueError, match="one sequence a row, got seq_idx"):
        head(task)(**batch_for(task, rows=1), seq_idx=torch.zeros(1, 20, dtype=torch.long))


def test_pictures_are_read_row_by_row():
    picture = head("ImageClassification")
    sequence = auto_class("SequenceClassification").from_config(picture.config).eval()
    sequence.load_state_dict(picture.state_dict())
    pixels = values(2, 1, 3, 5)
    with torch.no_grad():
        rows = torch.stack([torch.cat([image[0, y] for y in range(3)]) for image in pixels])
        torch.testing.assert_close(picture(pixel_values=pixels).logits, sequence(input_values=rows).logits)


def question_loss(positions):
    return head("QuestionAnswering")(token_ids(2, 5), start_positions=positions, end_positions=positions).loss


def test_positions_may_be_a_column():
    """As nn.DataParallel's and some collators' are."""
    positions = torch.tensor([1, 2])
    assert torch.equal(question_loss(positions[:, None]), question_loss(positions))


# Labels of three rows that the losses of numbers would broadcast, or fail on somewhere inside; C classes.
@pytest.mark.parametrize(
    ("classes", "problem", "labels", "words"),
    [
        (1, None, torch.rand(3, 3), r"shape \(3,\) or \(3, 1\) for regression, got \(3, 3\)"),
        (1, None, torch.rand(1), r"shape \(3,\) or \(3, 1\) for regression, got \(1,\)"),
        (2, "regression", torch.rand(2), r"shape \(3, 2\) for regression, got \(2,\)"),
        (2, "regression", torch.rand(1, 2), r"shape \(3, 2\) for regression, got \(1, 2\)"),
        (4, None, torch.rand(3), r"shape \(3, 4\) for multi_label_classification, got \(3,\)"),
        (4, None, torch.ones(3, 4, dtype=torch.int64), "floating point, 0.0 or 1.0 each, got torch.int64"),
        (4, "multi_label_classification", torch.ones(3, 4).bool(), "floating point, 0.0 or 1.0 each, got torch.bool"),
        (4, None, torch.ones(3, dtype=torch.uint8), "dtype int64, got torch.uint8"),
        (4, "single_label_classification", torch.ones(3, dtype=torch.int32), "dtype int64, got torch.int32"),
        (4, "single_label_classification", torch.ones(3, 1, dtype=torch.int64), r"shape \(3,\), got \(3, 1\)"),
    ],
)
def test_labels_that_do_not_fit_their_problem_are_refused(classes, problem, labels, words):
    model = head("SequenceClassification", num_labels=classes, problem_type=problem)
    with pytest.raises(ValueError, match=f"labels .*{words}"):
        model(token_ids(3, 5), labels=labels)
    assert model.config.problem_type == problem


def test_one_number_a_row_may_be_a_column():
    model, labels = head("SequenceClassification", num_labels=1), torch.rand(3)
    assert torch.equal(model(token_ids(3, 5), labels=labels[:, None]).loss, model(token_ids(3, 5), labels=labels).loss)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: head("ImageClassification")(pixel_values=values(2, 3, 4, 4)), r"\(2, 3, 4, 4\).*one channel"),
        (lambda: head("ImageClassification")(pixel_values=values(2, 4, 4)), r"batch, 1, height, width"),
        (lambda: head("ImageClassification")(), "give pixel_values"),
        (lambda: head("ImageClassification", input_type="tokens"), "input_type='values', got input_type='tokens'"),
        (lambda: head("AudioClassification", input_type="tokens"), "input_type='values', got input_type='tokens'"),
        (lambda: head("AudioClassification", pair_features="nli"), "pair_features must be 'none', got 'nli'"),
        (lambda: head("AudioClassification")(input_values=values(2, 1, 9)),
         r"input_values must be of shape .*\(2, 1, 9\)"),
        (lambda: head("MaskedLM", bidirectional=False), "bidirectional=True, got bidirectional=False"),
        (lambda: head("QuestionAnswering")(token_ids(1, 5), start_positions=torch.tensor([1])),
         "end_positions is mis"),
        (lambda: head("TokenClassification")(token_ids(1, 5), output_attentions=True), "output_attentions"),
        (lambda: head("TokenClassification")(token_ids(1, 5), use_cache=True), "use_cache must be False"),
        (lambda: head("SequenceClassification")(token_ids(1, 5), pair_attention_mask=torch.ones(1, 5)),
         "pair_attention_mask must not be given: pair_features is 'none'"),
        (lambda: head("SequenceClassification", pair_features="nli")(token_ids(1, 5), pair_input_ids=token_ids(2, 5)),
         r"pair_input_ids must have a row for each of the 1 first texts, got shape \(2, 5\)"),
        (lambda: question_loss(torch.tensor([1.0, 2.0])), "start_positions must be of dtype int64, got torch.float32"),
        (lambda: question_loss(torch.tensor([1, 2], dtype=torch.int32)), "start_positions must be of dtype int64"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused_by_name(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_masked_language_model_is_tied_by_default(tmp_path):
    tied = head("MaskedLM")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    loose = head("MaskedLM", tie_word_embeddings=False)
    assert loose.lm_head.weight is not loose.model.embed_tokens.weight
    loose.save_pretrained(tmp_path)
    loaded = auto_class("MaskedLM").from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, loose.lm_head.weight)
    ids = token_ids(2, 11)
    labels = ids.masked_fill(torch.rand(2, 11, generator=torch.Generator().manual_seed(0)) < 0.5, -100)
    output = tied(ids, labels=labels)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits.flatten(0, 1), labels.flatten()))


def test_a_masked_token_is_predicted_from_both_sides():
    model, ids = head("MaskedLM"), token_ids(1, 12)
    other = ids.clone()
    other[0, -1] = 3 if ids[0, -1] != 3 else 4
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits[0, 0], model(other).logits[0, 0], atol=1e-6)


def test_question_answering_scores_padding_last_and_skips_rows_without_answer():
    model, ids = head("QuestionAnswering"), token_ids(2, 10)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, 6:] = 0
    output = model(
        ids, attention_mask=mask, start_positions=torch.tensor([1, 10]), end_positions=torch.tensor([3, 99])
    )
    assert output.start_logits.shape == output.end_logits.shape == (2, 10)
    assert (output.start_logits[0].softmax(-1)[6:] == 0).all()
    want = F.cross_entropy(output.start_logits[:1], torch.tensor([1]))
    want = (want + F.cross_entropy(output.end_logits[:1], torch.tensor([3]))) / 2
    torch.testing.assert_close(output.loss, want)


POOLED_LABELS = {
    "single": (LABELS, torch.tensor([0, 2, -100, 1])),
    "several": (LABELS, torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])),
    "regression": (1, torch.tensor([0.5, -2.0, 3.0, 0.1])),
}
LOSSES = {
    "single": F.cross_entropy,
    "several": F.binary_cross_entropy_with_logits,
    "regression": lambda logits, labels: F.mse_loss(logits[:, 0], labels),
}


@pytest.mark.parametrize("kind", POOLED_LABELS)
@pytest.mark.parametrize("task", ["SequenceClassification", *VALUE_TASKS])
def test_losses_and_their_sum_over_micro_batches(task, kind):
    """The loss is right under gradient accumulation: parts weighted by num_items_in_batch add up to the whole."""
    count, labels = POOLED_LABELS[kind]
    model = head(task, num_labels=count)
    batch = {**batch_for(task, rows=4), "labels": labels}
    whole = model(**batch)
    torch.testing.assert_close(whole.loss, LOSSES[kind](whole.logits, labels))
    items = labels.ne(-100).sum()
    parts = [
        model(**{name: value[part] for name, value in batch.items()}, num_items_in_batch=items).loss
        for part in (slice(0, 2), slice(2, 3), slice(3, 4))
    ]
    torch.testing.assert_close(sum(parts), whole.loss)
    sum(parts).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_bfloat16_losses_are_finite():
    for kind, (count, labels) in POOLED_LABELS.items():
        model = head("AudioClassification", num_labels=count).to(torch.bfloat16).train()
        output = model(input_values=values(4, 20), labels=labels)
        output.loss.backward()
        assert torch.isfinite(output.loss), kind


def rows_of(batch):
    return [{name: value[i] for name, value in batch.items()} for i in range(len(next(iter(batch.values()))))]


@pytest.mark.parametrize("task", TASKS + VALUE_TASKS)
def test_trainer_learns_a_tiny_slice(task, tmp_path):
    """Trainer trains, evaluates with metrics, and what it saved loads again."""
    batch = batch_for(task, rows=6, length=12)
    model = head(task, vocab_size=264 if task == "MaskedLM" else 32)
    seen = {}

    def metrics(prediction):
        logits = prediction.predictions
        seen["shapes"] = [part.shape for part in (logits if isinstance(logits, tuple) else (logits,))]
        return {"size": float(len(prediction.label_ids))}

    collator = None
    if task == "MaskedLM":
        batch.pop("labels")
        collator = DataCollatorForLanguageModeling(build_byte_tokenizer(), mlm_probability=0.5, seed=0)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=12,
            learning_rate=2e-2, logging_steps=1, report_to="none", use_cpu=True, save_strategy="no", seed=0,
            disable_tqdm=True,
        ),
        train_dataset=rows_of(batch), eval_dataset=rows_of(batch), data_collator=collator, compute_metrics=metrics,
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:2])
    result = trainer.evaluate()
    assert np.isfinite(result["eval_loss"])
    if task == "QuestionAnswering":
        assert seen["shapes"] == [(6, 12), (6, 12)]
    else:
        assert len(seen["shapes"]) == 1
    trainer.save_model()
    assert type(auto_class(task).from_pretrained(tmp_path)) is type(model)


def saved(task, folder, processor, **overrides):
    model = head(task, **overrides)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


text_head = functools.partial(saved, processor=build_byte_tokenizer(), vocab_size=264)


def test_text_pipelines(tmp_path):
    model = text_head("SequenceClassification", tmp_path / "a")
    texts = ["Good.", "A much longer text than the first."]
    found = pipeline("text-classification", model=str(tmp_path / "a"))(texts, batch_size=2, top_k=None)
    for text, scores in zip(texts, found, strict=True):
        with torch.no_grad():
            want = model(torch.tensor([list(text.encode())])).logits[0].softmax(-1)
        for entry in scores:
            assert entry["score"] == pytest.approx(float(want[model.config.label2id[entry["label"]]]), abs=1e-4)

    text_head("TokenClassification", tmp_path / "b")
    tokens = pipeline("token-classification", model=str(tmp_path / "b"))("abc")
    assert [(token["start"], token["end"]) for token in tokens] == [(0, 1), (1, 2), (2, 3)]

    text_head("MaskedLM", tmp_path / "c")
    best = pipeline("fill-mask", model=str(tmp_path / "c"))("To be or n<|mask|>t to be", top_k=2)
    assert len(best) == 2 and best[0]["score"] >= best[1]["score"]


def test_audio_pipeline_hears_padding_as_nothing(tmp_path):
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
    model = saved("AudioClassification", tmp_path, extractor)
    short, long = values(30).numpy(), values(50, seed=1).numpy()
    classify = pipeline("audio-classification", model=str(tmp_path))
    found = classify([short, long], batch_size=2, top_k=LABELS)
    for wave, scores in zip((short, long), found, strict=True):
        with torch.no_grad():
            want = model(input_values=torch.from_numpy(wave)[None]).logits[0].softmax(-1)
        for entry in scores:
            assert entry["score"] == pytest.approx(float(want[model.config.label2id[entry["label"]]]), abs=1e-4)


def test_image_pipeline_takes_grey_arrays_and_refuses_colours(tmp_path):
    Image = pytest.importorskip("PIL.Image")

    processor = transformers.ViTImageProcessorPil(
        do_resize=False, image_mean=[0.5], image_std=[0.5], size={"height": 4, "width": 5}
    )
    model = saved("ImageClassification", tmp_path, processor)
    grey = np.random.default_rng(0).integers(0, 256, (1, 4, 5)).astype(np.uint8)
    classify = pipeline("image-classification", model=str(tmp_path))
    found = classify(grey, top_k=LABELS)
    with torch.no_grad():
        pixels = (torch.from_numpy(grey)[None].float() / 255 - 0.5) / 0.5
        want = model(pixel_values=pixels).logits[0].softmax(-1)
    for entry in found:
        assert entry["score"] == pytest.approx(float(want[model.config.label2id[entry["label"]]]), abs=1e-4)
    # The pipeline turns every picture, a grey one too, into RGB before the processor sees it.
    classify.image_processor.do_normalize = False
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 5\).*convert\('L'\)"):
        classify(Image.fromarray(grey[0]))


def test_a_batch_without_a_label_has_the_loss_0():
    """Of an accumulated step one micro-batch may be without; NaN would undo the others. Gradients are finite."""
    for name, labels in (
        ("SequenceClassification", {"labels": torch.tensor([-100, -100])}),
        ("TokenClassification", {"labels": torch.full((2, 5), -100)}),
        ("MaskedLM", {"labels": torch.full((2, 5), -100)}),
        ("QuestionAnswering", {"start_positions": torch.tensor([9, 5]), "end_positions": torch.tensor([9, 5])}),
    ):
        # None, and as Trainer counts the labels of all batches of a step.
        for count in (None,) if name == "QuestionAnswering" else (None, 0, torch.tensor(0)):
            model = head(name, router_target_rate=None if count is None else 0.5).train()
            loss = model(token_ids(2, 5), **labels, **({} if count is None else {"num_items_in_batch": count})).loss
            loss.backward()
            assert loss == 0, (name, count)
            assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()), (name, count)


def test_classes_outside_the_labels_are_refused_by_name():
    with pytest.raises(ValueError, match="labels must be -100 or lie in 0..2, got 3"):
        head("SequenceClassification", num_labels=3)(token_ids(2, 5), labels=torch.tensor([0, 3]))
    logits = head("SequenceClassification", num_labels=3)(token_ids(2, 5), labels=torch.tensor([0, -100]))
    expected = torch.nn.functional.cross_entropy(logits.logits[:1], torch.tensor([0]))
    torch.testing.assert_close(logits.loss, expected)
