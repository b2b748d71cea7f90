"""Classification example: generated data follow their rules, every recipe runs on a slice in its file format, a
resumed run repeats an uninterrupted one, and missing data are named."""

import dataclasses
import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from classification_tasks import (
    RECIPES,
    ROOT,
    WRITERS,
    draw_little,
    importable,  # noqa: F401
    module,
    run,
    write_gray_pictures,
    write_pairs,
    write_reviews,
)
from safetensors.torch import load_file
from torch.utils.data import DataLoader

pytestmark = pytest.mark.usefixtures("importable")


@pytest.mark.parametrize(
    ("tree", "value"),
    [
        ("[MIN 4 7 ]", 4),
        ("[MAX 4 7 3 ]", 7),
        ("[SM 9 8 7 ]", 4),
        ("[MED 1 9 5 ]", 5),
        ("[MED 1 2 ]", 1),
        ("[MED 2 9 4 7 ]", 5),
        ("[MED 0 1 9 9 ]", 5),
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
        ("[MAX 2 6 [MED [SM 3 2 2 ] 8 [MIN 4 3 ] ] 0 [MIN 5 8 6 ] ]", 7),
        ("[SM [SM [SM 9 9 ] 9 ] [MAX 0 1 ] ]", 8),
    ],
)
def test_listops_evaluator_on_trees_made_by_hand(tree, value):
    listops = module("listops")
    assert listops.evaluate(listops.encode(tree)) == value


@pytest.mark.parametrize("tree", ["", "3", "[MIN 4", "[MIN ]", "4 [MIN 5 ]", "[MIN 4 7 ] 3", "]", "<pad>"])
def test_listops_evaluator_refuses_what_is_no_tree(tree):
    listops = module("listops")
    with pytest.raises(ValueError, match="misplaced|not closed"):
        listops.evaluate(listops.encode(tree))


def tree_facts(listops, ids):
    """Depth of the deepest node and the numbers of arguments, read off the brackets."""
    depth, deepest, counts, arguments = 0, 0, [], []
    for place, token in enumerate(ids):
        if token == listops.CLOSE:
            arguments.append(counts.pop())
            depth -= 1
            continue
        assert counts or place == 0
        if counts:
            counts[-1] += 1
        deepest = max(deepest, depth + 1)
        if token in listops.OPERATORS:
            counts.append(0)
            depth += 1
        else:
            assert listops.ZERO <= token < listops.ZERO + 10
    assert not counts
    return deepest, arguments


def test_listops_generator_follows_the_published_rules(tmp_path):
    listops = module("listops")
    trees, labels = listops.load(tmp_path, seed=1, count=60)
    assert len({tree.tobytes() for tree in trees}) == 60 == len(labels)
    shares, arguments, deepest = [], [], 0
    for tree, label in zip(trees, labels, strict=True):
        assert 500 < len(tree) < 2000 and tree[0] in listops.OPERATORS
        assert listops.evaluate(tree) == label
        depth, counts = tree_facts(listops, tree.tolist())
        deepest = max(deepest, depth)
        arguments += counts
        shares += np.isin(tree[tree != listops.CLOSE], listops.OPERATORS).tolist()
    assert deepest == 10
    assert set(arguments) == set(range(2, 11)) and 5.7 < np.mean(arguments) < 6.5
    operators = np.concatenate(trees)
    assert all((operators == operator).any() for operator in listops.OPERATORS)
    again, _ = listops.load(tmp_path, seed=1, count=60)
    assert all(np.array_equal(a, b) for a, b in zip(trees, again, strict=True))
    assert len(list(tmp_path.iterdir())) == 1
    other, _ = listops.load(tmp_path, seed=2, count=5)
    assert not np.array_equal(other[0], trees[0])


