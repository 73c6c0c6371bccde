"""Configuration of a composed model: one language model, at most one tower per modality."""

from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from mllm.sizes import MediaRule, read_rule

MODALITIES = ("image", "audio", "video")


class MllmTowerConfig(PreTrainedConfig):
    """One modality's encoder and the connector that leads from it to the language model.

    Args:
        encoder_config: Configuration of the encoder, as a config object or as the dict it is saved as; None for a
            video tower, whose frames the image tower's encoder reads.
        connector: The connector's `type`, a key of `mllm.models.connectors.CONNECTORS`, and all its options.
        feature_sizes: Width of the encoder's features; several where it gives several streams of them.
        feature_lengths: Where there are several streams, how many features of a view each has.
        text_hidden_size: Width of the language model, the connector's output.
        feature_layer: Which of the encoder's `hidden_states` are the features. Not `last_hidden_state`: for SigLIP,
            DINO and ViT that one passed a further norm, which stock LLaVA does not apply.
        through_image_connector: Of a video tower: whether frames pass the image tower's connector before their own.
        rule: How many tokens an item becomes, as `mllm.sizes.written_rule` writes it; the processor has the same.
        placeholder_token_id: Token id that stands in `input_ids` once for every feature vector.
    """

    model_type = "mllm_tower"
    base_config_key = ""
    sub_configs: ClassVar[dict[str, Any]] = {"encoder_config": AutoConfig}

    encoder_config: Any = None
    connector: Any = None
    feature_sizes: Any = ()
    feature_lengths: Any = ()
    text_hidden_size: int = 0
    feature_layer: int = -1
    through_image_connector: bool = False
    rule: Any = None
    placeholder_token_id: int = 0

    def __post_init__(self, **kwargs):
        self.encoder_config = as_config(self.encoder_config)
        super().__post_init__(**kwargs)

    @property
    def media_rule(self) -> MediaRule:
        """How many tokens an item of this modality becomes."""
        return read_rule(self.rule)


class MllmConfig(PreTrainedConfig):
    """A language model with one optional tower per modality.

    The towers are named fields, not a dict: transformers serialises, and hands the attention choice to, named
    sub-configs only. Each field takes a config object, or the dict it is saved as, which becomes one; or None.
    """

    model_type = "mllm"
    sub_configs: ClassVar[dict[str, Any]] = {
        "text_config": AutoConfig,
        "image_config": MllmTowerConfig,
        "audio_config": MllmTowerConfig,
        "video_config": MllmTowerConfig,
    }

    text_config: Any = None
    image_config: Any = None
    audio_config: Any = None
    video_config: Any = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        # Before super(): it hands the attention choice on, and needs config objects for that.
        self.text_config = as_config(self.text_config)
        for modality in MODALITIES:
            value = getattr(self, f"{modality}_config")
            if isinstance(value, dict):
                setattr(self, f"{modality}_config", MllmTowerConfig(**value))
        super().__post_init__(**kwargs)
        if self.text_config is not None:
            self.tie_word_embeddings = self.text_config.tie_word_embeddings

    @property
    def tower_configs(self) -> dict[str, MllmTowerConfig]:
        """The configurations of the towers there are, by modality."""
        found = {modality: getattr(self, f"{modality}_config") for modality in MODALITIES}
        return {modality: config for modality, config in found.items() if config is not None}

    @property
    def image_token_id(self) -> int | None:
        """Placeholder id of images, by the name that stock code looks for; None without an image tower."""
        return None if self.image_config is None else self.image_config.placeholder_token_id

    @property
    def audio_token_id(self) -> int | None:
        """Placeholder id of sounds; None without an audio tower."""
        return None if self.audio_config is None else self.audio_config.placeholder_token_id

    @property
    def video_token_id(self) -> int | None:
        """Placeholder id of videos; None without a video tower."""
        return None if self.video_config is None else self.video_config.placeholder_token_id


def as_config(value: dict | PreTrainedConfig | None) -> PreTrainedConfig | None:
    """A sub-configuration as an object, from what it is saved as."""
    if not isinstance(value, dict):
        return value
    fields = dict(value)
    return CONFIG_MAPPING[fields.pop("model_type")](**fields)
