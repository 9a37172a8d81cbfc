"""The page: whole, by itself, and with every plot that the result has the numbers for."""

from __future__ import annotations

import base64
import dataclasses
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from fused_resnet.bench.report.page import MOST_OPS_DRAWN, page
from fused_resnet.bench.report.plots import Plots
from fused_resnet.bench.result import (
    ABSENT,
    FAILED,
    INFERENCE,
    MODEL,
    OP,
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
    ledger = {
        level: [
            {"phase": phase, "kind": kind, "bytes": size * part * 1e6}
            for phase, part in (("forward", 1), ("backward", 2))
            for kind in ("convolution", "statistics")
        ]
        for level, size in (("eager", 8.0), ("level 0", 6.0), ("level 3", 4.0))
    }
    facts = {"device": "a <machine>", "threads": 2, "torch": "2.13.0", "commit": "c" * 40, "date": "2026-11-25"}
    ceilings = {"float32": {"bytes_per_second": 1e9, "flop_per_second": 1e9}}
    return Result(facts | machine, {}, ceilings, entries, {"resnet18": ledger})


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
    return page([sample()])


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


def test_every_plot_that_there_are_numbers_for_is_there_and_says_them(text):
    said = list(drawings(text))
    expected = [
        "resnet18, inference, float32, 224x224: images a second by batch size; at batch 8: frozen 100, openvino 125",
        "resnet18, inference, batch 1, float32, 224x224: openvino 8.00 ms, frozen 10.0 ms, eager NCHW 20.0 ms",
        "resnet18, training step, batch 16, float32, 224x224: fused 50.0 ms",
        "resnet18: bytes read and written by a training step, an image: eager 48.0 MB, level 0 36.0 MB, level 3 24",
        "Roofline, float32: ceilings 1 GB/s and 0.001 TFLOP/s",
        "resnet18, training step, batch 16, float32, 224x224: eager NCHW 5.00 MB saved for backward; fused 2.50 MB",
    ]
    for beginning in expected:
        assert any(one.startswith(beginning) for one in said), (beginning, said)
    assert len(said) == len(expected)
    assert not any("timm" in one or "apex" in one for one in said)


def test_the_waterfall_falls_by_what_a_level_saves(text):
    (drawing,) = [one for said, one in drawings(text).items() if said.startswith("resnet18: bytes")]
    words = ["".join(node.itertext()) for node in drawing.iter(f"{SVG}text")]
    minus = "\N{MINUS SIGN}"
    assert [word for word in words if word.startswith(minus)] == [f"{minus}12", f"{minus}12"]
    assert "backward convolution" in words and "level by level" in words


def test_a_slow_measurement_is_a_loss_in_words_and_in_the_table(text):
    assert "openvino was 1.25x as fast as frozen" in text
    assert text.count('<td class="loss" data-order="0.8">0.80x</td>') == 2


def test_several_results_stand_side_by_side():
    text = page([sample(), dataclasses.replace(sample(), machine=sample().machine | {"threads": 1})])
    assert not Reader(text).open
    assert "A: batch 1, ms" in text and "B: batch 8, ms" in text and "2 conditions side by side" in text


def test_many_ops_share_a_figure():
    """A hundred of them with figures of their own took a minute and a half to draw."""

    def measured(op: str, shape: int, ours: float) -> Measurement:
        return Measurement(
            OP, f"{op} {shape}", INFERENCE, 1, "float32", None, {"eager": right(4), "fused": right(ours)}
        )

    entries = [measured("bn_apply", shape, 2) for shape in range(MOST_OPS_DRAWN)]
    few = dataclasses.replace(sample(), measurements=entries, ledgers={})
    assert len([said for said in drawings(page([few])) if said.startswith("bn_apply")]) == MOST_OPS_DRAWN
    many = dataclasses.replace(few, measurements=[*entries, measured("bn_stats", 1, 8), measured("bn_stats", 2, 4)])
    text = page([many])
    assert list(drawings(text)) == [
        "The best of ours against the fastest rival, by op: bn_apply 2.00x to 2.00x, bn_stats 0.50x to 1.00x"
    ]
    assert text.count("<details") > MOST_OPS_DRAWN and not Reader(text).open


def test_nothing_measured():
    empty = dataclasses.replace(sample(), measurements=[], ledgers={})
    text = page([empty])
    assert not Reader(text).open and "Nothing was measured." in text and "<img" not in text


def test_ours_and_eager_look_apart_and_a_contender_has_one_look():
    names = ["eager NCHW", "fused", "openvino", "frozen", "onnxruntime"]
    looks = Plots(names)
    assert len(set(looks.colours.values())) == len(set(looks.markers.values())) == 5
