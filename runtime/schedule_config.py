"""What a model's `scheduler_config.json` says about its noise, and the table that follows from it.

Every sampler reads the configuration with defaults of its own, as diffusers does when it makes one
scheduler from another's configuration; so a key that the file lacks stays None here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from heatsink.runtime.errors import ModelError

Array = npt.NDArray[np.float64]


class ScheduleConfig(BaseModel):
    """The keys of a diffusers scheduler configuration that decide a schedule; None where absent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_train_timesteps: int = Field(1000, ge=1)
    beta_start: float | None = Field(None, gt=0.0, lt=1.0)
    beta_end: float | None = Field(None, gt=0.0, lt=1.0)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] | None = None
    trained_betas: tuple[float, ...] | None = None
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = None
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    steps_offset: int = Field(0, ge=0)
    set_alpha_to_one: bool = True
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_lu_lambdas: bool = False
    use_flow_sigmas: bool = False
    sigma_min: float | None = Field(None, gt=0.0)
    sigma_max: float | None = Field(None, gt=0.0)
    rescale_betas_zero_snr: bool = False
    thresholding: bool = False
    clip_sample: bool | None = None
    # DPM-Solver++ alone.
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    lambda_min_clipped: float = -math.inf
    # LCM alone.
    original_inference_steps: int = Field(50, ge=1)
    timestep_scaling: float = Field(10.0, gt=0.0)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> ScheduleConfig:
        """Read the contents of a `scheduler_config.json`, of whatever diffusers class.

        Keys that no sampler here reads are left out. Keys that diffusers marks as filled in from
        its class's defaults (`_use_default_values` of a live scheduler's config) count as absent.

        Args:
            config: The decoded JSON, or a diffusers scheduler's `.config`.

        Returns:
            The configuration.

        Raises:
            ModelError: A value is out of range, or the scheduler is for another kind of model
                (flow matching). Names the key, what was expected and what came.
        """
        name = str(config.get("_class_name", ""))
        if "FlowMatch" in name or config.get("prediction_type") == "flow_prediction":
            raise ModelError(
                "scheduler configuration: expected a model that predicts epsilon, v_prediction or "
                f"sample, got flow matching (_class_name {name!r})"
            )
        defaulted = set(config.get("_use_default_values", ()))
        known = {
            key: value
            for key, value in config.items()
            if key in cls.model_fields and key not in defaulted and value is not None
        }
        try:
            return cls.model_validate(known)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ModelError(
                f"scheduler configuration: {key}: {first['msg']}, got {first['input']!r}"
            ) from None


@lru_cache(maxsize=64)
def signal_shares(config: ScheduleConfig, default: tuple[str, float, float]) -> Array:
    """The cumulative products of 1 - beta over the training steps: the signal's share of variance.

    Args:
        config: The model's configuration.
        default: The sampler's own (beta_schedule, beta_start, beta_end), where the model has none.

    Returns:
        float64 `(num_train_timesteps,)`, falling, read-only; ends in 0 with zero terminal SNR.

    Raises:
        ModelError: `trained_betas` has another length, or betas outside (0, 1).
    """
    steps = config.num_train_timesteps
    kind = config.beta_schedule or default[0]
    start = default[1] if config.beta_start is None else config.beta_start
    end = default[2] if config.beta_end is None else config.beta_end
    if config.trained_betas is not None:
        betas: Array = np.asarray(config.trained_betas, dtype=np.float64)
        outside = int(np.count_nonzero(~((betas > 0) & (betas < 1))))
        if betas.size != steps or outside:
            raise ModelError(
                f"scheduler configuration: trained_betas: expected {steps} numbers above 0 and "
                f"below 1, got {betas.size}, {outside} of them outside"
            )
    elif kind == "linear":
        betas = np.linspace(start, end, steps)
    elif kind == "scaled_linear":
        betas = np.square(np.linspace(math.sqrt(start), math.sqrt(end), steps))
    else:
        betas = _cosine_betas(steps)
    shares: Array = np.cumprod(1.0 - betas, dtype=np.float64)
    if config.rescale_betas_zero_snr:
        shares = _zero_terminal(shares)
    shares.setflags(write=False)
    return shares


def _cosine_betas(steps: int) -> Array:
    # Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (arXiv 2102.09672).
    edges = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    betas: Array = np.minimum(1.0 - edges[1:] / edges[:-1], 0.999)
    return betas


def _zero_terminal(shares: Array) -> Array:
    # Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv 2305.08891),
    # algorithm 1: shift the square roots so that the last is zero, scale so that the first stays.
    roots = np.sqrt(shares)
    rescaled: Array = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
    return rescaled
