"""The page and the PNG of a text and of a picture: what they hold, what is refused, and the page in a browser."""

import base64
import json
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from helpers import randomise, tiny_config

from modeling_seqboat import SeqBoatForCausalLM, SeqBoatForImageClassification, build_byte_tokenizer
from modeling_seqboat.analysis_seqboat import attention_reach

pytest.importorskip("matplotlib")
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

import activation_map  # noqa: E402
from activation_cells import Token, cells_of, tokens_of  # noqa: E402

PAGE, PICTURE = activation_map.PAGE, activation_map.PICTURE
TEXT = (
    "<script>alert('x')</script> &amp; {{data}}\r\n\tnaïve 👍 日本\u202e.\n".encode()
    + b"bad \xff\xc3( \x00\x1b end</div>\n"
)
GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Folders of a byte language model and of a picture classifier, each with a memory of 4."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    specials = {"pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}
    randomise(SeqBoatForCausalLM(tiny_config(vocab_size=264, **specials))).save_pretrained(folder / "text")
    build_byte_tokenizer().save_pretrained(folder / "text")
    values = {"bidirectional": True, "input_type": "values", **dict.fromkeys(specials)}
    randomise(SeqBoatForImageClassification(tiny_config(**values))).save_pretrained(folder / "pixels")
    return {name: str(folder / name) for name in ("text", "pixels")}


