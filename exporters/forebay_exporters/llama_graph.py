"""Llama-shaped language models as OpenVINO graphs, straight from safetensors: no torch.

Llama, Mistral, Qwen2 and Qwen3: RMS norm, rotary embeddings, grouped attention, gated MLP. The
key-value state is in ReadValue/Assign pairs around scaled_dot_product_attention, the form that
OpenVINO GenAI turns into paged attention for continuous batching.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import Model, Type
from openvino import opset13 as ops
from openvino.op.util import Variable, VariableInfo

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)


class NotConvertible(ValueError):
    """The folder holds a model that this graph does not fit; the message says why."""


class _Weights:
    """Tensors of all safetensors files, as constants in the precision they are stored in."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self._at: dict[str, Any] = {}
        for file in sorted(folder.glob("*.safetensors")):
            # numpy knows no bfloat16: such files are read by their raw bytes.
            handle = safe_open(str(file), "np")
            for name in handle.keys():  # noqa: SIM118 - no mapping
                self._at[name] = (file, handle)

    def __contains__(self, name: str) -> bool:
        return name in self._at

    def array(self, name: str) -> np.ndarray:
        """A tensor, float32 or float16."""
        file, handle = self._at[name]
        if handle.get_slice(name).get_dtype() == "BF16":
            return _bfloat16(file, name)
        return handle.get_tensor(name)

    def node(self, name: str) -> Any:
        """A tensor as a float32 node; half precision stays so in the file."""
        if name not in self._at:
            raise NotConvertible(f"the weights have no {name!r}")
        value = self.array(name)
        constant = ops.constant(value, name=name)
        return constant if value.dtype == np.float32 else ops.convert(constant, Type.f32)


def _bfloat16(file: Path, name: str) -> np.ndarray:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        start, end = header[name]["data_offsets"]
        stream.seek(8 + size + start)
        raw = np.frombuffer(stream.read(end - start), np.uint16)
    wide = (raw.astype(np.uint32) << 16).view(np.float32)
    return wide.reshape(header[name]["shape"]).astype(np.float32)


