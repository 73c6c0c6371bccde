"""What `scripts/inspect_data.py` looks at: opened sources whose broken rows are listed, and a reader of rows."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, CLIPImageProcessorPil

from mllm.data.auditing.audit import spread
from mllm.data.blobs import read_media_bytes
from mllm.data.indexing.index import RowIndex, open_index
from mllm.data.mixture import Mixture
from mllm.data.mixture_file import MixtureOptions, read_mixture
from mllm.data.schema import MediaItem, Row
from mllm.errors import OptionError
from mllm.processing import MllmProcessor
from mllm.processing.audio import decode_audio
from mllm.processing.build import build_processor
from mllm.processing.control import add_placeholder
from mllm.processing.images import decode_image
from mllm.processing.video import decode_video
from mllm.sizes import ImageTokenRule
from mllm.sizes.sampling import Sampling

STAND_IN = ImageTokenRule(image_size=336, patch_size=14, num_prefix_tokens=1, feature_select="default")
"""What images become where a tokenizer comes without an encoder: the 576 tokens of LLaVA-1.5."""


@dataclass
class Inspected:
    """Opened sources, and what reads their rows.

    Args:
        indexes: One a source; what is broken is listed in them and was not raised.
        options: How they are mixed.
        processor: None where nobody named one.
        max_length: Longest row in tokens, None for no limit or none known.
        facts: Sentences about all this, for whoever reads a page a month later.
        seed: Decides which rows `take: random:N` takes.
    """

    indexes: list[RowIndex]
    options: MixtureOptions
    processor: MllmProcessor | None = None
    max_length: int | None = None
    facts: list[str] = field(default_factory=list)
    seed: int = 0

    @cached_property
    def mixture(self) -> Mixture:
        """The rows that an epoch is made of.

        Raises:
            OptionError: No source has a row that can be used.
        """
        usable = [index for index in self.indexes if len(index)]
        if not usable:
            raise OptionError(
                "no row that can be used",
                expected="at least one source with one",
                do="run `audit`, which says what is wrong with each",
            )
        return Mixture(
            usable, temperature=self.options.temperature, epoch_rows=self.options.epoch_rows, seed=self.seed
        )

    def positions(self, index: RowIndex, limit: int | None = None) -> Sequence[int]:
        """Rows of a source that training would take, at most `limit` of them, evenly spread."""
        if not len(index):
            return []
        taken = self.mixture.taken[self.mixture.indexes.index(index)]
        return taken[spread(len(taken), limit)].tolist()


def open_inspected(
    data: Any,
    *,
    root: str | Path | None = None,
    processor: MllmProcessor | None = None,
    max_length: int | None = None,
    facts: Sequence[str] = (),
    seed: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> Inspected:
    """Open all sources; broken rows are listed, however many there are.

    Args:
        data: As `data:` of a configuration, see `read_mixture`.
        root: What relative paths are relative to.
        processor: Reads the rows.
        max_length: Longest row in tokens.
        facts: Said on top of a page, behind the names of the sources.
        seed: Decides which rows `take: random:N` takes.
        progress: Told how many more records have been read.

    Raises:
        OptionError: `data` has another form, or names what is not there.
    """
    options = read_mixture(data, root=root)
    lenient = [dataclasses.replace(source, on_bad="quarantine", max_bad_rate=1.0) for source in options.sources]
    indexes = [open_index(source, progress=progress) for source in lenient]
    named = [f"{index.source.path} ({index.importer}, {len(index):,} rows)" for index in indexes]
    limit = [f"max_length {max_length:,}"] if max_length else []
    return Inspected(indexes, options, processor, max_length, [*named, *facts, *limit], seed)


def pick_rows(rows: Sequence[Row], *, count: int, seed: int, ids: Sequence[str] = ()) -> list[Row]:
    """Some rows at random, or those with the given ids.

    Raises:
        OptionError: An id is nobody's.
    """
    if not ids:
        chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
        return [rows[int(position)] for position in sorted(chosen)]
    wanted = set(ids)
    found = [row for row in (rows[position] for position in range(len(rows))) if row.id in wanted]
    if missing := wanted - {row.id for row in found}:
        raise OptionError(
            f"no row with the id {', '.join(map(repr, sorted(missing)))}",
            expected=f"ids of the {len(rows):,} rows, such as {rows[0].id!r}",
            do="correct them; a row that was left out as broken is named by `audit`",
        )
    return found


def decode_item(item: MediaItem, where: str = "") -> None:
    """Read a media file to its end.

    Raises:
        MediaError: It is damaged somewhere.
    """
    source = read_media_bytes(item)
    if item.kind == "image":
        decode_image(source, where=where)
    elif item.kind == "audio":
        decode_audio(source, start=item.start, end=item.end, sampling_rate=16_000, where=where)
    else:
        decode_video(source, sampling=Sampling("uniform", frames=32), start=item.start, end=item.end, where=where)


def load_reader(path: str | Path, *, chat_template: str | None = None) -> tuple[MllmProcessor, str]:
    """A checkpoint's processor, or one made of a bare tokenizer, and a sentence that says which.

    A tokenizer brings no image encoder: images then become the 576 tokens that they are in LLaVA-1.5.

    Raises:
        OptionError: There is neither, or no chat template fits the tokenizer.
    """
    config = _processor_config(Path(path))
    if config.get("processor_class") == "MllmProcessor":
        return MllmProcessor.from_pretrained(str(path)), f"processor of {path}"
    try:
        if not Path(path).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            raise OSError("neither a directory nor a Hub id")  # without asking the Hub, which takes a minute
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise OptionError(
            f"--model {path} holds neither a processor of ours nor a tokenizer",
            expected="a checkpoint that `assemble` or training wrote, or a language model's directory or Hub id",
            do="correct the path",
        ) from error
    add_placeholder(tokenizer, "<image>", num_rows=len(tokenizer) + 1)
    processor = build_processor(
        tokenizer, CLIPImageProcessorPil(), rules={"image": STAND_IN}, chat_template=chat_template
    )
    return processor, f"tokenizer of {path}, each image counted as 576 tokens, padded to a square of 336 pixels"


def reader_of_config(config: Mapping[str, Any]) -> str | None:
    """The checkpoint or tokenizer that a training configuration starts from, None where it names none."""
    model = config.get("model")
    if not isinstance(model, Mapping):
        return model
    assembled = Path(str(config.get("output_dir", ".")), "assembled")
    return str(assembled) if (assembled / "config.json").is_file() else model.get("language_model")


def _processor_config(path: Path) -> dict[str, Any]:
    file = path / "processor_config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
