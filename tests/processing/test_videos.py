"""Videos to what a model reads: real files of all kinds, steady or not, whole or cut."""

import json
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mllm.data.collate import LeavingOut, PackingCollator, PaddingCollator
from mllm.data.examples import Examples, encode_row
from mllm.data.mixture_file import open_mixture, read_mixture
from mllm.data.probe import probe_media
from mllm.data.schema import MediaItem
from mllm.errors import MediaError
from mllm.processing.video import decode_video, video_header
from mllm.sizes.sampling import parse_sampling
from mllm.testing import tiny_model
from mllm.testing_media import write_tiny_video

UNEVEN = (0.0, 0.1, 0.2, 0.5, 1.5, 1.6, 2.0)
ASK = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What moves?"}]}
ANSWER = {"role": "assistant", "content": "a red 3"}


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    """By options of the video tower."""
    made = {}

    def make(**video):
        key = json.dumps(video, sort_keys=True)
        if key not in made:
            made[key] = tiny_model(tmp_path_factory.mktemp("parts"), video={"connector": "linear"} | video)[1]
        return made[key]

    return make


def _save(folder: Path, *media: dict) -> Path:
    rows = [{"id": number, "messages": [ASK, ANSWER], "media": [one]} for number, one in enumerate(media)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _examples(path: Path, processor) -> list:
    examples = Examples(open_mixture(read_mixture([str(path)])), processor)
    return [examples[number] for number in range(len(examples))]


@pytest.mark.parametrize("name", ["x.mp4", "x.webm", "x.mkv"])
@pytest.mark.parametrize("times", [(), UNEVEN], ids=["steady", "uneven"])
def test_a_header_says_how_many_frames_there_are_and_how_long_they_last(tmp_path, name, times):
    """Also where the file's own does not."""
    path = write_tiny_video(tmp_path / name, frames=7, times=times)
    header = video_header(path)
    last = times[-1] if times else 6 / 5
    shown = decode_video(path, sampling=np.arange(0, last + 0.01, 0.01).tolist()).timestamps
    assert header.frames == len(set(shown)) == 7
    assert last < header.seconds <= last + 0.5


def test_one_frame_is_a_video_too(tmp_path, processors):
    for name in ("x.mp4", "x.webm"):
        path = write_tiny_video(tmp_path / name, frames=1)
        header = video_header(path)
        assert header.frames == 1 and 0 < header.seconds <= 1
    [example] = _examples(_save(tmp_path, {"kind": "video", "path": "x.webm"}), processors(frames="uniform:3"))
    batch = PaddingCollator(processors(frames="uniform:3"))([example])
    assert batch["video_sizes"].tolist() == [3]
    assert torch.equal(batch["pixel_values_videos"][0], batch["pixel_values_videos"][2])


@pytest.mark.parametrize("times", [(), UNEVEN], ids=["steady", "uneven"])
@pytest.mark.parametrize("frames", ["uniform:4", "segment:3", "fps:2:2:6", "cap:3:5", "upbound:4"])
def test_the_frames_are_those_nearest_to_their_nominal_times(tmp_path, processors, times, frames):
    path = write_tiny_video(tmp_path / "x.mp4", frames=7, times=times)
    processor = processors(frames=frames)
    [example] = _examples(_save(tmp_path, {"kind": "video", "path": "x.mp4"}), processor)
    batch = PaddingCollator(processor)([example])
    moments = processor.frame_times(example.row.media[0].size)
    shown = np.array(times or [number / 5 for number in range(7)])
    nearest = [int(np.abs(shown - moment).argmin()) for moment in moments]
    whole = decode_video(path, sampling=shown.tolist()).frames
    expected = processor.encode_images([whole[place] for place in nearest])
    assert torch.equal(batch["pixel_values_videos"], expected)
    assert batch["video_sizes"].tolist() == [len(moments)]
    if not times:  # at a constant rate these are the very frames of the published rule
        published = decode_video(path, sampling=parse_sampling(frames)).frames
        assert torch.equal(batch["pixel_values_videos"], processor.encode_images(published))


def test_a_cut_is_seen_and_counted_as_a_video_of_its_own(tmp_path, processors):
    write_tiny_video(tmp_path / "x.mp4", frames=20)
    whole = {"kind": "video", "path": "x.mp4"}
    processor = processors(frames="cap:5:32")
    path = _save(tmp_path, whole, whole | {"start": 1.0, "end": 2.0}, whole | {"start": 3.0}, whole | {"end": 0.1})
    batch = PaddingCollator(processor)(_examples(path, processor))
    assert batch["video_sizes"].tolist() == [20, 5, 5, 1]
    frames = batch["pixel_values_videos"].split([20, 5, 5, 1])
    assert torch.equal(frames[1], frames[0][5:10])
    assert torch.equal(frames[2], frames[0][15:])
    assert torch.equal(frames[3], frames[0][:1])


def test_a_video_and_its_sound_are_two_media_of_one_file(tmp_path):
    files = runpy.run_path(str(Path(__file__).parents[1] / "media_files.py"))
    files["write_video"](tmp_path / "x.mp4", times=[number / 10 for number in range(15)], sound=True)
    processor = tiny_model(tmp_path / "parts", audio={}, video={"connector": "linear", "frames": "uniform:2"})[1]
    both = {"role": "user", "content": [{"type": "video"}, {"type": "audio"}, {"type": "text", "text": "What?"}]}
    media = [{"kind": kind, "path": "x.mp4"} for kind in ("video", "audio")]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": 0, "messages": [both, ANSWER], "media": media}) + "\n")
    [example] = _examples(tmp_path / "rows.jsonl", processor)
    batch = PaddingCollator(processor)([example])
    assert batch["video_sizes"].tolist() == [2]
    assert batch["audio_sizes"].tolist() == [pytest.approx(1.4 * 16_000, abs=2048)]
    assert batch["input_features"].abs().max() > 0


def test_times_stand_before_each_frame(tmp_path, processors):
    write_tiny_video(tmp_path / "x.mp4", frames=20)
    processor = processors(frames="uniform:3", timestamps=True)
    [example] = _examples(_save(tmp_path, {"kind": "video", "path": "x.mp4"}), processor)
    text = processor.tokenizer.decode(example.input_ids)
    four = "<video>" * 4
    assert f"0.0s: {four}\n2.0s: {four}\n3.8s: {four}\nWhat moves?" in text  # the 11th frame is that in the middle
    words = processor.tokenizer.decode(example.input_ids[example.labels != -100])
    assert words == "a red 3<|im_end|>"


def test_a_sentence_has_the_times_of_frames_that_are_read_together(tmp_path, processors):
    """As in Video-LLaMA."""
    write_tiny_video(tmp_path / "x.mp4", frames=20)
    qformer = {"type": "qformer", "per": "item", "layers": 1, "hidden_size": 16, "heads": 2, "num_queries": 3}
    processor = processors(frames="uniform:3", timestamps=True, connector=qformer)
    [example] = _examples(_save(tmp_path, {"kind": "video", "path": "x.mp4"}), processor)
    text = processor.tokenizer.decode(example.input_ids)
    sentence = "The video contains 3 frames sampled at 0.0, 2.0, 3.8 seconds."  # the 11th frame is that in the middle
    assert f"<video><video><video>\n{sentence}\nWhat moves?" in text


def test_a_row_that_takes_a_video_for_a_longer_one_is_left_out(tmp_path, processors):
    """Else its end would be shown again and again."""
    write_tiny_video(tmp_path / "x.mp4", frames=10)
    processor = processors(frames="uniform:4")
    [example] = _examples(_save(tmp_path, {"kind": "video", "path": "x.mp4"}), processor)
    longer = MediaItem("video", tmp_path / "x.mp4", 24, 32, frames=50, seconds=10.0)
    wrong = encode_row(replace(example.row, media=(longer,)), processor)
    for collate in (PaddingCollator(processor), PackingCollator(processor)):
        with pytest.raises(MediaError, match=r"ends after 2.00 seconds, and a frame at 9.80 seconds is asked for"):
            collate([wrong])
    collated = LeavingOut(PaddingCollator(processor))([example, wrong])
    assert len(collated.batch["video_sizes"]) == 1 and len(collated.left_out) == 1


def test_an_index_leaves_out_what_no_model_can_see(tmp_path, processors):
    """A file without frames, and one with more than there are positions for; each with its reason."""
    write_tiny_video(tmp_path / "good.mp4", frames=10)
    whole = (tmp_path / "good.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    write_tiny_video(tmp_path / "long.mp4", frames=30)
    rows = [
        {"id": name, "messages": [ASK, ANSWER], "media": [{"kind": "video", "path": f"{name}.mp4"}]}
        for name in ("good", "cut", "long")
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    processor = processors(frames="fps:2:2:64", connector={"type": "linear", "positions": 8})
    source = {"path": str(path), "on_bad": "quarantine", "max_bad_rate": 0.9}
    examples = Examples(open_mixture(read_mixture([source])), processor)
    assert [examples[number].row.id for number in range(len(examples))] == ["good"]
    assert sum(examples.dropped.values()) == 1
    with pytest.raises(MediaError, match="damaged or cut off"):
        probe_media("video", tmp_path / "cut.mp4")
