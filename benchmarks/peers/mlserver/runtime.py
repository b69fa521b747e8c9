"""The models as an MLServer runtime."""

# pyright: reportMissingImports=false
from __future__ import annotations

import bench_models
import numpy as np
from mlserver import MLModel, types
from mlserver.codecs import NumpyCodec, StringCodec


class Served(MLModel):
    """Batches come merged from MLServer's adaptive batcher."""

    async def load(self) -> bool:
        """Load the file."""
        extra = self.settings.parameters.extra
        self.kind = extra["kind"]
        self.model = bench_models.load(self.kind, extra["folder"], extra["threads"])
        return True

    async def predict(self, payload: types.InferenceRequest) -> types.InferenceResponse:
        """Rows or texts to numbers."""
        given = payload.inputs[0]
        if self.kind == "forest":
            out = self.model.predict(NumpyCodec.decode_input(given))
        else:
            out = self.model.embed(StringCodec.decode_input(given))
        output = NumpyCodec.encode_output("output", out.astype(np.float32))
        return types.InferenceResponse(model_name=self.name, outputs=[output])
