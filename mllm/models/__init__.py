"""The composed model: configuration, towers, language model. Importing it registers our Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM

from mllm.models.configuration import MllmConfig, MllmTowerConfig
from mllm.models.mixed_configuration import MixedEncoderConfig
from mllm.models.mixed_encoder import MixedEncoder
from mllm.models.modeling import MllmForConditionalGeneration, MllmModel, MllmTower
from mllm.models.query_encoder import QueryEncoder, QueryEncoderConfig

AutoConfig.register("mllm", MllmConfig)
AutoConfig.register("mllm_mixed_encoder", MixedEncoderConfig)
AutoConfig.register("mllm_query_encoder", QueryEncoderConfig)
AutoModel.register(MixedEncoderConfig, MixedEncoder)
AutoModel.register(QueryEncoderConfig, QueryEncoder)
AutoModelForImageTextToText.register(MllmConfig, MllmForConditionalGeneration)
AutoModelForMultimodalLM.register(MllmConfig, MllmForConditionalGeneration)

__all__ = [
    "MixedEncoder",
    "MixedEncoderConfig",
    "MllmConfig",
    "MllmForConditionalGeneration",
    "MllmModel",
    "MllmTower",
    "MllmTowerConfig",
    "QueryEncoder",
    "QueryEncoderConfig",
]
