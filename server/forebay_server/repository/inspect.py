"""Zero configuration: what an ONNX file or a Hugging Face folder is, read from its own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime as ort

from forebay_server.engines import tree_depth
from forebay_server.engines.onnx import DATATYPES
from forebay_server.engines.onnx_format import of_any_rank
from forebay_server.engines.signature import first_line
from forebay_server.repository import language_models
from forebay_server.repository.manifest import (
    ClassificationHead,
    EmbeddingHead,
    Manifest,
    RerankHead,
    Tensor,
    ZeroShotHead,
    read_manifest,
    rejected,
)

MODEL_FILES = ("model.onnx", "onnx/model.onnx")
#: Used when no file of the folder says how many tokens the model takes.
DEFAULT_MAX_TOKENS = 512


def describe(folder: Path) -> Manifest:
    """The manifest of a version folder: its manifest.json, or what its files say.

    Raises:
        FailedPrecondition: MODEL_REJECTED, naming the file that is missing or wrong.
    """
    try:
        return _described(folder)
    except (AttributeError, LookupError, TypeError, ValueError) as e:
        # JSON of strangers: where an object should be may be a list, and a word for a number.
        raise rejected(f"the folder's JSON files are not as Hugging Face has them: {e}") from e


def _described(folder: Path) -> Manifest:
    if (folder / "manifest.json").exists():
        return read_manifest(folder / "manifest.json")
    language_model = language_models.describe(folder)
    if language_model is not None:
        return language_model
    model_file = _model_file(folder)
    inputs, outputs = _signature(folder / model_file)
    config = _json(folder / "config.json")
    if config is None or not (folder / "tokenizer.json").exists():
        return Manifest(task="tensor", model_file=model_file, inputs=inputs, outputs=outputs)
    return _hugging_face(folder, model_file, config, inputs, outputs)


def _model_file(folder: Path) -> str:
    for name in MODEL_FILES:
        if (folder / name).is_file():
            return name
    found = sorted(p.name for p in folder.glob("*.onnx"))
    if len(found) == 1:
        return found[0]
    if found:
        raise rejected(
            f"the folder has several ONNX files ({', '.join(found)}) and no manifest.json"
        )
    names = sorted(p.name for p in folder.iterdir())
    pickles = [n for n in names if n.endswith((".pkl", ".joblib", ".bin", ".pt"))]
    weights = [n for n in names if n.endswith(".safetensors")]
    hint = ""
    if pickles:
        hint = f"; {pickles[0]} is never read by the server, export it first (`forebay export`)"
    elif weights:
        hint = (
            f"; {weights[0]} has the weights alone, make an ONNX file of them "
            "(`forebay export huggingface`)"
        )
    raise rejected(f"the folder has no ONNX file{hint}")


def _signature(path: Path) -> tuple[list[Tensor], list[Tensor]]:
    tree_depth.read(path)
    try:
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as e:
        raise rejected(f"{path.name} cannot be loaded: {first_line(e)}") from None

    def tensors(values: Any) -> list[Tensor]:
        out = []
        for value in values:
            if value.type not in DATATYPES:
                raise rejected(f"{path.name}: {value.name!r} has type {value.type}, not served")
            shape = [d if isinstance(d, int) and d >= 0 else -1 for d in value.shape]
            out.append(Tensor(name=value.name, dtype=DATATYPES[value.type], shape=shape))
        return out

    inputs = tensors(session.get_inputs())
    anything = of_any_rank(path, [i.name for i in inputs if not i.shape])
    for one in inputs:
        if one.name in anything:
            one.shape = None
    return inputs, tensors(session.get_outputs())


def _json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError as e:
        raise rejected(f"{path.name} is not JSON: {e}") from None


def _max_tokens(folder: Path, config: dict[str, Any]) -> int:
    sentence = _json(folder / "sentence_bert_config.json") or {}
    tokenizer = _json(folder / "tokenizer_config.json") or {}
    limits = [
        sentence.get("max_seq_length"),
        tokenizer.get("model_max_length"),
        config.get("max_position_embeddings"),
    ]
    # tokenizer_config.json says 1e30 where it knows no limit.
    good = [int(v) for v in limits if isinstance(v, (int, float)) and 0 < v < 1_000_000]
    return min(good) if good else DEFAULT_MAX_TOKENS


def _hugging_face(
    folder: Path,
    model_file: str,
    config: dict[str, Any],
    inputs: list[Tensor],
    outputs: list[Tensor],
) -> Manifest:
    architecture = (config.get("architectures") or [""])[0]
    tokens = _max_tokens(folder, config)
    names = [o.name for o in outputs]
    common: dict[str, Any] = {
        "model_file": model_file,
        "tokenizer_file": "tokenizer.json",
        "inputs": inputs,
        "outputs": outputs,
        "source": {"kind": "huggingface", "id": config.get("_name_or_path", "")},
    }
    if "logits" not in names:
        return Manifest(task="embedding", embedding=_embedding(folder, outputs, tokens), **common)
    labels = {int(k): str(v) for k, v in (config.get("id2label") or {}).items()}
    if not labels:
        raise rejected("config.json has no id2label, which a classifier needs")
    ordered = [labels[i] for i in sorted(labels)]
    if len(ordered) == 1:
        return Manifest(task="rerank", rerank=RerankHead(max_tokens=tokens), **common)
    lowered = [label.lower() for label in ordered]
    if "entailment" in lowered and "contradiction" in lowered:
        return Manifest(
            task="zero-shot-classification",
            zero_shot=ZeroShotHead(
                entailment_index=lowered.index("entailment"),
                contradiction_index=lowered.index("contradiction"),
                max_tokens=tokens,
            ),
            **common,
        )
    if not architecture.endswith("ForSequenceClassification"):
        raise rejected(f"config.json: the architecture {architecture!r} is not served")
    multi = config.get("problem_type") == "multi_label_classification"
    return Manifest(
        task="text-classification",
        classification=ClassificationHead(
            labels=ordered,
            multi_label=multi,
            activation="sigmoid" if multi else "softmax",
            max_tokens=tokens,
        ),
        **common,
    )


def _embedding(folder: Path, outputs: list[Tensor], tokens: int) -> EmbeddingHead:
    names = {o.name: o for o in outputs}
    pooled = names.get("sentence_embedding")
    output = pooled or names.get("last_hidden_state") or outputs[0]
    shape = output.shape or [-1]
    pooling = "none" if len(shape) == 2 else _pooling(folder)
    modules = _json(folder / "modules.json")
    normalize = (
        any("Normalize" in m.get("type", "") for m in modules)  # type: ignore[union-attr]
        if isinstance(modules, list)
        else True
    )
    dimensions = shape[-1]
    if dimensions < 1:
        config = _json(folder / "config.json") or {}
        dimensions = int(config.get("hidden_size") or config.get("dim") or 0)
        if dimensions < 1:
            raise rejected(f"neither {output.name!r} nor config.json says how long the vectors are")
    return EmbeddingHead(
        output=output.name,
        pooling=pooling,
        normalize=normalize,
        dimensions=dimensions,
        max_tokens=tokens,
    )


def _pooling(folder: Path) -> Any:
    config = _json(folder / "1_Pooling" / "config.json") or {}
    if config.get("pooling_mode_cls_token"):
        return "cls"
    if config.get("pooling_mode_lasttoken"):
        return "last_token"
    return "mean"
