"""What a collection may be: configurations completed and checked, and conditions against them."""

from __future__ import annotations

from dataclasses import asdict

import orjson
from forebay.errors import InvalidArgument

from forebay_server.core.call import Call
from forebay_server.dataplane.models import ModelAccess
from forebay_server.indexes import filters
from forebay_server.indexes.analysis import LANGUAGES
from forebay_server.indexes.collection import CollectionConfig, TextFieldConfig
from forebay_server.indexes.dense import DenseConfig
from forebay_server.indexes.payloads import LONGEST

EMBEDDING = ("embedding",)
_LISTS = {filters.AllOf: "all_of", filters.AnyOf: "any_of", filters.NoneOf: "none_of"}


def check_language(language: str, path: str) -> None:
    """Raises InvalidArgument at the path for a language that is not known."""
    if language not in LANGUAGES:
        known = ", ".join(LANGUAGES[1:])
        raise InvalidArgument.at(path, f"is {language!r}; known are {known}")


async def completed(access: ModelAccess, call: Call, config: CollectionConfig) -> CollectionConfig:
    """The configuration with dimensions and the model's version. Raises InvalidArgument."""
    dense, model = config.dense, config.embedding_model
    for i, text in enumerate(config.text_fields):
        check_language(text.language, f"config.text_fields[{i}].language")
        if text.path in [t.path for t in config.text_fields[:i]]:
            raise InvalidArgument.at(f"config.text_fields[{i}].path", "is there twice")
    if model:
        served = await access.resolve_async(call, model, EMBEDDING)
        own = served.manifest.embedding_head.dimensions
        model = f"{served.name}@{served.version}"
        if dense is not None and dense.dimensions not in (0, own):
            raise InvalidArgument.at(
                "config.dimensions", f"is {dense.dimensions}; {model} makes vectors of {own}"
            )
        dense = DenseConfig(**{**asdict(dense or DenseConfig(own)), "dimensions": own})
    elif dense is not None and not dense.dimensions:
        dense = None
    if dense is None and not config.text_fields:
        raise InvalidArgument.at(
            "config", "needs dimensions or embedding_model for dense search, or text_fields"
        )
    if dense is not None and dense.code_bytes and dense.dimensions % dense.code_bytes:
        raise InvalidArgument.at(
            "config.index.code_bytes",
            f"is {dense.code_bytes}, which does not divide the {dense.dimensions} dimensions",
        )
    return CollectionConfig(dense, config.text_fields, config.k1, config.b, model)


def config_from_json(text: str) -> CollectionConfig:
    """The configuration of a stored collection."""
    d = orjson.loads(text)
    dense = DenseConfig(**d["dense"]) if d["dense"] else None
    fields = tuple(TextFieldConfig(**f) for f in d["text_fields"])
    return CollectionConfig(dense, fields, d["k1"], d["b"], d["embedding_model"])


def check_filter(config: CollectionConfig, condition: filters.Filter, path: str = "filter") -> None:
    """Raise InvalidArgument for what cannot be told of text fields: words of a field that is none,
    and whether a long text is the same."""
    known = [f.path for f in config.text_fields]
    if isinstance(condition, filters.AllOf | filters.AnyOf | filters.NoneOf):
        kind = _LISTS[type(condition)]
        for i, c in enumerate(condition.filters):
            check_filter(config, c, f"{path}.{kind}.filters[{i}]")
    elif isinstance(condition, filters.Words) and condition.key not in known:
        raise InvalidArgument.at(
            f"{path}.text.key",
            f"is {condition.key!r}; the text fields are {', '.join(known) or 'none'}",
        )
    elif (
        isinstance(condition, filters.OneOf)
        and condition.key in known
        and any(isinstance(v, str) and len(v) > LONGEST for _, v in condition.values)
    ):
        raise InvalidArgument.at(
            path,
            f"compares the text field {condition.key!r} with more than {LONGEST} characters, "
            "up to which texts are compared whole; use text",
        )
