"""The Open Inference Protocol v2: bare tensors for tensor and tabular models, strings for texts.

A text model shows itself by what it means, not by its token tensors: input `text` (BYTES [-1]),
output `embedding` (FP32 [-1, dimensions]) or `label` (BYTES [-1]) and `scores` (FP32 [-1, labels]).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, cast

import forebay
import numpy as np
from forebay.constraints import Validator
from forebay.datatypes import DTYPES
from forebay.errors import ForebayError, InvalidArgument
from forebay.oip import open_inference_pb2 as pb
from numpy.typing import NDArray

from forebay_server.core.call import Call
from forebay_server.core.interfaces import TensorSpec
from forebay_server.dataplane import heads, tensors
from forebay_server.dataplane.models import ModelAccess, ServedModel
from forebay_server.dataplane.records import AVAILABLE
from forebay_server.dataplane.registry import Registry
from forebay_server.dataplane.texts import TextJob, TextOutcome, TextPipeline
from forebay_server.services.base import Service, add_facts, resolve_soon
from forebay_server.services.oip_raw import RawInfer
from forebay_server.services.oip_statistics import statistics_message

EXTENSIONS = ("model_repository", "statistics", "binary_tensor_data")
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
_ANY_TASK = (
    "tensor",
    "tabular-regression",
    "tabular-classification",
    "embedding",
    "text-classification",
)


class OpenInferenceService(Service):
    """See protos/forebay/oip/open_inference.proto."""

    name = "inference.GRPCInferenceService"

    def __init__(
        self,
        access: ModelAccess,
        registry: Registry,
        texts: TextPipeline,
        plain: tensors.TensorPipeline,
        validator: Validator,
    ) -> None:
        self._access = access
        self._registry = registry
        self._texts = texts
        self._plain = plain
        self._raw = RawInfer(access, validator, _ANY_TASK, _ref_of, signature)

    async def server_live(self, call: Call) -> pb.ServerLiveResponse:
        """ServerLive."""
        return pb.ServerLiveResponse(live=True)

    async def server_ready(self, call: Call) -> pb.ServerReadyResponse:
        """ServerReady."""
        return pb.ServerReadyResponse(ready=self._registry.ready)

    async def server_metadata(self, call: Call) -> pb.ServerMetadataResponse:
        """ServerMetadata."""
        return pb.ServerMetadataResponse(
            name="forebay", version=forebay.__version__, extensions=EXTENSIONS
        )

    async def model_ready(self, call: Call) -> pb.ModelReadyResponse:
        """ModelReady."""
        request = cast(pb.ModelReadyRequest, call.request)
        return pb.ModelReadyResponse(
            ready=self._registry.is_ready(request.name, _version(request.version, "version"))
        )

    async def model_metadata(self, call: Call) -> pb.ModelMetadataResponse:
        """ModelMetadata."""
        request = cast(pb.ModelMetadataRequest, call.request)
        ref = _ref(request.name, _version(request.version, "version"))
        model = await self._access.resolve_async(call, ref, _ANY_TASK)
        response = pb.ModelMetadataResponse(
            name=model.name,
            versions=[str(v) for v in self._registry.versions(model.name)],
            platform="onnxruntime_onnx",
        )
        inputs, outputs = signature(model)
        for spec in inputs:
            response.inputs.add(name=spec.name, datatype=spec.datatype, shape=spec.shape or ())
        for spec in outputs:
            response.outputs.add(name=spec.name, datatype=spec.datatype, shape=spec.shape or ())
        return response

    async def model_statistics(self, call: Call) -> pb.ModelStatisticsResponse:
        """ModelStatistics."""
        request = cast(pb.ModelStatisticsRequest, call.request)
        version = _version(request.version, "version")
        return pb.ModelStatisticsResponse(
            model_stats=[
                statistics_message(s)
                for s in self._registry.statistics(request.name)
                if version is None or s.version == version
            ]
        )

    async def repository_index(self, call: Call) -> pb.RepositoryIndexResponse:
        """RepositoryIndex."""
        request = cast(pb.RepositoryIndexRequest, call.request)
        response = pb.RepositoryIndexResponse()
        for name, version, state, reason in self._registry.index(call.principal):
            if state == "READY" or not request.ready:
                response.models.add(name=name, version=str(version), state=state, reason=reason)
        return response

    async def repository_model_load(self, call: Call) -> pb.RepositoryModelLoadResponse:
        """RepositoryModelLoad."""
        request = cast(pb.RepositoryModelLoadRequest, call.request)
        for name in request.parameters:
            raise InvalidArgument.at(
                f"parameters[{name}]", "is not supported: models are loaded from the repository"
            )
        await self._registry.load(request.model_name, None)
        return pb.RepositoryModelLoadResponse()

    async def repository_model_unload(self, call: Call) -> pb.RepositoryModelUnloadResponse:
        """RepositoryModelUnload."""
        request = cast(pb.RepositoryModelUnloadRequest, call.request)
        await self._registry.unload(request.model_name, None)
        return pb.RepositoryModelUnloadResponse()

    def model_infer_raw(self, calls: Sequence[Call]) -> list[Call]:
        """ModelInfer, where only the raw tensors differ."""
        return self._raw.start(calls) if AVAILABLE else list(calls)

    def model_infer(self, calls: Sequence[Call]) -> None:
        """ModelInfer."""
        jobs: list[tensors.TensorJob] = []
        for call in calls:
            request = cast(pb.ModelInferRequest, call.request)
            try:
                ref = _ref_of(request)
                if not request.model_name:
                    raise InvalidArgument.at("model_name", "is required")
                model = self._access.resolve(
                    call, ref, _ANY_TASK, "", lambda m, c=call: self._plain.run(self._jobs(c, m))
                )
                if model is not None:
                    jobs += self._jobs(call, model)
            except ForebayError as e:
                call.fail(e)
        self._plain.run(jobs)

    async def model_stream_infer(
        self, call: Call, requests: AsyncIterator[pb.ModelInferRequest]
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """ModelStreamInfer: an error answers its own request only, as the standard has it."""
        loop = asyncio.get_running_loop()
        async for request in requests:
            done: asyncio.Future[Call] = loop.create_future()
            one = Call(
                call.method,
                call.metadata,
                started=call.started,
                deadline=call.deadline,
                on_end=lambda c, f=done: resolve_soon(loop, f, c),
            )
            one.principal, one.request_id, one.request = call.principal, call.request_id, request
            call.on_cancel(one.cancel)
            await asyncio.to_thread(self.model_infer, [one])
            await done
            add_facts(call.facts, one.facts)  # usage and limits look at the stream's
            if one.error is not None:
                yield pb.ModelStreamInferResponse(
                    error_message=one.error.message,
                    infer_response=pb.ModelInferResponse(id=request.id),
                )
            else:
                yield pb.ModelStreamInferResponse(
                    infer_response=pb.ModelInferResponse.FromString(one.payload)
                )

    def _jobs(self, call: Call, model: ServedModel) -> list[tensors.TensorJob]:
        """What is left to start of a call: nothing when it went the way of texts."""
        request = cast(pb.ModelInferRequest, call.request)
        if model.text_encoder is None and self._access.refused(model, _ref_of(request), [call]):
            return []
        given = _inputs(request)
        place = {t.name: i for i, t in enumerate(request.inputs)}
        wanted = [o.name for o in request.outputs]
        known = [s.name for s in signature(model)[1]]
        for i, name in enumerate(wanted):
            if name not in known:
                raise InvalidArgument.at(
                    f"outputs[{i}].name", f"is {name!r}; the model gives {', '.join(known)}"
                )
        names = wanted or known

        def answer(outputs: Mapping[str, NDArray[Any]]) -> None:
            response = pb.ModelInferResponse(
                model_name=model.name, model_version=str(model.version), id=request.id
            )
            for name in names:
                array = outputs[name]
                response.outputs.add(
                    name=name, datatype=tensors.datatype_of(array), shape=array.shape
                )
                response.raw_output_contents.append(tensors.to_raw(array))
            call.reply(response)

        if model.text_encoder is not None:
            self._texts.run([_text_job(call, model, given, answer)])
            return []
        return [
            tensors.TensorJob(call, model, given, lambda n: f"inputs[{place.get(n, 0)}]", answer)
        ]


def signature(model: ServedModel) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs as the protocol shows them."""
    if model.text_encoder is None:
        return list(model.client.spec.inputs), list(model.client.spec.outputs)
    text = [TensorSpec("text", "BYTES", (-1,))]
    if model.manifest.task == "embedding":
        return text, [
            TensorSpec("embedding", "FP32", (-1, model.manifest.embedding_head.dimensions))
        ]
    labels = len(model.manifest.classification_head.labels)
    return text, [TensorSpec("label", "BYTES", (-1,)), TensorSpec("scores", "FP32", (-1, labels))]


