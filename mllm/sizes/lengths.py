"""How many vectors a connector makes of how many features."""

import math
from dataclasses import dataclass

from mllm.errors import OptionError

KINDS = ("each", "fixed", "windows", "grid")


@dataclass(frozen=True)
class LengthRule:
    """The length of a connector's output, from the length of its input.

    - "each": one vector a feature.
    - "fixed": always `tokens`, of however many features.
    - "windows": `tokens` for every `size` neighbours; an incomplete last window counts, or not (`rounds_up`), except
      that one which stands alone always counts: nothing becomes nothing.
    - "grid": features are a square, of which each `size` x `size` cells become `tokens`; incomplete cells count.

    Args:
        kind: One of the above.
        size: Neighbours in a window, or cells along its side.
        tokens: Vectors a window becomes, or all features together.
        rounds_up: Whether an incomplete window counts.
    """

    kind: str = "each"
    size: int = 1
    tokens: int = 1
    rounds_up: bool = True

    def __post_init__(self):
        if self.kind not in KINDS or self.size < 1 or self.tokens < 1:
            raise OptionError(
                f"{self}", expected=f"a kind among {', '.join(KINDS)}, and positive numbers", do="correct it"
            )

    def count(self, length: int) -> int:
        """How many vectors `length` features become; none of none, except where the number is fixed.

        Raises:
            OptionError: They are no square where one is needed.
        """
        if self.kind == "fixed":
            return self.tokens
        if self.kind == "windows":
            whole, rest = divmod(length, self.size)
            return (whole + int(rest > 0 and (self.rounds_up or whole == 0))) * self.tokens
        if self.kind == "grid":
            return (-(-square_side(length) // self.size)) ** 2 * self.tokens
        return length


EACH = LengthRule()
"""Of connectors that map every feature by itself."""


def square_side(length: int) -> int:
    """The side of a square of so many features.

    Raises:
        OptionError: It is no square: a class token or registers stand among the patches.
    """
    side = math.isqrt(length)
    if side * side != length:
        raise OptionError(
            f"{length} features, for a connector that joins neighbours on a square grid",
            expected="a square number: patches alone, without a class token and without registers",
            do="set `feature_select: patches`, or choose a connector that needs no grid",
        )
    return side
