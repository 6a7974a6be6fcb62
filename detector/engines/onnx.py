"""The masked network in ONNX Runtime: gates, path and score in one graph.

The graph is written from the same steps that the compiled kernel takes (program.py), which needs no exporter and takes
milliseconds. Nothing is skipped here: ONNX Runtime packs a convolution's weights when the graph is opened, which it
cannot do for weights that are gathered for each image.
"""

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from detector.engines import program as kinds
from detector.engines.engine import Answers
from detector.engines.program import Program, Step
from detector.errors import EngineError
from detector.images import Pixels
from detector.paths.encoder import Evidence
from detector.paths.gate_inputs import GateInputs
from detector.paths.path_encoding import PathEncoding
from detector.scoring.compiled_score import FoldedScore

_OPSET, _IR = 18, 9


class OnnxEngine:
    """A decoupled network in ONNX Runtime, on the processor."""

    name = "onnx"

    def __init__(self, program: Program, score: FoldedScore | None = None, threads: int = 1) -> None:
        """Write the graph of `program` and open it.

        Args:
            program: of the decoupled network.
            score: what turns a path into a score in the same graph; None for no scores. One that reads likelihoods
                is left to NumPy.
            threads: of one call.

        Raises:
            EngineError: ONNX Runtime or onnx is not installed, or does not work.
        """
        try:
            import onnxruntime
        except ModuleNotFoundError:
            raise EngineError(
                "expected ONNX Runtime, got none: install onnxruntime and onnx, or pathguard[onnx]"
            ) from None
        except Exception as error:
            raise _broken(error) from error
        in_graph = score is not None and {"bits", "gates", "inputs", "margins"}.issuperset(score.features.kinds)
        content = onnx_graph(program, score if in_graph else None)
        try:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise _broken(error) from error
        self._layers, self._reads = program.layers, program.reads

    def answer(self, pixels: Pixels) -> Answers:
        """As `Engine.answer`.

        Raises:
            EngineError: ONNX Runtime does not work.
        """
        try:
            class_logits, gate_logits, means, bits, *scores = self._session.run(None, {"pixels": pixels})
        except Exception as error:
            raise _broken(error) from error
        path, inputs = PathEncoding(bits, self._layers), GateInputs(means, self._reads)
        return Answers(Evidence(class_logits, gate_logits, path, inputs), scores[0] if scores else None)


