"""The page: whole, by itself, and with the roofline of what has ceilings and counted bytes."""

from __future__ import annotations

import base64
import dataclasses
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from fused_resnet.bench.report.page import looks, page
from fused_resnet.bench.result import (
    ABSENT,
    FAILED,
    INFERENCE,
    MODEL,
    RIGHT,
    TRAINING_STEP,
    WRONG,
    Measurement,
    Outcome,
    Result,
)
from fused_resnet.bench.timer import Timing

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

VOID = {"meta", "link", "br", "hr", "img", "input"}
SVG = "{http://www.w3.org/2000/svg}"


def right(milliseconds: float, **others) -> Outcome:
    return Outcome(RIGHT, timing=Timing(tuple(milliseconds * 1e-3 * step for step in (1, 0.8, 1.2))), **others)


def sample(**machine) -> Result:
    entries = []
    for batch_size in (1, 8):
        outcomes = {
            "eager NCHW": right(20 * batch_size, moved_bytes=2_000_000 * batch_size, peak_bytes=4_000_000),
            "openvino": right(8 * batch_size),
            "frozen": right(10 * batch_size, moved_bytes=1_000_000 * batch_size, peak_bytes=3_000_000),
            "fused": Outcome(WRONG, "off by <one> & more", Timing((1e-3,) * 3)),
            "apex": Outcome(ABSENT, "apex is not installed"),
            "timm": Outcome(FAILED, "<script>alert(1)</script>"),
        }
        entries.append(Measurement(MODEL, "resnet18", INFERENCE, batch_size, "float32", 224, outcomes, 4_000_000))
    trained = {"eager NCHW": right(100, saved_bytes=5_000_000), "fused": right(50, saved_bytes=2_500_000)}
    entries.append(Measurement(MODEL, "resnet18", TRAINING_STEP, 16, "float32", 224, trained))
    facts = {"device": "a <machine>", "threads": 2, "torch": "2.13.0", "commit": "c" * 40, "date": "2026-11-25"}
    ceilings = {"float32": {"bytes_per_second": 1e9, "flop_per_second": 1e9}}
    return Result(facts | machine, {}, ceilings, entries)


class Reader(HTMLParser):
    """Every element is closed; the attributes of all."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def text() -> str:
    return page(sample())


def drawings(text: str) -> dict[str, ElementTree.Element]:
    """The plots, by what is said of them; each is well-formed SVG inside the page."""
    found, said = {}, ""
    for tag, name, value in Reader(text).attributes:
        if (tag, name) == ("img", "src"):
            kind, _, data = str(value).partition(",")
            assert kind == "data:image/svg+xml;base64"
            said = base64.b64decode(data).decode()
        elif (tag, name) == ("img", "alt"):
            found[str(value)] = ElementTree.fromstring(said)
    return found


def test_it_is_whole_and_asks_nobody_for_anything(text):
    reader = Reader(text)
    assert not reader.open
    for tag, name, value in reader.attributes:
        if name in ("src", "srcset", "action", "data", "poster", "href", "xlink:href"):
            assert value.startswith(("data:", "#")), (tag, name, value)
    names = {value for _, name, value in reader.attributes if name == "id"}
    assert {value[1:] for _, _, value in reader.attributes if value and value.startswith("#")} <= names
    assert not re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", re.sub(r'src="[^"]*"', "", text))
    assert "@import" not in text and "url(" not in text


def test_what_others_wrote_is_text(text):
    assert "<script>alert(1)" not in text and "&lt;script&gt;alert(1)" in text
    assert "a &lt;machine&gt;" in text and "off by &lt;one&gt; &amp; more" in text


def test_the_roofline_has_who_counts_bytes_and_says_its_numbers(text):
    ((said, drawing),) = drawings(text).items()
    assert said.startswith("Roofline, float32: ceilings 1 GB/s and 0.001 TFLOP/s; eager NCHW up to 0.0002 TFLOP/s")
    assert "frozen up to 0.0004 TFLOP/s" in said
    words = ["".join(node.itertext()) for node in drawing.iter(f"{SVG}text")]
    assert {"eager NCHW", "frozen"} <= set(words) and not {"openvino", "timm", "apex", "fused"} & set(words)


def test_a_slow_measurement_is_a_loss_in_words_and_in_the_table(text):
    assert "Ours was the fastest, or as fast as the fastest, in 1 of 3 measurements." in text
    assert text.count('<td class="loss" data-order="0.8">0.80x</td>') == 2


def test_nothing_measured():
    empty = dataclasses.replace(sample(), measurements=[])
    text = page(empty)
    assert not Reader(text).open and "Nothing was measured." in text and "<img" not in text


def test_ours_and_eager_look_apart_and_a_contender_has_one_look():
    names = ["eager NCHW", "fused", "openvino", "frozen", "onnxruntime"]
    found = looks(names)
    assert len({look["color"] for look in found.values()}) == len({look["marker"] for look in found.values()}) == 5
