"""How many tokens a video becomes, and when its frames are shown: from its header alone."""

import json
import random

import pytest

from mllm.errors import OptionError, RowError
from mllm.sizes import LengthRule, num_tokens, read_rule, written_rule
from mllm.sizes.sampling import frame_times, parse_sampling
from mllm.sizes.video import VideoTokenRule

SAMPLINGS = ("uniform:1", "uniform:8", "segment:5", "segment:5:3", "fps:2", "fps:0.5:4:6", "cap:2:7", "upbound:9")


@pytest.mark.parametrize(
    ("rule", "size", "tokens"),
    [
        (VideoTokenRule("uniform:8", 4), (24, 32, 100, 4.0), 8 * 4),
        (VideoTokenRule("uniform:8", 4), (24, 32, 3, 0.1), 8 * 4),  # some of its three frames several times
        (VideoTokenRule("fps:2", 4), (24, 32, 100, 4.0), 8 * 4),
        (VideoTokenRule("fps:2:2:6", 4), (24, 32, 100, 4.0), 6 * 4),
        (VideoTokenRule("cap:1:32", 16, LengthRule("grid", size=2)), (24, 32, 100, 4.0), 4 * 4),
        (VideoTokenRule("cap:1:32", 5, LengthRule("fixed", tokens=32), is_joined=True), (9, 9, 99, 9.9), 32),
        (VideoTokenRule("cap:1:32", 5, LengthRule("fixed", tokens=32)), (9, 9, 100, 4.0), 4 * 32),
        (VideoTokenRule("cap:1:32", 5, LengthRule("windows", size=3), is_joined=True), (9, 9, 100, 4.0), 7),
    ],
)
def test_counts_by_hand(rule, size, tokens):
    assert num_tokens(size, rule) == tokens


def test_times_are_those_of_a_constant_rate():
    """Of 10 frames in 2 seconds the last is shown at 1.8 seconds."""
    assert frame_times(10, 2.0, parse_sampling("uniform:4")) == pytest.approx((0.0, 0.6, 1.2, 1.8))
    assert frame_times(10, 2.0, parse_sampling("cap:2:9")) == pytest.approx((0.0, 0.4, 1.0, 1.6))  # 2.5 is even at 2
    assert frame_times(1, 0.04, parse_sampling("uniform:3")) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_no_shorter_video_has_more_frames_than_the_most(sampling):
    draw = random.Random(sampling)
    rule = VideoTokenRule(sampling, 4)
    for _ in range(300):
        seconds = draw.choice([0.05, 1.0, 3.7, 60.0]) * draw.uniform(0.5, 2.0)
        rate = draw.choice([0.3, 0.6, 1.0, 1.49, 2.5, 10.0, 24000 / 1001, 30.0, 60.0])
        size = (24, 32, max(1, round(seconds * rate)), seconds)
        bound = rule.most_frames_within(draw.choice([seconds, seconds + 0.3, 2 * seconds]))
        assert len(rule.views(size)) <= bound
    assert rule.most_frames_within(100_000.0) < 1000


def test_a_rule_survives_json():
    rule = VideoTokenRule("fps:2:4:16", 7, LengthRule("windows", size=3), True, 16, False)
    assert read_rule(json.loads(json.dumps(written_rule(rule)))) == rule


@pytest.mark.parametrize("size", [(24, 32, 0, 4.0), (24, 32, 100, 0.0), (24, 32, 0, 0.0)])
def test_a_video_without_frames_is_refused(size):
    with pytest.raises(RowError, match="a video of .* frames and .* seconds, by its header"):
        num_tokens(size, VideoTokenRule("uniform:8", 4))
    with pytest.raises(RowError, match="a video with 0 frames"):
        VideoTokenRule("uniform:8", 4).views_of_frames(0)


def test_more_frames_than_positions_are_refused_and_as_many_are_not():
    rule = VideoTokenRule("fps:2", 4, most_frames=8)
    assert num_tokens((24, 32, 100, 4.0), rule) == 8 * 4
    with pytest.raises(RowError, match="takes 10 frames\n.*at most 8 frames, as many as the connector has positions"):
        num_tokens((24, 32, 125, 5.0), rule)
    with pytest.raises(RowError, match="a video with 9 frames"):
        rule.views_of_frames(9)


def test_a_sampling_that_is_none_is_named_at_once():
    with pytest.raises(OptionError, match="video sampling 'every:2'"):
        VideoTokenRule("every:2", 4)
