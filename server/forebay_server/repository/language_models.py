"""Folders with language models: what they are, read from their own files, and how they are loaded.

A Hugging Face folder (safetensors) is served by vLLM; the same converted for OpenVINO by the
embedded engine; with an engine that TensorRT-LLM has built, by that. A folder whose model.yaml says `engine: openai` stands for a model elsewhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from forebay_server.core.generation import GenerationSpec
from forebay_server.generation.client import GenerationClient
from forebay_server.repository.manifest import GenerationHead, Manifest, ModelConfig, rejected

#: Sampling defaults that generation_config.json may hold.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
OPENVINO_MODEL = "openvino_model.xml"
#: Folder of an engine that TensorRT-LLM has built.
TENSORRT_ENGINE = "engine"


def describe(folder: Path) -> Manifest | None:
    """The manifest of a language model's folder; None when it is none."""
    config = _json(folder / "config.json")
    architecture = ((config or {}).get("architectures") or [""])[0]
    converted = (folder / OPENVINO_MODEL).exists()
    if config is None or not architecture.endswith(("ForCausalLM", "ForConditionalGeneration")):
        return None
    built = (folder / TENSORRT_ENGINE / "config.json").exists()
    if not converted and not built and not any(folder.glob("*.safetensors")):
        return None
    tokenizer = folder / "tokenizer.json"
    text_config = config.get("text_config") or config
    context = text_config.get("max_position_embeddings")
    if not isinstance(context, int):
        raise rejected("config.json has no max_position_embeddings; say it in a manifest.json")
    return Manifest(
        task="generation",
        model_file=OPENVINO_MODEL if converted else "model.safetensors",
        tokenizer_file="tokenizer.json" if tokenizer.exists() else None,
        source={"kind": "huggingface", "id": config.get("_name_or_path", "")},
        precision=str(config.get("dtype") or config.get("torch_dtype") or "fp32"),
        generation=_head(folder, config, context),
    )


def _head(folder: Path, config: dict[str, Any], context: int) -> GenerationHead:
    own = _json(folder / "generation_config.json") or {}
    eos = own.get("eos_token_id", config.get("eos_token_id"))
    ids = eos if isinstance(eos, list) else [eos]
    sampling = {k: float(own[k]) for k in SAMPLING if isinstance(own.get(k), (int, float))}
    return GenerationHead(
        context_length=context,
        template_file="chat_template.jinja" if (folder / "chat_template.jinja").exists() else None,
        eos_token_ids=[i for i in ids if isinstance(i, int)],
        sampling=sampling,
    )


def _json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_bytes())
    except ValueError as e:
        raise rejected(f"{path.name} is not JSON: {e}") from None
    return value if isinstance(value, dict) else None


def tokenizer_of(folder: Path, manifest: Manifest) -> Any:
    """The folder's tokenizer, without truncation or padding; None for models that are elsewhere."""
    if manifest.tokenizer_file is None:
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / manifest.tokenizer_file))
    except Exception as e:
        raise rejected(f"{manifest.tokenizer_file} cannot be read: {e}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def template_of(folder: Path, manifest: Manifest) -> str:
    """The source of the chat template; empty when the model has none."""
    head = manifest.generation_head
    if head.template_file:
        path = (folder / head.template_file).resolve()
        if folder.resolve() not in path.parents or not path.is_file():
            raise rejected(f"the chat template {head.template_file!r} is missing")
        return path.read_text(encoding="utf-8")
    template = (_json(folder / "tokenizer_config.json") or {}).get("chat_template")
    if isinstance(template, list):  # several by name
        by_name = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = by_name.get("default")
    return template if isinstance(template, str) else ""


def special_tokens(folder: Path) -> dict[str, str]:
    """bos_token and eos_token as chat templates want them."""
    config = _json(folder / "tokenizer_config.json") or {}
    out = {}
    for name in ("bos_token", "eos_token"):
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        out[name] = value if isinstance(value, str) else ""
    return out


def load(
    name: str,
    version: int,
    folder: Path,
    config: ModelConfig,
    manifest: Manifest,
    tokenizer: Any,
    defaults: Any,
) -> GenerationClient:
    """The model, ready to generate. Raises FailedPrecondition (MODEL_REJECTED); leaves nothing."""
    wanted = config.generation
    head = manifest.generation_head
    engine_name = config.engine
    if engine_name == "auto":
        engine_name = "openvino" if (folder / OPENVINO_MODEL).exists() else "vllm"
        if (folder / TENSORRT_ENGINE / "config.json").exists():
            engine_name = "tensorrt_llm"
    if engine_name not in ("openvino", "vllm", "tensorrt_llm", "openai"):
        raise rejected(f"model.yaml: the engine {engine_name!r} generates no text")
    if engine_name != "openai" and tokenizer is None:
        raise rejected("tokenizer.json is missing")
    if wanted.context_length and wanted.context_length > head.context_length:
        raise rejected(
            f"model.yaml: generation.context_length is {wanted.context_length}; "
            f"the model's is {head.context_length}"
        )
    adapters = {}
    for adapter, given in wanted.adapters.items():
        path = Path(given) if Path(given).is_absolute() else folder / given
        if not (path / "adapter_config.json").exists():
            raise rejected(
                f"model.yaml: generation.adapters.{adapter}: no adapter_config.json there"
            )
        adapters[adapter] = str(path)
    spec = GenerationSpec(
        model=name,
        version=version,
        engine=engine_name,
        folder=str(folder),
        context_length=wanted.context_length or head.context_length,
        max_running=wanted.max_running,
        stream_interval_s=wanted.stream_interval_ms / 1e3,
        tool_parser=wanted.tool_parser,
        reasoning_parser=wanted.reasoning_parser,
        eos_token_ids=tuple(head.eos_token_ids),
        adapters=adapters,
        options=config.engine_options,
    )
    engine = _engine(spec, defaults)
    try:
        engine.load()
        template = template_of(folder, manifest)
        return GenerationClient(
            spec,
            engine,
            template,
            special_tokens(folder),
            max_running=wanted.max_running,
            max_queue_size=wanted.max_queue_size,
        )
    except Exception:
        engine.close()
        raise


def _engine(spec: GenerationSpec, defaults: Any) -> Any:
    if spec.engine == "openvino":
        from forebay_server.generation.openvino import OpenVinoEngine

        return OpenVinoEngine(spec)
    if spec.engine == "vllm":
        from forebay_server.generation.vllm import VllmEngine

        return VllmEngine(spec, defaults.vllm_python, defaults.vllm_cache_gb)
    if spec.engine == "tensorrt_llm":
        from forebay_server.generation.trtllm import TensorRtEngine

        return TensorRtEngine(spec, defaults.trtllm_python)
    from forebay_server.generation.upstream import UpstreamEngine

    return UpstreamEngine(spec)
