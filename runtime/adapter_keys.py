"""What the keys of a LoRA file mean: which module of which component, and which of its tensors.

Understood prefixes: diffusers' (`unet.`, `text_encoder.`, ... or the UNet's own names without one),
PEFT's (`base_model.model.`, whose component the file tells otherwise) and kohya's (`lora_unet_*`,
`lora_te_*`, ..., with underscores for dots). Under each of them every spelling of a tensor's role:
`lora_A`/`lora_B`, `lora.down`/`lora.up`, `lora_down`/`lora_up`, `lora_linear_layer.*`, the older
`processor.to_q_lora.*`, and of DoRA `lora_magnitude_vector` and `dora_scale`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PEFT_PREFIX = "base_model.model."
DOTTED = {
    "unet": "unet.",
    "text_encoder": "text_encoder.",
    "text_encoder_2": "text_encoder_2.",
    "controlnet": "controlnet.",
}
FLAT = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_controlnet_": "controlnet",
}
# Where the names of a UNet start; older files and `save_lora_adapter` put nothing before them.
_ROOTS = re.compile(
    r"(conv_in|conv_out|down_blocks|mid_block|up_blocks|time_embedding|add_embedding)\."
)
_NAMED = r"(?:\.default(?:_\d+)?)?"
_ROLES = {
    "down": rf"(?:lora_A{_NAMED}|lora\.down|lora_linear_layer\.down|lora_down)\.weight",
    "up": rf"(?:lora_B{_NAMED}|lora\.up|lora_linear_layer\.up|lora_up)\.weight",
    "mid": r"lora_mid\.weight",
    "alpha": r"alpha",
    "magnitude": rf"lora_magnitude_vector{_NAMED}(?:\.weight)?",
    "dora_scale": r"dora_scale(?:\.weight)?",
}
_ROLE_PATTERNS = {role: re.compile(rf"(.+?)\.{tail}") for role, tail in _ROLES.items()}
# diffusers' first generation: `attn1.processor.to_q_lora.down.weight`.
_OLD = re.compile(r"(.+?)(?:\.processor)?\.to_(q|k|v|out)_lora\.(down\.weight|up\.weight|alpha)")
_UNSUPPORTED = {
    r"hada_": "LoHa is not supported",
    r"lokr_": "LoKr is not supported",
    r"(a1|a2|b1|b2)\.weight$": "GLoRA is not supported",
    r"(oft_|boft_)": "OFT is not supported",
    r"(on_input|ia3_l)": "IA3 is not supported",
    r"(w_norm|b_norm)$": "adapters of norms are not supported",
    r"(diff|diff_b)$": "whole differences of weights are not supported",
    r"lora_embedding_": "adapters of embeddings are not supported",
    r"(.+\.)?bias$": "adapters of biases are not supported",
    r"(emb_params|string_to_param)": "embeddings of tokens are not supported",
}
_UNSUPPORTED_PATTERNS = {
    re.compile(rf"(?:.*\.)?{tail}"): reason for tail, reason in _UNSUPPORTED.items()
}


class Unknown(Exception):
    """A key this package can't apply; its text is the reason. Never leaves the reader."""


@dataclass(frozen=True)
class Key:
    """A key taken apart.

    Attributes:
        format: whose prefix it has: `"diffusers"`, `"peft"` or `"kohya"`.
        component: the component's name; empty where the prefix doesn't tell (PEFT's).
        name: the module as the key spells it: with dots, kohya's with underscores.
        role: `"down"`, `"up"`, `"mid"`, `"alpha"`, `"magnitude"` or `"dora_scale"`.
    """

    format: str
    component: str
    name: str
    role: str


def parse(key: str) -> Key:
    """Take a key apart.

    Raises:
        Unknown: with the reason.
    """
    stem, role = _split(key)
    for prefix, component in FLAT.items():
        if stem.startswith(prefix):
            return Key("kohya", component, stem.removeprefix(prefix), role)
    if stem.startswith(PEFT_PREFIX):
        return Key("peft", "", stem.removeprefix(PEFT_PREFIX), role)
    for component, prefix in DOTTED.items():
        if stem.startswith(prefix):
            return Key("diffusers", component, stem.removeprefix(prefix), role)
    if _ROOTS.match(f"{stem}."):
        return Key("diffusers", "unet", stem, role)
    known = ", ".join([*DOTTED.values(), PEFT_PREFIX, *FLAT])
    raise Unknown(f"unknown target: no component's prefix ({known})")


def has_no_prefix(key: str) -> bool:
    """Whether `key` starts with a UNet's own names."""
    return bool(_ROOTS.match(key))


def _split(key: str) -> tuple[str, str]:
    """The part before a tensor's role, in today's spelling, and the role."""
    old = _OLD.fullmatch(key)
    if old:
        text = old[1].startswith("text_encoder")
        leaf = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}[old[2]]
        leaf = leaf if text else {"out": "to_out.0"}.get(old[2], f"to_{old[2]}")
        return f"{old[1]}.{leaf}", old[3].removesuffix(".weight")
    for role, pattern in _ROLE_PATTERNS.items():
        match = pattern.fullmatch(key)
        if match:
            stem = match[1].replace(".processor.", ".")
            return (f"{stem}.0" if stem.endswith(".to_out") else stem), role
    for pattern, reason in _UNSUPPORTED_PATTERNS.items():
        if pattern.match(key):
            raise Unknown(f"unsupported: {reason}")
    raise Unknown(
        "no tensor of a LoRA: expected lora_A/lora_B, lora_down/lora_up, lora_mid, alpha,"
        " lora_magnitude_vector or dora_scale"
    )


def file_path(component: str, path: str) -> str:
    """A module path as files spell it: a text encoder's with `text_model.` before it."""
    if not component.startswith("text_encoder") or path.startswith("text_projection"):
        return path
    return "text_model." + path.removeprefix("text_model.")
