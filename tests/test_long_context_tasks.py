"""Long-context example: the generated texts, the mixed stream and the task files for lm-eval."""

import json
import lzma

import numpy as np
import pytest
import yaml
from example_scripts import imported

SIBLINGS = ("recall_tasks", "mixed_stream", "recall_models", "recipes", "text_data")


@pytest.fixture
def tasks(monkeypatch):
    yield from imported(monkeypatch, "recall_tasks")


@pytest.fixture(autouse=True)
def folder(monkeypatch):
    """The scripts import each other as scripts do, from their own folder."""
    from example_scripts import EXAMPLES

    monkeypatch.syspath_prepend(str(EXAMPLES / "long_context"))


@pytest.fixture
def stream(monkeypatch):
    yield from imported(monkeypatch, "mixed_stream", *SIBLINGS)


@pytest.fixture
def lm_eval_tasks(monkeypatch):
    yield from imported(monkeypatch, "lm_eval_tasks", *SIBLINGS)


def all_tasks(tasks):
    text = np.frombuffer(b"Nobody owns the sea, and it is deep. " * 40, np.uint8)
    return [
        tasks.RecallTask(),
        tasks.RecallTask(pairs=12, queries=3, within=0.5),
        tasks.CopyTask(),
        tasks.NeedleTask(text),
        tasks.NeedleTask(text, facts=3, queries=3, name_size=2, digits=4),
    ]


@pytest.mark.parametrize("number", range(5))
def test_a_text_is_a_function_of_seed_length_and_number(tasks, number):
    task = all_tasks(tasks)[number]
    first, again = (tasks.example_of(task, 300, 7, 3) for _ in range(2))
    assert all(np.array_equal(vars(first)[name], vars(again)[name]) for name in vars(first))
    for other in (tasks.example_of(task, 300, 7, 4), tasks.example_of(task, 300, 8, 3)):
        assert not np.array_equal(first.tokens, other.tokens)


@pytest.mark.parametrize("number", range(5))
def test_an_answer_stands_where_its_distance_says(tasks, number):
    task = all_tasks(tasks)[number]
    for text in range(20):
        e = tasks.example_of(task, 256, 0, text)
        assert len(e.tokens) == len(e.kinds) == 256 and e.tokens.min() >= 0 and e.tokens.max() < task.vocabulary
        width = e.answers.shape[1]
        for answer, distance in zip(e.answers, e.distances, strict=True):
            last = answer[0] - 1 - distance
            found = e.tokens[last - width + 1 : last + 1]
            assert np.array_equal(found, e.tokens[answer]) and set(e.kinds[last - width + 1 : last + 1]) == {
                tasks.VALUE
            }
            assert set(e.kinds[answer]) == {tasks.QUERY}


def test_a_question_names_the_key_of_its_pair(tasks):
    e = tasks.example_of(tasks.RecallTask(), 100, 0, 0)
    for answer, distance in zip(e.answers[:, 0], e.distances, strict=True):
        assert e.tokens[answer - 2] == tasks.QUESTION
        assert e.tokens[answer - 1] == e.tokens[answer - 2 - distance] and e.kinds[answer - 2 - distance] == tasks.KEY


def test_pairs_lie_anywhere_unless_told_to_lie_early(tasks):
    def places(task):
        kinds = [tasks.example_of(task, 1000, 0, number).kinds for number in range(40)]
        return np.concatenate([np.flatnonzero(k == tasks.KEY) for k in kinds])

    spread = places(tasks.RecallTask())
    assert spread.min() < 100 and spread.max() > 880 and 400 < spread.mean() < 600
    assert places(tasks.RecallTask(within=0.25)).max() < 250


def test_texts_too_short_and_impossible_tasks_are_refused_by_name(tasks):
    with pytest.raises(ValueError, match="6 pieces of 2 tokens do not fit into 8 tokens"):
        tasks.example_of(tasks.RecallTask(), 20, 0, 0)
    with pytest.raises(ValueError, match="queries must be from 1 to 6, got 7"):
        tasks.RecallTask(queries=7)
    with pytest.raises(ValueError, match="pairs must be from 1 to 64, got 65"):
        tasks.RecallTask(pairs=65)
    with pytest.raises(ValueError, match="within"):
        tasks.RecallTask(within=0.0)
    with pytest.raises(ValueError, match="text that facts are planted in is empty"):
        tasks.NeedleTask(np.zeros(0, np.uint8))


