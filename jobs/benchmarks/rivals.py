"""The others: padded batches at full depth through transformers, onnxruntime and OpenVINO.

Same weights, same token ids; each library with the thread count that ours has. Knows nothing of time.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from deebert.modeling import DeeBertForSequenceClassification, pool
from deebert.packing import IntArray, PackedTokens
from jobs.benchmarks.contenders import Outcome

LIBRARIES = ("transformers", "onnxruntime", "openvino")
INT8, FLOAT32, BFLOAT16 = "int8", "float32", "bfloat16"

Ids = npt.NDArray[np.int64]
Classifier = Callable[[Ids, Ids], npt.NDArray[np.float32]]
"""(N, L) ids and (N, L) mask, padded -> (N, C) logits."""


class FullDepth(nn.Module):
    """The training form without its off-ramps: what a plain classifier computes."""

    def __init__(self, model: DeeBertForSequenceClassification) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.final_classifier = model.final_classifier
        self.pooling = model.config.off_ramp_pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(N, L) ids and mask -> (N, C) logits."""
        states = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        final = self.final_classifier
        logits: Tensor = final(pool(states, attention_mask, self.pooling, final.query))
        return logits


@dataclass(frozen=True, kw_only=True, eq=False)
class Padded:
    """Batches of a fixed number of samples, each padded to its longest."""

    classify: Classifier
    tokens: PackedTokens
    batch_size: int
    sort_by_length: bool
    num_layers: int
    padding_id: int

    def __call__(self) -> Outcome:
        """Run every sample once, through all layers."""
        lengths = self.tokens.layout.lengths
        order = np.argsort(lengths, kind="stable") if self.sort_by_length else np.arange(len(lengths))
        predictions = np.empty(len(lengths), np.int64)
        tokens = squared_tokens = batches = 0
        for rows in _chunks(order, self.batch_size):
            ids, mask = pad(self.tokens, rows, self.padding_id)
            predictions[rows] = self.classify(ids, mask).argmax(axis=1)
            tokens += ids.size
            squared_tokens += ids.size * ids.shape[1]
            batches += 1
        return Outcome(
            predictions=predictions,
            layer_tokens=tokens * self.num_layers,
            layer_squared_tokens=squared_tokens * self.num_layers,
            off_ramp_samples=len(lengths),
            steps=batches * self.num_layers,
        )


def pad(tokens: PackedTokens, rows: IntArray, padding_id: int) -> tuple[Ids, Ids]:
    """These sequences as (N, L) ids and mask, L the longest."""
    lengths = tokens.layout.lengths[rows]
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    ids = np.full(mask.shape, padding_id, np.int64)
    ids[mask == 1] = tokens.input_ids[tokens.layout.token_index(rows)].numpy()
    return ids, mask


def _chunks(order: IntArray, size: int) -> Iterator[IntArray]:
    for start in range(0, len(order), size):
        yield order[start : start + size]


def transformers_classifier(
    model: DeeBertForSequenceClassification, *, device: torch.device, dtype: torch.dtype
) -> Classifier:
    """The Hugging Face modules with their own attention, cast to `dtype`."""
    module = FullDepth(copy.deepcopy(model)).eval().to(device, dtype)

    @torch.inference_mode()
    def classify(ids: Ids, mask: Ids) -> npt.NDArray[np.float32]:
        logits = module(torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device))
        return np.asarray(logits.float().cpu().numpy())

    return classify


def missing(library: str, device: torch.device) -> str | None:
    """Why a library cannot take part, or None."""
    if library == "transformers":
        return None
    if device.type != "cpu":
        return "measured on CPUs only"
    needed = ("onnx", library)
    absent = [name for name in needed if find_spec(name) is None]
    return f"not installed: pip install 'deebert-pipeline[bench]' ({', '.join(absent)})" if absent else None


def export_onnx(model: DeeBertForSequenceClassification, folder: Path) -> Path:
    """The full-depth graph, float32, of any batch size and length."""
    path = folder / "float32.onnx"
    module = FullDepth(copy.deepcopy(model)).eval()
    module.backbone.set_attn_implementation("eager")  # plain products: what graph optimizers know
    ids = torch.ones(2, 8, dtype=torch.long)
    any_size = {0: "batch", 1: "length"}
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (ids, torch.ones_like(ids)),
            str(path),
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_axes={"input_ids": any_size, "attention_mask": any_size, "logits": {0: "batch"}},
            opset_version=17,
            dynamo=False,
        )
    return path


def quantize_onnx(path: Path) -> Path:
    """Dynamic int8, weights per channel."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(path)
    del graph.graph.value_info[:]  # the exporter's shapes contradict the quantizer's own inference
    plain, quantized = path.with_name("plain.onnx"), path.with_name("int8.onnx")
    onnx.save(graph, plain)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # its advice on pre-processing goes to the root logger
    try:
        quantize_dynamic(plain, quantized, per_channel=True, weight_type=QuantType.QInt8)
    finally:
        root.setLevel(level)
    return quantized


def onnxruntime_classifier(path: Path, *, threads: int) -> Classifier:
    """An onnxruntime session with all graph optimizations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def classify(ids: Ids, mask: Ids) -> npt.NDArray[np.float32]:
        (logits,) = session.run(["logits"], {"input_ids": ids, "attention_mask": mask})
        return np.asarray(logits)

    return classify


def openvino_classifiers(path: Path, *, threads: int, streams: int, precision: str) -> list[Classifier]:
    """OpenVINO requests in the precision asked for, one for each of the streams that share the threads."""
    import openvino

    core: Any = openvino.Core()
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": streams,
        "INFERENCE_PRECISION_HINT": {BFLOAT16: "bf16", FLOAT32: "f32"}[precision],
    }
    compiled = core.compile_model(core.read_model(str(path)), "CPU", options)
    return [_openvino_request(compiled.create_infer_request()) for _ in range(streams)]


def _openvino_request(request: Any) -> Classifier:
    def classify(ids: Ids, mask: Ids) -> npt.NDArray[np.float32]:
        results = request.infer({"input_ids": ids, "attention_mask": mask})
        return np.array(results["logits"])

    return classify