def components(lit, reach=1):
    """Numbers of the connected areas (pixels up to `reach` columns and rows away) of an (H, W) bool picture, 0 where
    dark, and how many there are."""
    found, count = np.zeros(lit.shape, dtype=int), 0
    for place in map(tuple, np.argwhere(lit)):
        if found[place]:
            continue
        count += 1
        found[place], waiting = count, [place]
        while waiting:
            y, x = waiting.pop()
            for near in np.ndindex(2 * reach + 1, 2 * reach + 1):
                at = (y + near[0] - reach, x + near[1] - reach)
                if 0 <= min(at) and at[0] < len(lit) and at[1] < len(lit[0]) and lit[at] and not found[at]:
                    found[at] = count
                    waiting.append(at)
    return found, count


def dots(picture, reach=1, least=5.0):
    """One pixel of each dot: where a neighbourhood, 3 x 3 or larger, is nearly all bright, which no line is."""
    height, width = picture.shape
    padded = np.pad(picture.astype(float) / 255, reach)
    side = range(2 * reach + 1)
    around = sum(padded[y : y + height, x : x + width] for y in side for x in side)
    found, count = components(around > least)
    return [tuple(np.argwhere(found == index)[0]) for index in range(1, count + 1)]


def test_pathfinder_labels_are_what_the_picture_shows():
    pathfinder = module("pathfinder")
    pictures, labels = pathfinder.draw(np.random.default_rng(3), 150)
    assert len(pictures) > 120 and 0.3 < labels.mean() < 0.7
    for picture, label in zip(pictures, labels, strict=True):
        areas, count = components(picture > 0)
        # Two long snakes and five short ones.
        assert count == 7
        first, second = dots(picture)
        assert (areas[first] == areas[second]) == bool(label)
        assert not picture[[0, -1]].any() and not picture[:, [0, -1]].any()
        sizes = sorted(int((areas == index).sum()) for index in range(1, 8))
        assert sizes[5] > 2 * sizes[4]


def test_path_x_labels_are_what_the_picture_shows():
    """Pixels of one snake are at most as far apart as its dashes; those of two snakes are farther."""
    pathfinder = module("pathfinder")
    assert pathfinder.PATHX.size == 128 and pathfinder.PATHX.contour_length == 14
    for gap in (2, 3):
        drawing = dataclasses.replace(pathfinder.PATHX, gaps=(gap,))
        pictures, labels = pathfinder.draw(np.random.default_rng(gap), 6, drawing)
        assert len(pictures) > 3 and pictures.shape[1:] == (128, 128)
        for picture, label in zip(pictures, labels, strict=True):
            areas, count = components(picture > 0, gap + 1)
            assert count == 2 + 8
            first, second = dots(picture, 2, 18.0)
            assert (areas[first] == areas[second]) == bool(label)
            # A dash is some 5 pixels long and 1.5 wide; a dot covers one of them, or more.
            sizes = sorted(int((areas == index).sum()) for index in range(1, count + 1))
            assert 4 * 5 < sizes[0] and sizes[7] < 4 * 18 < 14 * 6 < sizes[8]


@pytest.mark.parametrize(("height", "dashes", "distractors"), [(32, 6, 2), (64, 9, 4)])
def test_strips_show_their_labels(height, dashes, distractors):
    pathfinder = module("pathfinder")
    strip = dataclasses.replace(pathfinder.PATHX.strip(height), contour_length=dashes)
    for gap in (2, 3):
        pictures, labels = pathfinder.draw(np.random.default_rng(gap), 8, dataclasses.replace(strip, gaps=(gap,)))
        assert len(pictures) > 5 and pictures.shape[1:] == (height, 128)
        for picture, label in zip(pictures, labels, strict=True):
            areas, count = components(picture > 0, gap + 1)
            first, second = dots(picture, 2, 18.0)
            assert count == 2 + distractors and (areas[first] == areas[second]) == bool(label)


