"""Scores: what tokens are paid by each other, against a plain transcription in float64."""

import math

import pytest
import torch

from mllm.pruning import scores as module
from mllm.pruning.scores import received

HEADS, WIDTH = 3, 4


def random_row(num_keys: int = 14, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    queries, keys = (torch.randn(HEADS, num_keys, WIDTH, generator=generator, dtype=dtype) for _ in range(2))
    return queries, keys


def transcribed(queries: torch.Tensor, keys: torch.Tensor, scaling: float, at: list[int], last: int) -> list[float]:
    """Of methods: the mean over heads and visual queries of softmax over all keys seen; `last` ends what all see."""
    found = [0.0] * len(at)
    for head in range(HEADS):
        for query in at:
            end = last if last >= 0 else query
            logits = [scaling * float(queries[head, query] @ keys[head, key]) for key in range(end + 1)]
            total = sum(math.exp(logit) for logit in logits)
            for number, key in enumerate(at):
                if key <= end:
                    found[number] += math.exp(logits[key]) / total / (HEADS * len(at))
    return found


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("at", [[4, 5, 6, 7, 8], [0, 1, 2], [2, 3, 9, 13], [6]])
@pytest.mark.parametrize("at_once", [2, 512])
def test_scores_are_what_tokens_receive(both_ways, at, at_once, monkeypatch):
    """Also of items that text stands in, and however many queries are taken at once."""
    monkeypatch.setattr(module, "_QUERIES_AT_ONCE", at_once)
    queries, keys = random_row()
    found = received(queries[:, at], keys, 0.7, torch.tensor(at), both_ways=both_ways)
    expected = transcribed(queries, keys, 0.7, at, at[-1] if both_ways else -1)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("both_ways", [False, True])
def test_what_stands_behind_a_picture_has_no_say(both_ways):
    """A question, a later picture."""
    queries, keys = random_row()
    at = torch.arange(3, 9)
    before = received(queries[:, at], keys, 1.0, at, both_ways=both_ways)
    keys[:, 9:] = 100.0
    assert torch.equal(received(queries[:, at], keys, 1.0, at, both_ways=both_ways), before)


def test_both_ways_a_score_does_not_depend_on_the_place():
    """Tokens in another order have the same scores in that order: no place wins by itself."""
    queries, keys = random_row()
    at, order = torch.arange(4, 10), torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled_queries, shuffled_keys = queries.clone(), keys.clone()
    shuffled_queries[:, at], shuffled_keys[:, at] = queries[:, at[order]], keys[:, at[order]]
    before = received(queries[:, at], keys, 1.0, at, both_ways=True)
    after = received(shuffled_queries[:, at], shuffled_keys, 1.0, at, both_ways=True)
    torch.testing.assert_close(after, before[order], rtol=0, atol=1e-12)


def test_causally_the_first_token_wins_though_all_are_alike():
    """The published bias: of tokens that are all the same, each has a lower score than the one before it."""
    queries, keys = torch.zeros(HEADS, 83, WIDTH), torch.zeros(HEADS, 83, WIDTH)
    at = torch.arange(35, 83)
    causal = received(queries[:, at], keys, 1.0, at, both_ways=False)
    assert (causal.diff() < 0).all()
    assert causal[0] / causal[-1] > 60
    both = received(queries[:, at], keys, 1.0, at, both_ways=True)
    torch.testing.assert_close(both, torch.full_like(both, 1 / 83))


def test_softmax_is_taken_in_float32_at_least():
    """A model in bfloat16 has scores of more digits."""
    queries, keys = random_row(dtype=torch.bfloat16)
    at = torch.arange(4, 10)
    assert received(queries[:, at], keys, 1.0, at, both_ways=False).dtype == torch.float32
