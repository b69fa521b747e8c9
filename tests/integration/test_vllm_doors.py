"""All tests of the doors to language models, with the same SDKs, against vLLM."""

from __future__ import annotations

import pytest

from tests.conftest import Live, Start
from tests.integration import test_llm_doors as doors
from tests.integration.language_models import random_vllm, vllm_python

# Its tests and fixtures, but for the server that they run against.
globals().update({k: v for k, v in vars(doors).items() if not k.startswith("__")})

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def tiny(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Live:
    return start(
        random_vllm(tmp_path_factory.mktemp("models")),
        generation__vllm_python=vllm_python(),
        generation__vllm_cache_gb=1,
    )
