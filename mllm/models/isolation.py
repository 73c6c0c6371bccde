"""Whether the segments of a packed row can be kept apart in a language model: by its config, and by a trial."""

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from mllm.errors import OptionError
from mllm.shapes import Float, Tensor

SPECIAL_MEDIA = (
    "deepseek_ocr2", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "git", "idefics", "mllama", "molmo2",
    "paligemma", "step3p7", "unlimited_ocr",
)  # fmt: skip
"""Stock models whose media see what comes behind them, or are seen by cross-attention from every row."""

ATTENTION = ("full_attention", "sliding_attention")
"""Kinds of layers that mix tokens by attention alone."""


def check_segments_possible(config: PreTrainedConfig, *, longest: int) -> None:
    """Refuse what is known not to keep segments apart.

    Args:
        config: Of the whole model.
        longest: Tokens of the longest segment that will come.

    Raises:
        OptionError: With the reason.
    """
    text = config.get_text_config()
    facts = text.to_dict()
    others = sorted(set(facts.get("layer_types") or ()) - set(ATTENTION))
    window = facts.get("sliding_window")
    is_sliding = window is not None and set(facts.get("layer_types") or ("sliding_attention",)) != {"full_attention"}
    if config.model_type in SPECIAL_MEDIA:
        raise impossible(text, f"media in {config.model_type} are not seen by causal attention alone")
    if facts.get("use_bidirectional_attention"):
        raise impossible(text, "its attention is not causal")
    if "mrope_section" in (facts.get("rope_parameters") or {}):
        raise impossible(text, "its positions have three numbers a token (M-RoPE)")
    if others:
        raise impossible(text, f"it has layers that are no attention within a segment ({', '.join(others)})")
    if facts.get("attn_logit_softcapping") is not None:
        raise impossible(text, "its attention scores have a soft cap")
    if is_sliding and window < longest:
        raise impossible(text, f"its sliding window of {window} tokens is shorter than rows of up to {longest}")


def try_isolation(model: PreTrainedModel) -> None:
    """Try it: what comes before a segment changes nothing in it, and it is as it would be alone.

    A model that is sharded over ranks cannot be tried alone.

    Raises:
        OptionError: It does change something.
    """
    text = model.get_decoder()
    if any(hasattr(parameter, "ds_id") or parameter.is_meta for parameter in text.parameters()):
        return
    was_training = text.training
    text.eval()
    try:
        with torch.no_grad():
            alone, *behind = (_last_two(text, before) for before in ((), (1, 2, 3), (4, 5, 6)))
    except OptionError as error:
        raise impossible(text.config, f"in a trial it had {error.found}") from error
    finally:
        text.train(was_training)
    tolerance = (1e-5 if alone.dtype == torch.float32 else 3e-2) * alone.abs().max().clamp(min=1e-6)
    if not all((other - alone).abs().max() <= tolerance for other in behind):
        raise impossible(text.config, "in a trial one segment changed the next")


def impossible(text: PreTrainedConfig, reason: str) -> OptionError:
    """The error that says why the rows of a pack cannot be kept apart, and what to do instead."""
    return OptionError(
        f"batching = 'packed' with a {text.model_type} language model: {reason}",
        expected="a language model in which the rows of a pack can be kept from seeing each other",
        do="set `batching: length`, which puts rows of like length together",
    )


def _last_two(text: PreTrainedModel, before: tuple[int, ...]) -> Float[Tensor, "2 D"]:
    """Hidden states of a segment of two tokens behind another of `before`."""
    lengths = (len(before), 2) if before else (2,)
    ids = torch.tensor([[*before, 7, 8]], device=text.device)
    positions = torch.tensor([[*range(len(before)), 0, 1]], device=text.device)
    outputs = text(input_ids=ids, position_ids=positions, segment_lengths=lengths, use_cache=False)
    return outputs.last_hidden_state[0, -2:]
