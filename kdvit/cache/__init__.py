"""Teacher outputs on disk: one record for each augmented view of each training image, made once for many students."""

from kdvit.cache.bases import load_bases
from kdvit.cache.manifest import CacheError, Manifest
from kdvit.cache.store import CacheReader, open_cache

__all__ = ["CacheError", "CacheReader", "Manifest", "load_bases", "open_cache"]
