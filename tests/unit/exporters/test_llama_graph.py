"""The OpenVINO graph against transformers: the same logits. Needs torch: `make test-export`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

LACKS = "the extras `export` and `openvino-export` are not installed: make test-export"
torch = pytest.importorskip("torch", reason=LACKS)
transformers = pytest.importorskip("transformers", reason=LACKS)
ov = pytest.importorskip("openvino", reason=LACKS)

from forebay_exporters import llama_graph as graph  # noqa: E402 - it needs them

COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("Llama", {"tie_word_embeddings": True}),
        ("Llama", {"tie_word_embeddings": False, "rope_scaling": LLAMA3}),
        ("Mistral", {"sliding_window": None}),
        ("Qwen2", {}),
        ("Qwen3", {}),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_graph_gives_the_logits_of_transformers(
    kind: str, extra: dict, dtype: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**COMMON, **extra)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():  # biases and norms begin at 0 and 1, which hides faults
        parameter.data += torch.randn_like(parameter) * 0.05
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path)
    # Computed in float32, whatever it is stored in. Read anew: .to() rounds the rotation's angles too.
    model = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        ids = torch.randint(3, 128, (2, 40))
        wanted = model(ids).logits.numpy()
    request = (
        ov.Core()
        .compile_model(graph.build(tmp_path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        .create_infer_request()
    )
    got = []
    for start, end in ((0, 25), (25, 26), (26, 40)):  # prefill, one token, a chunk: with state
        n = end - start
        got.append(
            request.infer(
                {
                    "input_ids": ids[:, start:end].numpy(),
                    "attention_mask": np.ones((2, end), np.int64),
                    "position_ids": np.tile(np.arange(start, end), (2, 1)).reshape(2, n),
                    "beam_idx": np.arange(2, dtype=np.int32),
                }
            )["logits"].copy()
        )
    assert np.allclose(np.concatenate(got, 1), wanted, atol=2e-4)


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    with pytest.raises(graph.NotConvertible, match="Mamba"):
        graph.build(tmp_path)
