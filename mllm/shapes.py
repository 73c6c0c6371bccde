"""Names for the axes in tensor signatures, and the array types that carry them.

Legend: B rows, T tokens of a row, N media items of a batch, V tokens of one media item, L features of one view (what
an encoder sees in one piece), D width, S supervised tokens, C colour channels, H height, W width (pixels).
"""

from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

TokenIds = Int[Tensor, "B T"]
TokenMask = Bool[Tensor, "B T"]
Pixels = Float[Tensor, "N C H W"]
MediaValues = Float[Tensor, "views ..."]
EncoderFeatures = Float[Tensor, "views L D_encoder"]
MediaFeatures = Float[Tensor, "N V D"]
MediaVectors = Float[Tensor, "_ D"]

__all__ = [
    "Bool",
    "EncoderFeatures",
    "Float",
    "Int",
    "MediaFeatures",
    "MediaValues",
    "MediaVectors",
    "Pixels",
    "Shaped",
    "Tensor",
    "TokenIds",
    "TokenMask",
]
