"""Configuration of several image encoders that see the same pixels."""

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from mllm.models.configuration import as_config

ENCODER_NAMES = ("first", "second", "third", "fourth")


class MixedEncoderConfig(PreTrainedConfig):
    """Up to four image encoders, and how their features are joined.

    They are named fields, not a list: transformers serialises, and hands the attention choice to, named sub-configs
    only.

    Args:
        first_config: Configuration of the first encoder, as a config object or as the dict it is saved as.
        second_config: Of the second; None where there is none.
        third_config: Of the third.
        fourth_config: Of the fourth.
        readings: Of every encoder how it gets its pixels: `image_size`, the side of the square it sees; `scale` and
            `shift`, which turn the colours as the first encoder's preprocessing leaves them into its own.
        streams: Of every stream of features the `encoders` whose grids are joined by channels, as numbers from 0;
            `side`, the grid they are brought to; and `has_class_token`, whether a class token stands in front. Of what
            is no grid `side` is None.
        image_size: Side of the square that an image is brought to, in pixels.
        num_channels: Of the pixels.
    """

    model_type = "mllm_mixed_encoder"
    sub_configs: ClassVar[dict[str, Any]] = {f"{name}_config": AutoConfig for name in ENCODER_NAMES}

    first_config: Any = None
    second_config: Any = None
    third_config: Any = None
    fourth_config: Any = None
    readings: Any = ()
    streams: Any = ()
    image_size: int = 224
    num_channels: int = 3

    def __post_init__(self, **kwargs):
        # Before super(): it hands the attention choice on, and needs config objects for that.
        for field in self.sub_configs:
            setattr(self, field, as_config(getattr(self, field)))
        super().__post_init__(**kwargs)

    @property
    def encoder_configs(self) -> dict[str, PreTrainedConfig]:
        """The configurations of the encoders there are, by name."""
        found = {name: getattr(self, f"{name}_config") for name in ENCODER_NAMES}
        return {name: config for name, config in found.items() if config is not None}
