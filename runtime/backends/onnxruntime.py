"""Components run by ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from heatsink.runtime.backends.session import Array
from heatsink.runtime.errors import EngineMismatch, InvalidRequest, MissingDependency


class OnnxRuntimeSession:
    """An ONNX file opened by ONNX Runtime.

    Args:
        name: the component's name, used in messages.
        path: the `.onnx` file; its external weights lie beside it.
        threads: of the operators' pool; 0 lets the library choose.

    Raises:
        MissingDependency: the library is not installed.
        EngineMismatch: the library refuses the file.
    """

    def __init__(self, name: str, path: Path, *, threads: int = 0) -> None:
        try:
            import onnxruntime as ort
        except ImportError:
            raise MissingDependency(
                "this engine runs on ONNX Runtime, which is not installed: pip install onnxruntime"
            ) from None
        self.name = name
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.use_deterministic_compute = True
        options.log_severity_level = 3
        # Only what was asked for: never a silent change of the execution provider.
        try:
            self._session = ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the library raises a dozen types of its own
            raise EngineMismatch(f"ONNX Runtime can't open {path.name}: {error}") from error
        self.inputs = [value.name for value in self._session.get_inputs()]
        self.outputs = [value.name for value in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the component once.

        Raises:
            InvalidRequest: an input is missing, or one is given that the component was not built
                with.
        """
        if set(inputs) != set(self.inputs):
            raise InvalidRequest(
                f"{self.name} takes the inputs {sorted(self.inputs)}, got {sorted(inputs)}"
            )
        values = self._session.run(self.outputs, dict(inputs))
        return dict(zip(self.outputs, values, strict=True))