def test_squares_are_drawn_as_ever_and_strips_from_streams_of_their_own(tmp_path, monkeypatch):
    pathfinder = module("pathfinder")
    small, large = pathfinder.Drawing(), pathfinder.PATHX
    drawn = [
        (0, 20, small, 0), (3, 20, dataclasses.replace(small, contour_length=4), 1), (0, 4, large, 0),
        (0, 4, dataclasses.replace(large, contour_length=7), 0),
    ]  # fmt: skip
    known = ["920a8569a6abbe34", "51a5b7cb5164798c", "1efdb09abdfda747", "b188e5078e235924"]
    for arguments, digest in zip(drawn, known, strict=True):
        pictures, labels = pathfinder._block(*arguments)
        assert hashlib.sha256(pictures.tobytes() + labels.tobytes()).hexdigest()[:16] == digest
    assert large.strip(None) == large.strip(128) == large
    monkeypatch.setattr(pathfinder.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(pathfinder, "BLOCK", 8)
    pixels, _ = pathfinder.load(tmp_path, 0, 3, 4, large, 32)
    again = pathfinder.load(tmp_path, 0, 3, 4, large, 32)[0]
    assert pixels.shape == (3, 32 * 128) and np.array_equal(pixels, again)
    pathfinder.load(tmp_path, 0, 3, 4, large, 64)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"pathfinder{height}x128-seed0-3-contour4.npz" for height in (32, 64)
    }
    monkeypatch.setattr(pathfinder, "TRIALS", 1)
    monkeypatch.setattr(pathfinder, "BLOCK", 2048)
    with pytest.raises(ValueError, match="16 x 128 pixels hardly have room for two contours of 14 dashes"):
        pathfinder.load(tmp_path, 0, 3, None, dataclasses.replace(large, distractors=0), 16)


def test_pictures_of_several_gaps_come_in_equal_shares():
    pathfinder = module("pathfinder")
    drawing = dataclasses.replace(pathfinder.PATHX, size=48, contour_length=4, distractors=0)
    found, _ = pathfinder.draw(np.random.default_rng(0), 40, drawing)
    alone = [
        pathfinder.draw(np.random.default_rng(0), 20, dataclasses.replace(drawing, gaps=(gap,)))[0] for gap in (2, 3)
    ]
    assert 30 < len(found) and np.array_equal(found[: len(alone[0])], alone[0])
    assert not np.array_equal(found[len(alone[0]) :], alone[1])
    with pytest.raises(ValueError, match="thickness must be at most 1/antialias"):
        pathfinder.draw(np.random.default_rng(0), 1, pathfinder.Drawing(thickness=1.5))


def test_pathfinder_is_kept_and_depends_on_the_seed_alone(tmp_path, monkeypatch):
    pathfinder = module("pathfinder")
    monkeypatch.setattr(pathfinder, "BLOCK", 8)
    monkeypatch.setattr(pathfinder.os, "cpu_count", lambda: 1)
    pixels, labels = pathfinder.load(tmp_path, seed=0, count=20)
    assert pixels.shape == (20, 1024) and pixels.dtype == np.uint8 and labels.shape == (20,)
    again = pathfinder.load(tmp_path, seed=0, count=20)
    assert np.array_equal(pixels, again[0]) and np.array_equal(labels, again[1])
    assert not np.array_equal(pathfinder.load(tmp_path, seed=1, count=20)[0], pixels)
    monkeypatch.setattr(pathfinder.os, "cpu_count", lambda: 2)
    parallel = pathfinder.generate(0, 20)
    assert np.array_equal(pixels, parallel["pixels"]) and np.array_equal(labels, parallel["labels"])
    (tmp_path / "pathfinder32-seed2-20.npz").write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match="damaged.*delete it"):
        pathfinder.load(tmp_path, seed=2, count=20)


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


