"""Frames are the ones that a rule picks, and their times are those at which the file shows them."""

import runpy
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm.errors import MediaError
from mllm.processing import video
from mllm.processing.torchcodec_frames import torchcodec_frames, video_decoder_class
from mllm.processing.video import decode_video, video_header
from mllm.sizes.sampling import Sampling, parse_sampling

files = runpy.run_path(str(Path(__file__).parents[1] / "media_files.py"))
write_video, frame_number, turn, write_endless = (
    files[name] for name in ("write_video", "frame_number", "turn", "write_endless")
)

STEADY = [number / 10 for number in range(50)]
UNEVEN = [0, 0.1, 0.2, 0.3, 1.0, 1.1, 3.0, 3.2, 5.0, 7.5]


def _numbers(result: video.VideoFrames) -> list[int]:
    return [frame_number(frame) for frame in result.frames]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "steady.mp4", times=STEADY)
    write_video(folder / "uneven.mp4", times=UNEVEN, options={"bf": "0"})
    return folder


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("x.mp4", "libx264"),
        ("x.mp4", "mpeg4"),
        ("x.mov", "libx264"),
        ("x.webm", "libvpx-vp9"),
        ("x.webm", "libvpx"),
        ("x.mkv", "libx264"),
        ("x.gif", "gif"),
    ],
)
def test_every_frame_comes_with_the_time_at_which_it_is_shown(name, codec, tmp_path):
    path = write_video(tmp_path / name, times=STEADY[:30], codec=codec)
    header = video_header(path)
    assert (header.height, header.width) == (files["HEIGHT"], files["WIDTH"])
    assert header.frames in (0, 30)
    assert header.format == name[2:].upper()
    for source in (path, path.read_bytes()):
        result = decode_video(source, sampling=Sampling("uniform", frames=30))
        assert _numbers(result) == list(range(30))
        np.testing.assert_allclose(result.timestamps, STEADY[:30], atol=1e-6)


@pytest.mark.parametrize("key_every", [1, 7, 100])
def test_seeking_finds_the_frames_that_decoding_everything_finds(key_every, tmp_path):
    path = write_video(tmp_path / "x.mp4", times=STEADY, key_every=key_every)
    result = decode_video(path, sampling=Sampling("segment", frames=9, seed=3))
    np.testing.assert_allclose(result.timestamps, np.array(_numbers(result)) / 10)
    assert len(set(_numbers(result))) == 9


def test_only_the_group_of_a_wanted_frame_is_decoded(tmp_path, monkeypatch):
    import av

    path = write_video(tmp_path / "x.mp4", times=STEADY, key_every=5, options={"bf": "0", "sc_threshold": "0"})
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        ticks, keys = video._packet_ticks(container, stream, "x")
        decoded = []
        decode = container.decode
        box = type("Box", (), {"seek": container.seek, "decode": lambda self, s: map(_noting(decoded), decode(s))})()
        (frame,) = video._decode_at(box, stream, ticks[[48]], keys, "x")
    assert frame.pts == ticks[48]
    assert len(decoded) <= 5


def _noting(seen):
    return lambda frame: seen.append(frame.pts) or frame


def test_uneven_times_are_sampled_by_time_and_reported_as_they_are(folder):
    result = decode_video(folder / "uneven.mp4", sampling=Sampling("uniform", frames=4))
    # 0, 2.5, 5 and 7.5 seconds: nearest in time, not every third frame.
    assert _numbers(result) == [0, 6, 8, 9]
    np.testing.assert_allclose(result.timestamps, [0, 3.0, 5.0, 7.5], atol=1e-3)


@pytest.mark.parametrize(("degrees", "turns"), [(90, -1), (180, 2), (270, 1)])
def test_rotation_turns_pixels_and_size_alike(degrees, turns, folder, tmp_path):
    flat = decode_video(folder / "steady.mp4", sampling=Sampling("uniform", frames=3)).frames
    path = turn(folder / "steady.mp4", degrees, tmp_path / "turned.mp4")
    turned = decode_video(path, sampling=Sampling("uniform", frames=3)).frames
    for before, after in zip(flat, turned, strict=True):
        assert np.array_equal(np.rot90(np.asarray(before), turns), np.asarray(after))
    header = video_header(path)
    assert (header.width, header.height) == turned[0].size
    assert header.notes == ("rotation",)


def test_interval_comes_before_the_rule(folder):
    path = folder / "steady.mp4"
    result = decode_video(path, sampling=Sampling("uniform", frames=3), start=1.0, end=2.0)
    assert _numbers(result) == [10, 15, 20]
    np.testing.assert_allclose(result.timestamps, [1.0, 1.5, 2.0])
    assert _numbers(decode_video(path, sampling=parse_sampling("uniform:2"), start=4.95)) == [49, 49]
    # Between two frames the earlier one is on the screen.
    between = decode_video(folder / "uneven.mp4", sampling=parse_sampling("uniform:1"), start=3.5, end=4.5)
    assert _numbers(between) == [7]
    with pytest.raises(MediaError, match="ends after 5.00 seconds, before start = 9"):
        decode_video(path, sampling=parse_sampling("uniform:2"), start=9.0)
    with pytest.raises(MediaError, match="start = 3, end = 2"):
        decode_video(path, sampling=parse_sampling("uniform:2"), start=3.0, end=2.0)


