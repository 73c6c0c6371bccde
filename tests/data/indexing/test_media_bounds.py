"""Rows with sounds and videos: counted tokens are those of encoding, and never more than their bound."""

import json

import pytest
from transformers import CLIPImageProcessorPil, WhisperFeatureExtractor

from mllm.data.indexing.index import open_index
from mllm.data.indexing.token_bounds import media_tokens, token_bounds
from mllm.data.indexing.token_counts import chats_of, count_tokens
from mllm.data.sources import Source
from mllm.errors import RowError
from mllm.processing.build import PLACEHOLDERS, add_placeholder, build_processor
from mllm.processing.chat_lengths import ChatLengths
from mllm.sizes import ImageTokenRule, LengthRule
from mllm.sizes.audio import AudioTokenRule
from mllm.sizes.video import VideoTokenRule
from mllm.testing import tiny_tokenizer
from mllm.testing_media import save_tiny_media_rows

IMAGE = ImageTokenRule(image_size=16, patch_size=8, num_prefix_tokens=1, feature_select="default")
AUDIO = AudioTokenRule(sampling_rate=16_000, window=15_200, samples_per_step=1600, most_windows=2)  # 1.9 seconds
VIDEOS = {
    "times": VideoTokenRule("fps:2", 4, has_timestamps=True),
    "few times": VideoTokenRule("upbound:3", 4, LengthRule("grid", size=2), has_timestamps=True),
    "sentence": VideoTokenRule("fps:2", 4, LengthRule("fixed", tokens=3), is_joined=True, has_timestamps=True),
    "fixed": VideoTokenRule("uniform:5", 4, LengthRule("fixed", tokens=3), is_joined=True),
    "windows": VideoTokenRule("cap:4:6", 4, LengthRule("windows", size=3, tokens=2), is_joined=True),
    "positions": VideoTokenRule("fps:4:2:64", 4, most_frames=6),
}
CONTENTS = ("itav", "", "v", "vtati", "avi", "a", "ii", "vv", "aa", "tt", "va")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Whole files, and cuts of them."""
    folder = tmp_path_factory.mktemp("rows")
    path = save_tiny_media_rows(folder / "rows", CONTENTS)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[:5]:
        cut = [item | {"start": 0.1, "end": 0.25} if item["kind"] != "image" else item for item in row["media"]]
        rows.append(row | {"id": f"{row['id']} cut", "media": cut})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_index(Source(path, format="mllm"), cache_dir=folder / "cache")


@pytest.mark.parametrize("video", VIDEOS)
@pytest.mark.parametrize(("kind", "template"), [("qwen", "chatml"), ("llama3", "llama3"), ("llama2", "vicuna_v1")])
def test_counts_are_lengths_of_encoded_chats_and_within_bounds(index, kind, template, video):
    processor = _processor(kind, template, VIDEOS[video])
    expected = [_encoded_length(chat, processor) for row in index for chat in chats_of(row, "pad")]
    counts = count_tokens(index, processor)
    assert counts.tolist() == expected
    assert sum(count > 0 for count in expected) >= len(CONTENTS) - 5
    assert (token_bounds(index, processor) >= counts).all()


@pytest.mark.parametrize("video", VIDEOS)
def test_the_tokens_of_media_are_bounded_closely(index, video):
    """By those of a second more of a sound or a video, and a token for each character of its times."""
    processor = _processor("llama2", "vicuna_v1", VIDEOS[video])
    found = media_tokens(index, processor).tolist()
    assert sum(found) > 0
    for row, tokens in zip(index, found, strict=True):
        own = [_tokens_of(processor, item.size) for item in row.media]
        assert sum(own) <= tokens
        if not VIDEOS[video].has_timestamps and all(own):
            assert tokens <= sum(own) + 20 * len(own)


def test_media_without_words_of_their_own_need_no_encoding(index, monkeypatch):
    """Else the law above would compare `encode_chat` with itself."""
    processor = _processor("qwen", "chatml", VIDEOS["windows"])
    chats = [chat for row in index for chat in chats_of(row, "pad")]
    expected = [_encoded_length(chat, processor) for chat in chats]
    monkeypatch.setattr(type(processor), "encode_chat", None)
    assert ChatLengths(processor)(chats) == expected


def test_a_row_whose_media_are_refused_counts_as_nothing(index):
    processor = _processor("qwen", "chatml", VideoTokenRule("fps:5:2:64", 4, most_frames=2))
    counts = count_tokens(index, processor).tolist()
    assert [count > 0 for count in counts[: len(CONTENTS)]] == ["v" not in letters for letters in CONTENTS]


def _processor(kind: str, template: str, video: VideoTokenRule):
    tokenizer = tiny_tokenizer(kind)
    for placeholder in PLACEHOLDERS.values():
        add_placeholder(tokenizer, placeholder, num_rows=len(tokenizer) + 1)
    rules = {"image": IMAGE, "audio": AUDIO, "video": video}
    return build_processor(
        tokenizer, CLIPImageProcessorPil(), WhisperFeatureExtractor(), rules=rules, chat_template=template
    )


def _tokens_of(processor, size) -> int:
    """Of one medium: its vectors, and what is written between them."""
    try:
        expansion = processor.expansion(size)
    except RowError:
        return 0
    written = expansion.text.split(processor.placeholders[expansion.kind])
    words = [processor.tokenizer.encode(text, add_special_tokens=False) for text in written if text]
    return sum(expansion.runs) + sum(map(len, words))


def _encoded_length(chat, processor) -> int:
    try:
        return len(processor.encode_chat(chat.messages, media_sizes=chat.media_sizes).input_ids)
    except RowError:
        return 0
