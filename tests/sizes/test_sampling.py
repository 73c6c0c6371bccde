"""The published sampling rules, against their formulas in their papers' and repositories' own words."""

import math

import numpy as np
import pytest

from mllm.errors import OptionError
from mllm.sizes.sampling import Sampling, frame_places, parse_sampling, sample_frames

COUNTS = (1, 2, 3, 5, 7, 16, 30, 99, 300, 2999)


@pytest.mark.parametrize("num_frames", COUNTS)
@pytest.mark.parametrize("rate", [1.0, 12.5, 30.0])
class TestRules:
    """At a constant rate, times change nothing: the indices are those of the formulas."""

    def _picked(self, num_frames, rate, text):
        sampling = parse_sampling(text)
        times = 3.0 + np.arange(num_frames) / rate
        picked = sample_frames(times, sampling)
        if num_frames > 1:
            assert picked.tolist() == frame_places(num_frames, rate, sampling).tolist()
        assert np.all(np.diff(picked) >= 0)
        assert picked.min() >= 0
        assert picked.max() < num_frames
        return picked.tolist()

    def test_uniform(self, num_frames, rate):
        for count in (1, 2, 8, 16):
            expected = np.linspace(0, num_frames - 1, count).round().tolist()
            assert self._picked(num_frames, rate, f"uniform:{count}") == expected

    def test_segment_middle(self, num_frames, rate):
        """VideoChat2: `(x[0] + x[1]) // 2 for x in ranges`, padded with the last frame."""
        intervals = np.linspace(start=0, stop=num_frames, num=min(8, num_frames) + 1).astype(int)
        ranges = [(start, intervals[place + 1] - 1) for place, start in enumerate(intervals[:-1])]
        expected = [(low + high) // 2 for low, high in ranges]
        expected += [expected[-1]] * (8 - len(expected))
        assert self._picked(num_frames, rate, "segment:8") == expected

    def test_segment_random(self, num_frames, rate):
        bounds = np.linspace(0, num_frames, min(8, num_frames) + 1).astype(int)
        seen = [self._picked(num_frames, rate, f"segment:8:{seed}") for seed in range(40)]
        for picked in seen:
            for place, low, high in zip(picked, bounds, bounds[1:], strict=False):
                assert low <= place < high
        assert seen[7] == self._picked(num_frames, rate, "segment:8:7")
        if num_frames >= 99:
            assert len({tuple(picked) for picked in seen}) > 30

    def test_fps_as_qwen(self, num_frames, rate):
        """smart_nframes of qwen_vl_utils, where it is defined: from two frames on."""
        if num_frames < 2:
            assert self._picked(num_frames, rate, "fps:2") == [0, 0]
            return
        most = math.floor(min(768, num_frames) / 2) * 2
        count = num_frames / rate * 2
        count = min(min(max(count, 4), most), num_frames)
        count = math.floor(count / 2) * 2
        expected = np.linspace(0, num_frames - 1, count).round().astype(int).tolist()
        assert self._picked(num_frames, rate, "fps:2") == expected

    def test_cap_as_videollama3(self, num_frames, rate):
        """One frame a second; where these are more than 180 (here 20), 20 evenly."""
        seconds = np.arange(0, num_frames / rate - 1e-9, 1.0)
        expected = np.rint(seconds * rate).clip(0, num_frames - 1)
        if len(seconds) > 20:
            expected = np.linspace(0, num_frames - 1, 20).round()
        assert self._picked(num_frames, rate, "cap:1:20") == expected.tolist()

    def test_upbound_as_llava_next(self, num_frames, rate):
        """`avg_fps = round(fps / video_fps)`, `range(0, total, avg_fps)`; beyond, `linspace(..., dtype=int)`."""
        expected = list(range(0, num_frames, round(rate / 1)))
        if len(expected) > 32:
            expected = np.linspace(0, num_frames - 1, 32, dtype=int).tolist()
        assert self._picked(num_frames, rate, "upbound:32") == expected


def test_uneven_frames_are_picked_by_time():
    times = np.array([0.0, 0.1, 0.2, 0.3, 10.0])
    assert sample_frames(times, parse_sampling("uniform:3")).tolist() == [0, 3, 4]
    assert sample_frames(np.array([2.0]), parse_sampling("uniform:3")).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("text", "sampling"),
    [
        ("uniform:8", Sampling("uniform", frames=8)),
        ("segment:8:3", Sampling("segment", frames=8, seed=3)),
        ("fps:2", Sampling("fps", frames=4, fps=2.0, max_frames=768)),
        ("fps:0.5:2:64", Sampling("fps", frames=2, fps=0.5, max_frames=64)),
        ("cap:1:180", Sampling("cap", fps=1.0, max_frames=180)),
        ("upbound:32", Sampling("upbound", max_frames=32)),
    ],
)
def test_texts(text, sampling):
    assert parse_sampling(text) == sampling


@pytest.mark.parametrize(
    "text",
    ["", "uniform", "uniform:0", "uniform:2.5", "uniform:x", "fps:-1", "fps:2:9:3", "fps:inf", "all:3", "cap:1"],
)
def test_texts_that_name_no_rule(text):
    with pytest.raises(OptionError, match="uniform:N, segment:N"):
        parse_sampling(text)