@pytest.fixture(scope="module")
def written(models, tmp_path_factory) -> dict[str, Path]:
    """The output folder of each kind of input."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("written")
    (folder / "text.txt").write_bytes(TEXT)
    Image.fromarray(GREY).save(folder / "picture.png")
    activation_map.main([models["text"], str(folder / "text.txt"), "--output", str(folder / "text")])
    activation_map.main([models["pixels"], str(folder / "picture.png"), "--output", str(folder / "pixels")])
    return {name: folder / name for name in models}


class Page(HTMLParser):
    """What a browser would find: tags, the cells of the map, and text outside of scripts."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.cells: list[tuple[int, str]] = []
        self.scripts: list[str] = []
        self._depth: list[str] = []
        self.feed(path.read_text("utf-8"))
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if self._depth and self._depth[-1] == "map" and tag == "span":
            self.cells.append((int(attributes.get("data-n", 1)), ""))
        if tag not in ("meta", "input", "option"):
            self._depth.append(attributes.get("id") if attributes.get("id") == "map" else tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        if self._depth:
            self._depth.pop()

    def handle_data(self, data):
        if self._depth and self._depth[-1] == "script":
            self.scripts[-1] += data
        elif "map" in self._depth and self.cells:
            self.cells[-1] = (self.cells[-1][0], self.cells[-1][1] + data)

    def confidence(self) -> np.ndarray:
        """(layers, T), as the page reads it."""
        codes = np.array([list(base64.b64decode(layer)) for layer in self.data["confidence"]], dtype=float)
        return np.where(codes > 0, 0.5 + (codes - 1) / 508, 0)


def confidences_of(folder: str, **inputs) -> np.ndarray:
    config = activation_map.load_config(folder)
    return activation_map.confidences(activation_map.load_model(folder, config), **inputs).numpy()


def test_page_of_a_text_holds_what_the_model_decides(models, written):
    page = Page(written["text"] / PAGE)
    expected = confidences_of(models["text"], input_ids=torch.tensor([list(TEXT)]))
    found = page.confidence()
    assert found.shape == (2, len(TEXT))
    assert ((found > 0) == (expected > 0)).all() and 0 < (found > 0).mean() < 1
    np.testing.assert_allclose(found, expected, atol=0.001)
    assert page.data["rates"] == pytest.approx((expected > 0).mean(1).tolist(), abs=1e-5)
    assert sum(page.data["classTokens"]) == len(TEXT)
    assert sum(count for count, _ in page.cells) == len(TEXT)


def test_page_shows_every_byte_and_interprets_none(written):
    page = Page(written["text"] / PAGE)
    shown = "".join(text for _, text in page.cells)
    assert shown == (
        "<script>alert('x')</script> &amp; {{data}}0D↵\n⇥naïve 👍 日本U+202E.↵\nbad FFC3( 001B end</div>↵\n"
    )
    assert (2, "ï") in page.cells and (4, "👍") in page.cells and (1, "FF") in page.cells
    assert [tag for tag, _ in page.tags].count("script") == len(page.scripts) == 2
    assert page.data["labels"][:2] == ["“<”", "“s”"] and page.data["labels"][-1] == "newline"


@pytest.mark.parametrize("kind", ["text", "pixels"])
def test_page_refers_to_nothing_outside(written, kind):
    page = Page(written[kind] / PAGE)
    assert not [attributes for _, attributes in page.tags if {"src", "href"} & set(attributes)]
    source = (written[kind] / PAGE).read_text("utf-8")
    assert not re.search(r"https?:|@import|url\(|\{\{(title|model|body|unit)", source)


@pytest.mark.parametrize("kind", ["text", "pixels"])
def test_page_names_its_controls(written, kind):
    page = Page(written[kind] / PAGE)
    by_id = {attributes["id"]: attributes for _, attributes in page.tags if "id" in attributes}
    labelled = {attributes.get("for") for tag, attributes in page.tags if tag == "label"}
    assert {"layer", "theme"} <= labelled
    assert by_id["layer"]["max"] == "1"
    assert by_id["map"]["tabindex"] == "0" and by_id["map"]["aria-label"]
    assert by_id["map"]["aria-describedby"] in by_id
    assert by_id["detail"]["aria-live"] == "polite"


def test_page_of_a_picture_holds_what_the_model_decides(models, written):
    page = Page(written["pixels"] / PAGE)
    values = (torch.from_numpy(GREY).float().flatten() / 255 - 0.5) / 0.5
    expected = confidences_of(models["pixels"], input_values=values[None])
    assert ((page.confidence() > 0) == (expected > 0)).all()
    assert base64.b64decode(page.data["pixels"]) == GREY.tobytes()
    canvas = next(attributes for tag, attributes in page.tags if tag == "canvas")
    assert (canvas["width"], canvas["height"]) == ("8", "6")


@pytest.mark.parametrize("kind", ["text", "pixels"])
def test_png_is_a_picture(written, kind):
    from PIL import Image

    with Image.open(written[kind] / PICTURE) as image:
        assert image.format == "PNG" and min(image.size) > 200
        assert len(set(image.convert("L").resize((64, 64)).tobytes())) > 8


def test_prints_rates_and_cuts_long_texts_aloud(models, tmp_path, capsys):
    activation_map.main([models["text"], "To be, or not to be", "--max-tokens", "5", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "has 19 tokens; the first 5 are shown (--max-tokens)" in printed
    assert re.search(r"^ +1 +[\d.]+% +\S+ +\S+$", printed, re.M)
    assert "FLOPs saved against attention that is always on: " in printed
    assert Page(tmp_path / PAGE).data["labels"] == ["“T”", "“o”", "space", "“b”", "“e”"]


def test_a_layer_that_never_attends(tmp_path):
    torch.manual_seed(0)
    randomise(SeqBoatForCausalLM(tiny_config(vocab_size=264)), rate=0).save_pretrained(tmp_path / "model")
    build_byte_tokenizer().save_pretrained(tmp_path / "model")
    activation_map.main([str(tmp_path / "model"), "x", "--output", str(tmp_path / "out")])
    page = Page(tmp_path / "out" / PAGE)
    assert page.data["rates"] == [0, 0] and page.data["spans"] == [None, None]


def test_words_and_specials_are_cells_of_their_own():
    tokens = [Token(b"", "<|bos|>"), Token(b"na\xc3"), Token(b"\xafve"), Token(b""), Token(b" \n"), Token(b"\xc3")]
    cells = cells_of(tokens)
    assert [(cell.first, cell.last, cell.html) for cell in cells] == [
        (0, 0, "<b>&lt;|bos|&gt;</b>"),
        (1, 2, "naïve"),
        (3, 3, ""),
        (4, 4, " <i>↵</i>\n"),
        (5, 5, "<b>C3</b>"),
    ]


def test_tokens_of_a_byte_level_tokenizer():
    tokenizer = build_byte_tokenizer()
    ids = tokenizer("é \n<|end|>")["input_ids"]
    tokens = tokens_of(tokenizer, ids)
    assert b"".join(token.text for token in tokens) == "é \n".encode()
    assert [token.special for token in tokens] == [None] * 4 + ["<|end|>"]
    assert [token.label for token in tokens] == ["0xC3", "0xA9", "space", "newline", "<|end|>"]


def refusal(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        activation_map.main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("text", "missing.txt", "there is no file 'missing.txt'; if it is the text itself, add --text"),
        ("text", "", "the text given is empty"),
        ("text", ".", "'.' is a folder"),
        ("pixels", "To be", "the model reads pixels: name a picture file, got 'To be'"),
        ("pixels", __file__, "is not a picture"),
    ],
)
def test_refuses_inputs(models, tmp_path, capsys, kind, source, message):
    assert message in refusal([models[kind], source, "--output", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


def test_refuses_models_and_options(models, tmp_path, capsys):
    out = ["--output", str(tmp_path / "out")]
    (tmp_path / "empty").mkdir()
    assert "it has no config.json" in refusal([str(tmp_path / "empty"), "text", *out], capsys)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "gpt2"}')
    assert "is a 'gpt2', not a SeqBoat" in refusal([str(tmp_path / "other"), "text", *out], capsys)
    assert "'0' is not a whole number above 0" in refusal([models["text"], "a b", "--max-tokens", "0"], capsys)
    assert "'32' is not HEIGHTxWIDTH" in refusal([models["pixels"], "a.png", "--size", "32"], capsys)
    assert "not a number above 0" in refusal([models["pixels"], "a.png", "--std", "0"], capsys)


def test_existing_files_are_replaced_only_when_asked(models, tmp_path, capsys):
    (tmp_path / PAGE).write_text("mine", encoding="utf-8")
    arguments = [models["text"], "to be", "--output", str(tmp_path)]
    assert "holds activation_map.html already; add --overwrite" in refusal(arguments, capsys)
    assert (tmp_path / PAGE).read_text("utf-8") == "mine"
    activation_map.main([*arguments, "--overwrite"])
    assert Page(tmp_path / PAGE).cells[0] == (1, "t")
    assert "is a file; name a folder" in refusal([*arguments[:3], str(tmp_path / PAGE)], capsys)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the PATH")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def background(browser: Browser, cell: int) -> str:
    return browser.script(f"getComputedStyle(document.querySelectorAll('#map > span')[{cell}]).backgroundImage") + (
        browser.script(f"getComputedStyle(document.querySelectorAll('#map > span')[{cell}]).backgroundColor")
    )


def test_browser_moves_through_layers_by_keys(browser, written):
    browser.open(written["text"] / PAGE)
    page = Page(written["text"] / PAGE)
    browser.press("Tab")
    assert browser.script("document.activeElement.id") == "layer"
    assert browser.script("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for layer in (0, 1):
        rate = f"{100 * page.data['rates'][layer]:.1f}"
        assert (
            browser.script("document.getElementById('layer-name').textContent") == f"layer {layer}: {rate}% activated"
        )
        assert browser.script("document.getElementById('layer').getAttribute('aria-valuetext')").startswith(
            f"layer {layer}"
        )
        active = page.confidence()[layer] > 0
        first = 0
        for cell, (count, _) in enumerate(page.cells):
            coloured = browser.script(f"document.querySelectorAll('#map > span')[{cell}].classList.contains('on')")
            assert coloured == bool(active[first : first + count].any()), cell
            first += count
        browser.press("ArrowRight")
    tinted = [background(browser, cell) for cell in range(8)]
    assert ["rgba(0, 0, 0, 0)" not in text for text in tinted] == (page.confidence()[1][:8] > 0).tolist()
    assert browser.requests == [(written["text"] / PAGE).as_uri()] and browser.errors == []


def test_browser_tells_what_the_selected_byte_attends_to(browser, written):
    browser.open(written["text"] / PAGE)
    active = torch.from_numpy(Page(written["text"] / PAGE).confidence()[0] > 0)[None]
    reach = attention_reach(active, 4, False)
    byte = int(active[0].nonzero()[20])
    browser.press("Tab", "Tab", "Tab")
    assert browser.script("document.activeElement.id") == "map"
    browser.press("Home", *["ArrowRight"] * byte)
    detail = browser.script("document.getElementById('detail').textContent")
    assert f"position {byte}" in detail
    assert (
        f"attends to {reach.keys[0, byte]} bytes, mean distance {reach.mean_distance[0, byte]:.1f}, "
        f"farthest {reach.farthest[0, byte]}" in detail
    )
    assert browser.script("document.querySelectorAll('#map > span.cursor').length") == 1
    browser.press("PageDown")
    assert browser.script("document.getElementById('layer').value") == "1"
    browser.press("End", "ArrowUp", "ArrowUp", "Home")
    assert "position 0" in browser.script("document.getElementById('detail').textContent")
    browser.click("#map > span:nth-child(4)")
    assert "position 3" in browser.script("document.getElementById('detail').textContent")
    assert browser.errors == []


def test_browser_shows_both_themes(browser, written):
    browser.open(written["text"] / PAGE)
    colour = "getComputedStyle(document.body).backgroundColor"
    browser.scheme("dark")
    assert browser.script(colour) == "rgb(20, 23, 26)"
    browser.script("theme.value = 'light', theme.dispatchEvent(new Event('change'))")
    assert browser.script(colour) == "rgb(255, 255, 255)"
    browser.script("theme.value = '', theme.dispatchEvent(new Event('change'))")
    browser.scheme("light")
    assert browser.script(colour) == "rgb(255, 255, 255)"
    assert browser.errors == []


def test_browser_gives_every_control_a_name(browser, written):
    for kind, name in (("text", "The text, coloured by confidence"), ("pixels", "The picture, activated pixels")):
        browser.open(written[kind] / PAGE)
        nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
        names = {node["role"]["value"]: node.get("name", {}).get("value", "") for node in nodes if "role" in node}
        assert names["slider"] == "Layer 0 to 1"
        assert names["combobox"].strip() == "Theme"
        assert names["application"].startswith(name)


def test_browser_colours_activated_pixels(browser, written):
    browser.open(written["pixels"] / PAGE)
    active = Page(written["pixels"] / PAGE).confidence()[0] > 0
    read = "[...map.getContext('2d').getImageData(0, 0, 8, 6).data]"
    colours = np.array(browser.script(read)).reshape(48, 4)
    grey = (colours[:, 0] == colours[:, 1]) & (colours[:, 1] == colours[:, 2])
    assert (grey == ~active).all()
    assert (colours[~active, 0] == GREY.flatten()[~active]).all()
    browser.press("Tab", "Tab", "Tab", "Home", "ArrowDown", "ArrowRight")
    assert "row 1, column 1" in browser.script("document.getElementById('detail').textContent")
    assert browser.errors == []


HIDDEN = ("\u202e", "\u2066", "\u200f", "\u200b", "\ufeff", "\x1b", "\udcff")


def test_names_show_what_cannot_be_seen(tmp_path, models, capsys):
    """Bidirectional controls and bytes that are no UTF-8, in the names of the file, the model and a special token."""
    model = tmp_path / "mod\u202eel"
    shutil.copytree(models["text"], model)
    text = os.fsencode(tmp_path) + b"/a\xe2\x80\xae\xff<b>.txt"
    Path(os.fsdecode(text)).write_text("hello\u202e\u2066", "utf-8")
    output = tmp_path / "out"
    activation_map.main([str(model), os.fsdecode(text), "--output", str(output), "--max-tokens", "8"])
    page = (output / "activation_map.html").read_text("utf-8")
    assert not any(character in page for character in HIDDEN) and "aU+202E\\xFF&lt;b&gt;.txt" in page
    assert "modU+202Eel" in page and "aU+202E" in capsys.readouterr().out
    tokens = [Token(b"", f"<|{character}|>") for character in HIDDEN]
    shown = "".join(token.label for token in tokens) + "".join(cell.html for cell in cells_of(tokens))
    assert not any(character in shown for character in HIDDEN) and "&lt;|U+202E|&gt;" in shown


def test_a_page_is_replaced_whole_or_left_alone(tmp_path, models, monkeypatch):
    argv = [models["text"], "some text", "--output", str(tmp_path / "out"), "--overwrite"]
    activation_map.main(argv)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fails(*arguments):
        raise OSError("disk full")

    for name in ("write_png", "build_page"):
        with monkeypatch.context() as patch:
            patch.setattr(activation_map, name, fails)
            with pytest.raises(OSError, match="disk full"):
                activation_map.main(argv)
        assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
