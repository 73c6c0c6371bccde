"""Sound keeps its pitch, its length and its place in time, whatever the file, the rate and the number of channels."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mllm.errors import MediaError
from mllm.processing import audio
from mllm.processing.audio import audio_header, decode_audio

write_video = runpy.run_path(str(Path(__file__).parents[1] / "media_files.py"))["write_video"]


def _sine(seconds: float, rate: int, pitch: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def _pitch(samples: np.ndarray, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(spectrum.argmax() * rate / len(samples))


@pytest.mark.parametrize("name", ["x.wav", "x.flac", "x.mp3", "x.ogg"])
@pytest.mark.parametrize(("rate", "wanted"), [(44_100, 16_000), (8_000, 16_000), (16_000, 16_000)])
def test_resampling_keeps_pitch_length_and_loudness(name, rate, wanted, tmp_path):
    path = tmp_path / name
    soundfile.write(path, _sine(2.0, rate), rate)
    header = audio_header(path)
    assert (header.format, header.sampling_rate, header.channels) == (name[2:].upper(), rate, 1)
    assert header.seconds == pytest.approx(2.0, abs=0.1)
    for source in (path, path.read_bytes()):
        samples, found_rate = decode_audio(source, sampling_rate=wanted)
        assert (samples.dtype, samples.ndim, found_rate) == (np.float32, 1, wanted)
        assert len(samples) / wanted == pytest.approx(header.seconds, abs=1e-3)
        assert _pitch(samples, wanted) == pytest.approx(440, abs=1)
        assert np.abs(samples[wanted // 2 : wanted]).max() == pytest.approx(0.5, abs=0.05)


def test_what_the_new_rate_cannot_hold_is_filtered_out(tmp_path):
    """Without a low-pass filter 7 kHz would come back as 1 kHz."""
    soundfile.write(tmp_path / "x.wav", _sine(1.0, 44_100, pitch=7000), 44_100)
    samples, _ = decode_audio(tmp_path / "x.wav", sampling_rate=8_000)
    assert np.abs(samples[1000:-1000]).max() < 0.01


def test_channels_are_averaged(tmp_path):
    left, right = _sine(1.0, 16_000, 300), _sine(1.0, 16_000, 500)
    soundfile.write(tmp_path / "x.wav", np.stack([left, right], axis=1), 16_000, subtype="FLOAT")
    samples, _ = decode_audio(tmp_path / "x.wav", sampling_rate=16_000)
    np.testing.assert_allclose(samples, (left + right) / 2, atol=1e-6)
    assert audio_header(tmp_path / "x.wav").channels == 2


@pytest.mark.parametrize("name", ["x.wav", "x.flac", "x.ogg"])
def test_a_cut_is_that_part_of_the_whole(name, tmp_path):
    ramp = np.linspace(-0.9, 0.9, 3 * 16_000, dtype=np.float32)
    soundfile.write(tmp_path / name, ramp, 16_000)
    whole, _ = decode_audio(tmp_path / name, sampling_rate=16_000)
    part, _ = decode_audio(tmp_path / name, start=0.5, end=1.25, sampling_rate=16_000)
    np.testing.assert_allclose(part, whole[8_000:20_000], atol=1e-4)
    rest, _ = decode_audio(tmp_path / name, start=2.5, end=99.0, sampling_rate=16_000)
    np.testing.assert_allclose(rest, whole[40_000:], atol=1e-4)


def test_sound_of_a_video(tmp_path):
    path = write_video(tmp_path / "x.mp4", times=[number / 10 for number in range(40)], sound=True)
    header = audio_header(path)
    assert (header.sampling_rate, header.notes) == (16_000, ("sound of a video",))
    samples, _ = decode_audio(path, sampling_rate=16_000)
    assert len(samples) / 16_000 == pytest.approx(3.9, abs=0.1)
    assert _pitch(samples[4000:-4000], 16_000) == pytest.approx(440, abs=1)
    part, _ = decode_audio(path, start=2.0, end=3.0, sampling_rate=16_000)
    assert len(part) == 16_000
    np.testing.assert_allclose(part[1000:15_000], samples[33_000:47_000], atol=1e-3)


def test_faults_are_named(tmp_path):
    silent = write_video(tmp_path / "silent.mp4", times=[0, 0.1, 0.2])
    soundfile.write(tmp_path / "whole.wav", _sine(1.0, 16_000), 16_000)
    soundfile.write(tmp_path / "whole.flac", _sine(1.0, 16_000), 16_000)
    faults = {
        "silent.mp4": (silent.read_bytes(), "an MP4 file that holds no audio"),
        "page.mp3": (b"<html><body>404</body></html>", "no audio of a known type but an HTML page"),
        "cut.wav": ((tmp_path / "whole.wav").read_bytes()[:-9000], "damaged or cut off: 23,044 of 32,044 bytes"),
        "header.wav": ((tmp_path / "whole.wav").read_bytes()[:20], "damaged or cut off"),
        "empty.ogg": (b"", "is empty"),
        "noise.wav": (np.random.default_rng(0).bytes(4000), "no audio of a known type"),
    }
    for name, (content, fault) in faults.items():
        (tmp_path / name).write_bytes(content)
        for source in (tmp_path / name, content):
            with pytest.raises(MediaError, match=fault) as caught:
                audio_header(source, where="row 7")
            assert caught.value.found.startswith("row 7: the audio ")
            with pytest.raises(MediaError, match=fault):
                decode_audio(source, sampling_rate=16_000)
    (tmp_path / "cut.flac").write_bytes((tmp_path / "whole.flac").read_bytes()[:-9000])
    with pytest.raises(MediaError, match="damaged or cut off"):
        decode_audio(tmp_path / "cut.flac", sampling_rate=16_000)


def test_places_outside_the_file_are_named(tmp_path):
    soundfile.write(tmp_path / "x.wav", _sine(1.0, 16_000), 16_000)
    with pytest.raises(MediaError, match="ends before start = 5"):
        decode_audio(tmp_path / "x.wav", start=5.0, sampling_rate=16_000)
    with pytest.raises(MediaError, match="start = 0.5, end = 0.2"):
        decode_audio(tmp_path / "x.wav", start=0.5, end=0.2, sampling_rate=16_000)


def test_too_long_is_refused_and_never_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "with_time_limit", lambda function, *args, seconds, name: function(*args))
    monkeypatch.setattr(audio, "MAX_SECONDS", 2.0)
    soundfile.write(tmp_path / "x.wav", _sine(3.0, 8_000), 8_000)
    clip = write_video(tmp_path / "x.mp4", times=[number / 10 for number in range(40)], sound=True)
    for path in (tmp_path / "x.wav", clip):
        with pytest.raises(MediaError, match="seconds of sound or more"):
            decode_audio(path, sampling_rate=8_000)
        samples, _ = decode_audio(path, start=1.0, end=2.5, sampling_rate=8_000)
        assert len(samples) == 12_000
