"""Pairs to one batch: the sides of a pair stand side by side, and what they share is in the batch once."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from mllm.data.blobs import read_media_bytes
from mllm.data.collate import PackingCollator, PaddingCollator, decode_item
from mllm.data.contrasts import Contrast, changed_data
from mllm.data.pairs import Pair, names_of_sides
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
            What the collator of the rows gives for all sides, with media once each and `{kind}_places`, the number of
            the medium at each place of the texts (without `shares_media`, media as often as they stand in texts);
            `sources` [pairs]; `reference_log_probs` [pairs, sides] where they are known.
        """
        batch = self._rows.texts([side for pair in examples for side in pair.sides])
        media: list[Any] = []
        kinds: list[str] = []  # of the media of the batch
        places: list[int] = []  # the number of the medium at each place of the texts
        for row, pair in enumerate(examples):
            own, start = list(self.media_of(pair, row)), len(media)
            if self.shares_media:
                media += own
                kinds += [shown.item.kind for shown in pair.shown]
                places += [start + place for side in pair.places for place in side]
                continue
            for number, side in enumerate(pair.places):
                media += [own[place]._replace(row=row * len(pair.sides) + number) for place in side]
        features = self._rows.features
        batch |= features.batch(media) if features is not None else self._rows.processor.encode_media(media)
        if self.shares_media:
            batch |= _places_by_kind(places, kinds)
        batch |= self._questions(examples)
        batch |= self._rows.processor.text_inputs(batch["input_ids"])
        if self.source_of is not None:
            batch["sources"] = torch.tensor([self.source_of(pair.position) for pair in examples], dtype=torch.long)
        if self.reference is not None:
            known = [self.reference(pair.position) for pair in examples]
            batch["reference_log_probs"] = torch.tensor(known).view(len(examples), len(names_of_sides(self.contrast)))
        return batch

    def media_of(self, example: Pair, row: int = 0) -> Iterator[Any]:
        """A pair's media, each once, as they are asked for: decoded and changed, or as features."""
        if self._rows.features is not None:
            yield from self._rows.features.of(example)  # type: ignore[arg-type]
            return
        for shown in example.shown:
            source = read_media_bytes(shown.item)
            decoded = decode_item(shown.item, source, self._rows.processor, row=row, where=example.row.name)
            yield decoded._replace(data=changed_data(decoded.data, shown, self.contrast.crop_scale))

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


def _places_by_kind(places: Sequence[int], kinds: Sequence[str]) -> dict[str, Tensor]:
    """For each kind, which of the media of that kind stands at each place of the texts."""
    numbers, counts = [], Counter[str]()
    for kind in kinds:
        numbers.append(counts[kind])
        counts[kind] += 1
    found: dict[str, list[int]] = {}
    for place in places:
        found.setdefault(kinds[place], []).append(numbers[place])
    return {f"{kind}_places": torch.tensor(items) for kind, items in found.items()}
