"""A Llama with random weights for the embedded engine: real in every part, senseless in its words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def random_model(root: Path, name: str = "random", **options: object) -> Path:
    """Put the model at `<root>/<name>/1`."""
    import openvino as ov
    from forebay_exporters.llama_graph import build
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = root / name / "1"
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the answer of the question"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    config = {**CONFIG, "vocab_size": size}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": TEMPLATE, "eos_token": "</s>", "bos_token": "<s>"})
    )
    random = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return random.normal(0, 0.3, shape).astype(np.float32)

    weights = {"model.embed_tokens.weight": weight(size, 64), "model.norm.weight": weight(64)}
    for i in range(2):
        at = f"model.layers.{i}."
        for part in ("q", "k", "v", "o"):
            weights[f"{at}self_attn.{part}_proj.weight"] = weight(64, 64)
        for part, shape in (("gate", (96, 64)), ("up", (96, 64)), ("down", (64, 96))):
            weights[f"{at}mlp.{part}_proj.weight"] = weight(*shape)
        for part in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{at}{part}.weight"] = weight(64)
    save_file(weights, str(folder / "model.safetensors"))
    ov.save_model(build(folder), str(folder / "openvino_model.xml"), compress_to_fp16=False)
    (folder / "model.safetensors").unlink()
    settings = {
        "engine": "openvino",
        "engine_options": {"kv_cache_gb": 1},
        "generation": {"prices": {"prompt": 1.0, "completion": 2.0}, **options},
    }
    (root / name / "model.yaml").write_text(json.dumps(settings))
    return root
