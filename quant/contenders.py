"""One linear layer in several number formats: ours, torch's, and those of other packages that are installed."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.convert import pack_layer, search_activation
from quant.errors import QuantError
from quant.packed import PackedLinear
from quant.search import WeightGrid, input_candidates, search_weight, weight_candidates

# Bits of weights and of inputs; None leaves the inputs as they come.
OURS: dict[str, tuple[int, int | None]] = {
    "MSFP W4A4": (4, 4),
    "MSFP W4A6": (4, 6),
    "MSFP W4A8": (4, 8),
    "MSFP W8A8": (8, 8),
    "MSFP W4A16": (4, None),
}
GROUP = 32  # weights that share a scale, in others' formats of 4 bits
BASELINE = "float32"


@dataclass(frozen=True)
class Contender:
    """A layer, ready to run.

    run: (rows, K) float32 -> (rows, N).  size: bytes of its weights with scales and tables.
    arithmetic: what it multiplies in, "float32", "bfloat16" or "int8".
    """

    name: str
    run: Callable[[Tensor], Tensor]
    size: int
    arithmetic: str


def others(layer: nn.Linear, sample: Tensor, threads: int) -> tuple[list[Contender], dict[str, str]]:
    """The plain layer, then the same in others' formats.

    layer: without a bias.  sample: (rows, K), inputs to try it on.  threads: for packages with threads of their own.
    Returns also why some are absent: a package is not installed, or it refuses the layer.
    """
    made, absent = [Contender(BASELINE, layer, layer.weight.nbytes, "float32")], {}
    ways: dict[str, Callable[[], Contender]] = {
        "float32, oneDNN": lambda: _onednn(layer),
        "bfloat16": lambda: _bfloat16(layer),
        "torch int8 dynamic": lambda: _torch_int8(layer),
        "torch int4": lambda: _torch_int4(layer),
        "onnxruntime int4": lambda: _onnxruntime(layer, threads),
        "bitsandbytes nf4": lambda: _bitsandbytes(layer, 4),
        "bitsandbytes int8": lambda: _bitsandbytes(layer, 8),
    }
    for name, make in ways.items():
        try:
            contender = replace(make(), name=name)
            contender.run(sample[:1])
        except Exception as error:  # whatever it is, what others' code cannot do is a result
            absent[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        else:
            made.append(contender)
    return made, absent


def ours(layer: nn.Linear, sample: Tensor) -> list[Contender]:
    """Layers as `quant.convert` packs them, with formats searched for these weights and this sample of inputs."""
    grids: dict[int, WeightGrid] = {}
    made = []
    for name, (bits, act_bits) in OURS.items():
        if bits not in grids:
            tried = weight_candidates("msfp", bits)
            # Of the 100 ranges every tenth: rows of one distribution need no finer search, and large layers are slow.
            grids[bits] = search_weight(layer.weight, replace(tried, signed_factors=tried.signed_factors[::10]))
        activation = None
        if act_bits is not None:
            inputs = input_candidates("msfp", act_bits, anomalous=False)
            activation, _ = search_activation(sample, float(sample.min()), float(sample.max()), inputs)
        packed = pack_layer(layer, grids[bits], activation).eval()
        made.append(Contender(name, packed, size_of(packed), "int8"))
    return made


def size_of(packed: PackedLinear) -> int:
    """Bytes of everything that the layer holds."""
    return sum(buffer.nbytes for buffer in packed.buffers())


def _onednn(layer: nn.Linear) -> Contender:
    """torch multiplies float32 by MKL, which is slow on other makers' processors."""
    multiply, weight = torch.ops.mkldnn._linear_pointwise, layer.weight
    return Contender("", lambda x: multiply(x, weight, None, "none", [], ""), weight.nbytes, "float32")


def _bfloat16(layer: nn.Linear) -> Contender:
    weight = layer.weight.bfloat16()
    return Contender("", lambda x: F.linear(x.bfloat16(), weight), weight.nbytes, "bfloat16")


def _torch_int8(layer: nn.Linear) -> Contender:
    """Weights by channel, inputs by tensor with a range that every call finds for itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch moves this to torchao
        import torch.ao.quantization as quantization

        how = {nn.Linear: quantization.per_channel_dynamic_qconfig}
        quantised = quantization.quantize_dynamic(nn.Sequential(layer), how, torch.qint8)[0]
    # Its weights are opaque: a byte each, and a scale and a zero point of 4 bytes for every channel.
    return Contender("", quantised, layer.weight.numel() + 8 * layer.out_features, "int8")


def groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight: (N, K), K a multiple of 32. Returns codes, (N, K) int32 of 0 to 15, and scales, (N, K / 32) float32.

    A weight is (code - 8) * scale, and the largest of a group 7.5 scales, as others have it.
    Raises QuantError: another K.
    """
    if weight.shape[1] % GROUP:
        raise QuantError(f"a row has {weight.shape[1]} weights: in groups they must be a multiple of {GROUP}")
    grouped = weight.unflatten(1, (-1, GROUP))
    scales = grouped.abs().amax(2) / 7.5
    codes = (grouped / scales[..., None] + 8).round().clamp(0, 15)
    return codes.flatten(1).int(), scales


def _torch_int4(layer: nn.Linear) -> Contender:
    codes, scales = groups(layer.weight)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    # A scale, and what code 8 stands for.
    table = torch.stack((scales, torch.zeros_like(scales)), 2).transpose(0, 1).contiguous()
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return Contender("", lambda x: multiply(x, packed, GROUP, table), packed.nbytes + table.nbytes, "float32")


def _onnxruntime(layer: nn.Linear, threads: int) -> Contender:
    """MatMulNBits at its fastest, with inputs of 8 bits in groups."""
    onnx, runtime = (importlib.import_module(name) for name in ("onnx", "onnxruntime"))
    codes, scales = (part.numpy() for part in groups(layer.weight))
    count, size = layer.weight.shape
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).astype("uint8").reshape(count, -1, GROUP // 2)
    sizes = {"N": count, "K": size, "bits": 4, "block_size": GROUP, "accuracy_level": 4}
    helper, number = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMulNBits", ["x", "weight", "scale"], ["y"], domain="com.microsoft", **sizes)],
        "layer",
        [helper.make_tensor_value_info("x", number, ["rows", size])],
        [helper.make_tensor_value_info("y", number, ["rows", count])],
        [
            onnx.numpy_helper.from_array(packed, "weight"),
            onnx.numpy_helper.from_array(scales.reshape(-1), "scale"),
        ],
    )
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=9)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that wait in a loop would take the processor from the contender that comes next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    return Contender("", run, packed.nbytes + scales.nbytes, "int8")


def _bitsandbytes(layer: nn.Linear, bits: int) -> Contender:
    package: Any = importlib.import_module("bitsandbytes")
    size = (layer.in_features, layer.out_features)
    if bits == 4:
        quantised = package.nn.Linear4bit(*size, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    else:
        quantised = package.nn.Linear8bitLt(*size, bias=False, has_fp16_weights=False)
    quantised.load_state_dict({"weight": layer.weight.clone()})
    quantised = quantised.to("cpu").eval()
    held = sum(part.nbytes for part in quantised.state_dict().values())
    if bits == 4:
        return Contender("", quantised, held, "float32")
    # In float32 it would convert inputs too, and write a warning with every call.
    return Contender("", lambda x: quantised(x.half()), held, "int8")
