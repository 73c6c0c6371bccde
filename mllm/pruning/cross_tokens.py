"""The learned cross tokens of CrossGET: the file they are kept in, and the loss that aligns two modalities' tokens."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mllm.errors import CheckpointError, OptionError
from mllm.shapes import Float, Tensor

CROSS_TOKENS = "cross_tokens.safetensors"
"""Stands beside a model's weights."""

PARAMETER = "cross_tokens"
"""The name that they have in an encoder and in a language model while they are learned."""

ZEROS = "zeros"
"""In place of a directory: cross tokens before they are tuned."""

KL = ("reversed", "usual")


def save_cross_tokens(directory: Path, tokens: dict[str, Tensor]) -> None:
    """Write cross tokens beside a model's weights.

    Args:
        directory: Of the model.
        tokens: Those of each tower [layers, D], "image" and "text".
    """
    whole = {name: one.detach().contiguous().cpu() for name, one in tokens.items()}
    save_file(whole, directory / CROSS_TOKENS, metadata={"format": "pt"})


def parted(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a model without its cross tokens, which its class does not know; and these, by tower."""
    names = [name for name in state if name.rpartition(".")[2] == PARAMETER]
    tokens = {"text" if ".language_model." in f".{name}" else "image": state[name] for name in names}
    return {name: value for name, value in state.items() if name not in names}, tokens


def load_cross_tokens(directory: Path, name: str, shape: tuple[int, int]) -> Float[Tensor, "layers D"]:
    """Read the cross tokens of a tower.

    Args:
        directory: Of the model that was tuned with them.
        name: "image" or "text".
        shape: Layers and width of the encoder they are for.

    Raises:
        CheckpointError: There are none.
        OptionError: They are for another encoder.
    """
    path = directory / CROSS_TOKENS
    if not path.is_file():
        raise CheckpointError(
            f"{path} is not there",
            expected=f"a model that was tuned with cross tokens, or {ZEROS!r}",
            do="correct `cross_tokens`, or train with the option `cross_tokens`",
        )
    tokens = load_file(path)
    if name not in tokens or tuple(tokens[name].shape) != shape:
        found = {one: tuple(value.shape) for one, value in tokens.items()}
        raise OptionError(
            f"{path} with cross tokens {found}",
            expected=f"{name}: {shape}, for each layer of this encoder one of its width",
            do="name the directory of the model that was tuned with this encoder",
        )
    return tokens[name]


def alignment_loss(
    first: Float[Tensor, "n D"], second: Float[Tensor, "n D"], *, kl: str = "reversed"
) -> Float[Tensor, ""]:
    """How far the cross tokens of two modalities are from each other, as distributions over their width.

    With M the mean of P = softmax(first) and Q = softmax(second): half of KL(M || P) + KL(M || Q), as CrossGET's code
    has it ("reversed"), or of KL(P || M) + KL(Q || M), which is Jensen and Shannon's ("usual"). Mean over pairs.

    Args:
        first: Of one modality, layers and items one behind the other.
        second: Of the other, in the same order.
        kl: Which of the two.
    """
    p, q = first.log_softmax(dim=-1), second.log_softmax(dim=-1)
    mean = torch.logaddexp(p, q) - torch.tensor(2.0, dtype=p.dtype, device=p.device).log()
    if kl == "reversed":
        return 0.5 * (mean.exp() * (2 * mean - p - q)).sum(dim=-1).mean()
    return 0.5 * (p.exp() * (p - mean) + q.exp() * (q - mean)).sum(dim=-1).mean()
