"""Load transformers' own processors as training uses them: images by PIL, videos left alone.

With torchvision a stock processor makes other pixels than without, and without it those that can read videos do not
load at all. Training reads no videos: so the class that a checkpoint names gets PIL's image processors everywhere, and
in place of a video processor its settings, which are saved again as they were found.
"""

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer, ProcessorMixin

from mllm.errors import CheckpointError, OptionError
from mllm.processing.stock_families import STOCK_PROCESSORS

PROCESSOR_CONFIG = "processor_config.json"
VIDEO_CONFIG = "video_preprocessor_config.json"
LOADERS = {
    "tokenizer": AutoTokenizer,
    "image_processor": AutoImageProcessor,
    "feature_extractor": AutoFeatureExtractor,
}


class VideoSettings(dict):
    """The settings of a video processor that is not there; they can be read and saved, and nothing else."""

    model_input_names = ("pixel_values_videos",)
    _auto_class = None

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class _WithoutVideo(ProcessorMixin):
    """Stands before a stock processor class."""

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        path = pretrained_model_name_or_path
        arguments: list[Any] = []
        for name in cls.get_attributes():
            if name == "video_processor":
                arguments.append(VideoSettings(**_video_settings(Path(path), processor_dict or {})))
                continue
            extra = {"backend": "pil"} if name == "image_processor" else {}
            arguments.append(LOADERS[name].from_pretrained(path, **extra, **kwargs))
        return arguments

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if isinstance(argument, VideoSettings):
            return VideoSettings
        return super().check_argument_for_proper_class(argument_name, argument)

    def __reduce__(self) -> tuple:
        # The class is made here, so it has to be made again wherever a copy arrives.
        return (_bare, (type(self).__name__,), vars(self))


def processor_class(name: str) -> type[ProcessorMixin]:
    """The stock processor class of this name, one of `STOCK_PROCESSORS`, as this module says."""
    return type(name, (_WithoutVideo, getattr(transformers, name)), {})


def _bare(name: str) -> ProcessorMixin:
    return object.__new__(processor_class(name))


def load_processor_class(directory: Path) -> ProcessorMixin:
    """The stock processor that a checkpoint directory holds.

    Raises:
        CheckpointError: It names no processor that training knows.
        OptionError: The processor needs a package that is not installed.
    """
    name = processor_name(directory)
    if name not in STOCK_PROCESSORS:
        raise CheckpointError(
            f"{directory}, whose processor is {name}",
            expected=f"one of {', '.join(STOCK_PROCESSORS)}",
            do="choose a checkpoint of one of these families; InternVL and others in their -hf form",
        )
    try:
        return processor_class(name).from_pretrained(str(directory))
    except ImportError as error:
        raise OptionError(
            f"{directory}: {str(error).strip()}", expected=f"what {name} needs", do="install the package it names"
        ) from error


def processor_name(directory: Path) -> str:
    """The class that a checkpoint's files name, without the ending of older releases; "none" where they name none."""
    for file in (PROCESSOR_CONFIG, "tokenizer_config.json", "preprocessor_config.json"):
        path = directory / file
        named = json.loads(path.read_text(encoding="utf-8")).get("processor_class") if path.is_file() else None
        if named:
            return str(named)
    return "none"


def _video_settings(directory: Path, processor_dict: dict[str, Any]) -> dict[str, Any]:
    path = directory / VIDEO_CONFIG
    if "video_processor" in processor_dict:
        return processor_dict["video_processor"]
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
