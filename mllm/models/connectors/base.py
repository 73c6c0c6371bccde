"""What all connectors share: from the encoder's views of media items to one sequence of vectors an item."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from mllm.errors import OptionError
from mllm.shapes import Bool, Float, Int, Tensor
from mllm.sizes import EACH, LengthRule

PER = ("view", "item")

Features = Float[Tensor, "N L D_in"] | tuple[Float[Tensor, "N _ _"], ...]
"""Of one stream; or of each of several, where an encoder gives several: [N, L_i, D_i]."""
Lengths = Int[Tensor, " N"] | tuple[Int[Tensor, " N"], ...] | None
"""How many features of each sequence count, of each stream where there are several; None for all."""

POSITION_STD = 0.02
"""Of fresh positions, as in BERT: small beside features, so that training begins as without them."""


class Question(NamedTuple):
    """The words that a medium is asked about, for connectors that read them.

    Args:
        ids: Token ids, padded.
        mask: 1 for tokens, 0 for padding.
    """

    ids: Int[Tensor, "N Q"]
    mask: Int[Tensor, "N Q"]

    def repeated(self, counts: Sequence[int]) -> "Question":
        """Each item's question as often as it says: once for each of its views."""
        times = torch.tensor(counts, device=self.ids.device)
        return Question(self.ids.repeat_interleave(times, 0), self.mask.repeat_interleave(times, 0))


class Layout(NamedTuple):
    """How the views of a batch belong to its items.

    Args:
        views: Of each item, how many features of each of its views count.
        sizes: Of each item, for arrangements that depend on them.
    """

    views: list[tuple[int, ...]]
    sizes: list[tuple]


@dataclass(frozen=True)
class ConnectorOptions:
    """Options that every connector has; those of its own stand in its file.

    Args:
        per: "view" connects each view of an item (image, tile, frame, window) by itself, "item" all of them as one
            sequence.
        positions: Rows of a table of learned vectors of which one is added to all features of a view, by its number in
            its item; an item may then have no more views. 0 for no table.
    """

    per: str = "view"
    positions: int = 0

    def __post_init__(self):
        self.check("per", self.per in PER, f"one of {', '.join(PER)}")
        self.check("positions", self.positions >= 0, "0 or more")

    def check(self, name: str, is_fine: bool, expected: str) -> None:
        """Refuse an option's value.

        Raises:
            OptionError: It is not fine.
        """
        if not is_fine:
            found = f"connector: {name} = {getattr(self, name)!r}"
            raise OptionError(found, expected=expected, do=f"correct `{name}` of the connector, or leave it out")

    def length_rule(self) -> LengthRule:
        """How many vectors it makes of how many features."""
        return EACH


