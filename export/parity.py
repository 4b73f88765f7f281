"""Compares a built component with the library's own module in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from heatsink.export import exactness
from heatsink.export.manifest import Parity, TensorSpec
from heatsink.runtime.backends.session import Array, Session
from heatsink.runtime.errors import EngineMismatch, NonFiniteWeights
from heatsink.runtime.graph.components import TextLayer, output_names, wrap
from heatsink.runtime.model import Model

# One row of the autoencoder: at full resolution its activations in float64 take gigabytes each.
ROWS = {"vae_decoder": 1, "vae_encoder": 1}
OTHER_ROWS = 2
# A backend sums in another order than PyTorch, so its error is another draw, in networks as deep as
# Stable Diffusion's UNet measured at three times PyTorch's own. What a mistake makes (an operation
# left out, a value rounded to half precision) is hundreds of times larger.
MARGIN = 8
# In half precision PyTorch rounds after every operation, more often than any fused graph.
HALF_MARGIN = 2
SEED = exactness.PROBE_SEED + 1


def check_parity(
    model: Model,
    text_layer: TextLayer | None,
    specs: list[TensorSpec],
    session: Session,
    dtype: torch.dtype = torch.float32,
) -> Parity:
    """The component's error on a seeded probe, of the output that is nearest to what is allowed.

    The reference is the module in float64. What is allowed is `MARGIN` times the error of the
    module in `dtype`, and a rounding of the largest value times the root of a row's size (in half
    precision: twice that error, and two roundings).

    Args:
        model: whose module is the reference; the session's name says which.
        text_layer: of a text encoder.
        specs: the inputs.
        session: the built component.
        dtype: what it computes in.

    Raises:
        EngineMismatch: the error is larger.
        NonFiniteWeights: the module's own results are not finite.
    """
    values = exactness.probe(specs, ROWS.get(session.name, OTHER_ROWS), SEED)
    found = session.run(values)
    reference = run_module(model, session.name, text_layer, values, torch.float64)
    plain = run_module(model, session.name, text_layer, values, dtype)
    results = [
        compare(
            f"{session.name}: output {name!r}", found[name], plain[name], reference[name], dtype
        )
        for name in reference
    ]
    return max(results, key=lambda parity: parity.max_abs / (parity.allowed or 1.0))


def compare(
    what: str,
    found: Array,
    plain: Array,
    expected: Array,
    dtype: torch.dtype = torch.float32,
) -> Parity:
    """The error of `found`, refused where rounding does not explain it (see `check_parity`)."""
    own_dtype = str(dtype).removeprefix("torch.")
    for kind, values in (("float64", expected), (own_dtype, plain)):
        if not np.isfinite(values).all():
            raise NonFiniteWeights(
                f"{what} is not finite in PyTorch in {kind} on an ordinary input"
            )
    largest = float(np.abs(expected).max())
    error = float(np.abs(found - expected).max())
    own = float(np.abs(plain - expected).max())
    # Normalisations reduce over about as many values as the output has; summed one after another,
    # as some backends do, that errs by the square root of their number.
    whole = dtype == torch.float32
    rounding = torch.finfo(dtype).eps * largest * (expected[0].size ** 0.5 if whole else 2)
    margin = MARGIN if whole else HALF_MARGIN
    allowed = margin * own + rounding
    # Written so that a NaN is refused too.
    if not error <= allowed:
        raise EngineMismatch(
            f"{what} is {error:.3g} away from PyTorch in float64, allowed are {allowed:.3g} "
            f"({margin} times PyTorch's own {own_dtype} error, and rounding)"
        )
    return Parity(
        max_abs=error,
        reference_max_abs=largest,
        relative=error / (largest or 1.0),
        allowed=allowed,
    )


def run_module(
    model: Model,
    name: str,
    text_layer: TextLayer | None,
    values: dict[str, Array],
    dtype: torch.dtype,
    deltas: Mapping[str, Tensor] | None = None,
) -> dict[str, Array]:
    """The module's outputs as float64, computed in `dtype`.

    Args:
        model: whose module it is.
        name: of the component.
        text_layer: of a text encoder.
        values: the inputs.
        dtype: to compute in.
        deltas: what is added to parameters, by name.
    """
    loaded = model.load_module(name, dtype)
    parameters = dict(loaded.named_parameters())
    for parameter, delta in (deltas or {}).items():
        # Its own tensor: what it holds may be mapped, and others' too.
        held = parameters[parameter]
        whole = held.data.double() + delta.reshape(held.shape)
        held.data = whole.to(dtype)
    module = wrap(name, loaded, text_layer, list(values)).eval()
    inputs = [torch.from_numpy(np.asarray(value)) for value in values.values()]
    with torch.inference_mode():
        outputs = module(*(x.to(dtype) if x.is_floating_point() else x for x in inputs))
    return {
        output: value.double().numpy()
        for output, value in zip(output_names(name, loaded), outputs, strict=True)
    }
