"""Which architecture an adapter's file was made for, told from its keys and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Mapping

from heatsink.runtime.adapter_targets import Shape, Targets

NAMES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "SDXL"}
# Text features that the cross attention of each family takes.
_CONTEXT = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_CROSS = re.compile(r".*attn2[._](?:processor\.)?to_[kv][._].*(?:lora_A|down)\S*\.weight")
# The width of Flux's blocks; SD3 has others, and where both name their parts alike that tells.
_FLUX_WIDTH = 3072
# Names by which no UNet goes.
_TRANSFORMERS = {
    "Flux": r"(?:.*[._])?(?:single_transformer_blocks|single_blocks|double_blocks)[._]\d",
    "SD3": r"(?:.*[._])?joint_blocks[._]\d|text_encoder_3\.|lora_te3_"
    r"|(?:lora_)?transformer[._]transformer_blocks[._]\d+[._](?:attn[._]add_\w_proj|attn2[._])",
    "a diffusion transformer": r"(?:lora_)?transformer[._]|diffusion_model\.(?:blocks|layers)\.",
}
_SDXL = r"lora_te2_|text_encoder_2\.|.*(?:add_embedding|label_emb)[._]|.*attentions[._]\d+[._]"
_SDXL += r"transformer_blocks[._][1-9]|.*(?:input|output)_blocks[._]\d+[._]1[._]"
_SDXL += r"transformer_blocks[._][1-9]|.*middle_block[._]1[._]transformer_blocks[._][1-9]"
# SDXL's first level has no attention, and there is no fourth.
_SD1 = r"lora_te_|.*(?:down_blocks[._]0[._]attentions|up_blocks[._]3)[._]"
_SD1 += r"|.*input_blocks[._][12][._]1[._]"


def family_of(shapes: Mapping[str, Shape]) -> str | None:
    """The architecture a file was made for, by its keys' shapes.

    Returns:
        A key of `NAMES`, the name of a transformer, or None where it can't be told.
    """
    for name, pattern in _TRANSFORMERS.items():
        if any(re.match(pattern, key) for key in shapes):
            wide = any(_FLUX_WIDTH in shape for shape in shapes.values())
            return "Flux" if wide and name == "SD3" else name
    crosses = [s for key, s in shapes.items() if _CROSS.fullmatch(key) and len(s) > 1]
    known = {_CONTEXT[shape[1]] for shape in crosses if shape[1] in _CONTEXT}
    if len(known) == 1:
        return known.pop()
    for name, pattern in (("sdxl", _SDXL), ("sd1", _SD1)):
        if any(re.match(pattern, key) for key in shapes):
            return name
    return None


def foreign(family: str | None, targets: Targets | None) -> str | None:
    """Why a file of `family` doesn't fit; None where nothing says so.

    Judged by what the model's own names and shapes would be taken for: one of unusual make is not
    called another's for what it has itself.
    """
    if family is None:
        return None
    told = f"the file is for {NAMES.get(family, family)}"
    if targets is None:
        return None if family in NAMES else told
    own = family_of(
        {
            f"{component}.{path}.lora_A.weight": (1, *shape[1:])
            for component, table in targets.shapes.items()
            for path, shape in table.items()
        }
    )
    if family == (own or targets.kind):
        return None
    return f"{told}, the model is {NAMES.get(own or '', '') or NAMES.get(targets.kind, 'not')}"
