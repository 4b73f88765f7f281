"""PEFT's configuration of an adapter: where it lies, which component it is of, and its scales."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heatsink.runtime.adapter_keys import Unknown, has_no_prefix
from heatsink.runtime.errors import AdapterError

METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's configurations in a file's header."""
CONFIG_NAME = "adapter_config.json"
"""The file PEFT writes beside its tensors."""
CLASSES = {
    "unet": "UNet2DConditionModel",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "controlnet": "ControlNetModel",
}
"""The class that PEFT's configuration names for each component."""

Config = dict[str, Any]
# Ways to start training that move the base weights too: A and B mean nothing on the pristine ones.
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "loraga")
# Settings under which PEFT computes something else than LoRA or DoRA.
_FOREIGN = (
    "alora_invocation_tokens", "arrow_config", "fan_in_fan_out", "kasa_config",
    "layer_replication", "lora_bias", "modules_to_save", "monteclora_config", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip


def beside(path: Path) -> Config:
    """The configuration that PEFT wrote beside its tensors."""
    file = path.parent / CONFIG_NAME
    if not file.is_file():
        raise AdapterError(
            f"{path} was written by PEFT, which keeps alpha in {CONFIG_NAME}:"
            " that is missing beside it"
        )
    return _json_object(file.read_text(encoding="utf-8", errors="replace"), str(file))


def in_header(
    path: Path, metadata: Mapping[str, str], keys: Mapping[str, Any]
) -> dict[str, Config]:
    """The configurations in the file's header by component; empty where it has none.

    Fields are of a component (`unet.r`), or of the one network whose keys stand without a prefix.

    Raises:
        AdapterError: whose a field is, can't be told.
    """
    if METADATA_KEY not in metadata:
        return {}
    fields = _json_object(metadata[METADATA_KEY], f"{path}: its metadata {METADATA_KEY}")
    bare = {name: value for name, value in fields.items() if "." not in name}
    configs: dict[str, Config] = {}
    for key, value in fields.items():
        component, _, field = key.partition(".")
        if field:
            configs.setdefault(component, {})[field] = value
    if bare and (configs or not any(map(has_no_prefix, keys))):
        raise AdapterError(
            f"{path}: the fields {sorted(bare)[:3]} of its metadata {METADATA_KEY} name no"
            " component"
        )
    return {"unet": bare} if bare else configs


def component_of(config: Mapping[str, Any]) -> str | None:
    """The component whose class the configuration names, if it does."""
    mapping = config.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return next((component for component, known in CLASSES.items() if known == name), None)


def _json_object(text: str, where: str) -> Config:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise AdapterError(f"{where} is not JSON: {cause}") from cause
    if not isinstance(value, dict):
        raise AdapterError(f"{where} is no JSON object")
    return value


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a configuration that asks for what is neither LoRA nor DoRA.

    Raises:
        Unknown: with the reason.
    """
    kind = config.get("peft_type") or "LORA"
    if str(kind).rpartition(".")[2] != "LORA":
        raise Unknown(f"unsupported: the configuration is of {kind}, not of LORA")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MOVES_BASE):
        raise Unknown(
            f"unsupported: training started with {start}, which moves the base weights too"
        )
    for field in _FOREIGN:
        if config.get(field):
            raise Unknown(f"unsupported: the configuration asks for {field}")


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The scale PEFT configures: alpha / r, or alpha / sqrt(r) if rank-stabilised.

    Raises:
        Unknown: it contradicts the matrices, or is no finite number.
    """
    r = _pattern(config.get("rank_pattern"), module, config.get("r", rank))
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
    if r != rank:
        raise Unknown(f"rank mismatch: the configuration says {r}, the matrices have {rank}")
    return _finite(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _finite(alpha: Any) -> float:
    try:
        value = math.nan if isinstance(alpha, bool | str) else float(alpha)
    except (TypeError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise Unknown(
            f"non-finite: the configuration's alpha is {alpha!r}, expected a finite number"
        )
    return value


def _pattern(table: Any, module: str, default: Any) -> Any:
    """PEFT's lookup: a pattern is the end of a module's path; with `^`, all of it."""
    path = module.removeprefix("text_model.")
    if table is not None and not isinstance(table, dict):
        raise Unknown(f"unsupported: the configuration's patterns are {table!r}, no table")
    for pattern, value in (table or {}).items():
        bare = str(pattern).removeprefix("^").removeprefix("text_model.")
        # PEFT takes any regular expression; one from a stranger's file is not run, nor guessed at.
        if not re.fullmatch(r"[\w.]+", bare):
            raise Unknown(f"unsupported: the configuration's pattern {pattern!r} is no module path")
        whole = str(pattern).startswith("^")
        if path == bare if whole else f".{path}".endswith(f".{bare}"):
            return value
    return default
