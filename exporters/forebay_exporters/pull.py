"""`forebay pull`: a model of the hub, made ready to be served.

An ONNX file of the repository is taken as it is; otherwise safetensors are exported (extra
`export`). Pickles (pytorch_model.bin) are never read, and code of a repository is never run.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path

from forebay_exporters.artefact import ExportError, must_be_new, sha256, version_folder

ONNX = ("onnx/model.onnx", "model.onnx")
#: Small files that say what the model is.
CONFIGURATION = (
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "sentence_bert_config.json",
    "modules.json",
    "1_Pooling/config.json",
)


def is_language_model(folder: Path) -> bool:
    """Whether a Hugging Face folder holds a model that generates text."""
    config = json.loads((folder / "config.json").read_text())
    return (config.get("architectures") or [""])[0].endswith("ForCausalLM")


def pull(
    repo_id: str,
    root: Path,
    *,
    name: str | None = None,
    revision: str | None = None,
    precision: str = "fp32",
    version: int = 1,
) -> Path:
    """Fetch, export when need be, and put it at `<root>/<name>/<version>`.

    Args:
        repo_id: `org/name`; the hub is HF_ENDPOINT's, the token HF_TOKEN's.
        name: name to serve it by; default: the last part of `repo_id`.
        revision: branch, tag or commit.
        precision: `fp32` takes an ONNX file of the repository as it is; others are exported from its
            safetensors.

    Raises:
        ExportError: the version is there already (said before anything is fetched); not there, not reachable, or no file that may be read.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
    from huggingface_hub.utils import httpx  # the one that it uses itself, whatever its name

    served = name or re.sub(r"[^A-Za-z0-9._-]", "-", repo_id.rpartition("/")[2])
    must_be_new(root, served, version)
    try:
        info = HfApi().model_info(repo_id, revision=revision)
        files = {s.rfilename for s in info.siblings or ()}
        onnx = next((f for f in ONNX if f in files), None) if precision == "fp32" else None
        weights = sorted(f for f in files if f.endswith(".safetensors"))
        if onnx is None and not weights:
            pickles = sorted(f for f in files if f.endswith((".bin", ".pt", ".pkl", ".ckpt")))
            held = (
                f"only {', '.join(pickles[:3])}, which can run code and is never read"
                if pickles
                else "none"
            )
            lacks = "no ONNX file and no" if precision == "fp32" else f"for {precision} it needs"
            raise ExportError(
                f"{repo_id} cannot be taken: {lacks} safetensors; weights there: {held}"
            )
        if "tokenizer.json" not in files:
            raise ExportError(f"{repo_id} has no tokenizer.json (a fast tokenizer is needed)")
        wanted = [f for f in CONFIGURATION if f in files]
        wanted += [f for f in (onnx, f"{onnx}_data") if f in files] if onnx else weights
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            for file in wanted:
                hf_hub_download(repo_id, file, revision=info.sha, local_dir=folder)
            if onnx is None and is_language_model(folder):
                from forebay_exporters.openvino_export import export_language_model

                return export_language_model(folder, root, served, version)
            if onnx is None:
                from forebay_exporters.huggingface import export_huggingface

                return export_huggingface(folder, root, served, version, precision)
            with version_folder(root, served, version) as target:
                for file in wanted:
                    (target / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(folder / file, target / file)
                lines = [f"{sha256(target / f)}  {f}" for f in wanted]
                (target / "PULLED").write_text(f"{repo_id}@{info.sha}\n" + "\n".join(lines) + "\n")
            return root / served / str(version)
    except RepositoryNotFoundError:
        raise ExportError(f"{repo_id} is not on the hub, or needs a token (HF_TOKEN)") from None
    except HfHubHTTPError as e:
        raise ExportError(f"the hub refused {repo_id}: {e}") from None
    except (OSError, httpx.TransportError) as e:
        raise ExportError(f"the hub cannot be reached: {e}") from None
