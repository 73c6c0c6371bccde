"""The language model of a composition: what can be one, and that it stays what it was."""

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mllm.assemble.reading import read_config
from mllm.errors import CompositionError
from mllm.models import MllmForConditionalGeneration
from mllm.processing import MllmProcessor
from mllm.processing.chat import control_token_ids, end_of_turn_ids


def language_model_config(path: str) -> PreTrainedConfig:
    """The configuration of a decoder-only language model.

    Raises:
        CompositionError: It cannot be read, or is of something else.
    """
    config = read_config(path, "language_model")
    _check_language_model(config, path)
    return config


@torch.no_grad()
def check_text_only_equality(model: MllmForConditionalGeneration, llm: PreTrainedModel, *, where: str) -> None:
    """Check that without media the composed model computes what the language model does, bit for bit.

    Heads with a scale, a soft cap or a bias (Granite, Cohere, Gemma 2, Phi) do not survive composition, and would
    train without a word of warning.

    Raises:
        CompositionError: The logits differ.
    """
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, llm.config.vocab_size - 1, (2, 16), generator=generator)
    for tower in model.config.tower_configs.values():
        input_ids[input_ids == tower.placeholder_token_id] = 0
    alone = llm.eval()(input_ids=input_ids, use_cache=False).logits
    composed = model.eval()(input_ids=input_ids, use_cache=False).logits
    # A bias could be carried along here, but neither our configuration nor a stock class would load it again.
    has_bias = getattr(llm.get_output_embeddings(), "bias", None) is not None
    if has_bias or not torch.equal(alone, composed):
        difference = (alone.float() - composed.float()).abs().max().item()
        reason = "its head has a bias" if has_bias else f"by up to {difference:.3g}"
        raise CompositionError(
            f"{where} ({llm.config.model_type}) composed gives other logits on text than alone ({reason})",
            expected="equal logits: the head must be a plain linear layer on the last hidden states",
            do="choose a language model whose head has no scale, soft cap or bias (Llama, Qwen, Mistral, Phi-3, ...)",
        )


def extend_embedding(llm: PreTrainedModel, num_rows: int) -> None:
    """Add rows to the embedding and the head, tied or not; each starts as the mean of the rows there are.

    A mean row is in no direction special: the logit it adds is an average one, and generation suppresses it.
    """
    before = llm.get_input_embeddings().num_embeddings
    llm.resize_token_embeddings(num_rows, mean_resizing=False)
    matrices = {id(layer.weight): layer.weight for layer in (llm.get_input_embeddings(), llm.get_output_embeddings())}
    with torch.no_grad():
        for weight in matrices.values():
            weight[before:] = weight[:before].float().mean(dim=0).to(weight.dtype)


def generation_config(llm: PreTrainedModel, processor: MllmProcessor) -> GenerationConfig:
    """The language model's own settings, ending at the template's end of turn, never speaking control tokens."""
    tokenizer, own = processor.tokenizer, llm.generation_config
    own_ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = list(dict.fromkeys([*end_of_turn_ids(processor), *(end for end in own_ends if end is not None)]))
    config = GenerationConfig.from_dict(own.to_dict())
    config.eos_token_id = ends
    config.bos_token_id = tokenizer.bos_token_id
    config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    config.suppress_tokens = [token for token in control_token_ids(processor) if token not in ends]
    return config


def _check_language_model(config: PreTrainedConfig, path: str) -> None:
    reason = None
    if config.is_encoder_decoder:
        reason = "an encoder-decoder"
    elif config.get_text_config() is not config:
        reason = "a multimodal model already"
    elif config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        reason = "not a causal language model"
    if reason:
        raise CompositionError(
            f"language_model = {path!r} ({config.model_type}) is {reason}",
            expected="a decoder-only language model that AutoModelForCausalLM loads",
            do="name a text-only, decoder-only checkpoint as `language_model`",
        )
