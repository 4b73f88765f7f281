"""Reads a single-file checkpoint (SD1.5, SDXL; safetensors) under diffusers' names.

Names are translated by formula (`ldm_names`). Only OpenCLIP's fused projections are cut, its text
projection transposed and the VAE's 1x1 convolutions reshaped to linears; all of these are views
made when a tensor is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from heatsink.runtime import ldm_names
from heatsink.runtime.errors import ModelError
from heatsink.runtime.model_folder import (
    PARTS,
    TOKENIZERS,
    Config,
    Layout,
    Part,
    read_json,
    tokenizer_in,
)
from heatsink.runtime.weights import Entry, open_safetensors

_UNET = "model.diffusion_model."
_VAE = "first_stage_model."
_CLIP = {"sd1": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}
_OPEN_CLIP = "conditioner.embedders.1.model."
# Constants of the original code and parts of CLIP that no network here needs.
_UNUSED = {
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped",
    "posterior_mean_coef1", "posterior_mean_coef2", "logvar", "denoiser.sigmas", "scale_factor",
    "cond_stage_model.logit_scale", "cond_stage_model.text_projection",
    "conditioner.embedders.0.logit_scale", "conditioner.embedders.0.text_projection",
}  # fmt: skip
# Where a tokenizer may lie in the local Hugging Face cache: (repository, folder in it).
_CACHED_TOKENIZERS = {
    "tokenizer": (
        ("openai/clip-vit-large-patch14", ""),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer"),
    ),
    "tokenizer_2": (("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer_2"),),
}


def read_single_file(path: Path, tokenizer: Path | None, config: Path | None) -> Layout:
    """Read the checkpoint's header and find its configurations and tokenizers.

    Args:
        path: a safetensors file.
        tokenizer: a tokenizer's folder, or a folder with `tokenizer/` (and `tokenizer_2/`) in it.
        config: a diffusers folder whose configurations (and tokenizers) replace the standard ones.

    Raises:
        ModelError: damaged, of an unknown layout, with keys of no known meaning, or without a
            tokenizer.
    """
    entries = open_safetensors(path)[0]
    kind = _kind_of(path, entries)
    notes = [f"{path.name} is read as a {'Stable Diffusion 1.x' if kind == 'sd1' else 'SDXL'} file"]
    configs = _configs(kind, config)
    used = {
        key: entry
        for key, entry in entries.items()
        if key not in _UNUSED and not key.startswith(("model_ema.", "first_stage_model.loss."))
    }
    if len(used) < len(entries):
        count = len(entries) - len(used)
        notes.append(f"{count} tensors that no network needs (EMA, schedule constants) are ignored")
    found = _sort(path, used, _Tables(kind, configs), PARTS[kind])
    empty = [part for part, values in found.items() if not values]
    if empty:
        raise ModelError(f"{path} lacks the weights of {' and '.join(empty)}")
    parts = {part: Part(configs[part], found[part]) for part in PARTS[kind]}
    own = config if config is not None and (config / "tokenizer").is_dir() else None
    tokenizers = _tokenizers(path, kind, tokenizer or own, notes)
    return Layout(kind, parts, tokenizers, configs["scheduler"], configs["settings"], notes)


def _sort(
    path: Path, entries: dict[str, Entry], tables: _Tables, parts: Iterable[str]
) -> dict[str, dict[str, Entry]]:
    """Every entry under its part and diffusers name; a key of no known meaning is an error."""
    found: dict[str, dict[str, Entry]] = {part: {} for part in parts}
    unknown = []
    for key, entry in entries.items():
        translated = list(tables.translate(key, entry))
        if not translated:
            unknown.append(key)
        for part, name, value in translated:
            if name:
                found[part][name] = value
    if unknown:
        raise ModelError(
            f"{path} holds {len(unknown)} keys of no known meaning: {', '.join(unknown[:8])}"
            " (a checkpoint of another shape needs config=FOLDER)"
        )
    return found


def _kind_of(path: Path, entries: dict[str, Entry]) -> str:
    if f"{_UNET}input_blocks.0.0.weight" not in entries:
        raise ModelError(
            f"{path} is no checkpoint of a whole Stable Diffusion model: it lacks"
            f" {_UNET}input_blocks.0.0.weight (an adapter or a single network?)"
        )
    if any(key.startswith(_OPEN_CLIP) for key in entries):
        return "sdxl"
    if any(key.startswith(_CLIP["sd1"]) for key in entries):
        return "sd1"
    if any(key.startswith("cond_stage_model.model.") for key in entries):
        raise ModelError(f"{path} is a Stable Diffusion 2.x file; supported: SD1.5, SDXL")
    raise ModelError(f"{path} holds no text encoder in the layout of SD1.5 or SDXL")


def _configs(kind: str, folder: Path | None) -> dict[str, Config]:
    standard = read_json(Path(__file__).parent / "configs" / f"{kind}.json")
    if folder is None:
        return standard
    if not folder.is_dir():
        raise ModelError(f"config={folder} is no folder")
    own = {part: read_json(folder / part / "config.json") for part in PARTS[kind]}
    scheduler = folder / "scheduler" / "scheduler_config.json"
    own["scheduler"] = read_json(scheduler) if scheduler.exists() else standard["scheduler"]
    return {**standard, **own}


class _Tables:
    """Translates a checkpoint's key to `(part, diffusers name, entry)`.

    Nothing comes of a key of no known meaning. An empty name stands for a tensor that is
    known and of no use.
    """

    def __init__(self, kind: str, configs: dict[str, Config]) -> None:
        self.unet = ldm_names.unet_names(configs["unet"])
        self.vae = ldm_names.vae_names(configs["vae"])
        self.clip = _CLIP[kind]
        layers = configs["text_encoder_2"]["num_hidden_layers"] if kind == "sdxl" else 0
        self.open_clip = ldm_names.open_clip_names(layers)

    def translate(self, key: str, entry: Entry) -> Iterator[tuple[str, str, Entry]]:
        if key.startswith(_UNET):
            name = ldm_names.translate(self.unet, key.removeprefix(_UNET))
            if name:
                yield "unet", name, entry
        elif key.startswith(_VAE):
            name = ldm_names.translate(self.vae, key.removeprefix(_VAE))
            if name:
                yield "vae", name, _as_linear(name, entry)
        elif key.startswith(self.clip):
            yield "text_encoder", key.removeprefix(self.clip), entry
        elif key.startswith(_OPEN_CLIP):
            for name, value in self._from_open_clip(key.removeprefix(_OPEN_CLIP), entry):
                yield "text_encoder_2", name, value

    def _from_open_clip(self, key: str, entry: Entry) -> Iterator[tuple[str, Entry]]:
        if key == "logit_scale":
            yield "", entry
        elif key == "positional_embedding":
            yield "text_model.embeddings.position_embedding.weight", entry
        elif key == "text_projection":
            yield (
                "text_projection.weight",
                entry.derive(_transpose, entry.shape[::-1], "transposed"),
            )
        elif ".attn.in_proj_" in key:
            block, _, leaf = key.partition(".attn.in_proj_")
            layer = f"text_model.encoder.layers.{block.rpartition('.')[2]}.self_attn"
            for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
                yield f"{layer}.{name}.{leaf}", _third(entry, part)
        else:
            translated = ldm_names.translate(self.open_clip, key)
            if translated:
                yield translated, entry


def _transpose(tensor: Tensor) -> Tensor:
    return tensor.t()


def _third(entry: Entry, part: int) -> Entry:
    rows = entry.shape[0] // 3

    def cut(tensor: Tensor) -> Tensor:
        return tensor[part * rows : (part + 1) * rows]

    return entry.derive(cut, (rows, *entry.shape[1:]), f"rows {part * rows}:{(part + 1) * rows}")


def _as_linear(name: str, entry: Entry) -> Entry:
    """The VAE's attention: the original has 1x1 convolutions where diffusers has linears."""
    if ".attentions." in name and entry.shape[2:] == (1, 1):
        return entry.derive(
            lambda tensor: tensor.flatten(1), entry.shape[:2], "1x1 convolution as linear"
        )
    return entry


