"""Configuration of a composed model: one language model, at most one tower per modality."""

from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from mllm.errors import OptionError
from mllm.sizes import ImageTokenRule

FEATURE_SELECTS = ("default", "full")


class MllmTowerConfig(PreTrainedConfig):
    """One modality's encoder and the connector that leads from it to the language model.

    Args:
        encoder_config: Configuration of the encoder, as a config object or as the dict it is saved as.
        connector_type: A key of `mllm.models.connectors.CONNECTORS`.
        connector_activation: Activation inside the connector, by its transformers name.
        connector_bias: Whether the connector's linear layers have a bias.
        text_hidden_size: Width of the language model, the connector's output.
        feature_layer: Which of the encoder's `hidden_states` are the features. Not `last_hidden_state`: for SigLIP,
            DINO and ViT that one passed a further norm, which stock LLaVA does not apply.
        feature_select: "default" drops the first token (a class token), "full" keeps every token.
        num_prefix_tokens: Tokens the encoder puts in front of its patches.
        placeholder_token_id: Token id that stands in `input_ids` once for every feature vector.
    """

    model_type = "mllm_tower"
    base_config_key = ""
    sub_configs: ClassVar[dict[str, Any]] = {"encoder_config": AutoConfig}

    encoder_config: Any = None
    connector_type: str = "mlp"
    connector_activation: str = "gelu"
    connector_bias: bool = True
    text_hidden_size: int = 0
    feature_layer: int = -1
    feature_select: str = "default"
    num_prefix_tokens: int = 1
    placeholder_token_id: int = 0

    def __post_init__(self, **kwargs):
        self.encoder_config = _as_config(self.encoder_config)
        super().__post_init__(**kwargs)
        if self.feature_select not in FEATURE_SELECTS:
            raise OptionError(
                f"feature_select = {self.feature_select!r}",
                expected=f"one of {', '.join(FEATURE_SELECTS)}",
                do="set `feature_select` to one of them, or leave it out",
            )

    @property
    def image_token_rule(self) -> ImageTokenRule:
        """How many tokens an image of the encoder's native size becomes."""
        return ImageTokenRule(
            image_size=_side(self.encoder_config.image_size),
            patch_size=_side(self.encoder_config.patch_size),
            num_prefix_tokens=self.num_prefix_tokens,
            feature_select=self.feature_select,
        )


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
        self.text_config = _as_config(self.text_config)
        for name in ("image_config", "audio_config", "video_config"):
            value = getattr(self, name)
            if isinstance(value, dict):
                setattr(self, name, MllmTowerConfig(**value))
        super().__post_init__(**kwargs)
        if self.text_config is not None:
            self.tie_word_embeddings = self.text_config.tie_word_embeddings

    @property
    def image_token_id(self) -> int | None:
        """Placeholder id of images, by the name that stock code looks for; None without an image tower."""
        return None if self.image_config is None else self.image_config.placeholder_token_id


def _as_config(value: dict | PreTrainedConfig | None) -> PreTrainedConfig | None:
    if not isinstance(value, dict):
        return value
    fields = dict(value)
    return CONFIG_MAPPING[fields.pop("model_type")](**fields)


def _side(value: int | list[int] | tuple[int, ...]) -> int:
    """Configs write a square's side as 14 or as [14, 14]."""
    return value if isinstance(value, int) else int(value[0])
