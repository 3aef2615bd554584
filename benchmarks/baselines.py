"""Matrix products of other packages as candidates of `layer_speed`: onnxruntime, ggml, GPTQModel's CPU kernels.

Without its package, a candidate raises DependencyError with the command that installs it.
onnxruntime and ggml hold exactly the weight of the layer where their format allows it: symmetric, 4 or 8 bits, groups
that are multiples of 32. ggml's Q4_K has 6-bit scales: it quantizes the dequantized weight again, and its error is
larger.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from layer_speed import Candidate, Run, registered
from torch import Tensor

from fewbit.errors import DependencyError, KernelError
from fewbit.quantized_matrix import QuantizedMatrix

GGML = ("q4_0", "q4_k", "q8_0")
GPTQMODEL = ("torch_cpu_avx512", "torch_aten")


def all_baselines(ggml_folder: Path | None = None) -> dict[str, Candidate]:
    """Every candidate of this module, by name.

    Args:
        ggml_folder: folder of libggml*.so; None for the one in the package llama_cpp (llama-cpp-python).
    """
    return {
        "onnxruntime": onnxruntime,
        **{f"ggml {kind}": ggml(kind, ggml_folder) for kind in GGML},
        **{name: registered(name) for name in GPTQMODEL},
    }


def onnxruntime(codes: QuantizedMatrix, dtype: torch.dtype) -> Run:
    """MatMulNBits with int8 activations (accuracy level 4, its fast path), float32 in and out.

    Raises:
        DependencyError: onnxruntime or onnx is missing.
        KernelError: it cannot run this layer.
    """
    for package in ("onnxruntime", "onnx"):
        if importlib.util.find_spec(package) is None:
            raise DependencyError(f"{package} is not installed: pip install onnxruntime onnx")
    _check(codes, bits=(4, 8), product="MatMulNBits")
    return _OnnxRuntime(_onnx_model(codes))


def _check(codes: QuantizedMatrix, bits: tuple[int, ...], product: str) -> None:
    """Raise KernelError where the product could not hold the same weight."""
    if codes.bits not in bits:
        raise KernelError(f"{product} cannot run this layer: {codes.bits} bits")
    if codes.group_size < 16 or codes.group_size % 16 or codes.shape[1] % codes.group_size:
        raise KernelError(f"{product} cannot run this layer: group_size {codes.group_size}")
    if codes.has_act_order or bool((codes.zeros != 2 ** (codes.bits - 1)).any()):
        raise KernelError(f"{product} cannot run this layer: act-order or asymmetric")


def _onnx_model(codes: QuantizedMatrix) -> bytes:
    """A model of one MatMulNBits node, with the default zero point in the middle."""
    from onnx import TensorProto, helper, numpy_helper

    N, K = codes.shape
    q = codes.codes.view(N, K // codes.group_size, codes.group_size)
    B = q if codes.bits == 8 else q[..., ::2] | (q[..., 1::2] << 4)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "B", "scales"],
        ["y"],
        domain="com.microsoft",
        K=K,
        N=N,
        bits=codes.bits,
        block_size=codes.group_size,
        accuracy_level=4,
    )
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "layer",
        [value("x", TensorProto.FLOAT, ["M", K])],
        [value("y", TensorProto.FLOAT, ["M", N])],
        [
            numpy_helper.from_array(B.contiguous().numpy(), "B"),
            numpy_helper.from_array(codes.scales.float().flatten().numpy(), "scales"),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return model


class _OnnxRuntime:
    def __init__(self, model: bytes) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._model = model
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._x: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return len(self._model)

    def __deepcopy__(self, memo: Any) -> _OnnxRuntime:
        return _OnnxRuntime(self._model)

    def __call__(self, x: Tensor) -> Tensor:
        if x is not self._x:  # the conversion is not what is compared
            self._x, self._array = x, x.float().numpy()
        return torch.from_numpy(self._session.run(None, {"x": self._array})[0])


def ggml(kind: str, folder: Path | None = None) -> Candidate:
    """ggml's product for weights of type `kind` (q4_0, q4_k, q8_0), repacked for this processor where supported.

    Args:
        folder: folder of libggml*.so; None for the one in the package llama_cpp (llama-cpp-python).
    """

    def make(codes: QuantizedMatrix, dtype: torch.dtype) -> Run:
        library = _Library(_library_folder(folder))
        return _Ggml(library, kind, _blocks(library, kind, codes), codes.shape)

    return make


def _library_folder(folder: Path | None) -> Path:
    if folder is not None:
        return folder
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise DependencyError("ggml is not here: pip install llama-cpp-python, or give --ggml-folder")
    return Path(spec.origin).parent / "lib"


_TYPES = {"q4_0": 2, "q8_0": 8, "q4_k": 12}  # enum ggml_type
_F32 = 0


def _blocks(library: _Library, kind: str, codes: QuantizedMatrix) -> np.ndarray[Any, Any]:
    """The weight in ggml's layout: one float16 scale and 32 codes per block; for q4_k quantized again."""
    N, K = codes.shape
    if kind == "q4_k":
        if codes.bits != 4 or K % 256:
            raise KernelError(f"ggml q4_k cannot run this layer: {codes.bits} bits, {K} inputs")
        return library.quantize(_TYPES[kind], codes.dequantize())
    _check(codes, bits=(4,) if kind == "q4_0" else (8,), product=f"ggml {kind}")
    if codes.group_size % 32:
        raise KernelError(f"ggml {kind} cannot run this layer: group_size {codes.group_size}")
    q = codes.codes.view(N, K // 32, 32)
    data = q[..., :16] | (q[..., 16:] << 4) if kind == "q4_0" else q ^ 128  # code − 128 as int8
    scales = codes.scales.repeat_interleave(codes.group_size // 32, dim=1).half()
    blocks = torch.cat([scales.view(N, K // 32, 1).view(torch.uint8), data], dim=-1)
    return blocks.contiguous().numpy()


class _Parameters(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


class _Library:
    """The functions of ggml that this module calls, with their types."""

    _POINTER = ctypes.c_void_p
    _INT = ctypes.c_int64

    def __init__(self, folder: Path) -> None:
        paths = [folder / f"libggml{part}.so" for part in ("-base", "-cpu")]
        missing = [path for path in paths if not path.exists()]
        if missing:
            raise DependencyError(f"no {missing[0]}: build ggml with shared libraries and give --ggml-folder")
        base, cpu = (ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for path in paths)
        p, i = self._POINTER, self._INT
        self._silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, p)(lambda *_: None)
        self._function(base, "ggml_log_set", None, p, p)(self._silent, None)
        self.init = self._function(base, "ggml_init", p, _Parameters)
        self.tensor = self._function(base, "ggml_new_tensor_2d", p, p, ctypes.c_int, i, i)
        self.mul_mat = self._function(base, "ggml_mul_mat", p, p, p, p)
        self.graph = self._function(base, "ggml_new_graph", p, p)
        self.expand = self._function(base, "ggml_build_forward_expand", None, p, p)
        self.allocate = self._function(base, "ggml_backend_alloc_ctx_tensors_from_buft", p, p, p)
        self.write = self._function(
            base, "ggml_backend_tensor_set", None, p, p, ctypes.c_size_t, ctypes.c_size_t
        )
        self.read = self._function(
            base, "ggml_backend_tensor_get", None, p, p, ctypes.c_size_t, ctypes.c_size_t
        )
        self.compute = self._function(base, "ggml_backend_graph_compute", ctypes.c_int, p, p)
        self.cpu_memory = self._function(base, "ggml_backend_cpu_buffer_type", p)
        self._address = self._function(base, "ggml_backend_reg_get_proc_address", p, p, ctypes.c_char_p)
        self._device = self._function(base, "ggml_backend_reg_dev_get", p, p, ctypes.c_size_t)
        self._registry = self._function(cpu, "ggml_backend_cpu_reg", p)
        self._chunk = self._function(
            base, "ggml_quantize_chunk", ctypes.c_size_t, ctypes.c_int, p, p, i, i, i, p
        )
        backend = self._function(cpu, "ggml_backend_cpu_init", p)
        self.backend = backend()
        threads = self._function(cpu, "ggml_backend_cpu_set_n_threads", None, p, ctypes.c_int)
        threads(self.backend, torch.get_num_threads())

    @staticmethod
    def _function(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
        return function

    def repacking_memory(self) -> list[Any]:
        """Buffer types that store weights repacked, fastest first."""
        registry = self._registry()
        address = self._address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return []
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
        kinds = extra(self._device(registry, 0))
        found: list[Any] = []
        while kinds and kinds[len(found)]:
            found.append(kinds[len(found)])
        return found

    def context(self, tensors: int = 8) -> Any:
        """A context for descriptions of tensors and a graph; their data is allocated later."""
        return self.init(_Parameters((tensors + 2100) * 512, None, True))

    def quantize(self, kind: int, weight: Tensor) -> np.ndarray[Any, Any]:
        """`weight`, float32 (out, in), quantized by ggml."""
        N, K = weight.shape
        out = np.empty(weight.nbytes, dtype=np.uint8)
        used = self._chunk(kind, weight.contiguous().data_ptr(), out.ctypes.data, 0, N, K, None)
        return out[:used]


class _Ggml:
    def __init__(
        self, library: _Library, kind: str, blocks: np.ndarray[Any, Any], shape: tuple[int, int]
    ) -> None:
        self._library, self._kind, self._blocks, self._shape = library, kind, blocks, shape
        N, K = shape
        # ggml crashes when it is told to repack a type without a repacked product.
        repacks = kind != "q8_0" and N % 8 == 0
        for memory in (*(library.repacking_memory() if repacks else ()), library.cpu_memory()):
            context = library.context()
            self._weight = library.tensor(context, _TYPES[kind], K, N)
            if library.allocate(context, memory):
                break
        library.write(self._weight, blocks.ctypes.data, 0, blocks.nbytes)
        self._graphs: dict[int, tuple[Any, Any, Any]] = {}
        self._x: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self._blocks.nbytes

    def __deepcopy__(self, memo: Any) -> _Ggml:
        return _Ggml(self._library, self._kind, self._blocks, self._shape)

    def _graph(self, tokens: int) -> tuple[Any, Any, Any]:
        """(x, y, graph) for this number of tokens."""
        if tokens not in self._graphs:
            library, context = self._library, self._library.context()
            x = library.tensor(context, _F32, self._shape[1], tokens)
            y = library.mul_mat(context, self._weight, x)
            graph = library.graph(context)
            library.expand(graph, y)
            library.allocate(context, library.cpu_memory())
            self._graphs[tokens] = x, y, graph
        return self._graphs[tokens]

    def __call__(self, x: Tensor) -> Tensor:
        library = self._library
        own_x, own_y, graph = self._graph(x.shape[0])
        if x is not self._x:  # the conversion is not what is compared
            data = x.float().contiguous()
            library.write(own_x, data.data_ptr(), 0, data.nbytes)
            self._x = x
        library.compute(library.backend, graph)
        y = torch.empty(x.shape[0], self._shape[0])
        library.read(own_y, y.data_ptr(), 0, y.nbytes)
        return y