def write_data(folder, packed=False):
    """A data folder of the smallest kind: text, 24 pictures of 4 pixels, 12 clips of 8 samples."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    text = b"The quick brown fox. " * 100
    (folder / "enwik8.xz").write_bytes(lzma.compress(text)) if packed else (folder / "some.txt").write_bytes(text)
    pixels = generator.integers(0, 256, (24, 4)).astype(np.uint8)
    np.save(folder / "cifar10_gray_pixels.npy", pixels)
    if packed:
        raw = folder / "cifar10_gray_pixels.npy"
        (folder / "cifar10_gray_pixels.npy.xz").write_bytes(lzma.compress(raw.read_bytes()))
        raw.unlink()
    np.save(folder / "cifar10_labels.npy", np.arange(24) % 10)
    np.savez(
        folder / "speech_commands_2words.npz", audio=generator.integers(-9000, 9000, (12, 8)).astype(np.int16),
        label=np.arange(12) % 2, is_test=np.arange(12) >= 8, words=np.array(["yes", "no"]),
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_splits_of_a_data_folder_have_no_row_in_common(stream, tmp_path, packed):
    folder = write_data(tmp_path / "data", packed)
    parts = {split: stream.load_pieces(folder, split) for split in stream.SPLITS}
    assert [len(p.pictures) for p in parts.values()] == [18, 2, 4]
    assert [len(p.clips) for p in parts.values()] == [8, 0, 4]
    assert sum(len(p.text) for p in parts.values()) == 2100
    rows = [tuple(row) for p in parts.values() for row in p.pictures]
    assert len(set(rows)) == 24


def test_mu_law_is_finest_near_silence_and_keeps_the_order(stream):
    coded = stream.mu_law(np.array([-32768, -1000, -10, 0, 10, 1000, 32767], np.int16)).astype(int)
    assert coded[0] == 0 and coded[3] == 128 and coded[-1] == 255 and (np.diff(coded) > 0).all()
    assert coded[4] - coded[3] > (coded[6] - coded[5]) / 3177


def test_a_stream_holds_whole_pieces_and_asks_for_them(stream, tmp_path):
    pieces = stream.load_pieces(write_data(tmp_path / "data"), "train", decimation=2)
    task = stream.MixedTask(pieces, facts=2, clips=2, pictures=3, queries=1)
    for seed in range(10):
        e = task.example(400, np.random.default_rng(seed))
        assert len(e.tokens) == len(e.kinds) == 400 and sorted(e.groups) == [0, 1, 2]
        starts = np.flatnonzero(e.tokens == stream.PICTURE)
        assert len(starts) == 4, "three pictures and a question"
        for answer, distance, group in zip(e.answers, e.distances, e.groups, strict=True):
            last = answer[0] - 1 - distance
            question = e.tokens[max(0, answer[0] - 5) : answer[0]]
            if group == 0:
                assert e.tokens[last] == stream.FACT_END
                assert np.array_equal(e.tokens[last - 2 : last], e.tokens[answer])
                continue
            size, mark = (4, stream.AUDIO) if group == 1 else (4, stream.PICTURE)
            assert e.tokens[last] == stream.TEXT and e.tokens[last - 1] == stream.END
            first = last - 1 - size - 3
            assert e.tokens[first] == mark and np.array_equal(e.tokens[first : first + 3], question[-3:])
            rows, labels, zero = (
                (pieces.clips, pieces.words, ord("A")) if group == 1 else (pieces.pictures, pieces.classes, ord("0"))
            )
            (row,) = np.flatnonzero((rows == e.tokens[first + 3 : first + 3 + size]).all(1))
            assert e.tokens[answer[0]] == zero + labels[row]
        text = e.tokens[e.kinds == stream.KINDS.index("text")]
        assert set(text) <= set(pieces.text)


def test_a_short_stream_has_fewer_pieces_and_all_of_one_length_as_many_questions(stream, tmp_path):
    pieces = stream.load_pieces(write_data(tmp_path / "data"), "train", decimation=2)
    task = stream.MixedTask(pieces, facts=2, clips=2, pictures=3, queries=2)
    found = []
    for length in range(28, 140):
        examples = [task.example(length, np.random.default_rng(seed)) for seed in range(3)]
        assert all(len(e.tokens) == length for e in examples)
        counts = {tuple(np.bincount(e.groups, minlength=3)) for e in examples}
        marks = {(e.tokens == mark).sum() for e in examples for mark in (stream.AUDIO, stream.PICTURE)}
        assert len(counts) == 1 and max(marks) <= 5
        found.append(counts.pop())
    # By turns, a picture first; questions are of at most two of a kind.
    assert list(dict.fromkeys(found)) == [(2, 0, 0), (2, 0, 1), (2, 1, 1), (2, 1, 2), (2, 2, 2)]
    shortest = found.index((2, 0, 1)) + 28
    e = task.example(shortest, np.random.default_rng(0))
    assert not (e.kinds == stream.KINDS.index("text")).any(), "every place is taken"
    with pytest.raises(ValueError, match="of 27 tokens is too short for its pieces, it needs at least 28"):
        task.example(27, np.random.default_rng(0))
    # A clip of one sample would fit into 14 tokens, but a picture comes first.
    short = stream.load_pieces(tmp_path / "data", "train", decimation=8)
    for clips in (0, 1):
        with pytest.raises(ValueError, match="needs at least 15"):
            stream.MixedTask(short, facts=0, clips=clips, pictures=3).example(14, np.random.default_rng(0))


def test_data_that_streams_cannot_be_made_of_is_refused_by_name(stream, tmp_path):
    with pytest.raises(FileNotFoundError, match="no data folder"):
        stream.load_pieces(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no text"):
        stream.load_pieces(tmp_path / "empty")
    folder = write_data(tmp_path / "data")
    with pytest.raises(ValueError, match="split must be one of train, validation, test, got 'all'"):
        stream.load_pieces(folder, "all")
    pieces = stream.load_pieces(folder, "validation")
    with pytest.raises(ValueError, match="clips is 1, but the data has none"):
        stream.MixedTask(pieces, clips=1)
    with pytest.raises(ValueError, match="too short for its pieces, it needs at least 42"):
        stream.MixedTask(pieces, clips=0).example(40, np.random.default_rng(0))
    np.save(folder / "cifar10_labels.npy", np.arange(24))
    with pytest.raises(ValueError, match=r"labels must lie in 0..9, got 0..23"):
        stream.load_pieces(folder)
    (folder / "cifar10_labels.npy").unlink()
    with pytest.raises(FileNotFoundError, match="cifar10_labels.npy"):
        stream.load_pieces(folder)


def test_the_stream_script_writes_one_stream(stream, tmp_path, capsys):
    arguments = ["--data", str(write_data(tmp_path / "data")), "--length", "500", "--output", str(tmp_path / "s.npz")]
    e = stream.main([*arguments, "--pictures", "2", "--clips", "1"])
    saved = np.load(tmp_path / "s.npz")
    assert np.array_equal(saved["tokens"], e.tokens) and len(saved["tokens"]) == 500
    assert "picture: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="exists already"):
        stream.main([*arguments, "--pictures", "2", "--clips", "1"])


def test_lm_eval_files_hold_prompts_of_their_length_and_the_answers(lm_eval_tasks, tmp_path):
    names = lm_eval_tasks.main(["--output_dir", str(tmp_path / "t"), "--lengths", "1000", "3000", "--texts", "3"])
    assert len(names) == 8
    group = yaml.safe_load((tmp_path / "t" / "long_bytes.yaml").read_text())
    assert group == {"group": "long_bytes", "task": names}
    for name in names:
        task = yaml.safe_load((tmp_path / "t" / f"{name}.yaml").read_text())
        assert task["task"] == name
        with open(task["dataset_kwargs"]["data_files"]["test"]) as file:
            rows = [json.loads(line) for line in file]
        length = int(name.rsplit("_", 1)[1])
        assert len(rows) == 3
        for row in rows:
            text = row.get("prompt", row.get("text"))
            # What is lost are halves of characters at cuts.
            assert length - 60 < len(text.encode()) <= length
            if "answer" in row:
                assert all(number in row["prompt"] for number in row["answer"].rstrip(".").split(", "))


def test_a_chain_of_variables_leads_to_its_answer(lm_eval_tasks):
    for seed in range(5):
        row = lm_eval_tasks.variable_tracking(b"Some text. " * 50, 1500, 4, np.random.default_rng(seed))
        values = {}
        lines = [line for line in row["prompt"].split("\n") if line.startswith("VAR ") and line.endswith(".")]
        for line in lines:
            name, value = line.removeprefix("VAR ").rstrip(".").split(" = ")
            values[name] = values[value.removeprefix("VAR ")] if value.startswith("VAR ") else value
        asked = row["prompt"].rsplit("VAR ", 1)[1].removesuffix(" is")
        assert len(lines) == 8 and values[asked] + "." == row["answer"]


def test_lm_eval_texts_that_are_too_short_are_refused(lm_eval_tasks):
    with pytest.raises(ValueError, match="too short for its 6 lines"):
        lm_eval_tasks.multikey(b"text", 100, 6, np.random.default_rng(0))
    with pytest.raises(ValueError, match="5 bytes, too few for a document of 6"):
        lm_eval_tasks.documents(b"12345", 6, 1)