def test_a_decoder_that_takes_too_long_is_killed(tmp_path):
    path = write_endless(tmp_path / "endless.webm", num_frames=20_000)
    assert path.stat().st_size < 5_000_000
    assert video_header(path).height == 2048
    with pytest.raises(MediaError, match="row 3: the video .* takes more than 0.5 seconds"):
        decode_video(path, sampling=Sampling("uniform", frames=2), where="row 3", seconds=0.5)


@pytest.mark.skipif(video_decoder_class() is None, reason="torchcodec does not import here")
@pytest.mark.parametrize("name", ["steady.mp4", "uneven.mp4", "turned.mp4"])
def test_both_decoders_return_the_same(name, folder, monkeypatch):
    turn(folder / "steady.mp4", 90, folder / "turned.mp4")
    arguments = (asdict(parse_sampling("segment:7")), None, None, "x")
    pixels, places, times = video._read_frames(folder / name, *arguments)
    tried = []
    monkeypatch.setattr(video, "torchcodec_frames", lambda *given: tried.append(given))
    expected, expected_places, expected_times = video._read_frames(folder / name, *arguments)
    assert torchcodec_frames(*tried[0]) is not None
    assert places == expected_places
    np.testing.assert_allclose(times, expected_times, atol=1e-6)
    np.testing.assert_allclose(pixels.astype(int), expected.astype(int), atol=12)


def test_faults_are_named(folder, tmp_path):
    whole = (folder / "steady.mp4").read_bytes()
    index_last = whole.index(b"moov") > whole.index(b"mdat")
    assert index_last
    picture = tmp_path / "picture.mp4"
    Image.new("RGB", (64, 64)).save(picture, "PNG")
    faults = {
        "page.mp4": (b"<!DOCTYPE html>\n<html>no such video</html>", "no video of a known type but an HTML page"),
        "pointer.mp4": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        "list.mp4": (b"ffconcat version 1.0\nfile steady.mp4\n", "no video of a known type but a text"),
        "hls.mp4": (b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n", "but a text that begins"),
        "archive.mp4": (b"PK\x03\x04" + bytes(60), "but a ZIP file"),
        "packed.mp4": (b"\x1f\x8b\x08" + bytes(60), "but a GZIP file"),
        "zeros.mp4": (bytes(5000), "nothing but zero bytes"),
        "cut.mp4": (whole[:-600], "holds no video, or is damaged or cut off"),
        "empty.mp4": (b"", "is empty"),
        "picture.mp4": (picture.read_bytes(), "no video of a known type but a PNG file"),
    }
    for name, (content, fault) in faults.items():
        (tmp_path / name).write_bytes(content)
        for source in (tmp_path / name, content):
            for read in (video_header, _two_frames):
                with pytest.raises(MediaError, match=fault) as caught:
                    read(source, where="row 7")
                assert caught.value.found.startswith("row 7: the video ")
    with pytest.raises(MediaError, match="does not exist"):
        video_header(tmp_path / "absent.mp4")


def _two_frames(source, where):
    return decode_video(source, sampling=Sampling("uniform", frames=2), where=where)


def test_a_file_cut_behind_its_index_is_refused(tmp_path):
    """Nothing is cut silently: the index says that there are more frames."""
    path = write_video(tmp_path / "x.mp4", times=STEADY)
    import av

    front = tmp_path / "front.mp4"  # index first, as files for the web are written
    with (
        av.open(str(path)) as source,
        av.open(str(front), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    assert _numbers(decode_video(front, sampling=Sampling("uniform", frames=2))) == [0, 49]
    front.write_bytes(front.read_bytes()[: -front.stat().st_size // 3])
    with pytest.raises(MediaError, match=r"is cut off: \d+ of 50 frames are there"):
        _two_frames(front, "")


def test_limits(folder, monkeypatch):
    path = folder / "steady.mp4"
    many = Sampling("uniform", frames=50)
    with monkeypatch.context() as patch:
        patch.setattr(video, "with_time_limit", lambda function, *args, seconds, name: function(*args))
        patch.setattr(video, "MAX_CLIP_PIXELS", 100_000)
        with pytest.raises(MediaError, match="50 frames of 160 x 48 pixels"):
            decode_video(path, sampling=many)
        patch.setattr(video, "MAX_SECONDS", 4.0)
        with pytest.raises(MediaError, match="has 5 seconds"):
            video_header(path)
        patch.setattr(video, "MAX_FRAMES", 20)
        for read in (video_header, _two_frames):
            with pytest.raises(MediaError, match="frames"):
                read(path, where="")
        patch.setattr(video, "MAX_PIXELS", 100)
        with pytest.raises(MediaError, match="160 x 48 pixels"):
            video_header(path)
