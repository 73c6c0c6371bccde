"""Windowed Q-Former: a few queries read each window of neighbouring features (Granite-speech, arXiv 2505.08699).

So the number of vectors grows with the input: of each 15 features become 3 by default.
"""

from dataclasses import dataclass

from torch.nn.functional import pad

from mllm.models.connectors.base import counted_features
from mllm.models.connectors.qformer import QFormerConnector, QFormerOptions
from mllm.sizes import LengthRule


@dataclass(frozen=True)
class WindowedQFormerOptions(QFormerOptions):
    """Options of `WindowedQFormerConnector`; the others are those of `QFormerOptions`.

    Args:
        window: Neighbours that are read together. A last window that they do not fill is filled up with zeros.
        num_queries: Vectors that a window becomes.
        layers: How many.
        cross_attention_frequency: Every how many layers the queries read the features.
    """

    window: int = 15
    num_queries: int = 3
    layers: int = 2
    cross_attention_frequency: int = 1

    def __post_init__(self):
        super().__post_init__()
        self.check("window", self.window >= 1, "1 or more")

    def length_rule(self) -> LengthRule:
        """As many for each window, the last included."""
        return LengthRule("windows", size=self.window, tokens=self.num_queries)


class WindowedQFormerConnector(QFormerConnector):
    """A Q-Former over windows; the queries are the same for all of them."""

    Options = WindowedQFormerOptions

    def connect(self, features, lengths, question):
        """Let the queries read each window.

        What does not count is zero, and read as that: so it is in Granite-speech, and so nothing depends on what an
        item was padded with.
        """
        left_out = ~counted_features(features, lengths)[..., None]
        features = self.normed(features).masked_fill(left_out, 0.0)
        size, windows = self.options.window, -(-features.shape[1] // self.options.window)
        filled = pad(features, (0, 0, 0, windows * size - features.shape[1]))
        read = self.read(filled.reshape(len(features) * windows, size, -1), None, None)
        return self.language_projection(read).reshape(len(features), windows * self.options.num_queries, -1)
