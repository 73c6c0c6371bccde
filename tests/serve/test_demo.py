"""The chat page in a headless browser, over a real server process."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm.assemble import assemble_checkpoint
from mllm.pruning.picture import SIDE
from mllm.testing import save_tiny_parts
from mllm.testing_media import write_tiny_video
from mllm.testing_sounds import save_tiny_audio_encoder, sine, write_wav

ROOT = Path(__file__).parents[2]

RECORD_LENGTHS = """
window.lengths = [];
new MutationObserver(() => {
    const answers = document.querySelectorAll("[data-testid=bot]");
    if (answers.length) lengths.push(answers[answers.length - 1].textContent.length);
}).observe(document.body, {childList: true, subtree: true, characterData: true});
"""

DRAWN = "height => (document.querySelector('#kept img')?.naturalHeight ?? 0) > height"


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A tiny model of images, sounds and videos, saved."""
    root = tmp_path_factory.mktemp("reader")
    audio = {"encoder": save_tiny_audio_encoder(root / "whisper")}
    return assemble_checkpoint(root / "model", **save_tiny_parts(root), audio=audio, video={"frames": "uniform:4"})


@pytest.fixture(scope="module")
def server(reader, tmp_path_factory):
    """The address of a page over the tiny model."""
    with _served(reader, tmp_path_factory.mktemp("server"), "--max_seconds", "3", "--max_upload_mb", "1") as address:
        yield address


@pytest.fixture(scope="module")
def browser(chromium):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(server, browser):
    page = _opened(browser, server)
    yield page
    _shoot(page, "demo.png")


def _picture(path: Path, side: int) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.browser
def test_a_conversation_about_a_picture(page, tmp_path):
    _upload(page, _picture(tmp_path / "scene.png", 64))
    page.evaluate(RECORD_LENGTHS)
    answer = _ask(page, "What is in the picture?")
    _rest(page)
    first = answer.inner_text()
    lengths = page.evaluate("lengths")
    assert len(set(lengths)) > 2 and first.strip()  # it was seen to grow
    assert page.get_by_test_id("user").locator("img").count() == 1
    assert _ask(page, "And now?").inner_text()
    _rest(page)
    assert page.get_by_test_id("bot").first.inner_text() == first


@pytest.mark.browser
def test_a_literal_placeholder_is_text(page):
    _ask(page, "a literal <image> and <b>bold</b> here")
    _rest(page)
    assert "a literal <image> and <b>bold</b> here" in page.get_by_test_id("user").last.inner_text()
    assert not page.get_by_text("No answer").count()


@pytest.mark.browser
def test_a_corrupt_picture_gets_a_notice(page, tmp_path):
    whole = _picture(tmp_path / "scene.png", 64).read_bytes()
    (tmp_path / "bad.png").write_bytes(whole[: len(whole) // 2])
    _upload(page, tmp_path / "bad.png")
    _ask(page, "What is this?")
    page.get_by_text("damaged or truncated PNG").wait_for()
    _rest(page)
    notices = page.get_by_text("This cannot be used").count()
    _ask(page, "Never mind.")  # the bad picture is not part of the conversation
    _rest(page)
    assert page.get_by_text("This cannot be used").count() == notices == 1


@pytest.mark.browser
def test_a_sound_and_a_video_are_answered(page, tmp_path):
    notices = page.get_by_text("No answer").count()
    _upload(page, write_wav(tmp_path / "tone.wav", sine(1.5)))
    _upload(page, write_tiny_video(tmp_path / "clip.webm", frames=6))
    assert _ask(page, "What do you hear and see?").inner_text().strip()
    _rest(page)
    assert page.get_by_text("No answer").count() == notices


@pytest.mark.browser
def test_a_long_sound_is_refused_by_its_length(page, tmp_path):
    _upload(page, write_wav(tmp_path / "long.wav", sine(4.0)))
    _ask(page, "What do you hear?")
    page.get_by_text("is 4.0 seconds long. Expected: at most 3 seconds").wait_for()
    _rest(page)


@pytest.mark.browser
def test_an_oversized_file_is_refused(page, tmp_path):
    page.locator("input[type=file]").first.set_input_files(_picture(tmp_path / "large.png", 800))
    page.get_by_text("exceed").first.wait_for()
    assert _ask(page, "Still there?").inner_text()
    _rest(page)


@pytest.mark.browser
def test_under_a_pruner_the_page_shows_what_is_left_of_each_picture(reader, browser, tmp_path):
    with _served(reader, tmp_path, "--pruner", "uniform", "tokens=2") as address:
        page = _opened(browser, address)
        drawn = page.locator("#kept img")
        _ask(page, "Hello?")
        _rest(page)
        assert drawn.count() == 0
        for number in (1, 2):  # all pictures of the conversation, each time
            _upload(page, _picture(tmp_path / f"scene{number}.png", 48 + number))
            assert _ask(page, "What is in the picture?").inner_text()
            page.wait_for_function(DRAWN, arg=number * SIDE)
            _rest(page)
        assert not page.get_by_text("No answer").count()
        _shoot(page, "demo_pruner.png")


def test_a_pruner_that_is_not_there(tmp_path):
    command = [sys.executable, "serve/demo.py", "--model", tmp_path, "--pruner", "fewest", "tokens=2"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert "pruner 'fewest'" in run.stderr and "uniform" in run.stderr and "Traceback" not in run.stderr


def test_a_model_that_is_not_there(tmp_path):
    command = [sys.executable, "serve/demo.py", "--model", tmp_path]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert "holds no finished checkpoint" in run.stderr and "Traceback" not in run.stderr


@contextlib.contextmanager
def _served(model: Path, folder: Path, *options: str):
    """A server of the page; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "log.txt"
    command = [sys.executable, "serve/demo.py", "--model", model, "--port", str(port), "--max_new_tokens", "48"]
    with log.open("w") as output:
        process = subprocess.Popen([*command, *options], cwd=ROOT, stdout=output, stderr=output)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(address, process, log)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def _opened(browser, address: str):
    page = browser.new_page(viewport={"width": 1100, "height": 850})
    page.set_default_timeout(60_000)
    page.goto(address)
    page.locator("textarea").first.wait_for()
    return page


def _shoot(page, name: str) -> None:
    if shots := os.environ.get("MLLM_SCREENSHOTS"):
        page.screenshot(path=Path(shots, name), full_page=True)


def _wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(1200):
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError):
            urllib.request.urlopen(address, timeout=5).close()
            return
        time.sleep(0.1)
    raise TimeoutError(log.read_text())


def _upload(page, path: Path) -> None:
    shown = page.locator(".thumbnail-item, .thumbnail-image")
    known = shown.count()
    page.locator("input[type=file]").first.set_input_files(path)
    shown.nth(known).wait_for()


def _ask(page, words: str):
    """Send a message and wait for the first words of the answer."""
    known = page.get_by_test_id("bot").count()
    box = page.locator("textarea").first
    box.fill(words)
    box.press("Enter")
    answer = page.get_by_test_id("bot").nth(known)
    answer.wait_for()
    return answer


def _rest(page) -> None:
    """Wait until the last answer has not grown for a second."""
    before = None
    while before != (before := page.get_by_test_id("bot").last.inner_text()):
        page.wait_for_timeout(1000)
