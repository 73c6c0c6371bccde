"""The attention of packs: within segments only, with the family's scaling and dropout, or refused."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM

from mllm.errors import OptionError
from mllm.models import segment_attention as segments
from mllm.models.isolation import check_segments_possible
from mllm.models.segment_attention import isolate_segments, segment_attention, segment_mask
from mllm.testing import tiny_llm

LENGTHS = (3, 1, 4)
MODULE = torch.nn.Identity()


@pytest.fixture
def tensors() -> list[torch.Tensor]:
    """Queries of four heads; keys and values of two."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, sum(LENGTHS), 8, generator=generator) for heads in (4, 2, 2)]


def _mark() -> torch.Tensor:
    return torch.empty(1, 1, 0, 0, dtype=torch.bool)


@pytest.mark.parametrize("scaling", [None, 0.7])
def test_each_segment_is_by_itself_and_shared_keys_are_shared(tensors, scaling):
    output, _ = segment_attention(MODULE, *tensors, _mark(), scaling=scaling, segment_lengths=LENGTHS)
    start = 0
    for length in LENGTHS:
        query, key, value = (tensor[:, :, start : start + length] for tensor in tensors)
        whole = (key.repeat_interleave(2, 1), value.repeat_interleave(2, 1))
        scores = query @ whole[0].transpose(2, 3) * (8**-0.5 if scaling is None else scaling)
        scores = scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf)
        expected = (scores.softmax(-1) @ whole[1]).transpose(1, 2)
        torch.testing.assert_close(output[:, start : start + length], expected)
        start += length


def test_keys_are_not_repeated(tensors, monkeypatch):
    seen = []

    def note(query, key, value, **options):
        seen.append((key.shape[1], options))
        return scaled_dot_product_attention(query, key, value, **options)

    monkeypatch.setattr(segments, "scaled_dot_product_attention", note)
    segment_attention(MODULE, *tensors, _mark(), dropout=0.25, scaling=0.5, segment_lengths=LENGTHS)
    options = {"dropout_p": 0.25, "scale": 0.5, "is_causal": True, "enable_gqa": True}
    assert seen == [(2, options)] * 3


@pytest.mark.parametrize(
    ("mask", "lengths"),
    [
        (_mark(), None),  # positions say packed, and there are no lengths
        (_mark(), (8,)),  # or only one
        (None, LENGTHS),  # lengths, and positions that go on
        (_mark(), (3, 4)),  # tokens that belong to no segment
    ],
)
def test_positions_and_lengths_have_to_agree(tensors, mask, lengths):
    with pytest.raises(OptionError, match="PackingCollator"):
        segment_attention(MODULE, *tensors, mask, segment_lengths=lengths)


def test_two_rows_are_no_pack(tensors):
    with pytest.raises(OptionError, match="2 rows"):
        segment_attention(MODULE, *(torch.cat([t, t]) for t in tensors), _mark(), segment_lengths=LENGTHS)


def test_a_soft_cap_is_refused(tensors):
    with pytest.raises(OptionError, match="soft cap"):
        segment_attention(MODULE, *tensors, _mark(), segment_lengths=LENGTHS, softcap=50.0)


def test_packed_rows_get_a_mark_and_padded_ones_their_mask():
    """transformers allows skipping a plain causal mask, and not that of a packed row."""
    assert segment_mask(1, 8, 8, allow_is_causal_skip=False).shape == (1, 1, 0, 0)
    assert segment_mask(2, 8, 8, allow_is_causal_skip=True) is None
    padding = torch.ones(2, 8, dtype=torch.bool)
    padding[0, :3] = False
    mask = segment_mask(2, 8, 8, attention_mask=padding, allow_is_causal_skip=True)
    assert mask.shape == (2, 1, 8, 8) and not mask[0, 0, :, :3].any()


POSSIBLE = ("llama", "qwen2", "qwen3", "mistral", "gemma", "phi3", "olmo2", "smollm3", "cohere2", "gpt2", "gpt_neox")
IMPOSSIBLE = {
    "gemma2": "soft cap",
    "gpt_oss": "no SDPA",
    "mamba": "no SDPA",
    "qwen3_next": "linear_attention",
    "bloom": "one segment changed the next",  # its positions are in the scores, and it takes no attention of ours
    "stablelm": "lengths of 0",  # does not hand lengths on to its attention
    "opt": "lengths of 2",  # takes its positions from a mask
}


