"""Hugging Face encoders to ONNX. Runs in the export environment (torch): `make test-export`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

LACKS = "the extra `export` is not installed: make test-export"
torch = pytest.importorskip("torch", reason=LACKS)
transformers = pytest.importorskip("transformers", reason=LACKS)

from forebay_exporters.huggingface import export_huggingface  # noqa: E402 - it needs them

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "short",
    "sentence",
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "and",
]


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {w: i for i, w in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    made.save(str(folder / "tokenizer.json"))


def random_model(folder: Path, architecture: str, labels: list[str] | None) -> Path:
    common = {"vocab_size": 64, "max_position_embeddings": 80}
    if architecture == "distilbert":
        config = transformers.DistilBertConfig(
            dim=32, hidden_dim=64, n_layers=2, n_heads=4, **common
        )
    else:
        kind = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}[
            architecture
        ]
        config = kind(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            **common,
        )
    torch.manual_seed(0)
    if labels is None:
        model = transformers.AutoModel.from_config(config)
    else:
        config.id2label = dict(enumerate(labels))
        config.label2id = {v: k for k, v in config.id2label.items()}
        config.num_labels = len(labels)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    folder.mkdir(parents=True)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer(folder)
    return folder


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize(
    ("labels", "task"),
    [
        (None, "embedding"),
        (["bad", "good"], "text-classification"),
        (["LABEL_0"], "rerank"),
        (["contradiction", "neutral", "entailment"], "zero-shot-classification"),
    ],
)
def test_every_task_is_exported_and_equal(tmp_path, architecture, labels, task) -> None:
    source = random_model(tmp_path / "source", architecture, labels)
    folder = export_huggingface(source, tmp_path / "models", "m")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["task"] == task
    assert manifest["parity"]["max_abs_diff"] < 2e-3
    pairs = task in ("rerank", "zero-shot-classification")
    assert manifest["parity"]["inputs"] == ("pairs" if pairs else "texts")
    assert sorted(p.name for p in folder.iterdir()) == [
        "manifest.json",
        "model.onnx",
        "tokenizer.json",
    ]


@pytest.mark.parametrize("precision", ["fp16", "int8", "int8-static"])
def test_precisions(tmp_path, precision) -> None:
    source = random_model(tmp_path / "source", "bert", None)
    texts = ["the quick brown fox", "a lazy dog jumps", "a short sentence"] * 4
    folder = export_huggingface(source, tmp_path / "models", "m", 1, precision, texts)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["precision"] == precision.partition("-")[0]


def test_minilm_written_by_hand_equals_transformers(tmp_path) -> None:
    """The starter's graph, straight from safetensors, against transformers' own output."""
    import numpy as np
    from forebay_exporters.starters import minilm

    kept = Path(__file__).resolve().parents[3] / ".forebay"
    source = minilm.weights(kept / "cache", lambda *_: None)
    folder = minilm.make(tmp_path, kept / "cache", lambda *_: None)
    ours = minilm.embed(folder / "model.onnx", source, minilm.PARITY_TEXTS)
    model = transformers.AutoModel.from_pretrained(source).eval()
    tokens, _ = minilm.encoder(source)
    for text, vector in zip(minilm.PARITY_TEXTS, ours, strict=True):
        ids = torch.tensor([tokens.encode(text).ids])
        with torch.no_grad():
            hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        expected = hidden[0].mean(0).numpy()
        expected /= np.linalg.norm(expected)
        assert np.abs(expected - vector).max() < 1e-5
