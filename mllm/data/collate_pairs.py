"""Pairs to one batch: the sides of a pair stand side by side, and what they share is in the batch once."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mllm.data.blobs import read_media_bytes
from mllm.data.collate import PackingCollator, PaddingCollator, decode_item
from mllm.data.contrasts import CONTRAST, RETRIEVED, Contrast, changed_data
from mllm.data.pairs import Pair, names_of_sides
from mllm.errors import MediaError
from mllm.processing.media import MediaInput
from mllm.processing.questions import questions_of
from mllm.shapes import Tensor


class PairCollator:
    """Make a batch of pairs. Its rows (of a packed batch, its segments) are their sides, pair by pair.

    Args:
        texts: The collator of the rows, padded or packed. Its features are used where it has some.
        contrast: What sides a pair has.
        shares_media: Whether the model takes a medium once that stands in several sides. Else it is repeated.
        reference: From a row's position to the reference model's log-probabilities of its sides, where they are known
            beforehand.
    """

    def __init__(
        self,
        texts: PaddingCollator | PackingCollator,
        *,
        contrast: Contrast,
        shares_media: bool,
        reference: Callable[[int], Sequence[float]] | None = None,
    ):
        self._rows = texts
        self.contrast = contrast
        self.shares_media = shares_media
        self.reference = reference
        self.source_of = texts.source_of
        texts.source_of = None  # of a pair, not of each of its sides

    def __call__(self, examples: Sequence[Pair]) -> dict[str, Any]:
        """Collate. No pairs give two padding tokens with nothing to learn.

        Returns:
            What the collator of the rows gives for all sides, with the media of `Pair.shown` and `{kind}_places`, the
            number of the medium at each place of the texts; or, without `shares_media`, a medium for each place.
            `sources` [pairs]; `reference_log_probs` [pairs, sides] where they are known.
        """
        batch = self._rows.texts([side for pair in examples for side in pair.sides])
        media = self._shared(examples) if self.shares_media else self._repeated(examples)
        features = self._rows.features
        batch |= features.batch(media) if features is not None else self._rows.processor.encode_media(media)
        if self.shares_media:
            batch |= _places_by_kind(examples)
        batch |= self._questions(examples)
        batch |= self._rows.processor.text_inputs(batch["input_ids"])
        if self.source_of is not None:
            batch["sources"] = torch.tensor([self.source_of(pair.position) for pair in examples], dtype=torch.long)
        if self.reference is not None:
            known = [self.reference(pair.position) for pair in examples]
            batch["reference_log_probs"] = torch.tensor(known).view(len(examples), len(names_of_sides(self.contrast)))
        return batch

    def media_of(self, example: Pair, row: int = 0) -> Iterator[Any]:
        """A pair's media, as `Pair.shown` lists them, as they are asked for: decoded and changed, or as features.

        Those that stand in a side together are of one row of the processor's.

        Raises:
            MediaError: One is damaged, or what a retrieved picture shows is the pair's own.
        """
        if self._rows.features is not None:
            yield from self._rows.features.of(example)
            return
        rows = {place: number for number, side in enumerate(dict.fromkeys(example.places)) for place in side}
        seen: list[Any] = []
        for place, shown in enumerate(example.shown):
            decoded = decode_item(
                shown.item,
                read_media_bytes(shown.item),
                self._rows.processor,
                row=row + rows[place],
                where=example.row.name,
            )
            seen.append(changed_data(decoded.data, shown, self.contrast.crop_scale))
            if self.contrast.media == RETRIEVED:
                _check_retrieved(example, names_of_sides(self.contrast).index(CONTRAST), seen)
            yield MediaInput(decoded.kind, seen[-1], decoded.size, decoded.row)

    def _shared(self, examples: Sequence[Pair]) -> list[Any]:
        """The media of a batch, those of several sides once."""
        media: list[Any] = []
        row = 0
        for pair in examples:
            media += self.media_of(pair, row)
            row += len(set(pair.places))
        return media

    def _repeated(self, examples: Sequence[Pair]) -> list[Any]:
        """The media of a batch as often as they stand in texts, each of the row that its side is. Never features."""
        media = []
        for number, pair in enumerate(examples):
            own = list(self.media_of(pair))
            for row, side in enumerate(pair.places, start=number * len(pair.sides)):
                media += [MediaInput(own[place].kind, own[place].data, own[place].size, row) for place in side]
        return media

    def _questions(self, examples: Sequence[Pair]) -> Mapping[str, Tensor]:
        """What each medium of the batch is asked about: all sides ask the same."""
        asked = []
        for pair in examples:
            by_medium: dict[int, dict[str, Any]] = {}
            for side, places in zip(pair.sides, pair.places, strict=True):
                kinds = [pair.shown[place].item.kind for place in places]
                texts = {kind: iter(questions_of(side.row.messages, kind)) for kind in kinds}
                for place, kind in zip(places, kinds, strict=True):
                    content = [{"type": kind}, {"type": "text", "text": next(texts[kind])}]
                    message = {"role": "user", "content": content}
                    if self.shares_media:
                        by_medium.setdefault(place, message)
                    else:
                        asked.append([message])
            asked += [[by_medium[place]] for place in sorted(by_medium)]
        return self._rows.processor.encode_questions(asked)


def _places_by_kind(examples: Sequence[Pair]) -> dict[str, Tensor]:
    """For each kind, which of the batch's media of that kind stands at each place of the texts."""
    counts = Counter[str]()
    found: dict[str, list[int]] = {}
    for pair in examples:
        numbers = []  # of the pair's media, each among those of its kind
        for shown in pair.shown:
            numbers.append(counts[shown.item.kind])
            counts[shown.item.kind] += 1
        for place in (place for side in pair.places for place in side):
            found.setdefault(pair.shown[place].item.kind, []).append(numbers[place])
    return {f"{kind}_places": torch.tensor(items) for kind, items in found.items()}


def _check_retrieved(pair: Pair, side: int, seen: Sequence[Any]) -> None:
    """Raise a MediaError once all that is contrasted has been decoded, if it is what the chosen answer is read under.

    Two files may hold one picture, and the loss would then compare an answer with itself.
    """
    chosen, contrast = pair.places[0], pair.places[side]
    if len(seen) - 1 != max(contrast) or not all(
        _is_same(seen[one], seen[other]) for one, other in zip(chosen, contrast, strict=True)
    ):
        return
    raise MediaError(
        f"{pair.row.name}: the retrieved image, {pair.shown[contrast[0]].item.path}, shows what the row's own shows",
        expected="another picture: under the same one the answer cannot be worse",
        do="drop the row, or retrieve again",
    )


def _is_same(one: Any, other: Any) -> bool:
    """Whether two images, sounds or videos are the same, as they were decoded."""
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return np.array_equal(np.asarray(one), np.asarray(other))