@pytest.mark.parametrize("family", POSSIBLE)
def test_a_segment_is_what_it_is_alone(family):
    model = tiny_llm(family, vocab_size=50)
    isolate_segments(model, longest=100)
    ids = torch.randint(0, 50, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    packed = model(input_ids=ids, position_ids=positions, segment_lengths=LENGTHS, use_cache=False).logits
    alone = [model(input_ids=part, use_cache=False).logits for part in ids.split(LENGTHS, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "reason"), IMPOSSIBLE.items())
def test_what_cannot_be_isolated_is_refused(family, reason):
    with pytest.raises(OptionError, match=rf"(?s)packed.* {family} .*{reason}.*batching: length"):
        isolate_segments(tiny_llm(family, vocab_size=50), longest=100)


def test_a_model_whose_images_see_what_comes_behind_them_is_refused():
    config = AutoConfig.for_model("paligemma")
    with pytest.raises(OptionError, match="media in paligemma"):
        check_segments_possible(config, longest=10)


def test_a_sliding_window_is_refused_where_a_row_does_not_fit_into_it():
    config = tiny_llm("mistral", vocab_size=50, sliding_window=64).config
    check_segments_possible(config, longest=64)
    with pytest.raises(OptionError, match="sliding window of 64 tokens is shorter than rows of up to 65"):
        check_segments_possible(config, longest=65)


def test_within_its_window_a_sliding_family_is_what_it_is_alone():
    """A pack longer than the window, of rows that are not."""
    model = tiny_llm("mistral", vocab_size=50, sliding_window=4)
    isolate_segments(model, longest=4)
    ids = torch.arange(8)[None]
    positions = torch.cat([torch.arange(4)] * 2)[None]
    packed = model(input_ids=ids, position_ids=positions, segment_lengths=(4, 4), use_cache=False).logits
    torch.testing.assert_close(packed[:, 4:], model(input_ids=ids[:, 4:], use_cache=False).logits)


def test_a_family_that_leaks_is_found_out(monkeypatch):
    """As one would that has layers we do not know: here the attention itself forgets the lengths."""

    def forget(module, query, key, value, attention_mask, *, scaling, segment_lengths, **kwargs):
        return segments.sdpa_attention_forward(module, query, key, value, None, scaling=scaling)

    monkeypatch.setattr(segments, "segment_attention", forget)
    with pytest.raises(OptionError, match="one segment changed the next"):
        isolate_segments(tiny_llm("llama", vocab_size=50), longest=100)


def test_the_choice_is_not_saved(tmp_path):
    model = tiny_llm("llama", vocab_size=50)
    isolate_segments(model, longest=100)
    model.save_pretrained(tmp_path)
    assert segments.SEGMENTS not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_generation_is_as_before():
    model = tiny_llm("llama", vocab_size=50)
    ids, mask = torch.tensor([[0, 0, 5, 6], [3, 4, 5, 6]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    before = model.generate(**options)
    isolate_segments(model, longest=100)
    assert torch.equal(model.generate(**options), before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", [4, 2])
def test_the_kernel_gives_what_sdpa_gives_segment_by_segment(dtype, heads):
    """In bfloat16 by a kernel over all segments, in float32 by SDPA for each; forward and backward."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, count, 300, 64, generator=generator) for count in (4, heads, heads)]
    lengths, found = (100, 7, 150, 43), []
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        moved = [tensor.to(device, kind).requires_grad_() for tensor in tensors]
        output, _ = segment_attention(MODULE, *moved, _mark().to(device), scaling=0.2, segment_lengths=lengths)
        output.square().sum().backward()
        found.append([tensor.detach().cpu().float() for tensor in (output, *(tensor.grad for tensor in moved))])
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for expected, actual in zip(*found, strict=True):
        assert (expected - actual).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.gpu
def test_under_autocast_on_a_gpu_a_pack_is_its_rows():
    model = tiny_llm("qwen3", vocab_size=50).to("cuda")
    isolate_segments(model, longest=100)
    ids = torch.randint(0, 50, (1, 60), device="cuda")
    lengths = (20, 33, 7)
    positions = torch.cat([torch.arange(length) for length in lengths])[None].cuda()
    with torch.autocast("cuda", torch.bfloat16):
        packed = model(input_ids=ids, position_ids=positions, segment_lengths=lengths, use_cache=False).logits
        alone = torch.cat([model(input_ids=part, use_cache=False).logits for part in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, alone, rtol=5e-2, atol=5e-3)
