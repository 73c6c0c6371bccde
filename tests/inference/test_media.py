"""Sounds and videos in a conversation: answered as in training's batches, alone or together; refused with a reason."""

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from mllm.data.collate import PaddingCollator
from mllm.data.examples import encode_row
from mllm.data.indexing.index import open_index
from mllm.data.sources import Source
from mllm.errors import MediaError, OptionError, RowError
from mllm.evaluation.runner import answer_rows, blanked, read_evaluation_rows
from mllm.inference import Chat, MediaLimits, generate_answers
from mllm.inference.prompt import encode_prompt, model_inputs
from mllm.testing import tiny_model

files = runpy.run_path(str(Path(__file__).parents[1] / "media_files.py"))
LENGTH = 8


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> dict[str, Path]:
    """A short sound, one of several windows in two channels at another rate, and one that holds nothing."""
    root, random = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0)
    paths = {name: root / f"{name}.{'flac' if name == 'long' else 'wav'}" for name in ("short", "long", "none")}
    soundfile.write(paths["short"], random.normal(0, 0.1, 6_000), 16_000)
    soundfile.write(paths["long"], random.normal(0, 0.1, (18_000, 2)), 8_000)
    soundfile.write(paths["none"], np.zeros(0), 16_000)
    return paths


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("videos")
    return {
        "slow": files["write_video"](root / "slow.mp4", times=[number / 4 for number in range(8)]),
        "fast": files["write_video"](root / "fast.mp4", times=[number / 25 for number in range(25)], sound=True),
    }


@pytest.fixture(scope="module")
def conversations(sounds, videos, picture):
    def item(kind: str, source, **cut) -> dict:
        return {"type": kind, kind: source, **cut}

    def ask(*content) -> list[dict]:
        return [{"role": "user", "content": [*content, {"type": "text", "text": "What is it?"}]}]

    short, long = item("audio", str(sounds["short"])), item("audio", sounds["long"].read_bytes())
    slow, fast = item("video", videos["slow"]), item("video", videos["fast"])
    return [
        ask(short),
        ask(fast),
        ask(slow, long, item("image", picture(0))),
        [*ask(long), {"role": "assistant", "content": "a red 3"}, *ask(fast, short)],
        ask(item("audio", videos["fast"]), item("video", videos["slow"], start=0.5, end=1.5)),
        [{"role": "user", "content": "Is there a 5?"}],
    ]


def test_stream_equals_batch_and_neighbours_change_nothing(listener, conversations):
    chat = Chat(*listener, max_new_tokens=LENGTH)
    alone = [chat.reply(messages) for messages in conversations]
    assert len(set(alone)) > 3  # a talker worth comparing
    assert generate_answers(*listener, conversations, batch_size=6, max_new_tokens=LENGTH) == alone


def test_prompt_is_what_training_reads(listener, sounds, videos, tmp_path):
    """The ids before the answer, and every tensor of the media."""
    _, processor = listener
    paths = [shutil.copy(path, tmp_path) for path in (videos["fast"], sounds["long"], videos["slow"])]
    kinds, cuts = ("video", "audio", "video"), ({"start": 0.2}, {}, {"start": 0.5, "end": 1.5})
    media = [{"kind": kind, "path": path, **cut} for kind, path, cut in zip(kinds, paths, cuts, strict=True)]
    content = [{"type": kind} for kind in kinds] + [{"type": "text", "text": "?"}]
    said = {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}
    row = {"id": "1", "messages": [{"role": "user", "content": content}, said], "media": media}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    [example] = [encode_row(row, processor) for row in open_index(Source(tmp_path / "rows.jsonl"))]
    trained = PaddingCollator(processor)([example])

    asked = [{"type": kind, kind: path, **cut} for kind, path, cut in zip(kinds, paths, cuts, strict=True)]
    prompt = encode_prompt(processor, [{"role": "user", "content": [*asked, content[-1]]}])
    inputs = model_inputs(processor, [prompt], device=torch.device("cpu"))
    length = len(prompt.input_ids)
    assert inputs["input_ids"].tolist() == trained["input_ids"][:, :length].tolist()
    media_names = set(inputs) - {"input_ids", "attention_mask"}
    assert {"input_features", "audio_sizes", "pixel_values_videos", "video_sizes"} <= media_names
    assert all(torch.equal(inputs[name], trained[name]) for name in media_names)


BAD = {
    "no file": ({"type": "audio", "audio": "/nowhere/a.wav"}, "sound 1 .*nowhere.* does not exist"),
    "no key": ({"type": "video"}, "video 1 of the conversation given as NoneType"),
    "no sound": ({"type": "audio", "audio": b"words"}, "sound 1 .*no audio of a known type"),
    "no video": ({"type": "video", "video": b"words"}, "video 1 .*no video of a known type"),
    "a number": ({"type": "video", "video": 3}, "video 1 of the conversation given as int"),
}


@pytest.mark.parametrize(("item", "match"), BAD.values(), ids=BAD.keys())
def test_bad_media_are_refused_at_once(listener, item, match):
    with pytest.raises(MediaError, match=match):
        Chat(*listener).stream([{"role": "user", "content": [item]}])


def test_a_sound_without_samples_is_refused(listener, sounds):
    with pytest.raises(MediaError, match="sound 1 .* holds no samples"):
        Chat(*listener).stream([{"role": "user", "content": [{"type": "audio", "audio": sounds["none"]}]}])


