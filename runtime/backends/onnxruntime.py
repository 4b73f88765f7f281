"""Components run by ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from heatsink.runtime.backends.session import Array
from heatsink.runtime.errors import (
    EngineMismatch,
    InvalidRequest,
    MissingDependency,
    ResourceError,
)

# The library has no type for it: what its arena and what the C++ runtime under it say.
_NO_MEMORY = ("Failed to allocate memory", "bad_alloc")


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(text in str(error) for text in _NO_MEMORY)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class OnnxRuntimeSession:
    """An ONNX file opened by ONNX Runtime.

    Args:
        name: the component's name, used in messages.
        path: the `.onnx` file; its external weights lie beside it.
        threads: of the operators' pool; 0 lets the library choose.

    Raises:
        MissingDependency: the library is not installed.
        EngineMismatch: the library refuses the file.
        ResourceError: there is no memory for it.
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
            if _out_of_memory(error):
                raise ResourceError(
                    f"no memory is left to open {path.name}: {_one_line(error)}"
                ) from error
            raise EngineMismatch(
                f"ONNX Runtime can't open {path.name}: {_one_line(error)}"
            ) from error
        self.inputs = [value.name for value in self._session.get_inputs()]
        self.outputs = [value.name for value in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the component once.

        Raises:
            InvalidRequest: an input is missing, or one is given that the component was not built
                with.
            ResourceError: the memory did not suffice; the session can still be used.
        """
        if set(inputs) != set(self.inputs):
            raise InvalidRequest(
                f"{self.name} takes the inputs {sorted(self.inputs)}, got {sorted(inputs)}"
            )
        try:
            values = self._session.run(self.outputs, dict(inputs))
        except Exception as error:
            if not _out_of_memory(error):
                raise
            shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in inputs.items())
            raise ResourceError(
                f"no memory is left to run {self.name} on {shapes}; an engine with a smaller "
                f"--batch or --size needs less: {_one_line(error)}"
            ) from error
        return dict(zip(self.outputs, values, strict=True))