def _text_job(
    call: Call, model: ServedModel, given: dict[str, NDArray[Any]], answer: Any
) -> TextJob:
    if set(given) != {"text"} or given["text"].dtype != object:
        raise InvalidArgument.at("inputs", "one input `text` of datatype BYTES is needed")
    texts = []
    for i, data in enumerate(given["text"].reshape(-1)):
        try:
            texts.append(data.decode())
        except UnicodeDecodeError:
            raise InvalidArgument.at(f"inputs[0] element {i}", "is not UTF-8") from None
    if not texts:
        raise InvalidArgument.at("inputs[0]", "has no elements")

    def done(outcome: TextOutcome) -> None:
        manifest = outcome.model.manifest
        if manifest.task == "embedding":
            head = manifest.embedding_head
            matrix = heads.vectors(
                outcome.rows,
                normalize=head.normalize,
                normalized_by_model=head.normalize,
                dimensions=None,
            )
            answer({"embedding": matrix})
            return
        head = manifest.classification_head
        scores = heads.activate(np.stack(outcome.rows), head.activation)
        best = [head.labels[i].encode() for i in scores.argmax(axis=1)]
        answer({"label": np.array(best, object), "scores": scores.astype(np.float32)})

    return TextJob(
        call,
        f"{model.name}@{model.version}",
        (model.manifest.task,),
        lambda _: texts,
        done,
        path="inputs[0] element",
        path_of=lambda i: f"inputs[0] element {i}",
    )


