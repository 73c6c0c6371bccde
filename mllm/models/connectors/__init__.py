"""Connectors lead from encoder features [N, L, D_encoder] to the language model's width [N, V, D_text].

Adding one: a file with its options and a `Connector`, and a line in the table below.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from mllm.errors import OptionError
from mllm.models.configuration import MllmTowerConfig
from mllm.models.connectors.arrangement import Arrangement
from mllm.models.connectors.base import Connector, ConnectorOptions, Layout, Question
from mllm.models.connectors.frame_stack import FrameStackConnector
from mllm.models.connectors.identity import IdentityConnector
from mllm.models.connectors.instruct_qformer import InstructQFormerConnector
from mllm.models.connectors.linear import LinearConnector
from mllm.models.connectors.mlp import MlpConnector
from mllm.models.connectors.multi_stream_qformer import MultiStreamQFormerConnector
from mllm.models.connectors.patch_merge import PatchMergeConnector
from mllm.models.connectors.perceiver import PerceiverConnector
from mllm.models.connectors.pool import PoolConnector
from mllm.models.connectors.qformer import QFormerConnector
from mllm.models.connectors.streams import StreamsConnector
from mllm.models.connectors.windowed_qformer import WindowedQFormerConnector
from mllm.sizes import ImageTokenRule

CONNECTORS: dict[str, type[Connector]] = {
    "linear": LinearConnector,
    "mlp": MlpConnector,
    "patch_merge": PatchMergeConnector,
    "pool": PoolConnector,
    "frame_stack": FrameStackConnector,
    "perceiver": PerceiverConnector,
    "identity": IdentityConnector,
    "streams": StreamsConnector,
    "qformer": QFormerConnector,
    "instruct_qformer": InstructQFormerConnector,
    "windowed_qformer": WindowedQFormerConnector,
    "multi_stream_qformer": MultiStreamQFormerConnector,
}

PLAIN: dict[Any, str] = {int: "a whole number", bool: "true or false", str: "a text"}
"""Types of options that can be told from what YAML gives, and how an error names them."""

__all__ = [
    "CONNECTORS",
    "Connector",
    "ConnectorOptions",
    "Layout",
    "Question",
    "build_connector",
    "connector_options",
    "num_parameters",
    "written_connector",
]


def connector_options(choice: str | Mapping[str, Any]) -> tuple[type[Connector], ConnectorOptions]:
    """The connector that a name, or a mapping with its `type` and options, stands for.

    Raises:
        OptionError: No connector of that name, no option of that name, or a value it cannot have.
    """
    fields = {"type": choice} if isinstance(choice, str) else dict(choice)
    name = fields.pop("type", None)
    if not isinstance(name, str) or name not in CONNECTORS:
        raise OptionError(
            f"connector = {name!r}", expected=f"one of {', '.join(CONNECTORS)}", do="set `connector` to one of them"
        )
    known = {field.name: field.type for field in dataclasses.fields(CONNECTORS[name].Options)}
    if unknown := [key for key in fields if key not in known]:
        raise OptionError(
            f"connector {name!r}: no option {unknown[0]!r}",
            expected=f"only {', '.join(known)}",
            do="correct the option, or leave it out",
        )
    for key, value in fields.items():
        if known[key] in PLAIN and type(value) is not known[key]:
            raise OptionError(
                f"connector {name!r}: {key} = {value!r}", expected=PLAIN[known[key]], do=f"correct `{key}`"
            )
    return CONNECTORS[name], CONNECTORS[name].Options(**fields)


def written_connector(choice: str | Mapping[str, Any]) -> dict[str, Any]:
    """A choice with all its options, as a configuration holds it."""
    _, options = connector_options(choice)
    return {"type": choice if isinstance(choice, str) else choice["type"], **dataclasses.asdict(options)}


def build_connector(config: MllmTowerConfig) -> Connector:
    """Build the connector a tower's config names.

    Raises:
        OptionError: As `connector_options`.
    """
    kind, options = connector_options(config.connector)
    connector = kind(options, in_sizes=tuple(config.feature_sizes), out_size=config.text_hidden_size)
    rule = None if config.rule is None else config.media_rule
    if isinstance(rule, ImageTokenRule) and rule.tiles is not None:
        connector.arrangement = Arrangement(rule, out_size=config.text_hidden_size)
    return connector


def num_parameters(config: MllmTowerConfig) -> int:
    """How many parameters the connector will have; it takes no memory to ask."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_connector(config).parameters())
