"""The original checkpoints' names of modules, by formula from a diffusers configuration.

Each table maps a module path of the original layout to the diffusers path; paths below a listed one
keep their rest. Sources: the CompVis/Stability layouts (`input_blocks`, `middle_block`,
`output_blocks`) and OpenCLIP's (`transformer.resblocks`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Pairs = Iterator[tuple[str, str]]

_UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_RESNET = {"nin_shortcut": "conv_shortcut"}
_VAE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}


def _within(old: str, new: str, inner: Mapping[str, str]) -> Pairs:
    yield old, new
    for old_leaf, new_leaf in inner.items():
        yield f"{old}.{old_leaf}", f"{new}.{new_leaf}"


def unet_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Original -> diffusers module paths of a UNet2DConditionModel with this configuration."""
    pairs = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    pairs.update(_within("middle_block.0", "mid_block.resnets.0", _UNET_RESNET))
    pairs["middle_block.1"] = "mid_block.attentions.0"
    pairs.update(_within("middle_block.2", "mid_block.resnets.1", _UNET_RESNET))
    downs, ups = list(config["down_block_types"]), list(config["up_block_types"])
    layers = config.get("layers_per_block", 2)
    pairs.update(_unet_down(downs, layers))
    pairs.update(_unet_up(ups, layers + 1))
    return pairs


def _unet_down(types: list[str], layers: int) -> Pairs:
    index = 1
    for block, kind in enumerate(types):
        for layer in range(layers):
            old, new = f"input_blocks.{index}", f"down_blocks.{block}"
            yield from _within(f"{old}.0", f"{new}.resnets.{layer}", _UNET_RESNET)
            if kind.startswith("CrossAttn"):
                yield f"{old}.1", f"{new}.attentions.{layer}"
            index += 1
        if block + 1 < len(types):
            yield f"input_blocks.{index}.0.op", f"down_blocks.{block}.downsamplers.0.conv"
            index += 1


def _unet_up(types: list[str], layers: int) -> Pairs:
    for block, kind in enumerate(types):
        attention = kind.startswith("CrossAttn")
        for layer in range(layers):
            old, new = f"output_blocks.{block * layers + layer}", f"up_blocks.{block}"
            yield from _within(f"{old}.0", f"{new}.resnets.{layer}", _UNET_RESNET)
            if attention:
                yield f"{old}.1", f"{new}.attentions.{layer}"
            if layer + 1 == layers and block + 1 < len(types):
                yield f"{old}.{1 + attention}.conv", f"{new}.upsamplers.0.conv"


def vae_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Original -> diffusers module paths of an AutoencoderKL with this configuration."""
    pairs = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    blocks, layers = len(config["block_out_channels"]), config.get("layers_per_block", 1)
    for half in ("encoder", "decoder"):
        pairs[f"{half}.conv_in"] = f"{half}.conv_in"
        pairs[f"{half}.conv_out"] = f"{half}.conv_out"
        pairs[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        for i in (0, 1):
            mid = f"{half}.mid_block.resnets.{i}"
            pairs.update(_within(f"{half}.mid.block_{i + 1}", mid, _VAE_RESNET))
        attention = f"{half}.mid_block.attentions.0"
        pairs.update(_within(f"{half}.mid.attn_1", attention, _VAE_ATTENTION))
    for block in range(blocks):
        # The original counts the decoder's levels from the finest.
        up = blocks - 1 - block
        pairs[f"encoder.down.{block}.downsample.conv"] = (
            f"encoder.down_blocks.{block}.downsamplers.0.conv"
        )
        pairs[f"decoder.up.{up}.upsample.conv"] = f"decoder.up_blocks.{block}.upsamplers.0.conv"
        for layer in range(layers):
            new = f"encoder.down_blocks.{block}.resnets.{layer}"
            pairs.update(_within(f"encoder.down.{block}.block.{layer}", new, _VAE_RESNET))
        for layer in range(layers + 1):
            new = f"decoder.up_blocks.{block}.resnets.{layer}"
            pairs.update(_within(f"decoder.up.{up}.block.{layer}", new, _VAE_RESNET))
    return pairs


def open_clip_names(layers: int) -> dict[str, str]:
    """OpenCLIP's -> transformers' module paths; the fused `attn.in_proj` is not among them."""
    pairs = {
        "token_embedding": "text_model.embeddings.token_embedding",
        "ln_final": "text_model.final_layer_norm",
    }
    inner = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
    }
    for i in range(layers):
        old, new = f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}"
        pairs.update({f"{old}.{a}": f"{new}.{b}" for a, b in inner.items()})
    return pairs


def translate(table: Mapping[str, str], path: str) -> str | None:
    """`path` with its longest listed prefix replaced; None where no prefix of it is listed."""
    prefix = path
    while prefix:
        if prefix in table:
            return table[prefix] + path[len(prefix) :]
        prefix = prefix.rpartition(".")[0]
    return None