def _inputs(request: pb.ModelInferRequest) -> dict[str, NDArray[Any]]:
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidArgument.at(
            "raw_input_contents", f"has {len(raw)} entries; there are {len(request.inputs)} inputs"
        )
    out: dict[str, NDArray[Any]] = {}
    for i, tensor in enumerate(request.inputs):
        path = f"inputs[{i}]"
        if tensor.name in out:
            raise InvalidArgument.at(f"{path}.name", f"{tensor.name!r} is there twice")
        if raw:
            out[tensor.name] = tensors.from_raw(tensor.datatype, tensor.shape, raw[i], path)
        else:
            out[tensor.name] = _typed(tensor, path)
    return out


def _typed(tensor: pb.ModelInferRequest.InferInputTensor, path: str) -> NDArray[Any]:
    field = _CONTENTS.get(tensor.datatype)
    if field is None:
        raise InvalidArgument.at(
            f"{path}.datatype", f"is {tensor.datatype!r}; allowed here are {', '.join(_CONTENTS)}"
        )
    n = tensors.element_count(tensor.shape, path)
    values = getattr(tensor.contents, field)
    if len(values) != n:
        raise InvalidArgument.at(
            f"{path}.contents.{field}", f"has {len(values)} elements; the shape needs {n}"
        )
    if tensor.datatype == "BYTES":
        return np.array(list(values), object).reshape(tuple(tensor.shape))
    try:
        return np.array(values, DTYPES[tensor.datatype]).reshape(tuple(tensor.shape))
    except OverflowError:
        raise InvalidArgument.at(
            f"{path}.contents.{field}", f"has a value outside of {tensor.datatype}"
        ) from None


def _version(text: str, path: str) -> int | None:
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise InvalidArgument.at(path, f"is {text!r:.40}; a version is a whole number")
    return int(text)


def _ref_of(request: pb.ModelInferRequest) -> str:
    return _ref(request.model_name, _version(request.model_version, "model_version"))


def _ref(name: str, version: int | None) -> str:
    return name if version is None else f"{name}@{version}"
