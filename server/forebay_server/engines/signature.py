"""A model file's inputs and outputs against what its manifest promises: the same for every runtime."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from forebay.errors import FailedPrecondition

from forebay_server.core.interfaces import EngineSpec, TensorSpec
from forebay_server.engines.arrays import TOKEN_INPUTS

#: Name -> the Open Inference Protocol's datatype (None where it has none), dimensions.
Signature = Mapping[str, TensorSpec]
#: The line of its own sources, and the function's signature, before what ONNX Runtime has to say.
_SOURCE = re.compile(r"/onnxruntime_src/\S+:\d+ .*?\) (?:const )?")


def rejected(message: str) -> FailedPrecondition:
    """The error of a model that is not served, naming its fault."""
    return FailedPrecondition(message, reason="MODEL_REJECTED")


def must_be_there(spec: EngineSpec) -> Path:
    """The model's file. Raises when it is missing or empty."""
    path = Path(spec.path)
    if not path.is_file():
        raise rejected(f"{path.name} is not there")
    if path.stat().st_size == 0:
        raise rejected(f"{path.name} is empty")
    return path


def check(spec: EngineSpec, have: Signature, outputs: Signature, served: Mapping[str, str]) -> None:
    """Raise unless the file has the inputs and outputs that its manifest promises.

    Args:
        have, outputs: what the file has; `datatype` in the runtime's own words.
        served: the runtime's datatypes -> the Open Inference Protocol's.
    """
    name = Path(spec.path).name
    for one in have.values():
        if one.datatype not in served:
            raise rejected(f"{name}: input {one.name!r} has type {one.datatype}, not served")
    if spec.kind == "tokens":
        if "input_ids" not in have:
            raise rejected(f"{name} has no input 'input_ids'; it has {', '.join(have)}")
        odd = [n for n in have if n not in TOKEN_INPUTS]
        if odd:
            raise rejected(f"{name} wants inputs {odd} that a text model does not have")
    else:
        for one in spec.inputs:
            _check_tensor(name, one, have, served)
        promised = {s.name for s in spec.inputs}
        extra = [n for n in have if n not in promised]
        if extra:
            raise rejected(f"{name} has inputs {extra} that its manifest does not name")
    for out_name, out in outputs.items():
        if out.datatype not in served and (spec.kind == "tensors" or out_name == spec.output):
            raise rejected(f"{name}: output {out_name!r} has type {out.datatype}, not served")
    wanted = [spec.output] if spec.kind == "tokens" else [o.name for o in spec.outputs]
    for one in wanted:
        if one not in outputs:
            raise rejected(f"{name} has no output {one!r}; it has {', '.join(outputs)}")


def _check_tensor(file: str, spec: TensorSpec, have: Signature, served: Mapping[str, str]) -> None:
    found = have.get(spec.name)
    if found is None:
        raise rejected(f"{file} has no input {spec.name!r}; it has {', '.join(have)}")
    if served[found.datatype] != spec.datatype:
        raise rejected(
            f"{file}: input {spec.name!r} is {served[found.datatype]}, "
            f"its manifest says {spec.datatype}"
        )
    if found.shape is None:  # then the manifest's word holds
        return
    if spec.shape is None or len(found.shape) != len(spec.shape):
        said = "any number of them" if spec.shape is None else len(spec.shape)
        raise rejected(
            f"{file}: input {spec.name!r} has {len(found.shape)} dimensions, its manifest says {said}"
        )


def first_line(error: Exception) -> str:
    """What a runtime says of a bad file, short."""
    text = _SOURCE.sub(" ", str(error)).strip().splitlines()
    return text[0][:300] if text else type(error).__name__
