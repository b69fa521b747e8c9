"""A tiny Llama with random weights, made in seconds without torch: for tests that need a real engine
and no sense in what it says.

    python -m forebay_exporters.tiny_lm.random_weights <new folder>

It has the trained tiny model's shape, tokenizer and chat template. One dimension of the residual
stream is held constant, so that a column of the head acts as a bias of each token: only printable
ASCII is said, and the end token comes now and then.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
from forebay_server.generation.templates import render
from safetensors.numpy import save_file

from forebay_exporters.tiny_lm.dialogues import dialogue
from forebay_exporters.tiny_lm.folder import CONTEXT, TEMPLATE, train_tokenizer, write_tokenizer

HIDDEN, MIDDLE, LAYERS, HEADS, KV_HEADS, HEAD = 192, 512, 4, 6, 3, 32
#: Size of the constant dimension, in standard deviations of the others.
CONSTANT = 4.0
#: Bias of tokens that are never said, and of the end token: in standard deviations of the logits.
NEVER, END = -60.0, 1.5
#: Standard deviation of the logits: with 1 the likeliest token has few rivals.
SPREAD = 3.0


def make(out: Path, seed: int = 0) -> None:
    """Write a Hugging Face folder, whole or not at all."""
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    chance = random.Random(seed)
    template = TEMPLATE.read_text()
    made = [dialogue(chance) for _ in range(1000)]
    texts = [render(template, d["messages"], {"tools": d.get("tools")}) for d in made]
    tokenizer = train_tokenizer(texts)
    write_tokenizer(part, tokenizer)
    end = tokenizer.token_to_id("<|im_end|>")
    size = tokenizer.get_vocab_size()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": size,
        "hidden_size": HIDDEN,
        "intermediate_size": MIDDLE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "max_position_embeddings": CONTEXT,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": [end, 0],
        "pad_token_id": 0,
        "dtype": "float32",
    }
    (part / "config.json").write_text(json.dumps(config, indent=1))
    generation = {"bos_token_id": 0, "eos_token_id": [end, 0], "pad_token_id": 0}
    (part / "generation_config.json").write_text(json.dumps(generation, indent=1))
    bias = np.array([_bias(tokenizer.decode([i], False), i == end) for i in range(size)])
    save_file(_weights(size, bias, seed), str(part / "model.safetensors"), {"format": "pt"})
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)


def _bias(text: str, end: bool) -> float:
    if end:
        return END
    return 0.0 if text and text.isascii() and text.isprintable() and "<" not in text else NEVER


def _weights(size: int, bias: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    r = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (r.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    embeddings = r.standard_normal((size, HIDDEN)).astype(np.float32)
    embeddings[:, 0] = CONSTANT
    out: dict[str, np.ndarray] = {"model.embed_tokens.weight": embeddings}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes = {
            "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
            "mlp.gate_proj": (MIDDLE, HIDDEN),
            "mlp.up_proj": (MIDDLE, HIDDEN),
            "mlp.down_proj": (HIDDEN, MIDDLE),
        }
        for name, shape in shapes.items():
            weight = matrix(*shape)
            if name.endswith(("o_proj", "down_proj")):
                weight[0] = 0  # the constant dimension stays as it is
            out[f"{at}.{name}.weight"] = weight
        for name in ("input_layernorm", "post_attention_layernorm"):
            out[f"{at}.{name}.weight"] = np.ones(HIDDEN, np.float32)
    out["model.norm.weight"] = np.ones(HIDDEN, np.float32)
    head = matrix(size, HIDDEN) * SPREAD
    # After the last norm the constant dimension is about CONSTANT / 2: layers add to the others.
    head[:, 0] = (bias * SPREAD / (CONSTANT / 2)).astype(np.float32)
    out["lm_head.weight"] = head
    return out


if __name__ == "__main__":
    make(Path(sys.argv[1]))