@pytest.mark.parametrize("recipe", [path.stem for path in RECIPES])
def test_every_recipe_runs_on_a_slice(recipe, tmp_path, monkeypatch, capsys):
    draw_little(monkeypatch)
    output = tmp_path / "run"
    run(recipe, output, **WRITERS[recipe](tmp_path))
    results = json.loads((output / "results.json").read_text("utf-8"))
    assert 0 <= results["test_accuracy"] <= 1 and 0 <= results["validation_accuracy"] <= 1
    assert results["steps"] == 2 and results["best_step"] in (1, 2)
    assert len(results["activation_rate_by_layer"]) == 2
    assert all(0 <= rate <= 1 for rate in results["activation_rate_by_layer"])
    assert results["tokens_per_second"] > 0
    assert np.sum(results["confusion_matrix"]) == results["rows"]["test"] > 0
    assert min(png_size(output / "confusion_matrix.png") + png_size(output / "activations.png")) > 200
    printed = capsys.readouterr()
    assert "test accuracy" in printed.out and "100%" in printed.err
    config = transformers.AutoConfig.from_pretrained(output / "best")
    task = config.architectures[0].removeprefix("SeqBoatFor")
    model = getattr(transformers, f"AutoModelFor{task}").from_pretrained(output / "best")
    if task == "AudioClassification":
        assert list(model.config.id2label.values()) == ["yes", "no", "up", "down"]
        wave = np.random.default_rng(0).normal(size=200)
        assert len(transformers.pipeline("audio-classification", model=str(output / "best"))(wave)) == 4
    elif task == "ImageClassification":
        grey = np.zeros((1, 8, 8), dtype=np.uint8)
        assert len(transformers.pipeline("image-classification", model=str(output / "best"))(grey, top_k=2)) == 2
    elif recipe == "lra-text":
        assert transformers.pipeline("text-classification", model=str(output / "best"))("xyz")[0]["score"] >= 0.5


def test_text_run_learns_and_resumes_exactly(tmp_path, capsys):
    data = write_reviews(tmp_path)
    settings = {**data, "max_steps": 60, "eval_steps": 20, "learning_rate": 2e-2, "save_total_limit": 5}
    whole = run("lra-text", tmp_path / "whole", **settings)
    assert whole["test_accuracy"] == 1.0 and whole["validation_accuracy"] == 1.0
    resumed = run(
        "lra-text", tmp_path / "resumed", resume_from_checkpoint=tmp_path / "whole/checkpoint-20", **settings
    )
    first, second = (tmp_path / name / "checkpoint-60/model.safetensors" for name in ("whole", "resumed"))
    torch.testing.assert_close(load_file(first), load_file(second), rtol=0, atol=0)
    assert resumed["confusion_matrix"] == whole["confusion_matrix"]
    assert resumed["trained_tokens"] < whole["trained_tokens"]
    again = run("lra-text", tmp_path / "whole", resume_from_checkpoint="latest", **(settings | {"max_steps": 61}))
    assert again["steps"] == 61


def test_pairs_with_labels_and_without(tmp_path):
    tasks = module("tasks")
    path = tmp_path / "pairs.tsv"
    path.write_text("id\ta\tb\tsame\n" + "".join(f"{i}\ta{i}\tb{i}\t{i % 2}\n" for i in range(10)), "utf-8")
    arguments = tasks.DataArguments(
        data_path=str(path), first_column="a", second_column="b", validation_size=2, test_size=2
    )
    found = tasks.load_task("retrieval", arguments, 256)
    rows = [found.train[i] for i in range(len(found.train))]
    texts = [tuple(bytes(row[name]).decode() for name in ("input_ids", "pair_input_ids")) for row in rows]
    assert len(rows) == 12
    for (first, second), row in zip(texts, rows, strict=True):
        assert (first[1:] == second[1:]) == bool(row["labels"]) and (first[0], second[0]) == ("a", "b")
    batch = found.collate(rows[:3])
    assert batch["input_ids"].shape == batch["attention_mask"].shape and "pair_attention_mask" in batch
    held_out = {bytes(row["input_ids"]) for part in (found.validation, found.test) for row in (part[0], part[2])}
    assert not held_out & {bytes(row[name]) for row in rows for name in row if name != "labels"}
    arguments.label_column = "same"
    found = tasks.load_task("retrieval", arguments, 256)
    rows = [found.train[i] for i in range(len(found.train))]
    assert len(rows) == 6
    assert all(int(bytes(row["input_ids"])[1:]) % 2 == row["labels"] for row in rows)


