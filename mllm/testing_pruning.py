"""What a forward under a pruner has to equal: the whole prompt, layer by layer, with what left masked as keys."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mllm.models import MllmForConditionalGeneration
from mllm.models.parts import layers_of, parts_of
from mllm.processing import MllmProcessor
from mllm.pruning import Cut, Item, Pruner, Row, Selection
from mllm.shapes import Float, Int, Tensor
from mllm.testing import tiny_model
from mllm.testing_images import save_tiny_image_encoder

NUM_TOKENS = 16
"""Visual tokens of a picture of `tiny_prunable_model`."""


def tiny_prunable_model(
    directory: Path, *, encoder: str = "clip_vision_model", llm: str = "llama", **parts: Any
) -> tuple[MllmForConditionalGeneration, MllmProcessor]:
    """A composed model with 4 layers and 16 vectors to a picture, whose weights are large enough to tell tokens apart.

    Args:
        directory: Where its parts are made.
        encoder: Encoder family.
        llm: Language model family.
        **parts: As for `save_tiny_parts`.
    """
    path = save_tiny_image_encoder(directory / "eye", encoder, image_size=32)
    image = {"encoder": path, **parts.pop("image", {})}
    model, processor = tiny_model(directory, image=image, llm=llm, **{"num_hidden_layers": 4, **parts})
    enlarge(model)
    return model.eval(), processor


def enlarge(model: PreTrainedModel) -> None:
    """Give each matrix entries as large as keep numbers at their size: random ones at first hardly move anything."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                std = parameter[0].numel() ** -0.5
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


@dataclass
class KeepsAll(Pruner):
    """Lets all tokens go through what those go through that stay."""

    def cuts(self, num_layers: int) -> tuple[Cut, ...]:
        """See `Pruner.cuts`."""
        return tuple(Cut(layer, scored_at=max(layer - 1, 0)) for layer in (0, 1, 3))

    def select(self, item: Item, num_layers: int) -> Selection:
        """See `Pruner.select`."""
        return Selection(torch.arange(len(item.vectors)), item.vectors.clone())

    def select_at_cut(self, row: Row, cut: int, entered: tuple[int, ...], num_layers: int) -> list[Selection | None]:
        """See `Pruner.select_at_cut`."""
        return [Selection(torch.arange(len(item)), row.hidden[item]) for item in row.items]


class KeepsFirst(Pruner):
    """Keeps the first tokens of each item."""

    def select(self, item: Item, num_layers: int) -> Selection:
        """See `Pruner.select`."""
        return Selection(torch.arange(self.budget(len(item.vectors))))


@dataclass
class Shuffles(Pruner):
    """Keeps, turns around and mixes tokens; of each item another number."""

    tokens: int | float = 12

    def cuts(self, num_layers: int) -> tuple[Cut, ...]:
        """See `Pruner.cuts`."""
        return tuple(Cut(layer, scored_at=layer) for layer in (0, 1, 3))

    def select(self, item: Item, num_layers: int) -> Selection:
        """See `Pruner.select`."""
        return self._some(item.vectors, 13)

    def select_at_cut(self, row: Row, cut: int, entered: tuple[int, ...], num_layers: int) -> list[Selection | None]:
        """See `Pruner.select_at_cut`."""
        return [self._some(row.hidden[item], 9 - 2 * cut) for item in row.items]

    def _some(self, values: Tensor, count: int) -> Selection:
        count += int(values[0, 0] > 0)
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(count)).to(values.device)
        kept, others = order[:count], order[count:]
        into = (
            torch.full_like(order, -1)
            .scatter(0, kept, torch.arange(count, device=order.device))
            .scatter(0, others[:1], 1)
        )
        mixed = values[kept].clone()
        mixed[1] = values[order[[1, count]]].mean(dim=0)
        return Selection(kept, mixed, into)


@dataclass
class Watched:
    """A prompt under a pruner, as it was seen from outside.

    Args:
        pruner: At work.
        columns: Those of each picture of each row.
        kwargs: What the language model was given, with what left in front of it marked.
        cuts: At each cut, the selections of each row that had visual tokens.
    """

    pruner: Pruner
    columns: list[list[Int[Tensor, " _"]]]
    kwargs: dict[str, Any] = field(default_factory=dict)
    cuts: dict[int, list[list[Selection | None]]] = field(default_factory=dict)


