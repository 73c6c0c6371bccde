"""A sound's tokens follow from its seconds alone, and no sound has more of them than the longest."""

import json
from dataclasses import replace

import pytest

from mllm.errors import RowError
from mllm.sizes import LONGEST_SOUND, LengthRule, num_tokens, read_rule, written_rule
from mllm.sizes.audio import AudioTokenRule

WHISPER = AudioTokenRule(sampling_rate=16_000, window=480_000, samples_per_step=320)
POOLED = AudioTokenRule(sampling_rate=16_000, window=480_000, samples_per_step=640, first_step=321)
WAVE = AudioTokenRule(sampling_rate=16_000, window=160_000, samples_per_step=320, first_step=400)
PATCHES = AudioTokenRule(
    sampling_rate=16_000, window=163_840, samples_per_step=1600, first_step=2800, features_per_step=12
)
RULES = [WHISPER, POOLED, WAVE, PATCHES]


@pytest.mark.parametrize("samples", [1, 319, 320, 321, 640, 641, 960, 961, 479_999, 480_000])
def test_whisper_features_cover_the_sound(samples):
    """As transformers counts them: a mel frame every 160 samples, one feature of two frames, one pooled of two."""
    frames = -(-samples // 160)
    assert WHISPER.views((samples / 16_000,)) == ((frames - 1) // 2 + 1,)
    assert POOLED.views((samples / 16_000,)) == (max(1, ((frames - 1) // 2 + 1 - 2) // 2 + 1),)


@pytest.mark.parametrize("samples", [400, 719, 720, 16_000, 160_000])
def test_wave_features_are_those_of_the_convolutions(samples):
    length = samples
    for kernel, stride in zip((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2), strict=True):
        length = (length - kernel) // stride + 1
    assert WAVE.views((samples / 16_000,)) == (length,)


def test_patches_are_columns_of_frames():
    assert PATCHES.features == 1212  # 101 columns of 12, as the published model has positions for
    assert PATCHES.views((2.0,)) == (12 * ((1 + (32_000 - 400) // 160 - 16) // 10 + 1),)


def test_a_long_sound_is_split_into_windows():
    assert WHISPER.samples((70.0,)) == (480_000, 480_000, 160_000)
    assert WHISPER.views((70.0,)) == (1500, 1500, 500)
    assert WHISPER.starts(70 * 16_000) == (0, 480_000, 960_000)
    assert num_tokens((70.0,), replace(WHISPER, connector=LengthRule("windows", size=4))) == 375 + 375 + 125
    assert num_tokens((70.0,), replace(WHISPER, connector=LengthRule("fixed", tokens=8))) == 24
    assert num_tokens((70.0,), replace(WHISPER, connector=LengthRule("fixed", tokens=8), is_joined=True)) == 8


def test_silence_counts_where_it_is_asked_for():
    assert replace(WHISPER, counts_silence=True).views((31.0,)) == (1500, 1500)


def test_clips_are_spread_over_the_whole_sound():
    rule = replace(WAVE, window=32_000, clips=8)
    starts = rule.starts(100 * 16_000)
    assert (starts[0], starts[-1] + rule.window) == (0, 100 * 16_000)
    assert {later - earlier for earlier, later in zip(starts, starts[1:], strict=False)} == {14 * 16_000}
    assert rule.views((100.0,)) == (rule.features,) * 8
    assert (rule.starts(16_000), rule.samples((1.0,))) == ((0,) * 8, (16_000,) * 8)
    assert rule.most_views == 8


@pytest.mark.parametrize("rule", [*RULES, *(replace(rule, most_windows=3) for rule in RULES), replace(WAVE, clips=4)])
@pytest.mark.parametrize("connector", [LengthRule(), LengthRule("fixed", tokens=8), LengthRule("windows", size=3)])
@pytest.mark.parametrize("is_joined", [False, True])
def test_no_sound_has_more_tokens_than_the_longest(rule, connector, is_joined):
    rule = replace(rule, connector=connector, is_joined=is_joined)
    longest = num_tokens((LONGEST_SOUND,), rule)
    limit = 3600.0 if rule.most_windows is None else rule.most_windows * rule.window_seconds
    lengths = [1 / 16_000, 0.5, 1.0, 9.99, 10.0, 10.01, limit / 2, limit]
    assert max(num_tokens((seconds,), rule) for seconds in lengths) == longest


@pytest.mark.parametrize("seconds", [0.0, 0.00001, 3600.1, 1e9])
def test_no_sound_and_too_much_of_it_are_refused(seconds):
    with pytest.raises(RowError, match="a sound of"):
        WHISPER.views((seconds,))


def test_more_windows_than_positions_are_refused():
    assert len(replace(WHISPER, most_windows=2).views((60.0,))) == 2
    with pytest.raises(RowError, match="3 windows of 30 seconds"):
        replace(WHISPER, most_windows=2).views((60.1,))


def test_samples_and_seconds_of_them_are_the_same_number():
    """The processor counts by seconds, the model by samples."""
    for samples in range(1, 200_000, 997):
        for rate in (16_000, 48_000, 44_100):
            rule = replace(WHISPER, sampling_rate=rate)
            assert sum(rule.samples((samples / rate,))) == samples


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_survives_json(rule):
    assert read_rule(json.loads(json.dumps(written_rule(rule)))) == rule