def _inverse_frequencies(config: Mapping[str, Any], head: int) -> np.ndarray:
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    inverse = 1.0 / theta ** (np.arange(0, head, 2, dtype=np.float64) / head)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return inverse.astype(np.float32)
    if kind == "linear":
        return (inverse / float(parameters["factor"])).astype(np.float32)
    if kind != "llama3":
        raise NotConvertible(f"rope scaling {kind!r} is not known; default, linear and llama3 are")
    factor, old = float(parameters["factor"]), float(parameters["original_max_position_embeddings"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    wave = 2 * math.pi / inverse
    smooth = (old / wave - low) / (high - low)
    mixed = (1 - smooth) * inverse / factor + smooth * inverse
    scaled = np.where(wave > old / low, inverse / factor, inverse)
    between = (wave <= old / low) & (wave >= old / high)
    return np.where(between, mixed, scaled).astype(np.float32)


def build(folder: Path) -> Model:
    """The graph of a Hugging Face folder. Raises NotConvertible."""
    config = json.loads((folder / "config.json").read_text())
    architecture = (config.get("architectures") or [""])[0]
    if architecture not in ARCHITECTURES:
        raise NotConvertible(
            f"the architecture {architecture!r} is not known; known are {', '.join(ARCHITECTURES)}"
        )
    if config.get("quantization_config"):
        raise NotConvertible("quantised weights are not read here; give the full-precision model")
    if config.get("hidden_act", "silu") != "silu":
        raise NotConvertible(f"the activation {config['hidden_act']!r} is not known; silu is")
    return _Builder(config, _Weights(folder)).model()


class _Builder:
    def __init__(self, config: Mapping[str, Any], weights: _Weights) -> None:
        self._config = config
        self._weights = weights
        self._eps = float(config["rms_norm_eps"])
        self._heads = int(config["num_attention_heads"])
        self._kv_heads = int(config.get("num_key_value_heads") or self._heads)
        self._head = int(config.get("head_dim") or config["hidden_size"] // self._heads)

    def model(self) -> Model:
        """Inputs, layers, head, state."""
        ids = ops.parameter([-1, -1], Type.i64, name="input_ids")
        mask = ops.parameter([-1, -1], Type.i64, name="attention_mask")
        positions = ops.parameter([-1, -1], Type.i64, name="position_ids")
        beams = ops.parameter([-1], Type.i32, name="beam_idx")
        for p in (ids, mask, positions, beams):
            p.output(0).tensor.names = {p.friendly_name}
        embeddings = self._weights.node("model.embed_tokens.weight")
        hidden: Any = ops.gather(embeddings, ids, ops.constant(0, Type.i64))
        batch = ops.gather(
            ops.shape_of(ids), ops.constant([0], Type.i64), ops.constant(0, Type.i64)
        )
        cos, sin = self._rotary(positions)
        bias = self._mask(mask, ids)
        sinks: list[Any] = []
        for layer in range(int(self._config["num_hidden_layers"])):
            name = f"model.layers.{layer}"
            normed = self._norm(hidden, f"{name}.input_layernorm.weight")
            attended = self._attention(normed, layer, cos, sin, bias, batch, beams, sinks)
            hidden = ops.add(hidden, attended)
            normed = self._norm(hidden, f"{name}.post_attention_layernorm.weight")
            gate = ops.swish(self._linear(normed, f"{name}.mlp.gate_proj"))
            up = self._linear(normed, f"{name}.mlp.up_proj")
            hidden = ops.add(hidden, self._linear(ops.multiply(gate, up), f"{name}.mlp.down_proj"))
        hidden = self._norm(hidden, "model.norm.weight")
        tied = "lm_head.weight" not in self._weights
        head = embeddings if tied else self._weights.node("lm_head.weight")
        logits = ops.matmul(hidden, head, False, True)
        logits.output(0).tensor.names = {"logits"}
        result = ops.result(logits, name="logits")
        make: Any = Model  # its stub contradicts itself
        return make([result], sinks, [ids, mask, positions, beams], "language_model")

    def _linear(self, x: Any, name: str) -> Any:
        out = ops.matmul(x, self._weights.node(f"{name}.weight"), False, True)
        if f"{name}.bias" in self._weights:
            out = ops.add(out, self._weights.node(f"{name}.bias"))
        return out

    def _norm(self, x: Any, name: str) -> Any:
        square = ops.power(x, ops.constant(np.float32(2)))
        mean = ops.reduce_mean(square, ops.constant([-1], Type.i64), True)
        root = ops.sqrt(ops.add(mean, ops.constant(np.float32(self._eps))))
        scaled = ops.multiply(x, ops.divide(ops.constant(np.float32(1)), root))
        return ops.multiply(scaled, self._weights.node(name))

    def _rotary(self, positions: Any) -> tuple[Any, Any]:
        inverse = _inverse_frequencies(self._config, self._head).reshape(1, -1, 1)
        where = ops.convert(ops.unsqueeze(positions, ops.constant(1, Type.i64)), Type.f32)
        angles = ops.transpose(
            ops.matmul(ops.constant(inverse), where, False, False),
            ops.constant([0, 2, 1], Type.i64),
        )
        both = ops.unsqueeze(ops.concat([angles, angles], -1), ops.constant(1, Type.i64))
        return ops.cos(both), ops.sin(both)

    def _rotate(self, x: Any, cos: Any, sin: Any) -> Any:
        half = self._head // 2

        def at(place: int) -> Any:
            return ops.constant([place], Type.i64)

        first = ops.slice(x, at(0), at(half), at(1), at(3))
        second = ops.slice(x, at(half), at(self._head), at(1), at(3))
        turned = ops.concat([ops.multiply(second, ops.constant(np.float32(-1))), first], -1)
        return ops.add(ops.multiply(x, cos), ops.multiply(turned, sin))

    def _mask(self, mask: Any, ids: Any) -> Any:
        """0 where a query may look, -inf elsewhere: [batch, 1, new, all]."""
        zero, one = ops.constant(0, Type.i64), ops.constant(1, Type.i64)
        total = ops.gather(ops.shape_of(mask), one, zero)
        new = ops.gather(ops.shape_of(ids), one, zero)
        columns = ops.range(zero, total, one, Type.i64)
        rows = ops.range(ops.subtract(total, new), total, one, Type.i64)
        causal = ops.less_equal(ops.unsqueeze(columns, zero), ops.unsqueeze(rows, one))
        alive = ops.convert(mask, Type.boolean)
        alive = ops.unsqueeze(alive, ops.constant([1, 2], Type.i64))
        allowed = ops.logical_and(ops.unsqueeze(causal, ops.constant([0, 1], Type.i64)), alive)
        return ops.select(
            allowed, ops.constant(np.float32(0)), ops.constant(np.float32(np.finfo(np.float32).min))
        )

    def _split(self, x: Any, heads: int) -> Any:
        shape = ops.constant([0, 0, heads, self._head], Type.i64)
        return ops.reshape(x, shape, True)

    def _state(self, value: Any, name: str, batch: Any, beams: Any, sinks: list[Any]) -> Any:
        """What was before, and this: [batch, heads, all, head]."""
        shape = [-1, self._kv_heads, -1, self._head]
        info = VariableInfo()
        info.data_shape, info.data_type = ov.PartialShape(shape), Type.f32
        info.variable_id = name
        variable = Variable(info)
        rest = ops.constant([self._kv_heads, 0, self._head], Type.i64)
        empty = ops.broadcast(ops.constant(np.float32(0)), ops.concat([batch, rest], 0))
        before = ops.read_value(empty, variable)
        chosen = ops.gather(before, beams, ops.constant(0, Type.i64))
        whole = ops.concat([chosen, value], 2)
        sinks.append(ops.assign(whole, variable))
        return whole

    def _repeat(self, x: Any, batch: Any) -> Any:
        """Key and value heads, once per query head of their group."""
        times = self._heads // self._kv_heads
        if times == 1:
            return x
        zero = ops.constant(0, Type.i64)
        wide = ops.unsqueeze(x, ops.constant(2, Type.i64))
        length = ops.gather(ops.shape_of(x), ops.constant([2], Type.i64), zero)
        target = ops.concat(
            [
                batch,
                ops.constant([self._kv_heads, times], Type.i64),
                length,
                ops.constant([self._head], Type.i64),
            ],
            0,
        )
        wide = ops.broadcast(wide, target, "BIDIRECTIONAL")
        shape = ops.constant([0, self._heads, -1, self._head], Type.i64)
        return ops.reshape(wide, shape, True)

    def _attention(
        self,
        x: Any,
        layer: int,
        cos: Any,
        sin: Any,
        bias: Any,
        batch: Any,
        beams: Any,
        sinks: list[Any],
    ) -> Any:
        name = f"model.layers.{layer}.self_attn"
        turn = ops.constant([0, 2, 1, 3], Type.i64)
        q = self._split(self._linear(x, f"{name}.q_proj"), self._heads)
        k = self._split(self._linear(x, f"{name}.k_proj"), self._kv_heads)
        v = self._split(self._linear(x, f"{name}.v_proj"), self._kv_heads)
        if f"{name}.q_norm.weight" in self._weights:
            q = self._norm(q, f"{name}.q_norm.weight")
            k = self._norm(k, f"{name}.k_norm.weight")
        q = self._rotate(ops.transpose(q, turn), cos, sin)
        k = self._rotate(ops.transpose(k, turn), cos, sin)
        v = ops.transpose(v, turn)
        k = self._state(k, f"past_key_values.{layer}.keypresent.{layer}.key", batch, beams, sinks)
        v = self._state(
            v, f"past_key_values.{layer}.valuepresent.{layer}.value", batch, beams, sinks
        )
        out = ops.scaled_dot_product_attention(
            q,
            self._repeat(k, batch),
            self._repeat(v, batch),
            bias,
            ops.constant(np.float32(1 / math.sqrt(self._head))),
            causal=False,
        )
        out = ops.transpose(out, turn)
        out = ops.reshape(out, ops.constant([0, 0, self._heads * self._head], Type.i64), True)
        return self._linear(out, f"{name}.o_proj")
