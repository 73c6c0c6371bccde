"""What a pruner did: for pictures, tables and tests."""

from dataclasses import dataclass, field

import torch

from mllm.shapes import Int, Tensor


@dataclass
class ItemStages:
    """What became of one visual item, from stage to stage.

    Args:
        num_tokens: How many it had.
        kept: After the features stage and after each cut, by the layer in front of which it was done (0 for the
            features stage): which of its tokens are left, by their places among all of its own.
        merged_into: Beside it, of each of its tokens the place of the one it lives on in, -1 for none; a token that is
            kept lives on in itself.
    """

    num_tokens: int
    kept: dict[int, Int[Tensor, " n"]] = field(default_factory=dict)
    merged_into: dict[int, Int[Tensor, " V"]] = field(default_factory=dict)

    def note_merges(
        self, layer: int, kept: Int[Tensor, " n"], merged_into: Int[Tensor, " here"] | None, own: Int[Tensor, " here"]
    ) -> None:
        """Note what was merged.

        Args:
            layer: In front of which one.
            kept: See `Selection`, as `merged_into`.
            merged_into: None where nothing was.
            own: Of the tokens at hand, their places among all of the item's.
        """
        if merged_into is None:
            return
        into = torch.full((self.num_tokens,), -1, dtype=torch.long, device=own.device)
        into[own] = torch.where(merged_into >= 0, own[kept[merged_into.clamp(min=0)]], -1)
        self.merged_into[layer] = into


@dataclass
class Statistics:
    """Of the last prompt, unless it says otherwise.

    Args:
        num_prompts: Prompts (forwards with visual tokens) since the pruner was made.
        items: The visual items of each row.
        tokens_per_layer: How many tokens, visual and text, without padding, each layer saw of each row.
    """

    num_prompts: int = 0
    items: list[list[ItemStages]] = field(default_factory=list)
    tokens_per_layer: list[list[int]] = field(default_factory=list)