def onnx_graph(program: Program, score: FoldedScore | None = None) -> bytes:
    """`program` as an ONNX model of `pixels`: `class_logits`, `gate_logits`, `gate_inputs`, `bits`, perhaps `scores`.

    Raises:
        EngineError: onnx is not installed, or does not work.
    """
    try:
        import onnx
    except ModuleNotFoundError:
        raise EngineError("expected onnx, got none: install onnxruntime and onnx, or pathguard[onnx]") from None
    except Exception as error:
        raise _broken(error) from error
    writer = _Writer(program)
    for step in program.steps:
        writer.write(step)
    writer.write_outputs(score)
    types = onnx.TensorProto
    shape = program.maps[0]
    outputs = [
        onnx.helper.make_tensor_value_info("class_logits", types.FLOAT, ["images", program.classes]),
        onnx.helper.make_tensor_value_info("gate_logits", types.FLOAT, ["images", program.filters]),
        onnx.helper.make_tensor_value_info("gate_inputs", types.FLOAT, ["images", program.channels_read]),
        onnx.helper.make_tensor_value_info("bits", types.BOOL, ["images", program.filters]),
    ]
    if score is not None:
        outputs.append(onnx.helper.make_tensor_value_info("scores", types.DOUBLE, ["images"]))
    image = [shape.height, shape.width, shape.channels]
    graph = onnx.helper.make_graph(
        writer.nodes,
        "pathguard",
        [onnx.helper.make_tensor_value_info("pixels", types.UINT8, ["images", *image])],
        outputs,
        writer.constants,
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", _OPSET)], ir_version=_IR)
    content: bytes = model.SerializeToString()
    return content


def _broken(error: Exception) -> EngineError:
    """Of an installation that is there: its libraries raise errors of many types, which have nothing in common."""
    return EngineError(f"expected a working ONNX Runtime, got: {' '.join(str(error).split())[:200]}")


class _Writer:
    """Nodes and constants of one graph. A map is the tensor `mapN`."""

    def __init__(self, program: Program) -> None:
        import onnx

        self._onnx = onnx
        self._program = program
        self._names = (f"t{number}" for number in itertools.count())
        self._gates: dict[int, tuple[str, str]] = {}  # first bit -> names of the logits and of the bits
        self._read: dict[int, str] = {}  # first channel read -> name of the means
        self._pooled: dict[int, str] = {}
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def node(self, kind: str, inputs: Iterable[str], out: str | None = None, **attributes: Any) -> str:
        out = out or next(self._names)
        self.nodes.append(self._onnx.helper.make_node(kind, list(inputs), [out], **attributes))
        return out

    def constant(self, value: npt.ArrayLike, dtype: npt.DTypeLike = np.float32) -> str:
        name = next(self._names)
        self.constants.append(self._onnx.numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def write(self, step: Step) -> None:
        out, source = f"map{step.out}", f"map{step.input}"
        numbers, arrays, types = step.numbers, step.arrays, self._onnx.TensorProto
        shape = self._program.maps[step.out] if step.out >= 0 else None
        match step.kind:
            case kinds.PIXELS:
                first = self.node("Transpose", ["pixels"], perm=[0, 3, 1, 2])
                self.node("Div", [self.node("Cast", [first], to=types.FLOAT), self.constant(255)], out)
            case kinds.CONVOLVE:
                self._convolution(step, source, out)
            case kinds.GATE:
                self._gate(step, source)
            case kinds.ADD:
                self._added(source, f"map{step.other}", numbers["relu_after"], out)
            case kinds.RELU:
                self.node("Relu", [source], out)
            case kinds.AFFINE:
                scale, shift = (self.constant(arrays[name].reshape(1, -1, 1, 1)) for name in ("weights", "biases"))
                self.node("Add", [self.node("Mul", [source, scale]), shift], out)
            case kinds.MAX_POOL | kinds.MEAN_POOL:
                window = {
                    "kernel_shape": [numbers["kernel_h"], numbers["kernel_w"]],
                    "strides": [numbers["stride"]] * 2,
                    "pads": [numbers["padding"]] * 4,
                }
                if step.kind == kinds.MEAN_POOL:
                    window["count_include_pad"] = numbers.get("count_padding", 0)  # type: ignore[assignment]
                self.node("MaxPool" if step.kind == kinds.MAX_POOL else "AveragePool", [source], out, **window)
            case kinds.MEAN:
                self.node("GlobalAveragePool", [source], out)
            case kinds.LINEAR:
                flat = self.node("Flatten", [source], axis=1)
                weights = [self.constant(arrays[name]) for name in ("weights", "biases")]
                made = self.node("Gemm", [flat, *weights], transB=1)
                made = self.node("Relu", [made]) if numbers["relu_after"] else made
                self.node("Unsqueeze", [made, self.constant([2, 3], np.int64)], out)
            case kinds.SUBSAMPLE:
                ends = [self.constant(value, np.int64) for value in ([0, 0], [2**31] * 2, [2, 3])]
                self.node("Slice", [source, *ends, self.constant([numbers["stride"]] * 2, np.int64)], out)
            case kinds.PAD_CHANNELS:
                assert shape is not None
                after = shape.channels - self._program.maps[step.input].channels - numbers["hidden"]
                pads = self.constant([0, numbers["hidden"], 0, 0, 0, after, 0, 0], np.int64)
                self.node("Pad", [source, pads], out)
            case _:
                self.node("Concat", [source, f"map{step.other}"], out, axis=1)

    def _convolution(self, step: Step, source: str, out: str) -> None:
        numbers = step.numbers
        made = self.node(
            "Conv",
            [source, *(self.constant(step.arrays[name]) for name in ("weights", "biases"))],
            kernel_shape=[numbers["kernel_h"], numbers["kernel_w"]],
            strides=[numbers["stride"]] * 2,
            pads=[numbers["padding"]] * 4,
        )
        if numbers["relu_before"]:
            made = self.node("Relu", [made])
        if numbers["gate"] >= 0:
            bits = self._gates[numbers["gate"]][1]
            if "kept" in step.arrays:
                bits = self.node("Gather", [bits, self.constant(step.arrays["kept"], np.int64)], axis=1)
            mask = self.node("Cast", [bits], to=self._onnx.TensorProto.FLOAT)
            made = self.node("Mul", [made, self.node("Unsqueeze", [mask, self.constant([2, 3], np.int64)])])
        if step.other >= 0:
            self._added(made, f"map{step.other}", numbers["relu_after"], out)
        else:
            self.node("Identity", [made], out)

    def _added(self, one: str, other: str, relu: int, out: str) -> None:
        if relu:
            self.node("Relu", [self.node("Add", [one, other])], out)
        else:
            self.node("Add", [one, other], out)

    def _gate(self, step: Step, source: str) -> None:
        if step.input not in self._pooled:
            self._pooled[step.input] = self.node("Flatten", [self.node("GlobalAveragePool", [source])], axis=1)
        self._read[step.numbers["first_read"]] = self._of_whole(self._pooled[step.input], step)
        squeeze = [self.constant(step.arrays[name]) for name in ("squeeze", "squeeze_biases")]
        units = self.node("Relu", [self.node("Gemm", [self._pooled[step.input], *squeeze])])
        excite = [self.constant(step.arrays[name]) for name in ("weights", "biases")]
        logits = self.node("Gemm", [units, *excite], transB=1)
        self._gates[step.numbers["gate"]] = logits, self.node("Greater", [logits, self.constant(0.0)])

    def _of_whole(self, pooled: str, step: Step) -> str:
        """The means of a gate's channels, with zeros in the place of those that a compacted network does without."""
        if "kept" not in step.arrays:
            return pooled
        first = step.numbers["first_read"]
        starts = np.cumsum([0, *self._program.reads.values()]).tolist()
        width = starts[starts.index(first) + 1] - first
        kept = step.arrays["kept"]
        places = np.full(width, len(kept))  # of the zero that is put behind them
        places[kept] = np.arange(len(kept))
        padded = self.node("Pad", [pooled, self.constant([0, 0, 0, 1], np.int64)])
        return self.node("Gather", [padded, self.constant(places, np.int64)], axis=1)

    def write_outputs(self, score: FoldedScore | None) -> None:
        ordered = [self._gates[first] for first in sorted(self._gates)]
        self.node("Flatten", [f"map{self._program.result}"], "class_logits", axis=1)
        self.node("Concat", [logits for logits, _ in ordered], "gate_logits", axis=1)
        self.node("Concat", [self._read[first] for first in sorted(self._read)], "gate_inputs", axis=1)
        self.node("Concat", [bits for _, bits in ordered], "bits", axis=1)
        if score is None:
            return
        # In float64, as scikit-learn sums.
        total = self.constant(score.sums.offsets[None], np.float64)
        tensors = {
            "bits": lambda: "bits",
            "gates": lambda: "gate_logits",
            "inputs": lambda: "gate_inputs",
            "margins": self._margins,
        }
        for kind, weights in score.weights.items():
            name = tensors[kind]()
            row = self.node("Cast", [name], to=self._onnx.TensorProto.DOUBLE)
            total = self.node("Add", [total, self.node("MatMul", [row, self.constant(weights, np.float64)])])
        if (hidden := score.sums.hidden) is not None:
            units = self.node("Relu", [total])
            total = self.node("MatMul", [units, self.constant(hidden.weights, np.float64)])
            total = self.node("Add", [total, self.constant(hidden.offsets[None], np.float64)])
        self._odds(total, score.sums.count, score.sums.benign)

    def _odds(self, sums: str, count: int, benign: int) -> None:
        """`scores`: see `detector.scoring.sums.odds_of_sums`."""
        one = self.constant([1], np.int64)
        if count == 1:
            self.node("Squeeze", [sums, one], "scores")
            return

        def together(first: int, end: int, out: str | None = None, clean: bool = False) -> str:
            part = self.node("Slice", [sums, *(self.constant([at], np.int64) for at in (first, end, 1))])
            if clean:  # exp(0) = 1 beside the others
                part = self.node("Pad", [part, self.constant([0, 1, 0, 0], np.int64)])
            return self.node("ReduceLogSumExp", [part, one], out, keepdims=0)

        if benign:
            self.node("Sub", [together(benign, count), together(0, benign, clean=True)], "scores")
        else:
            together(0, count, "scores")

    def _margins(self) -> str:
        count = self._program.classes
        ordered = next(self._names)
        self.nodes.append(
            self._onnx.helper.make_node(
                "TopK", ["class_logits", self.constant([count], np.int64)], [ordered, next(self._names)], axis=1
            )
        )
        first, rest, axis = ([0], [1], [1])
        top = self.node("Slice", [ordered, self.constant(first, np.int64), self.constant([1], np.int64),
                                  self.constant(axis, np.int64)])  # fmt: skip
        others = self.node("Slice", [ordered, self.constant(rest, np.int64), self.constant([count], np.int64),
                                     self.constant(axis, np.int64)])  # fmt: skip
        return self.node("Sub", [top, others])
