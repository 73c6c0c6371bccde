"""Who constructs pairs, and how: what `construct_pairs` is told."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mllm.errors import OptionError
from mllm.preference_data.acceptance import TAU, Similarity
from mllm.preference_data.embedders import ImageEmbedder
from mllm.preference_data.phrases import Completer, Masker
from mllm.preference_data.retriever import Retrieval, search_by_default

ON_UNANSWERED = ("error", "reject")

Bar = Callable[[str, int], Callable[[int], Any]]
"""Given a title and a total, gives what is told how many more are done."""


@dataclass(frozen=True)
class Components:
    """Who does the steps.

    Args:
        masker: Finds the phrases of an answer.
        embedder: Makes images comparable.
        completer: Writes phrases anew.
        similarity: Compares answers.
        facts: What each of them is, as JSON can hold it, by its name here. Results of one with other facts are not
            taken up.
        keeps_each: Names of those whose results are kept one by one, and never asked for again: endpoints. The others
            are models at hand, whose results are kept portion by portion.
        counts: What endpoints have met with since they were made, by the name of what they do.
    """

    masker: Masker
    embedder: ImageEmbedder
    completer: Completer
    similarity: Similarity
    facts: Mapping[str, Any]
    keeps_each: frozenset[str] = frozenset()
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Construction:
    """How pairs are made.

    Args:
        tau: A completion is taken when its similarity to the answer is below.
        retrieval: Which images are tried, nearest first.
        batch_size: Images embedded at once.
        portion: Answers that a component is given at once.
        chunk: Rows that go through all steps together.
        search: How neighbours are found: "faiss" or "numpy".
        on_unanswered: What becomes of rows of which an endpoint gave no answer: "error" (the construction ends without
            an output once all others are done; started again it asks again) or "reject".
        examples: Pairs shown on the page.
    """

    tau: float = TAU
    retrieval: Retrieval = field(default_factory=Retrieval)
    batch_size: int = 32
    portion: int = 256
    chunk: int = 2048
    search: str = field(default_factory=search_by_default)
    on_unanswered: str = "error"
    examples: int = 24

    def __post_init__(self):
        if not 0 < self.tau <= 1:
            raise OptionError(f"tau = {self.tau}", expected="a similarity above 0, up to 1", do="correct it")
        if min(self.batch_size, self.portion, self.chunk, self.examples) < 1:
            raise OptionError(
                "batch_size, portion, chunk, examples = "
                f"{self.batch_size}, {self.portion}, {self.chunk}, {self.examples}",
                expected="1 or more each",
                do="raise what is less",
            )
        if self.on_unanswered not in ON_UNANSWERED:
            raise OptionError(
                f"on_unanswered = {self.on_unanswered!r}",
                expected=f"one of {', '.join(ON_UNANSWERED)}",
                do="choose one",
            )
