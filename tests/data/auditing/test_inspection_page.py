"""The page of scripts/inspect_data.py: complete in itself, readable, and deaf to what the data say."""

import os
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm.data.auditing.audit import audit_source
from mllm.data.auditing.audit_page import inspection_page, row_view
from mllm.data.auditing.charts import statistics_charts
from mllm.data.auditing.statistics import BatchSize, RowSize, Statistics
from mllm.data.auditing.thumbnails import seen_image, thumbnail
from mllm.data.quarantine import Bad
from mllm.data.schema import parse_row
from mllm.data.sources import Source
from mllm.errors import OptionError
from mllm.load import load_processor
from mllm.processing.images import decode_image

HOSTILE = (
    "</span></script><script>document.title='owned'</script><img src=x onerror=alert(1)>\"'&<!--\u202e\x1b[31m{{7*7}}"
)
ALLOWED = {"http-equiv", "content", "class", "src", "alt", "title", "name", "charset", "lang"}


@pytest.fixture(scope="module")
def processor(assembled):
    return load_processor(assembled)


@pytest.fixture
def row(tmp_path):
    """A row that says hostile things everywhere, about a good image, a missing one and a damaged one."""
    pixels = np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "<b>&.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "<b>&.png").read_bytes()[:2000])
    media = [
        {"kind": "image", "path": name, "height": 30, "width": 50} for name in ("<b>&.png", "none.png", "cut.png")
    ]
    content = [*({"type": "image"} for _ in media), {"type": "text", "text": HOSTILE}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f"It is {HOSTILE} {'x' * 400}"}]
    fields = {"id": HOSTILE, "source": HOSTILE, "messages": messages, "media": media}
    return parse_row(fields, where=HOSTILE, root=tmp_path)


class Page(HTMLParser):
    """Elements, their attributes and their texts."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.attributes, self.links, self.text = Counter(), set(), [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_hostile_text_stays_text(row, processor):
    page = Page(inspection_page(HOSTILE, facts=[HOSTILE], rows=[row_view(row, processor)], has_tokens=True))
    assert "script" not in page.elements and page.attributes <= ALLOWED
    assert all(link.startswith("data:image/") for link in page.links) and "img" in page.elements
    for part in ("<script>", "onerror=alert(1)", "{{7*7}}", r"\u202e", r"\x1b[31m", "<!--"):
        assert "".join(page.text.split()).count(part) >= 4, part  # title, facts, head of the row, its text
    assert "\u202e" not in page.text and "\x1b" not in page.text


def test_hostile_findings_stay_text(row, tmp_path):
    class Rows(list):
        num_bad, dropped, licence = 1, Counter({HOSTILE: 2}), HOSTILE
        source = Source(path=tmp_path, name=HOSTILE)

        def bad(self):
            return [Bad(HOSTILE, HOSTILE, "", HOSTILE), Bad(HOSTILE, HOSTILE, f"{HOSTILE}/x.jpg", HOSTILE)]

    page = Page(inspection_page("Audit", audits=[audit_source(Rows([row]))]))
    assert "script" not in page.elements and "img" not in page.elements and page.attributes <= ALLOWED
    assert "<script>" in page.text and "none.png" in page.text and "\u202e" not in page.text


def test_the_page_shows_what_is_read_and_what_is_learned(row, processor):
    html = inspection_page("Rows", rows=[row_view(row, processor)], has_tokens=True, max_length=10)
    learned = re.sub(r"<[^>]+>", "", "".join(re.findall(r'<span class="t assistant learn[^>]*>(.*?)</span>', html)))
    assert learned.startswith("It is") and "document.title" in learned
    assert html.count("× 4</span>") == 3  # 16 px in patches of 8
    assert "longer than max_length = 10" in html
    assert "does not exist" in html and "truncated PNG" in html  # in the places of the pictures


def test_the_picture_of_what_is_seen_is_what_the_encoder_gets(row, processor):
    image = decode_image(row.media[0].path)
    seen = seen_image(image, processor)
    side = processor.rule("image").image_size
    assert seen.size == (side, side)
    again = processor.encode_images([seen])[0]
    assert np.abs((again - processor.encode_images([image])[0]).numpy()).max() < 0.02  # half a step of 8 bits


@pytest.mark.parametrize("kind", ["wav", "mp4"])
def test_sounds_and_videos_have_pictures_too(kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    if kind == "wav":
        soundfile = pytest.importorskip("soundfile")
        soundfile.write(path, np.sin(np.arange(16_000) / 20), 16_000)
    else:
        _write_video(path)
    item = {"kind": "audio" if kind == "wav" else "video", "path": path.name, "end": 0.5, "seconds": 1.0}
    messages = [{"role": "user", "content": [{"type": item["kind"]}]}, {"role": "assistant", "content": "Yes."}]
    row = parse_row({"id": 1, "messages": messages, "media": [item]}, where="x", root=tmp_path)
    shown = thumbnail(row.media[0])
    assert not shown.problem and len(shown.pictures) == (1 if kind == "wav" else 4)
    assert "1.0 s" in shown.caption and "cut from 0 s to 0.5 s" in shown.caption


def test_charts_are_pictures(processor):
    pytest.importorskip("matplotlib")
    sizes = [RowSize(f"$source_{number % 12}", 10, number, 20, 4, 1) for number in range(40)]
    batches = [BatchSize(10, 20, 5, 3, {"$source_1": 3, "_hidden": 2}) for _ in range(7)]
    charts = statistics_charts(Statistics("tokens", 40, sizes, batches, 5, 0), max_length=50)
    page = Page(inspection_page("Stats", charts=charts))
    assert all(chart.png.startswith(b"\x89PNG") for chart in charts)
    assert page.elements["img"] == len(charts) == 2


def test_charts_without_matplotlib_say_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(OptionError, match="pip install matplotlib"):
        statistics_charts(Statistics("words", 1, [RowSize("a", 1, 1, 1, 0, 0)], [], 1, 0))


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_shows_it(row, processor, chromium, tmp_path, scheme, width):
    from playwright.sync_api import sync_playwright

    html = inspection_page("Rows", facts=["a fact"], rows=[row_view(row, processor)], has_tokens=True)
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 850}, color_scheme=scheme)
        noise, requests = [], []
        page.on("console", lambda message: noise.append(message.text))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((tmp_path / "page.html").as_uri())
        assert page.title() == "Rows" and not noise
        assert all(url.startswith(("file:", "data:")) for url in requests)
        # Everything fits the width, every picture loads, and words stand out from what is behind them.
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(
            "[...document.querySelectorAll('.text')].every(text => text.scrollWidth <= text.clientWidth)"
        )
        assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        for selector in ("body", ".t.user", ".t.learn", ".media", ".none", "figcaption"):
            assert page.locator(selector).first.is_visible(), selector
            assert _contrast(page, selector) > 4.5, selector
        if shots := os.environ.get("MLLM_SCREENSHOTS"):
            page.screenshot(path=Path(shots, f"inspect-{scheme}-{width}.png"), full_page=True)
        browser.close()


def _contrast(page, selector: str) -> float:
    """Of the words to what lies behind them, as WCAG defines it."""
    colours = page.evaluate(
        """selector => {
            const element = document.querySelector(selector);
            let behind = element;
            while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
            return [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
        }""",
        selector,
    )

    def luminance(colour: str) -> float:
        parts = [float(part) / 255 for part in re.findall(r"[\d.]+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(map(luminance, colours))
    return (light + 0.05) / (dark + 0.05)


def _write_video(path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 25 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