def test_padding_goes_to_the_right_and_under_a_mask():
    rows = [{"input_ids": np.arange(n, dtype=np.uint8), "labels": n} for n in (3, 1)]
    batch = module("tasks").pad_tokens(rows, 9)
    assert batch["input_ids"].tolist() == [[0, 1, 2], [0, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [3, 1]


def test_rows_of_like_length_come_together_in_an_order_of_seed_and_epoch():
    tasks = module("tasks")
    lengths = np.random.default_rng(0).integers(1, 1000, 430).tolist()

    def epoch(number, seed=0):
        order = tasks.EpochOrder(430, 8, seed, lengths)
        order.set_epoch(number)
        return list(order)

    rows = epoch(0)
    assert sorted(rows) == list(range(430)) and rows == epoch(0)
    assert rows != epoch(1) and rows != epoch(0, seed=1)
    spans = [np.ptp([lengths[row] for row in rows[at : at + 8]]) for at in range(0, 424, 8)]
    assert np.mean(spans) < 100
    means = [np.mean([lengths[row] for row in rows[at : at + 8]]) for at in range(0, 424, 8)]
    assert means != sorted(means)


@pytest.mark.parametrize("lengths", [None, [*range(1, 61)]])
def test_easy_rows_come_first_in_the_first_epoch(lengths):
    order = module("tasks").EpochOrder(60, 4, 0, lengths, easy=20, easy_passes=2)
    rows = list(order)
    assert len(rows) == len(order) == 60
    assert sorted(rows[:20]) == sorted(rows[20:40]) == list(range(40, 60)) and rows[:20] != rows[20:40]
    assert min(rows[40:]) < 40
    order.set_epoch(1)
    assert sorted(order) == list(range(60)) and sorted(list(order)[:20]) != list(range(40, 60))


def test_easy_passes_leave_batches_of_like_length():
    lengths = np.random.default_rng(0).integers(1, 1000, 430).tolist()
    rows = list(module("tasks").EpochOrder(430, 8, 0, lengths, easy=101, easy_passes=2))
    spans = [np.ptp([lengths[row] for row in rows[at : at + 8]]) for at in range(0, 8 * 50, 8)]
    assert len(rows) == 430 and min(rows[:192]) >= 329 and np.mean(spans) < 100


def test_a_resumed_run_of_two_processes_takes_up_its_epoch():
    tasks, train = module("tasks"), module("train")

    def loader(order, skipped):
        whole = DataLoader(list(range(60)), batch_size=4, sampler=order)
        share = prepare_data_loader(whole, num_processes=2, process_index=0, put_on_device=False)
        return skip_first_batches(share, skipped) if skipped else share

    found = []
    for skipped in (0, 2):
        order = tasks.EpochOrder(60, 8, 0, easy=20, easy_passes=2)
        batches = loader(order, skipped)
        train.EpochOfOrder(order).on_epoch_begin(None, SimpleNamespace(epoch=1.3), None)
        batches.set_epoch(1)
        found.append([batch.tolist() for batch in batches])
    assert found[1] == found[0][2:] and len(found[1]) > 3


def test_missing_data_say_where_to_get_them(tmp_path):
    words = {
        "lra-text": "aclImdb.*--data_path",
        "lra-image": "CIFAR-10.*--data_path PIXELS --labels_path",
        "lra-listops": "no data path was given.*--data_path FOLDER",
        "lra-pathfinder": "--data_path FOLDER",
        "lra-pathx": "--data_path FOLDER",
        "lra-retrieval": "text pairs.*--data_path",
        "speech-commands": "Speech Commands.*--data_path",
    }
    assert set(words) == {path.stem for path in RECIPES}
    for recipe, message in words.items():
        with pytest.raises(FileNotFoundError, match=message):
            run(recipe, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="there is no file 'nowhere.tar'"):
        run("lra-text", tmp_path / "run", data_path="nowhere.tar")
    assert not (tmp_path / "run").exists()


def test_bad_input_is_refused_before_training(tmp_path):
    reviews, pictures, pairs = write_reviews(tmp_path), write_gray_pictures(tmp_path), write_pairs(tmp_path)
    (tmp_path / "broken.tar.xz").write_bytes(b"no archive")
    cases = [
        ("lra-text", reviews | {"data_path": tmp_path / "broken.tar.xz"}, "is no tar archive"),
        ("lra-text", reviews | {"task": "sums"}, "task must be one of text, image.*'sums'"),
        ("lra-text", reviews | {"preset": "lra-image"}, "needs input_type='tokens'"),
        ("lra-text", reviews | {"preset": "lra-listops"}, "256 ids, the preset's vocab_size is 19"),
        ("lra-text", reviews | {"preset": "lra-retrieval"}, "one input a row.*pair_features='nli'"),
        ("lra-text", reviews | {"validation_size": 14}, "leave 0 training rows"),
        ("lra-image", pictures | {"group_by_length": True}, "group_by_length is for texts"),
        ("lra-text", reviews | {"max_steps": 0}, "max_steps must be at least 1"),
        ("lra-text", reviews | {"resume_from_checkpoint": "latest"}, "there is no checkpoint"),
        ("lra-text", reviews | {"mixed_precision": "fp8"}, "mixed_precision"),
        ("lra-image", pictures | {"data_path": pictures["labels_path"]}, "pixels must be uint8"),
        ("lra-image", pictures | {"data_path": reviews["data_path"]}, "holds no numpy arrays"),
        ("speech-commands", {"data_path": pictures["data_path"]}, "lacks audio, label, is_test, words"),
        ("lra-retrieval", pairs | {"first_column": "title"}, "no column 'title'; it has question, answer"),
        ("lra-retrieval", pairs | {"label_column": "answer"}, "labels must be 0 or 1"),
        ("lra-listops", {"data_path": tmp_path / "broken.tar.xz"}, "is a file"),
    ]  # fmt: skip
    for recipe, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            run(recipe, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_retrieval_runs_on_real_texts(tmp_path):
    """Word problems and their solutions, and solutions of other problems."""
    path = ROOT / "tests/data/gsm8k_excerpt.jsonl"
    results = run(
        "lra-retrieval", tmp_path / "run", data_path=path, max_length=300, validation_size=6, test_size=6,
        first_column="question", second_column="answer",
    )  # fmt: skip
    assert results["rows"] == {"train": 56, "validation": 12, "test": 12}
    assert (tmp_path / "run/results.json").is_file()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_hold_the_published_settings(path):
    train = module("train")
    arguments = module("recipes").parse_arguments(train.ClassificationArguments, [str(path), "--output_dir", "out"])
    train.check_arguments(arguments)
    config = train.build_config(arguments)
    assert config.bidirectional and arguments.preset.split("-")[1] in path.stem
    published = {
        "lra-listops": (4e-3, 1e-3, 64, 90_000, 27_000), "lra-text": (4e-3, 0.01, 50, 25_000, 10_000),
        "lra-retrieval": (3e-3, 0.04, 64, 91_960, 10_000), "lra-image": (0.01, 0.02, 50, 180_000, 9_000),
        "lra-pathfinder": (0.01, 0.01, 128, 250_000, 50_000), "lra-pathx": (0.01, 0.01, 16, 125_000, 25_000),
        "speech-commands": (0.01, 0.01, 20, 250_000, 10_000),
    }  # fmt: skip
    rows = arguments.batch_size * arguments.gradient_accumulation_steps
    assert published[path.stem] == (
        arguments.learning_rate, arguments.weight_decay, rows, arguments.max_steps, arguments.warmup_steps,
    )  # fmt: skip
    assert (arguments.beta1, arguments.beta2, arguments.max_grad_norm) == (0.9, 0.98, 1.0)
