"""Some rows on their way through the steps: masked, completed under one image after the other, and judged."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mllm.data.blobs import read_media_bytes
from mllm.data.reading.json_text import is_unicode
from mllm.data.schema import MediaItem, Row
from mllm.preference_data.acceptance import Similarity, reason_against
from mllm.preference_data.answered import Answered, Unfit, take_apart
from mllm.preference_data.construction import Bar, Components, Construction
from mllm.preference_data.journal import Journal, Record, carry_out
from mllm.preference_data.outcomes import (
    ACCEPTED,
    NO_NEIGHBOUR,
    NONE_ACCEPTED,
    UNREADABLE,
    Outcome,
    masked_of,
    masked_record,
)
from mllm.preference_data.phrases import BAD_REPLY, TOO_SIMILAR, UNANSWERED, Completion, Masked, Task
from mllm.preference_data.retriever import NOBODY

MASKER, COMPLETER, VERDICTS = "masker", "completer", "verdicts"


class Chunk:
    """Some rows on their way.

    Args:
        rows: The rows, by number.
        images: The number of each image.
        items: Each image by its number.
        pictures: As `embed_pictures` made them.
        neighbours: As `find_neighbours` found them.
        components: Who does the steps.
        options: How.
        files: Where the results of each step are kept, without suffix.
        bar: Shows what is done.
    """

    def __init__(
        self,
        rows: Mapping[int, Row],
        images: Mapping[MediaItem, int],
        items: Sequence[MediaItem],
        pictures: np.ndarray,
        neighbours: np.ndarray,
        *,
        components: Components,
        options: Construction,
        files: Mapping[str, Path],
        bar: Bar,
    ):
        self.rows, self.images, self.items = rows, images, items
        self.pictures, self.neighbours = pictures, neighbours
        self.components, self.options, self.files, self.bar = components, options, files, bar
        self.answered: dict[int, Answered] = {}
        self.masked: dict[int, Masked] = {}  # rows that are still on their way
        self.tries: dict[int, tuple[str, ...]] = {}
        self.done: dict[int, Outcome] = {}

    def outcomes(self) -> list[Outcome]:
        """What becomes of the rows, in order; nothing of those without an answer, where that is an error."""
        self._take_apart()
        self._mask()
        for attempt in range(self.options.retrieval.top_k):
            alone = [number for number in self.masked if self._neighbour(number, attempt) == NOBODY]
            self._leave_out(dict.fromkeys(alone, NONE_ACCEPTED))
            if not self.masked:
                break
            completions = self._complete(attempt)
            self._accept(attempt, completions, self._judge(attempt, completions))
        self._leave_out(dict.fromkeys(list(self.masked), NONE_ACCEPTED))
        return [self.done[number] for number in sorted(self.done)]

    def _take_apart(self) -> None:
        """Leave out rows that no pair can be made of."""
        for number, row in self.rows.items():
            try:
                self.answered[number] = take_apart(row)
            except Unfit as unfit:
                self.done[number] = Outcome(number, str(unfit))
                continue
            if not self.pictures["is_read"][self._image(number)]:
                self.done[number] = Outcome(number, UNREADABLE)
            elif self._neighbour(number, 0) == NOBODY:
                self.done[number] = Outcome(number, NO_NEIGHBOUR)

    def _mask(self) -> None:
        def work(texts: list[str]) -> Iterator[tuple[int, Record | None]]:
            for place, masked in self.components.masker.mask(texts):
                yield place, None if masked.reason == UNANSWERED else masked_record(masked)

        wanted = [number for number in self.answered if number not in self.done]
        records = self._carry_out(MASKER, "", wanted, lambda number: self.answered[number].answer, work)
        for number, record in records.items():
            self.masked[number] = masked_of(self.answered[number].answer, record)
        self._leave_out({number: one.reason for number, one in self.masked.items() if one.reason})

    def _complete(self, attempt: int) -> dict[int, Completion]:
        """The answers of all rows on their way under the next of their images."""

        def task(number: int) -> Task:
            image = read_media_bytes(self.items[self._neighbour(number, attempt)])
            return Task(self.masked[number], self.answered[number].messages_with(image))

        def work(tasks: list[Task]) -> Iterator[tuple[int, Record | None]]:
            for place, completion in self.components.completer.complete(tasks):
                yield place, None if completion.reason == UNANSWERED else asdict(_writable(completion))

        records = self._carry_out(COMPLETER, f"-{attempt:02d}", list(self.masked), task, work)
        return {number: Completion(**record) for number, record in records.items()}

    def _judge(self, attempt: int, completions: Mapping[int, Completion]) -> dict[int, Record]:
        """Of each completion why it is not taken, and how similar it is to the answer."""

        def work(pairs: list[tuple[Masked, Completion]]) -> Iterator[tuple[int, Record | None]]:
            yield from enumerate(_verdicts(pairs, self.components.similarity, self.options.tau))

        def pair(number: int) -> tuple[Masked, Completion]:
            return self.masked[number], completions[number]

        return self._carry_out(VERDICTS, f"-{attempt:02d}", list(completions), pair, work)

    def _accept(self, attempt: int, completions: Mapping[int, Completion], verdicts: Mapping[int, Record]) -> None:
        """Make pairs of what was accepted; the others stay on their way, to the next image."""
        for number, verdict in verdicts.items():
            self.tries[number] = (*self.tries.get(number, ()), verdict["reason"])
            if verdict["reason"] != ACCEPTED:
                continue
            self.done[number] = Outcome(
                number,
                phrases=self.masked.pop(number).phrases,
                tries=self.tries[number],
                rejected=completions[number].text,
                neighbour=self._neighbour(number, attempt),
                cosine=float(self.neighbours["cosine"][self._image(number), attempt]),
                similarity=verdict["similarity"],
            )

    def _carry_out(
        self,
        step: str,
        suffix: str,
        numbers: list[int],
        task_of: Callable[[int], Any],
        work: Callable[[list[Any]], Iterator[tuple[int, Record | None]]],
    ) -> dict[int, Record]:
        """The results of a step, by row. A row without one goes no further."""
        file = self.files[step].with_name(f"{self.files[step].name}{suffix}.jsonl")
        keeps_each = step in self.components.keeps_each
        progress = self.bar(f"{step}{suffix} of rows from {min(self.rows)}", len(numbers))
        with Journal(file) as journal:
            without = carry_out(
                journal, numbers, task_of=task_of, work=work,
                portion=self.options.portion, keeps_each=keeps_each, progress=progress,
            )  # fmt: skip
        for number in without:
            self.masked.pop(number, None)
            if self.options.on_unanswered == "reject":
                self.done[number] = Outcome(number, UNANSWERED, tries=self.tries.get(number, ()))
        unanswered = set(without)
        return {number: journal.records[number] for number in numbers if number not in unanswered}

    def _leave_out(self, reasons: Mapping[int, str]) -> None:
        for number, reason in reasons.items():
            phrases, tries = self.masked.pop(number).phrases, self.tries.get(number, ())
            self.done[number] = Outcome(number, reason, phrases=phrases, tries=tries)

    def _image(self, number: int) -> int:
        return self.images[self.answered[number].image]

    def _neighbour(self, number: int, attempt: int) -> int:
        return int(self.neighbours["number"][self._image(number), attempt])


def _verdicts(pairs: Sequence[tuple[Masked, Completion]], similarity: Similarity, tau: float) -> list[Record]:
    """Completions are taken whose similarity to the answer is below `tau`; those of no use are not compared."""
    reasons = [reason_against(masked, completion) for masked, completion in pairs]
    compared = [place for place, reason in enumerate(reasons) if not reason]
    texts = [(pairs[place][0].text, pairs[place][1].text) for place in compared]
    verdicts: list[Record] = [{"reason": reason, "similarity": 1.0} for reason in reasons]
    for place, value in zip(compared, similarity.similarities(texts), strict=True):
        verdicts[place] = {"reason": ACCEPTED if value < tau else TOO_SIMILAR, "similarity": value}
    return verdicts


def _writable(completion: Completion) -> Completion:
    """The completion, where it is a text that a file takes: half of a surrogate pair is none."""
    return completion if is_unicode(completion.text) else Completion("", BAD_REPLY)
