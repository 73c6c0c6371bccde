"""What can be said of the parts that are assembled, typed: the `model:` mapping of a plan."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mllm.assemble.mixed import Encoders, streams_of
from mllm.assemble.tiles import Tiles
from mllm.errors import OptionError

Connector = str | Mapping[str, Any]
"""A name in `mllm.models.connectors.CONNECTORS`, or a mapping with `type` and the options of that connector."""


@dataclass(frozen=True)
class ImageTowerOptions:
    """An image encoder and its connector.

    Args:
        encoder: Directory or Hub id of an encoder, or of the two-tower model that holds it; or a list of up to four,
            which all see the same pixels (see `mllm.assemble.mixed`).
        connector: How its features reach the language model's width.
        feature_layer: Which hidden states of the encoder are the features; layers above them are left out.
        feature_select: "default" drops the class token, "patches" all that is no patch, "full" keeps everything; by
            default "default" where there is a class token.
        geometry: How an image becomes a square: "pad", "crop" or "squash"; by default "pad", or as `tiles` has it.
        tiles: How an image is read in tiles: a name in `mllm.assemble.tiles.TILES`, or a mapping with `type` and what
            differs. None for the image as a whole.
        join: Of several encoders: "channels" joins the grids of all, cell by cell; "sequence" keeps each entry of the
            list as a stream of features of its own, and an entry that is a list is joined by channels.
        image_size: Side of the square that an image is brought to, for encoders that read any (ConvNeXt, DINO); of
            several, each then sees it in its own size. By default what the encoder, or the one that sees most, has.
    """

    encoder: Encoders
    connector: Connector = "mlp"
    feature_layer: int = -2
    feature_select: str | None = None
    geometry: str | None = None
    tiles: Tiles | None = None
    join: str = "channels"
    image_size: int | None = None

    def __post_init__(self):
        streams_of(self.encoder, self.join)


@dataclass(frozen=True)
class AudioTowerOptions:
    """An audio encoder and its connector.

    Args:
        encoder: Directory or Hub id of an encoder, or of the model that holds it.
        connector: How its features reach the language model's width; by default "mlp", or that of `connector_from`.
        feature_layer: -1 for what the encoder gives out, its last norm included; another index for what that layer
            gives, without it. Layers above are left out.
        window_seconds: What the encoder reads at once; by default what it was made for, or 10 s. Longer sounds are
            split into such windows.
        pool_time: Average every two features of a Whisper encoder before its last norm, and let it attend to no
            silence behind a sound's end, as Qwen2-Audio and AudioFlamingo3 do.
        counts_silence: Whether the features of the silence behind a sound's end count too, as in Voxtral.
        clips: Hear that many windows spread evenly over a sound of any length, as Video-LLaMA does, in place of all of
            it; 0 for all of it.
        connector_from: `model` and `modality` of a connector that was trained before, on features of the same space
            (see `mllm.assemble.reuse`), in place of a fresh one.
    """

    encoder: str
    connector: Connector | None = None
    feature_layer: int = -1
    window_seconds: float | int | None = None
    pool_time: bool = False
    counts_silence: bool = False
    clips: int = 0
    connector_from: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class VideoTowerOptions:
    """A connector for videos, whose frames the image tower's encoder reads.

    Args:
        connector: How the frames' features reach the language model's width.
        frames: Which frames are seen: "uniform:8", "fps:2", ... (see `mllm.sizes.sampling`).
        timestamps: Whether the prompt says when each frame is shown: before its tokens, or in a sentence behind those
            of a connector that reads all frames as one sequence.
        through_image_connector: Whether frames pass the image tower's connector before their own, which then reads
            what that one made of each frame, as Video-LLaMA's video Q-Former does.
    """

    connector: Connector = "mlp"
    frames: str = "uniform:8"
    timestamps: bool = False
    through_image_connector: bool = False


TOWERS: dict[str, type] = {"image": ImageTowerOptions, "audio": AudioTowerOptions, "video": VideoTowerOptions}


def tower_options(modality: str, given: Any) -> Any:
    """The typed options of one tower; None for none.

    Raises:
        OptionError: It is no mapping, has an unknown key, or lacks one.
    """
    kind = TOWERS[modality]
    if given is None or isinstance(given, kind):
        return given
    known = {field.name: field for field in dataclasses.fields(kind)}
    required = [name for name, field in known.items() if field.default is dataclasses.MISSING]
    if not isinstance(given, Mapping):
        raise OptionError(
            f"model: {modality} = {given!r}",
            expected=f"a mapping with {', '.join(known)}",
            do=f"write, e.g., `{modality}: {{{required[0] if required else 'connector'}: ...}}`",
        )
    wrong = [key for key in given if key not in known]
    missing = [name for name in required if given.get(name) is None]
    if wrong or missing:
        raise OptionError(
            f"model: {modality}: {'unknown key ' + repr(wrong[0]) if wrong else 'no ' + missing[0]}",
            expected=f"{', '.join(known)}",
            do=f"correct the mapping under `model: {modality}`",
        )
    return kind(**given)
