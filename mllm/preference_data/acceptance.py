"""Whether a completed answer differs enough from the one it was made of to be the worse one of a pair."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from mllm.errors import OptionError
from mllm.inference.generation import eval_mode
from mllm.preference_data.answer_ids import encode_answer
from mllm.preference_data.phrases import EMPTY, MASK, MASK_LEFT, UNCHANGED, Completion, Masked, words_of
from mllm.processing import TrainingProcessor
from mllm.shapes import Float, Tensor

TAU = 0.95
"""The paper's, for `PAPERS_MODEL`. Another way to compare has other similarities, and wants another bound."""
PAPERS_MODEL = "sentence-transformers/all-mpnet-base-v2"


@runtime_checkable
class Similarity(Protocol):
    """Says how alike two texts are."""

    def similarities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """The cosine of each pair's embeddings. It does not depend on the other pairs."""


def reason_against(masked: Masked, completion: Completion) -> str:
    """Why a completion is left out before anybody compares it, one of `REASONS`; "" if nothing speaks against it.

    What is left is taken where its similarity to the answer is below `TAU`. (The paper's Algorithm 1 prints the
    opposite; its text and its figure say this.)
    """
    if completion.reason:
        return completion.reason
    if not completion.text.strip():
        return EMPTY
    if MASK.casefold() in completion.text.casefold():
        return MASK_LEFT
    return UNCHANGED if _spoken(completion.text) == _spoken(masked.text) else ""


class SentenceSimilarity:
    """Compares by a model of the sentence-transformers library, which has to be installed.

    Args:
        model: A name on the Hub, or a directory.
        device: Where it runs; None for the library's own choice.
        batch_size: Texts embedded at once.

    Raises:
        OptionError: The library is not installed.
    """

    def __init__(self, model: str = PAPERS_MODEL, *, device: str | None = None, batch_size: int = 64):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise OptionError(
                f"similarity by {model!r} without the library sentence-transformers",
                expected="the library, which is no part of the core",
                do="pip install sentence-transformers, or compare by the language model at hand",
            ) from error
        self.batch_size = batch_size
        self._model: Any = SentenceTransformer(model, device=device, model_kwargs={"use_safetensors": True})

    def similarities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """The cosine of each pair's embeddings."""
        if not pairs:
            return []
        texts, places = _distinct(pairs)
        vectors = self._model.encode(
            texts, batch_size=self.batch_size, convert_to_tensor=True, show_progress_bar=False
        )
        return _cosines(vectors.cpu(), places)


class ModelSimilarity:
    """Compares by the language model at hand: its last hidden states over the answer, averaged.

    Such vectors lie close together, so that unlike answers have similarities near 1, too. What they have in common is
    therefore taken off: the average over some answers. Even so, similarities differ between models: look at some pairs
    before `tau` is chosen.

    Args:
        model: Ours or a stock one, or one of these wrapped by PEFT; it stays on its device.
        processor: The processor saved with the model.
        centre_on: Answers whose average is taken off, such as the first few hundred; none for none.
        batch_size: Texts embedded at once.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        processor: TrainingProcessor,
        *,
        centre_on: Sequence[str] = (),
        batch_size: int = 16,
    ):
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self._centre: Tensor | float = self.embed(list(centre_on)).mean(0) if centre_on else 0.0

    def similarities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """The cosine of each pair's embeddings."""
        if not pairs:
            return []
        texts, places = _distinct(pairs)
        return _cosines(self.embed(texts) - self._centre, places)

    def embed(self, texts: list[str]) -> Float[Tensor, "N D"]:
        """The mean of the last hidden states over each text, said as an answer."""
        encoded = [encode_answer(self.processor, text) for text in texts]
        order = sorted(range(len(texts)), key=lambda index: -len(encoded[index].input_ids))
        vectors: list[Tensor] = [torch.empty(0)] * len(texts)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            hidden = self._hidden([encoded[index].input_ids for index in batch])
            for row, index in zip(hidden, batch, strict=True):
                vectors[index] = row[encoded[index].start : encoded[index].end].float().mean(0).cpu()
        return torch.stack(vectors)

    def _hidden(self, rows: list[list[int]]) -> Float[Tensor, "B T D"]:
        """Last hidden states of texts of unequal length, each at the beginning of its row."""
        plain = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        input_ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for number, row in enumerate(rows):
            input_ids[number, : len(row)] = torch.tensor(row)
            attention_mask[number, : len(row)] = 1
        device = self.model.device
        with eval_mode(plain), torch.no_grad():
            output = plain.get_decoder()(
                input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False
            )
        return output.last_hidden_state


def _spoken(text: str) -> list[str]:
    """The words of a text: capitals, blanks and signs make no difference that a pair could be about."""
    words = [text[word.start : word.end].casefold() for word in words_of(text)]
    return [word for word in words if word[0].isalnum()] or words


def _distinct(pairs: Sequence[tuple[str, str]]) -> tuple[list[str], list[tuple[int, int]]]:
    """Each text once, and where those of each pair stand."""
    numbers: dict[str, int] = {}
    places = [
        (numbers.setdefault(first, len(numbers)), numbers.setdefault(second, len(numbers))) for first, second in pairs
    ]
    return list(numbers), places


def _cosines(vectors: Float[Tensor, "N D"], places: list[tuple[int, int]]) -> list[float]:
    first, second = (vectors[list(side)] for side in zip(*places, strict=True))
    return torch.cosine_similarity(first.double(), second.double(), dim=-1).tolist()
