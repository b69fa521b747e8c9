"""Models on disk, loaded models, and the names that lead to them."""

from forebay_server.repository.loading import Defaults, LoadedModel
from forebay_server.repository.repository import ModelRepository

__all__ = ["Defaults", "LoadedModel", "ModelRepository"]
