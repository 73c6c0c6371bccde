"""The composed model: configuration, towers, language model. Importing it registers our Auto classes."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForMultimodalLM

from mllm.models.configuration import MllmConfig, MllmTowerConfig
from mllm.models.modeling import MllmForConditionalGeneration, MllmModel, MllmTower

AutoConfig.register("mllm", MllmConfig)
AutoModelForImageTextToText.register(MllmConfig, MllmForConditionalGeneration)
AutoModelForMultimodalLM.register(MllmConfig, MllmForConditionalGeneration)

__all__ = ["MllmConfig", "MllmForConditionalGeneration", "MllmModel", "MllmTower", "MllmTowerConfig"]
