"""Features of frozen encoders, computed once and kept on disk."""

from mllm.training.feature_cache.cache import cache_features, check_cacheable
from mllm.training.feature_cache.features import CachedFeatures

__all__ = ["CachedFeatures", "cache_features", "check_cacheable"]
