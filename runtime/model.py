"""A model on disk: its components, configurations and mapped weights. Only safetensors are read."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from heatsink.runtime import components
from heatsink.runtime.errors import CallerError, ModelError
from heatsink.runtime.model_control import read_controlnet
from heatsink.runtime.model_folder import Config, Layout, Part, read_extra, read_folder
from heatsink.runtime.weights import Progress, Weights, refuse_pickle, sha256_of

# What a configuration records about who wrote it; two models that differ in these alone are the
# same.
_VOLATILE = {
    "_name_or_path", "_diffusers_version", "transformers_version", "torch_dtype", "dtype",
    "architectures",
}  # fmt: skip


class Model:
    """An opened model. Opening reads headers and configurations alone, no weight.

    Attributes:
        kind: `"sd1"` (Stable Diffusion 1.x and what is built like it) or `"sdxl"`.
        path: what was opened.
        components: the names of its networks; `vae_decoder` and `vae_encoder` are the halves of
            `vae`, `controlnet_NAME` those of `with_controlnets`.
        extras: names of networks that lie beside them in the folder (`controlnet`). `config` and
            `weights` know them, too.
        notes: what was ignored or chosen while opening, each a sentence for the user.
        scheduler_config: the scheduler's configuration as diffusers writes it.
        settings: the pipeline's own settings (`force_zeros_for_empty_prompt`, ...).
    """

    def __init__(
        self, path: Path, layout: Layout, controls: Mapping[str, Part] | None = None
    ) -> None:
        self.path = path
        self.kind = layout.kind
        self._controls = dict(controls or {})
        self.components = (*components.COMPONENTS[layout.kind], *self._controls)
        self.extras = tuple(layout.extras)
        self.notes = tuple(layout.notes)
        self.scheduler_config: Config = dict(layout.scheduler)
        self.settings: Config = dict(layout.settings)
        self._layout = layout
        self._extra_parts: dict[str, Part] = {}
        self._weights: dict[str, Weights] = {}
        self._digests: dict[str, str] = {}
        self._check_channels()

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        variant: str | None = None,
        tokenizer: str | Path | None = None,
        config: str | Path | None = None,
    ) -> Model:
        """Open a diffusers folder or a single-file checkpoint.

        Args:
            path: a folder with `model_index.json`, or a `.safetensors` file in the layout of SD1.5
                or SDXL.
            variant: of a folder: which weight files to take (`"fp16"`).
            tokenizer: of a single file, which holds none: a tokenizer's folder (SD1.5), or a folder
                with `tokenizer/` (and `tokenizer_2/`) in it, as every diffusers folder is.
            config: of a single file: a diffusers folder whose configurations replace the standard
                ones.

        Raises:
            ModelError: the path is no model, is incomplete, damaged or of an unknown kind; says
                which file.
            UnsafeFile: weights are pickles, by name or by content.
        """
        path = Path(path)
        if not path.is_dir():
            _check_file(path, variant)
            # Only here: most models are folders.
            from heatsink.runtime.single_file import read_single_file

            options = (None if each is None else Path(each) for each in (tokenizer, config))
            return cls(path, read_single_file(path, *options))
        if tokenizer is not None or config is not None:
            raise ModelError(
                f"tokenizer= and config= are for single files; {path} is a folder with its own"
            )
        return cls(path, read_folder(path, variant))

    def config(self, component: str) -> Config:
        """The configuration of a component, as diffusers or transformers wrote it (a copy)."""
        return dict(self._part(self._known(component)).config)

    def weights(self, component: str) -> Weights:
        """The component's tensors under its module's names, mapped and not yet read."""
        self._known(component)
        if component not in self._weights:
            part = self._part(component)
            name = functools.partial(components.module_name, component)
            self._weights[component] = Weights(component, part.entries).rename(name)
        return self._weights[component]

    def with_weights(self, replaced: Mapping[str, Weights]) -> Model:
        """The same model with other weights for some components, as a fused LoRA has."""
        model = Model(self.path, self._layout, self._controls)
        model._weights = {**self._weights, **{self._known(c): w for c, w in replaced.items()}}
        return model

    def with_controlnets(self, folders: Mapping[str, str | Path]) -> Model:
        """The same model with ControlNets beside its networks: components `controlnet_NAME`.

        Args:
            folders: each a `config.json` and weights, as diffusers saves a ControlNetModel; by the
                names that requests will call them.

        Raises:
            InvalidRequest: a name is none.
            ModelError, UnsafeFile: a folder holds no ControlNet, or one for another UNet.
        """
        controls = dict(self._controls)
        for name, folder in folders.items():
            part = read_controlnet(Path(folder), name, self.config("unet"), self._layout.notes)
            controls[components.CONTROL_PREFIX + name] = part
        model = Model(self.path, self._layout, controls)
        replaced = {components.CONTROL_PREFIX + name for name in folders}
        model._weights = {n: w for n, w in self._weights.items() if n not in replaced}
        return model

    @property
    def controlnets(self) -> tuple[str, ...]:
        """The names of its ControlNets."""
        return tuple(each.removeprefix(components.CONTROL_PREFIX) for each in self._controls)

    def module(self, component: str) -> nn.Module:
        """The component's module on the meta device, names and shapes checked against its weights.

        Buffers are on meta too; `buffers` has the true values of those that no file holds.
        `vae_decoder` and `vae_encoder` are an AutoencoderKL without its other half.

        Raises:
            ModelError: the configuration can't be built, or weights are missing, unexpected or
                misshapen.
        """
        module = components.meta_module(component, self.config(component))
        components.check_names(self.weights(component), module)
        return module

    def buffers(self, component: str) -> dict[str, Tensor]:
        """The true values of the module's buffers that no file holds, by name."""
        module = components.meta_module(component, self.config(component))
        return components.unsaved_buffers(component, module)

    def load_module(self, component: str, dtype: torch.dtype | None = None) -> nn.Module:
        """The component's module with its weights, on the CPU, in eval mode.

        Args:
            component: its name.
            dtype: the floating-point dtype of its weights; None keeps the stored one, and then
                nothing is
                copied: parameters are the mapped file.
        """
        module = self.module(component)
        state = {
            name: value.to(dtype) if dtype and value.is_floating_point() else value
            for name, value in self.weights(component).items()
        }
        return components.fill_module(module, state, component)

    def check(self) -> None:
        """Check every component against its module; raises `ModelError` as `module` does."""
        for component in self.components:
            self.module(component)

    def check_finite(self, progress: Progress | None = None) -> None:
        """Read every weight once.

        Args:
            progress: called with the bytes examined and the bytes in all.

        Raises:
            NumericError: a weight holds NaN or infinity; names component, tensor and file.
        """
        done, total = 0, sum(self.weights(component).nbytes for component in self.components)
        for component in self.components:
            weights = self.weights(component)
            weights.check_finite(progress and _shifted(progress, done, total))
            done += weights.nbytes

    def digest(self, component: str, progress: Progress | None = None) -> str:
        """SHA-256 (hex) of the component's configuration and its weights.

        Of the weights, names, dtypes, shapes and bytes count.
        It does not depend on how the weights are cut into files, nor on the libraries' versions.
        Kept after the first call. `progress` is called with the bytes hashed and the bytes in all.
        """
        if component not in self._digests:
            config = {k: v for k, v in self.config(component).items() if k not in _VOLATILE}
            text = f"{components.kind_of(component)}\0{json.dumps(config, sort_keys=True)}\0"
            digest = sha256_of(text)
            name = functools.partial(components.lasting_name, component)
            self.weights(component).update_digest(digest, name, progress)
            self._digests[component] = digest.hexdigest()
        return self._digests[component]

    @property
    def tokenizer_count(self) -> int:
        """How many tokenizers the model has: one for each text encoder."""
        return len(self._layout.tokenizers)

    def tokenizer_folder(self, index: int = 0) -> Path:
        """The folder of tokenizer `index` (0; for SDXL also 1)."""
        if not 0 <= index < self.tokenizer_count:
            raise CallerError(
                f"{self.path} has {self.tokenizer_count} tokenizers, there is none numbered {index}"
            )
        return self._layout.tokenizers[index]

    def _part(self, component: str) -> Part:
        if component in self._controls:
            return self._controls[component]
        if component not in self.extras:
            return self._layout.parts[components.part_of(component)]
        if component not in self._extra_parts:
            self._extra_parts[component] = read_extra(self._layout, component)
        return self._extra_parts[component]

    def _known(self, component: str) -> str:
        if component not in (*self.components, *self.extras):
            known = ", ".join((*self.components, *self.extras))
            raise CallerError(f"{self.path} has no component {component!r}; it has {known}")
        return component

    def _check_channels(self) -> None:
        unet, vae = (self._layout.parts[part].config for part in ("unet", "vae"))
        latent = vae.get("latent_channels", 4)
        # An inpainting model also takes a mask and the latents of what it keeps.
        if unet.get("in_channels", 4) not in (latent, 2 * latent + 1):
            raise ModelError(
                f"{self.path}: the UNet takes {unet.get('in_channels')} channels and the"
                f" VAE's latents have {latent}; expected {latent} (or {2 * latent + 1}, of an"
                " inpainting model): others, such as editing models, are not supported"
            )


def _check_file(path: Path, variant: str | None) -> None:
    if not path.exists():
        raise ModelError(f"there is no model folder or file {path}")
    refuse_pickle(path)
    if path.suffix.lower() != ".safetensors":
        raise ModelError(f"{path} is neither a model folder nor a .safetensors file")
    if variant is not None:
        raise ModelError(f"variant={variant!r} is for folders; {path} is a file")


def _shifted(progress: Progress, before: int, total: int) -> Progress:
    """`progress` for one part of a longer work: `before` of `total` bytes were done earlier."""
    return lambda done, _: progress(before + done, total)
