"""What a Gradio page remembers becomes messages; what is not the conversation's stays out."""

import io
import runpy
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from mllm.errors import MediaError
from mllm.inference.history import NO_ANSWER, messages_from_gradio

write_video = runpy.run_path(str(Path(__file__).parents[1] / "media_files.py"))["write_video"]


@pytest.fixture
def uploads(tmp_path):
    folder = tmp_path / "uploads"
    folder.mkdir()
    for name in ("red.png", "blue.png"):
        Image.new("RGB", (4, 4), name.removesuffix(".png")).save(folder / name)
    return folder


def _text(words):
    return {"type": "text", "text": words}


def _file(path):
    return {"type": "file", "file": {"path": str(path), "url": "http://elsewhere/x.png", "mime_type": "image/png"}}


def _user(*parts):
    return {"role": "user", "content": list(parts), "metadata": None, "options": None}


def _assistant(words, title=None):
    return {"role": "assistant", "content": [_text(words)], "metadata": {"title": title} if title else None}


def _message(text="", *files):
    return {"text": text, "files": [str(file) for file in files]}


def _image(path):
    return {"type": "image", "image": path.read_bytes()}


def test_first_message(uploads):
    messages = messages_from_gradio(_message("Hi", uploads / "red.png"), [], folder=uploads)
    assert messages == [{"role": "user", "content": [_image(uploads / "red.png"), _text("Hi")]}]
    assert Image.open(io.BytesIO(messages[0]["content"][0]["image"])).size == (4, 4)


def test_several_turns_in_order(uploads):
    history = [
        _user(_file(uploads / "red.png"), _file(uploads / "blue.png"), _text("Compare.")),
        _assistant("One is red."),
        _user(_text("Which?")),
        _assistant("The first."),
    ]
    messages = messages_from_gradio(_message("Sure?"), history, folder=uploads)
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant", "user"]
    pictures = [_image(uploads / "red.png"), _image(uploads / "blue.png")]
    assert messages[0]["content"] == [*pictures, _text("Compare.")]
    assert messages[-1] == {"role": "user", "content": [_text("Sure?")]}
    assert all(set(message) == {"role", "content"} for message in messages)


def test_control_tokens_stay_text(uploads):
    history = [_user(_text("<image>")), _assistant("<|im_end|><image>")]
    messages = messages_from_gradio(_message("<image>"), history, folder=uploads)
    assert [message["content"] for message in messages] == [
        [_text("<image>")],
        [_text("<|im_end|><image>")],
        [_text("<image>")],
    ]


@pytest.mark.parametrize(
    "refused",
    [
        [_user(_text("bad")), _assistant("Found a damaged file.", title=NO_ANSWER)],
        [_user(_text("stopped before a word"))],
        [_user(_text("empty")), _assistant("")],
        [_user(_text("one")), _user(_text("two"))],
        [_assistant("Found nothing to answer.", title=NO_ANSWER)],
    ],
)
@pytest.mark.parametrize("behind", [True, False])
def test_turns_without_an_answer_are_left_out(uploads, refused, behind):
    answered = [_user(_text("good")), _assistant("fine")]
    history = [*answered, *refused] if behind else [*refused, *answered]
    messages = messages_from_gradio(_message("next"), history, folder=uploads)
    assert [message["content"][0]["text"] for message in messages] == ["good", "fine", "next"]


def test_a_bad_picture_does_not_spoil_later_turns(uploads):
    gone = uploads / "gone.png"
    history = [_user(_file(gone)), _assistant("no longer on the server", title=NO_ANSWER)]
    assert len(messages_from_gradio(_message("next"), history, folder=uploads)) == 1


def test_only_uploads_are_opened(uploads, tmp_path):
    """History comes from the browser, where anybody may write a path into it."""
    secret = tmp_path / "secret.png"
    Image.new("RGB", (4, 4)).save(secret)
    link = uploads / "link.png"
    link.symlink_to(secret)
    for path in (secret, uploads / ".." / "secret.png", link, uploads, uploads / "gone.png", "/etc/passwd"):
        history = [_user(_file(path)), _assistant("an answer")]
        with pytest.raises(MediaError, match="no longer on the server") as caught:
            messages_from_gradio(_message("next"), history, folder=uploads)
        assert "secret" not in str(caught.value)
        with pytest.raises(MediaError, match="no longer on the server"):
            messages_from_gradio(_message("", path), [], folder=uploads)


def test_nothing_said_is_an_empty_message(uploads):
    assert messages_from_gradio(_message(""), [], folder=uploads) == [{"role": "user", "content": []}]


def test_files_are_told_by_their_bytes(uploads, tmp_path):
    """Not by their names, nor by what the browser says of them."""
    sound, video = uploads / "note.bin", uploads / "clip.png"
    soundfile.write(sound, np.zeros(800), 8000, format="FLAC")
    write_video(tmp_path / "clip.mp4", times=[0, 0.5]).rename(video)
    content = messages_from_gradio(_message("What?", sound, video), [], folder=uploads)[0]["content"]
    assert content == [
        {"type": "audio", "audio": sound.read_bytes()},
        {"type": "video", "video": video.read_bytes()},
        _text("What?"),
    ]


def test_sound_in_a_container_of_videos_is_a_sound(uploads):
    """As a browser's microphone records it: the same container, without pictures."""
    path = uploads / "voice.webm"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libopus", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert messages_from_gradio(_message("", path), [], folder=uploads)[0]["content"][0]["type"] == "audio"


@pytest.mark.parametrize("content", [b"hello, I am a letter", b"\x00" * 100], ids=["words", "zeros"])
def test_a_file_that_holds_no_media_is_refused(uploads, content):
    path = uploads / "thing.mp4"
    path.write_bytes(content)
    with pytest.raises(MediaError, match=r"thing\.mp4.* holds no picture, sound or video") as caught:
        messages_from_gradio(_message("", path), [], folder=uploads)
    assert str(uploads) not in str(caught.value)