def _tokenizers(path: Path, kind: str, given: Path | None, notes: list[str]) -> tuple[Path, ...]:
    folders = []
    for name in TOKENIZERS[kind]:
        if given is not None:
            # A bare tokenizer folder can't serve SDXL: its two pad with different tokens.
            bare = kind == "sd1" and not (given / name).is_dir()
            folders.append(tokenizer_in(given if bare else given / name))
            continue
        cached = _cached_tokenizer(name)
        if cached is None:
            raise ModelError(
                f"{path} holds no tokenizer, as no single file does, and the local Hugging Face"
                f" cache has no {name} of {_CACHED_TOKENIZERS[name][0][0]}; give tokenizer=DIR, a"
                f" folder with {' and '.join(f'{each}/' for each in TOKENIZERS[kind])} in it (any"
                " diffusers folder of this kind)"
            )
        notes.append(f"the {name} is taken from {cached}")
        folders.append(cached)
    return tuple(folders)


def _cached_tokenizer(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for repository, folder in _CACHED_TOKENIZERS[name]:
        files = [f"{folder}/{each}" if folder else each for each in ("vocab.json", "merges.txt")]
        found = [try_to_load_from_cache(repository, each) for each in files]
        if all(isinstance(each, str) for each in found):
            return Path(str(found[0])).parent
    return None
