"""Join an encoder, a fresh connector and a language model into one model with its processor."""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mllm.checkpoints import atomic_directory
from mllm.errors import CompositionError
from mllm.models import MllmConfig, MllmForConditionalGeneration, MllmTowerConfig
from mllm.models.connectors import build_connector
from mllm.models.encoders import encoder_family, load_encoder
from mllm.processing import MllmProcessor
from mllm.processing.build import add_placeholder, build_processor, load_image_processor
from mllm.processing.chat import control_token_ids, end_of_turn_ids

IMAGE_TOKEN = "<image>"


def assemble_checkpoint(out: str | Path, **options) -> Path:
    """Assemble a model and save it with its processor as one complete checkpoint.

    Args:
        out: Directory to be made; it must not exist.
        **options: The arguments of `assemble`.
    """
    with atomic_directory(out, kind="model", facts={"assembled_from": options}) as partial:
        model, processor = assemble(**options)
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
    return Path(out)


def assemble(
    *,
    image_encoder: str,
    language_model: str,
    connector: str = "mlp",
    feature_layer: int = -2,
    feature_select: str | None = None,
    geometry: str = "pad",
    chat_template: str | None = None,
    seed: int = 0,
) -> tuple[MllmForConditionalGeneration, MllmProcessor]:
    """Compose a model on the CPU out of pretrained parts and a connector with fresh weights.

    Args:
        image_encoder: Directory or Hub id of an encoder (or of the two-tower model that holds it).
        language_model: Directory or Hub id of a decoder-only language model with its tokenizer.
        connector: A key of `mllm.models.connectors.CONNECTORS`.
        feature_layer: Which hidden states of the encoder are the features; layers above them are left out.
        feature_select: "default" drops the class token, "full" keeps all; by default "default" where there is one.
        geometry: How an image becomes a square: "pad", "crop" or "squash".
        chat_template: Name of one of our templates; by default the tokenizer's own, if it can mark generation.
        seed: Seed of the connector's weights.

    Raises:
        CompositionError: A part is missing, of a kind that cannot be composed, or changed by being composed.
    """
    encoder_config = _read_config(image_encoder, "image_encoder")
    encoder_family(encoder_config.model_type, where=image_encoder)
    _check_language_model(_read_config(language_model, "language_model"), language_model)

    encoder, num_prefix_tokens = load_encoder(image_encoder, feature_layer=feature_layer)
    llm = AutoModelForCausalLM.from_pretrained(language_model)
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    placeholder_id = add_placeholder(tokenizer, IMAGE_TOKEN, num_rows=llm.get_input_embeddings().num_embeddings)
    if placeholder_id >= llm.get_input_embeddings().num_embeddings:
        _extend_embedding(llm, placeholder_id + 1)

    tower = MllmTowerConfig(
        encoder_config=encoder.config,
        connector_type=connector,
        text_hidden_size=llm.config.hidden_size,
        feature_select=feature_select or ("default" if num_prefix_tokens else "full"),
        num_prefix_tokens=num_prefix_tokens,
        placeholder_token_id=placeholder_id,
    )
    _check_feature_select(tower)
    model = _join(encoder, tower, llm, seed=seed)
    check_text_only_equality(model, llm, where=language_model)
    processor = build_processor(
        tokenizer,
        load_image_processor(image_encoder),
        rule=tower.image_token_rule,
        geometry=geometry,
        chat_template=chat_template,
        image_token=IMAGE_TOKEN,
    )
    model.generation_config = _generation_config(llm, processor)
    return model, processor


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
    input_ids[input_ids == model.config.image_token_id] = 0
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


def _read_config(path: str, option: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise CompositionError(
            f"{option} = {path!r} cannot be read: {str(error).splitlines()[0]}",
            expected="a directory with a transformers checkpoint, or the id of one on the Hub",
            do=f"check the path or id given as `{option}`",
        ) from error


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


def _check_feature_select(tower: MllmTowerConfig) -> None:
    if tower.feature_select == "default" and tower.num_prefix_tokens == 0:
        raise CompositionError(
            f"feature_select = 'default' with {tower.encoder_config.model_type}, which has no class token to drop",
            expected="'full' for an encoder without a class token",
            do="set `feature_select: full`, or leave it out",
        )


def _join(
    encoder: PreTrainedModel, tower: MllmTowerConfig, llm: PreTrainedModel, *, seed: int
) -> MllmForConditionalGeneration:
    """Build the shell without memory, then put the loaded parts in: no weight is copied or initialised twice."""
    config = MllmConfig(text_config=llm.config, image_config=tower, dtype=llm.dtype)
    with torch.device("meta"):
        model = MllmForConditionalGeneration(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        connector = build_connector(tower)
    model.model.image_tower.encoder = encoder
    model.model.image_tower.connector = connector
    model.model.language_model = llm.base_model
    model.lm_head = llm.get_output_embeddings()
    return model.to(llm.dtype).eval()


def _extend_embedding(llm: PreTrainedModel, num_rows: int) -> None:
    """Add rows to the embedding and the head, tied or not; each starts as the mean of the rows there are.

    A mean row is in no direction special: the logit it adds is an average one, and generation suppresses it.
    """
    before = llm.get_input_embeddings().num_embeddings
    llm.resize_token_embeddings(num_rows, mean_resizing=False)
    matrices = {id(layer.weight): layer.weight for layer in (llm.get_input_embeddings(), llm.get_output_embeddings())}
    with torch.no_grad():
        for weight in matrices.values():
            weight[before:] = weight[:before].float().mean(dim=0).to(weight.dtype)


def _generation_config(llm: PreTrainedModel, processor: MllmProcessor) -> GenerationConfig:
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
