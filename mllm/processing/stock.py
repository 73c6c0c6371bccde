"""Any stock processor as training uses it: messages to ids and labels by sizes alone, media to the model's inputs."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import ProcessorMixin

from mllm.errors import MediaError, OptionError, RowError
from mllm.processing.chat import ChatEncoder, EncodedChat, Expansion
from mllm.processing.media import MediaInput
from mllm.processing.messages import with_lists
from mllm.processing.stock_families import STOCK_PROCESSORS, StockFamily, num_samples
from mllm.processing.stock_loading import load_processor_class
from mllm.processing.stock_templates import trainable_template
from mllm.shapes import Tensor, TokenIds
from mllm.sizes import MediaSize

REMEMBERED_SIZES = 10_000
AUDIO_TOLERANCE = 0.1
"""Seconds by which a sound may differ from what its header says; it is cut, or filled with silence."""
_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


class StockProcessor:
    """What training needs of a processor, around one of transformers' own.

    Args:
        processor: Of a class in `STOCK_PROCESSORS`.
        chat_template: A name or a text, see `trainable_template`; None to go by the processor's own.

    Raises:
        OptionError: There is no template to train with.
    """

    image_geometry = None
    """Boxes in texts are not moved: each family has its own coordinates."""

    def __init__(self, processor: ProcessorMixin, *, chat_template: str | None = None):
        self.processor = processor
        self.placeholders = self.family.placeholders(processor)
        self.tokenizer = processor.tokenizer
        template = trainable_template(
            self.tokenizer,
            _own_template(processor),
            encoder=self._new_encoder,
            placeholders=self.placeholders,
            choice=chat_template,
        )
        self.chat_template = template.text
        self.end_of_turn_token = template.end_of_turn
        self._encoder: ChatEncoder | None = None
        self._expansions: dict[tuple[str, MediaSize], Expansion] = {}

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, chat_template: str | None = None) -> "StockProcessor":
        """Load the processor of a stock checkpoint.

        Raises:
            CheckpointError: It is of a family that cannot be trained.
            OptionError: There is no template to train with.
        """
        return cls(load_processor_class(Path(directory)), chat_template=chat_template)

    @property
    def family(self) -> StockFamily:
        """What is particular about the processor."""
        return STOCK_PROCESSORS[type(self.processor).__name__]

    @property
    def media_kinds(self) -> tuple[str, ...]:
        """The kinds of media that the model is trained on."""
        return tuple(self.family.facts)

    @property
    def image_token(self) -> str | None:
        """What stands for an image's feature vectors; None for a model without images."""
        return self.placeholders["image"].repeated if "image" in self.placeholders else None

    @property
    def media_tokens(self) -> tuple[str, ...]:
        """The tokens that stand for media."""
        return tuple(dict.fromkeys(token for pair in self.placeholders.values() for token in pair))

    @property
    def sampling_rate(self) -> int | None:
        """Samples a second that sounds are decoded at; None for a model without sounds."""
        return self.processor.feature_extractor.sampling_rate if "audio" in self.media_kinds else None

    def encode_chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        media_sizes: Sequence[MediaSize] = (),
        add_generation_prompt: bool = False,
        where: str = "the conversation",
    ) -> EncodedChat:
        """Messages to ids, loss weights and media spans; no file is opened.

        Args:
            messages: See `ChatEncoder.encode`.
            media_sizes: Of each media item, in order of appearance: height and width, or seconds.
            add_generation_prompt: Whether to end with the template's opening of an answer.
            where: Names the row in errors.

        Raises:
            RowError: A message is malformed, media and placeholders disagree, or a medium is too large for the model.
        """
        return self.chat_encoder().encode(
            messages,
            media=self.expansions(media_sizes, where=where),
            add_generation_prompt=add_generation_prompt,
            where=where,
        )

    def expansions(self, sizes: Sequence[MediaSize], *, where: str = "the conversation") -> list[Expansion]:
        """What each media item of one conversation becomes in its text."""
        if self.family.media_by_row:
            return self._expand("image", sizes)
        found = []
        for size in sizes:
            kind = "image" if len(size) == 2 else "audio"
            if kind not in self.media_kinds:
                raise RowError(
                    f"{where}: {kind}, which the model does not read",
                    expected=f"media of kind {', '.join(self.media_kinds)}",
                    do="drop the row, or train another model on it",
                )
            if (kind, size) not in self._expansions:
                if len(self._expansions) >= REMEMBERED_SIZES:
                    self._expansions.clear()
                self._expansions[kind, size] = self._expand(kind, [size])[0]
            found.append(self._expansions[kind, size])
        return found

    def most_tokens(self, size: MediaSize) -> int:
        """How many tokens at most a medium of this size becomes; 0 for one that the model does not read."""
        try:
            expansion = self.expansions([size])[0]
        except RowError:
            return 0
        # A token is a character at least; a run of placeholders was written as one.
        return sum(expansion.runs) + len(expansion.text)

    def encode_media(self, items: Sequence[MediaInput]) -> dict[str, Tensor]:
        """The model's inputs for decoded media of a batch, in order of appearance; nothing for no media.

        Raises:
            RowError: An item becomes more or fewer tokens than its size said.
        """
        if not items:
            return {}
        rows = [[item for item in items if item.row == row] for row in dict.fromkeys(item.row for item in items)]
        if not self.family.media_by_row:
            rows = [list(items)]
        kind = items[0].kind
        inputs: dict[str, Any] = {"text": [self.placeholders[kind].written * len(row) for row in rows]}
        if kind == "image":
            inputs["images"] = [[item.data for item in row] for row in rows]
        else:
            inputs["audio"] = [item.data for row in rows for item in row]
            inputs["sampling_rate"] = self.sampling_rate
        batch = self.processor(**inputs, padding=len(rows) > 1, return_tensors="pt")
        self._check_counts(batch["input_ids"], rows)
        return {name: value for name, value in batch.items() if name not in _TEXT}

    def frame_times(self, size: MediaSize) -> tuple[float, ...]:
        """Stock models are not trained on videos yet: rows with one are left out before they get here."""
        raise OptionError("a video for a stock model", expected="images or sounds", do="drop the row")

    def encode_questions(self, conversations: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Tensor]:
        """What media are asked about, for connectors that read it: no stock model that is trained has such a one."""
        return {}

    def text_inputs(self, input_ids: TokenIds) -> dict[str, Tensor]:
        """What the model wants to be told about the tokens besides their ids."""
        if self.family.types is None:
            return {}
        placeholder = self.tokenizer.convert_tokens_to_ids(self.placeholders["image"].repeated)
        return {self.family.types: (input_ids == placeholder).long()}

    def fitted(self, item: MediaInput, *, where: str) -> MediaInput:
        """The item as its size says; a sound is brought to the length that its tokens were counted by.

        Raises:
            MediaError: The row says another size than the file has.
        """
        if item.kind == "image":
            found: MediaSize = (item.data.height, item.data.width)
            if found != item.size:
                raise _other_size(where, "x".join(map(str, found)), "x".join(map(str, item.size)))
            return item
        wanted = num_samples(item.size[0], int(self.sampling_rate or 0))
        missing = wanted - len(item.data)
        if abs(missing) > AUDIO_TOLERANCE * int(self.sampling_rate or 0):
            raise _other_size(where, f"{len(item.data) / int(self.sampling_rate or 1):.2f} s", f"{item.size[0]:.2f} s")
        samples = np.pad(item.data[:wanted], (0, max(missing, 0)))
        return MediaInput(item.kind, samples, item.size, item.row)

    def save_pretrained(self, directory: str | Path, **kwargs: Any) -> None:
        """Write a stock processor, with the template of training."""
        self.processor.chat_template = self.chat_template
        self.processor.save_pretrained(directory, **kwargs)

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], **kwargs: Any) -> Any:
        """As the stock processor does it, with the template of training."""
        return self.processor.apply_chat_template(
            with_lists(list(messages)), chat_template=self.chat_template, **kwargs
        )

    def media_rule(self) -> str:
        """Everything that decides how many tokens a medium has, as text."""
        facts = json.loads(self.processor.to_json_string())
        return json.dumps(facts, sort_keys=True)

    def chat_encoder(self) -> ChatEncoder:
        """Made when first needed, and again when the vocabulary has changed."""
        if self._encoder is None or not self._encoder.belongs_to(self.tokenizer, self.chat_template):
            self._encoder = self._new_encoder(self.chat_template, self.end_of_turn_token)
        return self._encoder

    def _new_encoder(self, chat_template: str, end_of_turn: str | None) -> ChatEncoder:
        return ChatEncoder(
            self.tokenizer,
            chat_template=chat_template,
            end_of_turn=end_of_turn,
            placeholders=self.placeholders,
            lists_content=True,
        )

    def _expand(self, kind: str, sizes: Sequence[MediaSize]) -> list[Expansion]:
        facts = self.family.facts[kind](self.processor, sizes)
        replace = self.processor.replace_image_token if kind == "image" else self.processor.replace_audio_token
        return [
            _collapsed(kind, replace(facts, place), self.placeholders[kind].repeated) for place in range(len(sizes))
        ]

    def _check_counts(self, ids: TokenIds, rows: Sequence[Sequence[MediaInput]]) -> None:
        for row, items in zip(ids, rows, strict=True):
            expansions = self.expansions([item.size for item in items])
            expected = sum(sum(item.runs) for item in expansions)
            token = self.tokenizer.convert_tokens_to_ids(self.placeholders[items[0].kind].repeated)
            found = int((row == token).sum())
            if found != expected:
                raise RowError(
                    f"media of sizes {[item.size for item in items]} that become {found} tokens",
                    expected=f"{expected}, as their sizes say",
                    do="report this with the checkpoint's processor files: the two rules should agree",
                )


def _own_template(processor: ProcessorMixin) -> str | None:
    own = processor.chat_template or processor.tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own


def _collapsed(kind: str, text: str, placeholder: str) -> Expansion:
    """A replacement with each run of placeholders as one, so that it is not tokenized a thousand times."""
    pattern = f"(?:{re.escape(placeholder)})+"
    runs = tuple(len(run) // len(placeholder) for run in re.findall(pattern, text))
    if not runs:
        raise OptionError(
            f"a processor that writes {text!r:.60} for an {kind}, without {placeholder}",
            expected="at least one placeholder",
            do="use the processor that belongs to the checkpoint",
        )
    return Expansion(kind, re.sub(pattern, lambda match: placeholder, text), runs)


def _other_size(where: str, found: str, stated: str) -> MediaError:
    return MediaError(
        f"{where}: a media file of {found}, which the row says is {stated}",
        expected="the size that the file has: tokens are counted by it",
        do="correct the row's media, or leave the size out",
    )
