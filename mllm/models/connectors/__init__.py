"""Connectors lead from encoder features [N, V, D_encoder] to the language model's width [N, V', D_text].

Adding one: a file with an nn.Module built from the tower's config, and a line in the table below.
"""

from torch import nn

from mllm.errors import OptionError
from mllm.models.configuration import MllmTowerConfig
from mllm.models.connectors.linear import LinearConnector
from mllm.models.connectors.mlp import MlpConnector

CONNECTORS: dict[str, type[nn.Module]] = {"linear": LinearConnector, "mlp": MlpConnector}


def build_connector(config: MllmTowerConfig) -> nn.Module:
    """Build the connector a tower's config names.

    Raises:
        OptionError: No connector of that name.
    """
    if config.connector_type not in CONNECTORS:
        raise OptionError(
            f"connector = {config.connector_type!r}",
            expected=f"one of {', '.join(CONNECTORS)}",
            do="set `connector` to one of them",
        )
    return CONNECTORS[config.connector_type](config)
