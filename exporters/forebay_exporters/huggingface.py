"""Hugging Face encoders to ONNX: embedding, classification, pairs (rerank), zero-shot.

By torch's exporter, then fused by ONNX Runtime's optimizer; fp32, fp16, int8 dynamic or static.
Needs the extra `export` (torch, transformers), best in an environment of its own. Only safetensors
are read, and no code of a model's folder is run (trust_remote_code stays off).
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from forebay_exporters import quantize
from forebay_exporters.artefact import ExportError, version_folder, write_manifest
from forebay_exporters.parity import Bounds, report

LIBRARIES = ("torch", "transformers", "onnx", "onnxruntime")
PRECISIONS = ("fp32", "fp16", "int8", "int8-static")
PARITY_TEXTS = (
    "A short sentence.",
    "The quick brown fox jumps over the lazy dog, and then it does so once more.",
    "numbers 1 2 3 and signs ! ? %",
    "a",
)
#: What models of pairs are compared on: query and document, premise and hypothesis.
PARITY_PAIRS = (
    ("how do vaccines work?", "Vaccines train the immune system."),
    ("how do vaccines work?", "Cars need oil."),
    ("The quick brown fox jumps over the lazy dog.", "This example is about animals."),
    ("a", "The quick brown fox jumps over the lazy dog, and then it does so once more."),
)
PAIR_TASKS = ("rerank", "zero-shot-classification")
#: One text, or a pair of them.
Text = str | tuple[str, str]
#: What is the same model, by precision.
BOUNDS = {
    "fp32": Bounds(max_abs_diff=2e-3, min_cosine=0.9999),
    "fp16": Bounds(max_abs_diff=5e-2, min_cosine=0.999),
    "int8": Bounds(min_cosine=0.95),
    "int8-static": Bounds(min_cosine=0.9),
}


def export_huggingface(
    source: Path,
    root: Path,
    name: str,
    version: int = 1,
    precision: str = "fp32",
    calibration: Sequence[str] | None = None,
) -> Path:
    """Export a model folder as `<root>/<name>/<version>`.

    Args:
        source: folder with config.json, tokenizer.json and safetensors.
        calibration: texts for `int8-static`; parity is checked on them as well.

    Raises:
        ExportError: the model cannot be exported, or the artefact is not equal to it.
        ImportError: the extra `export` is not installed.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
        import transformers
    except ImportError as e:
        raise ImportError(f"{e.name} is not installed: pip install 'forebay[export]'") from None
    if precision not in PRECISIONS:
        raise ExportError(
            f"precision {precision!r} is not known; known are {', '.join(PRECISIONS)}"
        )
    if precision == "int8-static" and not calibration:
        raise ExportError("int8-static needs calibration texts")
    if not any(source.glob("*.safetensors")):
        raise ExportError(f"{source.name} has no safetensors; pickles are never read")
    if not (source / "tokenizer.json").exists():
        raise ExportError(f"{source.name} has no tokenizer.json")
    config = json.loads((source / "config.json").read_text())
    classifier = any(
        a.endswith("ForSequenceClassification") for a in config.get("architectures") or ()
    )
    kind = transformers.AutoModelForSequenceClassification if classifier else transformers.AutoModel
    options = {"use_safetensors": True, "trust_remote_code": False, "attn_implementation": "eager"}
    model: Any = kind.from_pretrained(source, **options).eval().float()
    encoder = _Encoder(source, model)
    output = "logits" if classifier else "last_hidden_state"
    with version_folder(root, name, version) as folder:
        raw = folder / "raw.onnx"
        with torch.no_grad():
            _to_onnx(model, encoder, output, raw)
        fused = folder / "fused.onnx"
        heads = int(config.get("num_attention_heads") or config.get("n_heads") or 0)
        hidden = int(config.get("hidden_size") or config.get("dim") or 0)
        quantize.optimized(raw, fused, heads, hidden)
        final = folder / "model.onnx"
        task, block = _head(source, config, classifier, output, hidden)
        given = _pairs(calibration or ()) if task in PAIR_TASKS else list(calibration or ())
        texts = [*(PARITY_PAIRS if task in PAIR_TASKS else PARITY_TEXTS), *given[:64]]
        if precision == "fp16":
            quantize.fp16(fused, final)
        elif precision == "int8":
            quantize.int8_dynamic(fused, final)
        elif precision == "int8-static":
            quantize.int8_static(fused, final, (encoder.feeds([t]) for t in given))
        else:
            shutil.copy(fused, final)
        # Alone and in padded batches: both must be what the original gives for each alone.
        original = encoder.original(texts, output)
        parity = report(
            np.concatenate([original, original]),
            np.concatenate([encoder.exported(final, texts, 1), encoder.exported(final, texts, 8)]),
            BOUNDS[precision],
        )
        parity["inputs"] = "pairs" if task in PAIR_TASKS else "texts"
        for extra in (raw, fused, *folder.glob("*.data")):
            extra.unlink(missing_ok=True)
        shutil.copy(source / "tokenizer.json", folder)
        write_manifest(
            folder,
            task,
            libraries=LIBRARIES,
            source={"kind": "huggingface", "id": config.get("_name_or_path") or source.name},
            precision=precision.partition("-")[0],
            tokenizer_file="tokenizer.json",
            parity=parity,
            **block,
        )
    return root / name / str(version)


