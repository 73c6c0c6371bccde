"""What became of each row: a pair, or why not."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mllm.preference_data.phrases import Masked, Phrase

UNREADABLE = "its image cannot be read"
NO_NEIGHBOUR = "no other image to retrieve"
NONE_ACCEPTED = "no completion was accepted"
ACCEPTED = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a row.

    Args:
        number: Of the row.
        reason: Why there is no pair; `ACCEPTED` where there is one.
        phrases: That were masked in its answer.
        tries: Of each completion that was tried why it was not taken; the last one of a pair is `ACCEPTED`.
        rejected: The worse answer.
        neighbour: Number of the retrieved image.
        cosine: How much alike both images are.
        similarity: How much alike both answers are.
    """

    number: int
    reason: str = ACCEPTED
    phrases: tuple[Phrase, ...] = ()
    tries: tuple[str, ...] = ()
    rejected: str = ""
    neighbour: int = -1
    cosine: float = 0.0
    similarity: float = 0.0

    @property
    def is_pair(self) -> bool:
        """Whether a pair was made of the row."""
        return self.reason == ACCEPTED

    def record(self) -> dict[str, Any]:
        """As a journal holds it, under its number."""
        record = asdict(self) | {"phrases": [list(phrase) for phrase in self.phrases]}
        del record["number"]
        return record


def outcome_of(number: int, record: Mapping[str, Any]) -> Outcome:
    """What a journal held."""
    return Outcome(
        number,
        **{**record, "phrases": phrases_of(record["phrases"]), "tries": tuple(record["tries"])},
    )


def masked_record(masked: Masked) -> dict[str, Any]:
    """Which phrases of a row's answer were masked, as a journal holds it."""
    return {"phrases": [list(phrase) for phrase in masked.phrases], "reason": masked.reason}


def masked_of(answer: str, record: Mapping[str, Any]) -> Masked:
    """What a journal held, about this answer."""
    return Masked(answer, phrases_of(record["phrases"]), record["reason"])


def phrases_of(lists: list[list[Any]]) -> tuple[Phrase, ...]:
    """Phrases as JSON has them."""
    return tuple(Phrase(start, end, kind) for start, end, kind in lists)
