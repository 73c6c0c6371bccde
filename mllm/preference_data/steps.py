"""The steps of the construction, each with its results in files of its own.

A file is named by a hash of everything that its results depend on. So a construction that is killed goes on to the
same pairs, and one with other options takes up what these do not touch. Rows go through the steps in chunks, so that
memory does not grow with them, except for the images' vectors.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from mllm.data.indexing.content_keys import hash_of
from mllm.data.schema import MediaItem, Row
from mllm.errors import OptionError
from mllm.preference_data.chunk import COMPLETER, MASKER, VERDICTS, Chunk
from mllm.preference_data.construction import Bar, Components, Construction
from mllm.preference_data.journal import Journal
from mllm.preference_data.outcomes import Outcome, outcome_of
from mllm.preference_data.pictures import embed_pictures
from mllm.preference_data.retriever import find_neighbours

FORMAT = 1
"""Of the files; a higher number makes all older ones void."""

PICTURES, NEIGHBOURS, OUTCOMES = "pictures", "neighbours", "outcomes"


class Steps:
    """Takes rows through the steps. Images are embedded, and their neighbours found, when it is made.

    Args:
        rows: Whose answers are taken.
        images: All images that can be retrieved, those of the rows among them, each with its number.
        images_key: A hash of all images.
        rows_key: A hash of the rows.
        components: Who does the steps.
        options: How.
        directory: Where results are kept.
        bar: Shows what is done.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        images: Mapping[MediaItem, int],
        *,
        images_key: str,
        rows_key: str,
        components: Components,
        options: Construction,
        directory: Path,
        bar: Bar,
    ):
        self.rows, self.images, self.items = rows, images, list(images)
        self.components, self.options, self.directory, self.bar = components, options, directory, bar
        self.names = _names(images_key, rows_key, components, options)
        self.pictures = embed_pictures(
            self.items, components.embedder, directory / self.names[PICTURES],
            batch_size=options.batch_size, progress=bar("images", len(self.items)),
        )  # fmt: skip
        self.neighbours = find_neighbours(
            self.pictures, directory / self.names[NEIGHBOURS], options.retrieval,
            search=options.search, progress=bar("neighbours", len(self.items)),
        )  # fmt: skip

    def carry_out(self) -> None:
        """Take all rows through the steps that they have not been through.

        Raises:
            EndpointError: An endpoint cannot be used. What it answered before is kept.
            OptionError: Of some rows it gave no answer, and that is an error. All others are done and kept.
        """
        unanswered = 0
        progress = self.bar("rows", len(self.rows))
        for numbers in self._chunks():
            with self._outcomes(numbers) as journal:
                if len(journal.records) < len(numbers):
                    journal.keep({one.number: one.record() for one in self._chunk(numbers).outcomes()})
                unanswered += len(numbers) - len(journal.records)
            progress(len(numbers))
        if unanswered:
            raise OptionError(
                f"{unanswered} of {len(self.rows)} rows of which an endpoint gave no answer",
                expected="an answer to every question; those that came are kept",
                do="start the same construction again, which asks for these alone, or leave such rows out with "
                "on_unanswered: reject",
            )

    def outcomes(self) -> Iterator[Outcome]:
        """What became of each row, in order, when all have been through the steps."""
        for numbers in self._chunks():
            with self._outcomes(numbers) as journal:
                yield from (outcome_of(number, journal.records[number]) for number in numbers)

    def _chunks(self) -> Iterator[range]:
        size = self.options.chunk
        for start in range(0, len(self.rows), size):
            yield range(start, min(start + size, len(self.rows)))

    def _chunk(self, numbers: range) -> Chunk:
        rows = {number: self.rows[number] for number in numbers}
        files = {step: self._file(step, numbers) for step in (MASKER, COMPLETER, VERDICTS)}
        return Chunk(
            rows, self.images, self.items, self.pictures, self.neighbours,
            components=self.components, options=self.options, files=files, bar=self.bar,
        )  # fmt: skip

    def _outcomes(self, numbers: range) -> Journal:
        return Journal(self._file(OUTCOMES, numbers).with_suffix(".jsonl"))

    def _file(self, step: str, numbers: range) -> Path:
        return self.directory / self.names[step] / f"{numbers.start:08d}"


def _names(images_key: str, rows_key: str, components: Components, options: Construction) -> dict[str, str]:
    """The file or directory of each step's results."""
    facts = components.facts
    pictures = hash_of([FORMAT, images_key, facts["embedder"]])
    neighbours = hash_of([pictures, asdict(options.retrieval)])
    masked = hash_of([FORMAT, rows_key, facts["masker"], options.chunk])
    completed = hash_of([masked, neighbours, facts["completer"]])
    verdicts = hash_of([completed, facts["similarity"], options.tau])
    hashes = {
        PICTURES: pictures,
        NEIGHBOURS: neighbours,
        MASKER: masked,
        COMPLETER: completed,
        VERDICTS: verdicts,
        OUTCOMES: hash_of([verdicts, options.on_unanswered]),
    }
    return {name: f"{name}-{digest[:16]}" for name, digest in hashes.items()}