@contextmanager
def watched(model: PreTrainedModel, pruner: Pruner, columns: list[list[Int[Tensor, " _"]]]) -> Iterator[Watched]:
    """A pruner's context, in which the first forward is written down. Arguments as of `Watched`."""
    found, own = Watched(pruner, columns), pruner.select_at_cut
    num_asked = 0

    def before_body(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal num_asked
        num_asked += 1
        if num_asked == 1:
            found.kwargs = dict(kwargs)

    def select_at_cut(row: Any, cut: int, *args: Any) -> list[Selection | None]:
        selections = own(row, cut, *args)
        if num_asked == 1:
            found.cuts.setdefault(cut, []).append(selections)
        return selections

    handle = model.get_decoder().register_forward_pre_hook(before_body, with_kwargs=True)
    vars(pruner)["select_at_cut"] = select_at_cut
    try:
        with pruner(model):
            yield found
    finally:
        handle.remove()
        del vars(pruner)["select_at_cut"]


@torch.no_grad()
def recomputed(
    model: PreTrainedModel, seen: Watched, answers: Int[Tensor, "B n"] | None = None
) -> Float[Tensor, "B U vocabulary"]:
    """Logits of the whole prompt, and of answers behind it, in one forward without a cache.

    No token is taken out. What left is masked as a key, from the layer on in front of which it did; what was merged
    gets the value it was given there; and where positions are compacted, they are so in each layer.

    Args:
        model: Without a pruner.
        seen: Of its forward under one.
        answers: Tokens that followed.
    """
    kwargs, embeds = dict(seen.kwargs), seen.kwargs["inputs_embeds"]
    if answers is not None:
        embeds = torch.cat([embeds, model.get_input_embeddings()(answers)], dim=1)
    names = layers_of(model, parts_of(model)["text"])
    layers = [model.get_submodule(name) for name in names]
    rows = _Rows(seen, embeds, model.get_decoder())
    with ExitStack() as stack:
        for index, layer in enumerate(layers if seen.pruner.cuts(len(layers)) else ()):
            stack.callback(
                layer.register_forward_pre_hook(rows.before_layer(index, len(layers)), with_kwargs=True).remove
            )
        kwargs |= {
            "inputs_embeds": rows.filled(embeds),
            "position_ids": rows.positions(),
            "attention_mask": rows.mask(),
        }
        kwargs |= {"past_key_values": None, "use_cache": False}
        if kwargs.get("visual_pos_masks") is not None:
            marks = kwargs["visual_pos_masks"]
            kwargs["visual_pos_masks"] = torch.cat(
                [marks, marks.new_zeros(len(marks), rows.width - marks.shape[1])], 1
            )
        outputs = model.get_decoder()(**kwargs)
    return model.get_output_embeddings()(outputs.last_hidden_state)


class _Rows:
    """Which tokens of each row are there, and in which order they stand."""

    def __init__(self, seen: Watched, embeds: Tensor, body: Any):
        self.seen = seen
        self.body = body
        self.device = embeds.device
        self.num_rows, self.width = embeds.shape[:2]
        self.is_marked = embeds[..., 0].isnan()
        given = seen.kwargs["inputs_embeds"].shape[1]
        mask = seen.kwargs.get("attention_mask")
        is_token = torch.ones(self.num_rows, self.width, dtype=torch.bool)
        if mask is not None:
            is_token[:, :given] = mask.bool().cpu()
        self.orders = [
            (row & ~marked).nonzero()[:, 0].tolist()
            for row, marked in zip(is_token, self.is_marked.cpu(), strict=True)
        ]
        self.items = [[set(columns.tolist()) for columns in row] for row in seen.columns]

    def filled(self, embeds: Tensor) -> Tensor:
        """What left has some number: nobody reads it."""
        return embeds.masked_fill(self.is_marked[..., None], 0.1)

    def positions(self) -> Tensor:
        """Of all columns."""
        if self.seen.pruner.positions == "compacted":
            positions = torch.zeros(self.num_rows, self.width, dtype=torch.long)
            for row, order in enumerate(self.orders):
                positions[row, order] = torch.arange(len(order))
            return positions.to(self.device)
        given = self.seen.kwargs.get("position_ids")
        if given is None:
            return torch.arange(self.width, device=self.device).expand(self.num_rows, -1)
        num_more = self.width - given.shape[-1]
        return torch.cat([given, given[..., -1:] + torch.arange(1, num_more + 1, device=self.device)], dim=-1)

    def mask(self) -> Tensor:
        """What each token sees: itself, and those that are there and stand in front of it."""
        sees = torch.eye(self.width, dtype=torch.bool).repeat(self.num_rows, 1, 1)
        for row, order in enumerate(self.orders):
            for place, column in enumerate(order):
                sees[row, column, order[: place + 1]] = True
        nothing = torch.finfo(torch.float32).min
        return torch.zeros(sees.shape).masked_fill(~sees, nothing)[:, None].to(self.device)

    def before_layer(self, index: int, num_layers: int) -> Any:
        """A hook in front of a layer."""

        def hook(layer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            hidden = args[0] if args else kwargs["hidden_states"]
            for number, cut in enumerate(self.seen.pruner.cuts(num_layers)):
                if cut.layer == index:
                    hidden = self._cut(number, hidden)
            kwargs = {**kwargs, "attention_mask": self.mask()}
            if self.seen.pruner.positions == "compacted" and "position_embeddings" in kwargs:
                kwargs["position_embeddings"] = self.body.rotary_emb(hidden, self.positions())
            return (hidden, *args[1:]), {name: value for name, value in kwargs.items() if name != "hidden_states"}

        return hook

    def _cut(self, number: int, hidden: Tensor) -> Tensor:
        """Let tokens leave, as was seen."""
        asked = iter(self.seen.cuts.get(number, ()))
        hidden = hidden.clone()
        for row, items in enumerate(self.items):
            if number not in self.seen.cuts or not any(own & set(self.orders[row]) for own in items):
                continue
            selections, order = next(asked), self.orders[row]
            for own, selection in zip(items, selections, strict=True):
                if selection is None:
                    continue
                here = [column for column in order if column in own]
                stay = [here[place] for place in selection.kept.tolist()]
                if selection.values is not None:
                    hidden[row, stay] = selection.values.to(hidden.dtype)
                places = sorted(order.index(column) for column in stay)
                if self.seen.pruner.positions != "compacted":
                    stay = sorted(stay)
                new = dict(zip(places, stay, strict=True))
                order = [
                    new.get(place, column) for place, column in enumerate(order) if column not in own or place in new
                ]
            self.orders[row] = order
        return hidden


def pictures_and_words(model: PreTrainedModel) -> dict[str, Tensor]:
    """Rows of one picture, of two that touch each other, and of none, padded on the left."""
    picture = [model.config.image_token_id] * NUM_TOKENS
    rows = [[20, 21, 22, *picture, 23, 24, 25, 26], [27, *picture, *picture, 28, 29, 30], [31, 32, 33, 34, 35]]
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": tiny_pictures(3),
    }


def tiny_pictures(count: int) -> Tensor:
    """Pixels of pictures for `tiny_prunable_model`."""
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def answered(model: PreTrainedModel, inputs: dict[str, Any], **options: Any) -> Any:
    """Four tokens that `generate` gives, with their logits, or as the options say."""
    settings: dict[str, Any] = {
        "max_new_tokens": 4,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    settings |= {"eos_token_id": None, "pad_token_id": 0}
    return model.generate(**inputs, **{**settings, **options})


def columns_of_items(input_ids: Int[Tensor, "B T"], token: int, lengths: list[int]) -> list[list[Int[Tensor, " _"]]]:
    """The columns of each picture of each row.

    Args:
        input_ids: Of the prompt.
        token: That stands for what is visual.
        lengths: How many there are of each picture, in order of appearance.
    """
    rest = iter(lengths)
    rows: list[list[Tensor]] = []
    for row in input_ids:
        columns = (row == token).nonzero()[:, 0]
        rows.append([])
        while len(columns):
            length = next(rest)
            rows[-1].append(columns[:length])
            columns = columns[length:]
    return rows