class Connector(nn.Module):
    """Leads features to the language model's width.

    A subclass has `Options`, builds its layers, and connects; items and their views are dealt with here. Padding that
    follows an item's features must not change its result: `connect` is told their lengths.

    Args:
        options: Its own.
        in_sizes: Width of the features; several where the encoder gives several streams.
        out_size: Width of the language model.
    """

    Options: ClassVar[type[ConnectorOptions]] = ConnectorOptions

    def __init__(self, options: Any, *, in_sizes: Sequence[int], out_size: int):
        super().__init__()
        self.options = options
        self.length_rule = options.length_rule()
        self.in_sizes = tuple(in_sizes)
        self.out_size = out_size
        self.positions = nn.Embedding(options.positions, sum(self.in_sizes)) if options.positions else None
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=POSITION_STD)
        self.arrangement: nn.Module | None = None
        """Puts the connected views of an item in order, where its rule has tiles; see `build_connector`."""

    @property
    def in_size(self) -> int:
        """Width of the features of the only stream.

        Raises:
            OptionError: There are several.
        """
        if len(self.in_sizes) > 1:
            raise OptionError(
                f"a {type(self).__name__} for {len(self.in_sizes)} streams of features",
                expected="a connector that reads several: `streams` or `multi_stream_qformer`",
                do="choose one of them, or let the encoder join its streams (`join: channels`)",
            )
        return self.in_sizes[0]

    def connect(
        self,
        features: Features,
        lengths: Lengths,
        question: Question | None,
    ) -> Float[Tensor, "N V D_out"]:
        """Connect sequences of features.

        Args:
            features: Padded at the end to one length; a tuple of them where there are several streams.
            lengths: How many of each count; None for all.
            question: What each is asked about, for connectors that read it.

        Returns:
            As many vectors as `length_rule` says of the longest; behind a shorter one's own stands anything.
        """
        raise NotImplementedError

    def forward(
        self,
        features: Features,
        layout: Layout | None = None,
        question: Question | None = None,
        *,
        as_one: bool = False,
    ) -> Float[Tensor, "N V D_out"] | Float[Tensor, "all D_out"] | list[Float[Tensor, "_ D_out"]]:
        """Connect the views of a batch.

        Args:
            features: Of all views, in order; a tuple where there are several streams, all of whose features count.
            layout: Which belong together; None where every view is an item, and all of its features count.
            question: What each item is asked about.
            as_one: Whether the vectors of items with a layout come in one tensor, one item behind the other. ZeRO-3
                counts the tensors that leave a module, of which every rank has to have as many.

        Returns:
            The vectors of each item: one tensor without a layout, else one for each.
        """
        items = self._connect_views(features, layout, question)
        return torch.cat(items) if as_one and isinstance(items, list) else items

    def _connect_views(
        self, features: Features, layout: Layout | None, question: Question | None
    ) -> Float[Tensor, "N V D_out"] | list[Float[Tensor, "_ D_out"]]:
        num_views = len(features[0] if isinstance(features, tuple) else features)
        counts = [1] * num_views if layout is None else [len(views) for views in layout.views]
        features = self._placed(features, counts)
        if layout is None:
            connected = self.connect(features, None, question)
            if self.arrangement is None:
                return connected
            return torch.stack(self._arranged([[one] for one in connected], None))
        if self.options.per == "item":
            return self._connect_items(features, layout, question)
        lengths = [length for views in layout.views for length in views]
        connected = self.connect(
            features, self._lengths(lengths, features), None if question is None else question.repeated(counts)
        )
        vectors = [one[: self.length_rule.count(length)] for one, length in zip(connected, lengths, strict=True)]
        parts = iter(vectors)
        return self._arranged([[next(parts) for _ in range(count)] for count in counts], layout)

    def _connect_items(
        self, features: Features, layout: Layout, question: Question | None
    ) -> list[Float[Tensor, "_ D_out"]]:
        joined: Features
        lengths: Lengths
        if isinstance(features, tuple):
            streams = [self._joined(one, [(one.shape[1],) * len(item) for item in layout.views]) for one in features]
            joined = tuple(one for one, _ in streams)
            known = tuple(length for _, length in streams if length is not None)
            lengths = known or None  # of all streams or of none: they have as many views
        else:
            joined, lengths = self._joined(features, layout.views)
        connected = self.connect(joined, lengths, question)
        vectors = [one[: self.length_rule.count(sum(item))] for one, item in zip(connected, layout.views, strict=True)]
        return self._arranged([[one] for one in vectors], layout)

    def _arranged(self, items: Any, layout: Layout | None) -> list[Float[Tensor, "_ D_out"]]:
        """The vectors of each item, from those of its views."""
        if self.arrangement is None:
            return [torch.cat(views) for views in items]
        sizes = None if layout is None else layout.sizes
        return list(self.arrangement(items, sizes).split(self.arrangement.lengths(items, sizes)))

    def _joined(
        self, features: Float[Tensor, "N L D_in"], items: list[tuple[int, ...]]
    ) -> tuple[Float[Tensor, "_ _ D_in"], Int[Tensor, " _"] | None]:
        """The features of each item's views as one sequence, padded, with the lengths that count."""
        views = iter(features)
        padded = pad_sequence([torch.cat([next(views)[:length] for length in item]) for item in items], True)
        return padded, self._lengths([sum(item) for item in items], padded)

    def _placed(self, features: Features, counts: list[int]) -> Features:
        """Features with the vector of their view's place among those of its item added, where there is a table."""
        if self.positions is None:
            return features
        places = [place for count in counts for place in range(count)]
        added = self.positions(torch.tensor(places, device=self.positions.weight.device))[:, None]
        if not isinstance(features, tuple):
            return features + added
        return tuple(one + part for one, part in zip(features, added.split(self.in_sizes, dim=-1), strict=True))

    def _lengths(self, lengths: list[int], features: Features) -> Int[Tensor, " _"] | None:
        whole = sum(one.shape[1] for one in features) if isinstance(features, tuple) else features.shape[1]
        if all(length == whole for length in lengths):
            return None
        assert not isinstance(features, tuple), "of several streams all features of a view count"
        return torch.tensor(lengths, device=features.device)


def counted_features(features: Float[Tensor, "N L D"], lengths: Int[Tensor, " N"] | None) -> Bool[Tensor, "#N L"]:
    """Which features count; one row for all where all do.

    Args:
        features: Padded at the end to one length.
        lengths: How many of each count; None for all.
    """
    places = torch.arange(features.shape[1], device=features.device)
    return (places < features.shape[1])[None] if lengths is None else places < lengths[:, None]