@pytest.mark.parametrize("cut", [{"start": -1}, {"start": 2.0}, {"end": 0}, {"start": 0.3, "end": 0.2}, {"end": "1"}])
def test_a_cut_outside_of_the_medium_is_refused(listener, videos, cut):
    with pytest.raises(MediaError, match="video 1 of the conversation: start = "):
        Chat(*listener).stream([{"role": "user", "content": [{"type": "video", "video": videos["fast"], **cut}]}])


def test_limits_are_kept(listener, sounds, videos, conversations, picture):
    def refused(limits, *content):
        with pytest.raises(MediaError) as caught:
            Chat(*listener, limits=limits).stream([{"role": "user", "content": list(content)}])
        return caught.value

    sound, video = {"type": "audio", "audio": sounds["long"]}, {"type": "video", "video": videos["fast"]}
    image = {"type": "image", "image": picture(0)}
    # Counted before a file is opened.
    missing = {"type": "audio", "audio": "/nowhere/a.wav"}
    assert refused(MediaLimits(sounds=1), missing, missing).found == "2 sounds in this conversation"
    assert refused(MediaLimits(videos=0), video).found == "1 video in this conversation"
    assert refused(MediaLimits(images=1), image, image).expected == "at most 1"
    assert "sound 1 of the conversation is 2.2 seconds long" in refused(MediaLimits(seconds=2), sound).found
    assert "video 1" in refused(MediaLimits(seconds=0.5), image, video).found
    enough = MediaLimits(images=1, sounds=2, videos=2, seconds=3)
    assert all(Chat(*listener, max_new_tokens=1, limits=enough).reply(one) is not None for one in conversations)
    with pytest.raises(OptionError, match="seconds=-1"):
        MediaLimits(seconds=-1)


def test_length_of_a_conversation_names_its_media(listener, videos):
    model, _ = listener
    limit = model.config.get_text_config().max_position_embeddings
    many = [{"type": "video", "video": videos["fast"]}] * (limit // 4)
    with pytest.raises(RowError, match=rf"tokens, with {len(many)} videos"):
        Chat(*listener).stream([{"role": "user", "content": many}])


def test_evaluation_rows_are_answered_with_their_media(listener, sounds, videos, tmp_path):
    """As the same questions by hand; blanked, as if there were nothing in them, yet with as many tokens."""
    rows = []
    for number, (kind, path) in enumerate([("audio", sounds["long"]), ("video", videos["slow"])]):
        question = {"role": "user", "content": [{"type": kind}, {"type": "text", "text": "What?"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": "3"}]}
        media = [{"kind": kind, "path": str(path), "start": 0.25}]
        rows.append({"id": number, "messages": [question, answer], "media": media})
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_evaluation_rows(tmp_path / "eval.jsonl")
    answers = answer_rows(*listener, read, max_new_tokens=LENGTH)
    by_hand = [
        [{"role": "user", "content": [{"type": kind, kind: path, "start": 0.25}, {"type": "text", "text": "What?"}]}]
        for kind, path in (("audio", sounds["long"]), ("video", videos["slow"]))
    ]
    assert answers == generate_answers(*listener, by_hand, batch_size=2, max_new_tokens=LENGTH)

    prompts = [encode_prompt(listener[1], messages) for messages in by_hand]
    seen, blank = (
        model_inputs(listener[1], prompts, device=torch.device("cpu"), change=change) for change in (None, blanked)
    )
    assert torch.equal(seen["input_ids"], blank["input_ids"])
    assert {name: value.shape for name, value in seen.items()} == {name: value.shape for name, value in blank.items()}
    grey = listener[1].encode_images([Image.new("RGB", (files["WIDTH"], files["HEIGHT"]), (128, 128, 128))])
    assert torch.equal(blank["pixel_values_videos"], grey.expand_as(seen["pixel_values_videos"]))
    silence = listener[1].feature_extractor(np.zeros(16_000), sampling_rate=16_000, return_tensors="pt").input_features
    assert all(torch.equal(window, silence[0]) for window in blank["input_features"])
    assert answer_rows(*listener, read, blank=True, max_new_tokens=LENGTH) != answers


@pytest.mark.parametrize("image", [{"tiles": "llava_next"}, {"tiles": "sphinx", "connector": "qformer"}], ids=str)
def test_pictures_in_tiles_are_answered_alike_alone_and_together(image, tmp_path, picture):
    connector = {
        "type": "qformer",
        "num_queries": 3,
        "layers": 1,
        "hidden_size": 32,
        "heads": 4,
        "intermediate_size": 48,
    }
    image = {**image, **({"connector": connector} if "connector" in image else {})}
    model, processor = tiny_model(tmp_path, encoder="siglip_vision_model", image=image)
    for module, factor in ((model.get_output_embeddings(), 20), (model.model.image_tower.connector, 4)):
        for parameter in module.parameters():
            parameter.data *= factor
    sizes = [(16, 40), (40, 16), (30, 30), (1, 9)]
    shown = [{"type": "image", "image": picture(number).resize(size)} for number, size in enumerate(sizes)]
    conversations = [[{"role": "user", "content": content}] for content in ([shown[0]], shown[1:3], [shown[3]], shown)]
    alone = [Chat(model, processor, max_new_tokens=LENGTH).reply(messages) for messages in conversations]
    assert len(set(alone)) > 2
    assert generate_answers(model, processor, conversations, batch_size=4, max_new_tokens=LENGTH) == alone
