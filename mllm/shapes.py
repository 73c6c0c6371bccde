"""Names for the axes in tensor signatures, and the array types that carry them.

Legend: B rows, T tokens of a row, N media items of a batch, V tokens of one media item, D width, S supervised tokens,
C colour channels, H height, W width (pixels).
"""

from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

TokenIds = Int[Tensor, "B T"]
TokenMask = Bool[Tensor, "B T"]
Pixels = Float[Tensor, "N C H W"]
MediaFeatures = Float[Tensor, "N V D"]

__all__ = ["Bool", "Float", "Int", "MediaFeatures", "Pixels", "Shaped", "Tensor", "TokenIds", "TokenMask"]
