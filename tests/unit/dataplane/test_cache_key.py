"""Keys of the response cache: what the model sees, and which files it is."""

from __future__ import annotations

import numpy as np
from forebay_server.core.interfaces import TokenInput
from forebay_server.dataplane.models import artefact_of
from forebay_server.dataplane.texts import cache_key
from forebay_server.dataplane.tokenization import Encoded
from forebay_server.repository.loading import LoadedModel
from forebay_server.repository.manifest import FileFacts, Manifest, ModelConfig


def encoded(ids: list[int], type_ids: list[int] | None = None) -> Encoded:
    types = None if type_ids is None else np.array(type_ids, np.int64)
    return Encoded(TokenInput(np.array(ids, np.int64), types), len(ids), False)


def loaded(sha256: str | None, at: float = 1.0) -> LoadedModel:
    files = {} if sha256 is None else {"model.onnx": FileFacts(sha256=sha256, bytes=1)}
    manifest = Manifest(task="embedding", files=files)
    return LoadedModel("m", 1, manifest, ModelConfig(), None, None, at)


def test_other_files_under_the_same_version_share_no_key() -> None:
    one, other = artefact_of(loaded("a" * 64)), artefact_of(loaded("b" * 64))
    assert artefact_of(loaded("a" * 64, at=2.0)) == one != other
    assert cache_key(encoded([1, 2]), one) != cache_key(encoded([1, 2]), other)


def test_without_hashes_no_load_shares_keys_with_an_earlier_one() -> None:
    assert artefact_of(loaded(None, at=1.0)) != artefact_of(loaded(None, at=2.0))


def test_whatever_the_model_sees_is_in_the_key() -> None:
    inputs = [encoded([1, 2]), encoded([1, 3]), encoded([1, 2], [0, 0]), encoded([1, 2], [0, 1])]
    assert len({cache_key(e, b"salt") for e in inputs}) == 4
    assert cache_key(inputs[0], b"salt") == cache_key(encoded([1, 2]), b"salt")
