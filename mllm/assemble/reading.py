"""Configurations of the parts, as their checkpoints have them."""

from transformers import AutoConfig, PreTrainedConfig

from mllm.errors import CompositionError


def read_config(path: str, option: str) -> PreTrainedConfig:
    """The configuration in a directory or on the Hub.

    Raises:
        CompositionError: There is none.
    """
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise CompositionError(
            f"{option} = {path!r} cannot be read: {str(error).splitlines()[0]}",
            expected="a directory with a transformers checkpoint, or the id of one on the Hub",
            do=f"check the path or id given as `{option}`",
        ) from error
