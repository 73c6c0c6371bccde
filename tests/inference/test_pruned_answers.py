"""Answers from fewer visual tokens, in conversations and in batches, and pictures of what was left."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mllm.inference import Chat, generate_answers
from mllm.inference.pruned_media import draw_kept, views_of
from mllm.processing.media import MediaInput
from mllm.pruning import build_pruner
from mllm.testing_media import write_tiny_video

ROOT = Path(__file__).parents[2]
LENGTH = 12


def test_answers_from_fewer_tokens_are_the_same_streamed_and_in_batches(talker, conversations):
    spec = "uniform tokens=1"
    pruner = build_pruner(spec)
    streamed = [Chat(*talker, max_new_tokens=LENGTH, pruner=build_pruner(spec)).reply(one) for one in conversations]
    together = generate_answers(*talker, conversations, batch_size=3, max_new_tokens=LENGTH, pruner=pruner)
    plain = generate_answers(*talker, conversations, batch_size=3, max_new_tokens=LENGTH)
    assert together[0] == plain[0] == streamed[0]  # it has no picture
    assert together != plain
    assert pruner.statistics.num_prompts == 2
    assert together == streamed


def test_an_error_while_answering_lets_go_of_the_model(talker, conversations, picture):
    model, processor = talker
    pruner, gone = build_pruner("uniform tokens=2"), RuntimeError("on the way")

    def fail(done: int) -> None:
        raise gone

    with pytest.raises(RuntimeError, match="on the way"):
        generate_answers(model, processor, conversations, batch_size=2, max_new_tokens=2, pruner=pruner, progress=fail)
    with pruner(model):  # which it refuses while a pruner is attached
        pass


def test_every_picture_of_a_conversation_is_drawn(talker, conversations):
    model, processor = talker
    pruner = build_pruner("uniform tokens=2")
    chat = Chat(model, processor, max_new_tokens=2, pruner=pruner)
    chat.reply(conversations[2])
    (items,) = pruner.statistics.items
    assert len(draw_kept(processor, conversations[2], items)) == 3
    assert draw_kept(processor, conversations[0], items) == []


def test_videos_are_drawn_frame_by_frame(listener, picture, tmp_path):
    model, processor = listener
    video = write_tiny_video(tmp_path / "clip.mp4", frames=6)
    items = [{"type": "video", "video": video}, {"type": "image", "image": picture(0)}]
    messages = [{"role": "user", "content": [*items, {"type": "text", "text": "Compare."}]}]
    pruner = build_pruner("uniform tokens=0.5")
    Chat(model, processor, max_new_tokens=2, pruner=pruner).reply(messages)
    of_video, of_picture = draw_kept(processor, messages, pruner.statistics.items[0])
    assert of_video.size[0] > of_picture.size[0]  # four frames in a square


def test_a_view_is_what_the_encoder_sees(talker):
    """Padded to a square, in the encoder's size."""
    red = Image.new("RGB", (40, 20), "red")
    _, processor = talker
    (view,) = views_of(processor, MediaInput("image", red, (20, 40)))
    side = view.size[0]
    assert view.size == (side, side)
    middle, corner = view.getpixel((side // 2, side // 2)), view.getpixel((0, 0))
    assert middle[0] > 250 and max(middle[1:]) < 5 and max(corner) - min(corner) < 30


def test_the_terminal_chat_takes_a_pruner(talker, tmp_path, picture):
    model, processor = talker
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    picture(0).save(tmp_path / "scene.png")

    def run(*pruner: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "scripts/chat.py", tmp_path / "model", "--image", tmp_path / "scene.png"]
        return subprocess.run(
            [*command, "--max_new_tokens", "8", *pruner],
            input="What is in the picture?\n", cwd=ROOT, capture_output=True, text=True, timeout=240,
        )  # fmt: skip

    whole, fewer, wrong = run(), run("--pruner", "uniform", "tokens=1"), run("--pruner", "uniform token=1")
    assert whole.returncode == fewer.returncode == 0, fewer.stderr
    assert fewer.stdout.strip() and fewer.stdout != whole.stdout
    assert wrong.returncode == 2 and "'token', which it does not have" in wrong.stderr
    assert "Traceback" not in wrong.stderr
