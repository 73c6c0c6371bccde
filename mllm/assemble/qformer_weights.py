"""Weights of published Q-Formers and of BERT, under the names of BLIP-2, and how far they fit one of ours."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from mllm.errors import CompositionError
from mllm.models.connectors import Connector

OURS = (
    (r"^qformer\.embeddings\.layernorm\.", "qformer.layernorm."),
    (r"^qformer\.layer\.", "qformer.encoder.layer."),
    (r"(crossattention|intermediate_query|output_query|feature_norm)\.\d+\.", r"\1."),
)
"""What our connectors' names are in BLIP-2; a multi-stream Q-Former has some layers once for each stream."""

_SALESFORCE = (
    (r"^qformer\.embeddings\.layernorm\.", "qformer.layernorm."),
    (r"^embeddings\.", "qformer.embeddings."),
    (r"^vision_model\.post_layernorm\.", "feature_norm."),
)
_BERT = (
    (r"^bert\.", ""),
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
    (r"^embeddings\.LayerNorm\.", "qformer.layernorm."),
    (r"^(embeddings|encoder)\.", r"qformer.\1."),
    (r"\.attention\.self\.", ".attention.attention."),
)
_TEXT = r"qformer\.embeddings\.|\.\d+\.(intermediate|output)\."
_WIDTHS = r"^query_tokens$|^language_projection\.|^feature_norm\.|\.crossattention\.attention\.(key|value)\.weight$"
"""What follows from encoder, language model and number of queries, and so may be of another shape."""
_OURS_ALONE = r"^positions\.|^arrangement\."


@dataclass(frozen=True)
class Family:
    """How one family of checkpoints holds a Q-Former, or what can become one.

    Args:
        names: Patterns of its names, and what they are in BLIP-2.
        wanted: Pattern of the names in BLIP-2 that are of the Q-Former.
        may_lack: Pattern of what it need not hold.
        doubles: Whether its feed-forward layers serve words and queries alike.
    """

    names: tuple[tuple[str, str], ...]
    wanted: str
    may_lack: str
    doubles: bool = False


_OF_QFORMER = r"^(qformer|query_tokens|language_projection|feature_norm)"
FAMILIES = {
    "blip-2": Family(_SALESFORCE, _OF_QFORMER, may_lack=rf"{_TEXT}|^language_projection\."),
    "instructblip": Family(_SALESFORCE, _OF_QFORMER, may_lack=r"^$"),
    "bert": Family(_BERT, r"^qformer\.", may_lack=rf"{_WIDTHS}|\.crossattention\.", doubles=True),
}


class Weights(NamedTuple):
    """Weights of a checkpoint under the names of BLIP-2, and of which family it is."""

    tensors: dict[str, Tensor]
    family: Family


class Fitted(NamedTuple):
    """Weights under our names; which of ours have none, and which of theirs have no place here, layers as `*`."""

    weights: dict[str, Tensor]
    fresh: list[str]
    left: list[str]


def check_family(model_type: str, *, where: str) -> None:
    """Refuse a checkpoint of a type that no Q-Former can begin with.

    Raises:
        CompositionError: It is of such a type.
    """
    if model_type not in FAMILIES:
        raise CompositionError(
            f"init_from = {where!r}, a {model_type!r} model",
            expected=f"a checkpoint of one of these types: {', '.join(FAMILIES)}",
            do="name another checkpoint as `init_from`, or leave it out",
        )


def read_weights(path: str, model_type: str) -> Weights:
    """Read what is of the Q-Former in a checkpoint of a type that has one, and nothing else.

    Raises:
        CompositionError: It has no weights in safetensors files.
    """
    family = FAMILIES[model_type]
    found = read_tensors(path, lambda name: re.search(family.wanted, _renamed(name, family.names)) is not None)
    tensors = {}
    for name, tensor in found.items():
        new = _renamed(name, family.names)
        tensors[new] = tensor
        if family.doubles:
            tensors[re.sub(r"\.(\d+)\.(intermediate|output)\.", r".\1.\2_query.", new)] = tensor
    return Weights(tensors, family)


def read_tensors(path: str, is_wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Some tensors of a checkpoint; of a sharded one only the files that hold them are fetched.

    Raises:
        CompositionError: There is no safetensors file.
    """
    index, whole = _file(path, SAFE_WEIGHTS_INDEX_NAME), _file(path, SAFE_WEIGHTS_NAME)
    files = [whole]
    if index is not None:
        with open(index, encoding="utf-8") as file:
            places: Mapping[str, str] = json.load(file)["weight_map"]
        files = [_file(path, name) for name in sorted({file for name, file in places.items() if is_wanted(name)})]
    if not files or None in files:
        raise CompositionError(
            f"init_from = {path!r}, which has no {SAFE_WEIGHTS_NAME} with a Q-Former in it",
            expected="weights in safetensors files; pickled ones are not read",
            do="convert the checkpoint with transformers, or name another one",
        )
    tensors: dict[str, Tensor] = {}
    for name in files:
        with safe_open(str(name), "pt") as file:
            tensors |= {key: file.get_tensor(key) for key in filter(is_wanted, file.keys())}
    return tensors


def fit_weights(connector: Connector, source: Weights, *, where: str) -> Fitted:
    """Give each weight of a connector the one that it has in a checkpoint.

    Fresh stay cross-attention's keys and values where the encoder has another width, the projection where the language
    model has, queries where their number differs, and what the checkpoint does not know.

    Raises:
        CompositionError: Anything else is missing, or of another shape.
    """
    weights, fresh, used, wrong = {}, [], set(), []
    for name, own in connector.state_dict().items():
        theirs = _renamed(name, OURS)
        tensor = source.tensors.get(theirs)
        if tensor is not None and tensor.shape == own.shape:
            weights[name] = tensor
            used.add(theirs)
        elif re.search(_OURS_ALONE, theirs) or re.search(
            source.family.may_lack if tensor is None else _WIDTHS, theirs
        ):
            fresh.append(name)
        else:
            wrong.append(
                f"{theirs} {'is not there' if tensor is None else f'is {tuple(tensor.shape)}'}, "
                f"and has to be {tuple(own.shape)}"
            )
    if wrong:
        raise CompositionError(
            f"init_from = {where!r}, of which {wrong[0]} ({len(wrong)} such weights)",
            expected="a checkpoint with these layers and widths",
            do="set `layers`, `hidden_size`, `heads`, `intermediate_size`, `cross_attention_frequency` and what else "
            "differs as the checkpoint has them, or leave `init_from` out",
        )
    return Fitted(weights, _grouped(fresh), _grouped(set(source.tensors) - used))


def _renamed(name: str, patterns: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name


def _grouped(names) -> list[str]:
    """Names with their layers' numbers as `*`, each once."""
    return sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})


def _file(path: str, name: str) -> str | None:
    """A file of a checkpoint, on disk or on the Hub; None where there is none."""
    try:
        return cached_file(path, name)
    except OSError:
        return None