class _Encoder:
    """Texts through the original and through the artefact."""

    def __init__(self, source: Path, model: Any) -> None:
        from tokenizers import Tokenizer

        self.model = model
        self.tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(64)
        types = getattr(model.config, "type_vocab_size", 0) or 0

        self.pad_id = int(getattr(model.config, "pad_token_id", None) or 0)
        self.names = ["input_ids", "attention_mask"] + (["token_type_ids"] if types > 1 else [])

    def feeds(self, texts: Sequence[Text]) -> dict[str, Any]:
        """Texts or pairs as the model's inputs, padded to the longest."""
        encodings = self.tokenizer.encode_batch(list(texts))
        length = max(len(e.ids) for e in encodings)
        out = {n: np.zeros((len(texts), length), np.int64) for n in self.names}
        out["input_ids"][:] = self.pad_id
        for row, e in enumerate(encodings):
            n = len(e.ids)
            out["input_ids"][row, :n] = e.ids
            out["attention_mask"][row, :n] = 1
            if "token_type_ids" in out:
                out["token_type_ids"][row, :n] = e.type_ids
        return out

    def original(self, texts: Sequence[Text], output: str) -> Any:
        """The mean vector, or the logits, of each text alone."""
        import torch  # pyright: ignore[reportMissingImports]

        rows = []
        with torch.no_grad():
            for text in texts:
                feeds = self.feeds([text])
                values = self.model(**{n: torch.from_numpy(v) for n, v in feeds.items()})
                found = getattr(values, output).numpy()
                rows.append(_rows(found, feeds["attention_mask"]))
        return np.concatenate(rows)

    def exported(self, path: Path, texts: Sequence[Text], batch: int) -> Any:
        """The same of the artefact, so many in a padded batch."""
        import onnxruntime as ort

        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        known = {i.name for i in session.get_inputs()}
        rows = []
        for start in range(0, len(texts), batch):
            feeds = self.feeds(texts[start : start + batch])
            (values, *_) = session.run(None, {n: v for n, v in feeds.items() if n in known})
            rows.append(_rows(np.asarray(values), feeds["attention_mask"]))
        return np.concatenate(rows)


def _pairs(texts: Sequence[str]) -> list[Text]:
    """Calibration texts as pairs: each with the next, or by a tab within the line."""
    split: list[Text] = [(a, b) for a, tab, b in (t.partition("\t") for t in texts) if tab]
    return split or list(itertools.pairwise(texts))


def _rows(values: Any, mask: Any) -> Any:
    """[rows, n]: logits as they are; the mean over real tokens of hidden states."""
    values = np.asarray(values, np.float32)
    if values.ndim == 2:
        return values
    weights = mask[..., None].astype(np.float32)
    return (values * weights).sum(axis=1) / weights.sum(axis=1)


def _to_onnx(model: Any, encoder: _Encoder, output: str, path: Path) -> None:
    import torch  # pyright: ignore[reportMissingImports]

    class Wrapped(torch.nn.Module):
        """Positional inputs in, one tensor out."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, *values: Any) -> Any:
            return getattr(self.inner(**dict(zip(encoder.names, values, strict=True))), output)

    example = "an example of two sentences. here is the second one."
    feeds = encoder.feeds([example, example])
    pair = tuple(torch.from_numpy(feeds[n]) for n in encoder.names)
    axes: dict[str, dict[int, str]] = {n: {0: "batch", 1: "length"} for n in encoder.names}
    axes[output] = {0: "batch"} if output == "logits" else {0: "batch", 1: "length"}
    try:
        torch.onnx.export(
            Wrapped().eval(),  # a fresh module trains, and would put the model back to training
            pair,
            str(path),
            input_names=encoder.names,
            output_names=[output],
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )
    except Exception as e:
        raise ExportError(f"torch cannot export this model: {e}") from e


def _head(
    source: Path, config: dict[str, Any], classifier: bool, output: str, hidden: int
) -> tuple[str, dict[str, Any]]:
    """Task and its block of the manifest, by the folder's own files."""
    tokens = _max_tokens(source, config)
    if not classifier:
        pooling = _json(source / "1_Pooling" / "config.json")
        way = "cls" if pooling.get("pooling_mode_cls_token") else "mean"
        block = {
            "output": output,
            "pooling": "last_token" if pooling.get("pooling_mode_lasttoken") else way,
            "normalize": True,
            "dimensions": hidden,
            "max_tokens": tokens,
        }
        return "embedding", {"embedding": block}
    labels = [str(v) for _, v in sorted((int(k), v) for k, v in config.get("id2label", {}).items())]
    lowered = [label.lower() for label in labels]
    if len(labels) == 1:
        return "rerank", {"rerank": {"output": output, "max_tokens": tokens}}
    if "entailment" in lowered and "contradiction" in lowered:
        block = {
            "output": output,
            "entailment_index": lowered.index("entailment"),
            "contradiction_index": lowered.index("contradiction"),
            "max_tokens": tokens,
        }
        return "zero-shot-classification", {"zero_shot": block}
    multi = config.get("problem_type") == "multi_label_classification"
    block = {
        "output": output,
        "labels": labels,
        "multi_label": multi,
        "activation": "sigmoid" if multi else "softmax",
        "max_tokens": tokens,
    }
    return "text-classification", {"classification": block}


def _max_tokens(source: Path, config: dict[str, Any]) -> int:
    limits = [
        _json(source / "sentence_bert_config.json").get("max_seq_length"),
        _json(source / "tokenizer_config.json").get("model_max_length"),
        config.get("max_position_embeddings"),
    ]
    good = [int(v) for v in limits if isinstance(v, (int, float)) and 0 < v < 1_000_000]
    # RoBERTa counts positions from the padding id on: two of them can never be used.
    spare = 2 if config.get("model_type") in ("roberta", "xlm-roberta", "camembert") else 0
    return min(good) - spare if good else 512


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
