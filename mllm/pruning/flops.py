"""How much arithmetic a prompt takes in a language model, foretold from how many tokens each of its layers sees.

Multiplications and additions count one each, and attention counts all pairs of tokens, though a causal kernel skips
half of them: so does `torch.utils.flop_counter`, and so do the papers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from mllm.pruning.anatomy import anatomy_of
from mllm.pruning.base import Pruner


@dataclass(frozen=True)
class TextSizes:
    """What of a language model its arithmetic follows from.

    Args:
        layer_weights: Weights of each decoder layer that every token is multiplied with.
        attention_width: Of all query heads of a layer together.
        head_weights: Weights of the head, which only the last token of a prompt is multiplied with.
    """

    layer_weights: tuple[int, ...]
    attention_width: int
    head_weights: int


def text_sizes(model: PreTrainedModel) -> TextSizes:
    """The sizes of a model's language model, in which every token passes all weights (no mixture of experts).

    Raises:
        OptionError: It is no model that can be pruned.
    """
    anatomy = anatomy_of(model)
    text = anatomy.body.config
    head_dim = text.to_dict().get("head_dim") or text.hidden_size // text.num_attention_heads
    head = anatomy.model.get_output_embeddings()
    return TextSizes(
        tuple(map(_num_weights, anatomy.layers)), text.num_attention_heads * head_dim, head.weight.numel()
    )


def prefill_flops(sizes: TextSizes, tokens_per_layer: Sequence[int]) -> int:
    """Of one prompt, from its embedded tokens to the scores of the first new one.

    Args:
        sizes: Of the language model.
        tokens_per_layer: How many of the prompt's tokens, text and visual, each layer sees.
    """
    layers = zip(sizes.layer_weights, tokens_per_layer, strict=True)
    pairs = 2 * 2 * sizes.attention_width  # scores, and sums of values
    return sum(2 * weights * count + pairs * count**2 for weights, count in layers) + 2 * sizes.head_weights


def planned_tokens(pruner: Pruner | None, *, items: Sequence[int], num_text: int, num_layers: int) -> list[int]:
    """How many tokens of a prompt each layer will see under a pruner, whatever is in it.

    Args:
        pruner: None for none.
        items: How many tokens each picture or video has.
        num_text: How many others there are.
        num_layers: Of the language model.
    """
    if pruner is None:
        return [num_text + sum(items)] * num_layers
    counts = [pruner.counts(num_tokens, num_layers) for num_tokens in items]
    return [num_text + sum(of_layer) for of_layer in zip(*counts, strict=True)]


def _num_weights(layer: nn.Module) -> int:
    """Weights of matrices; norms and biases are no multiplications worth counting."""
    return sum(weight.numel() for weight in layer.parameters() if weight.ndim == 2)
