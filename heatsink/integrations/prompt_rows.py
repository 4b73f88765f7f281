"""Which row of a network's batch belongs to which prompt of a pipeline's call.

A text encoder runs once for the prompts and once for the negative prompts, a row each. The UNet
and a ControlNet run on `[negative..., positive...]` with guidance and on `[positive...]` without,
each prompt's images side by side; a ControlNet in guess mode on the positive rows only. How many
prompts and images there are is what `encode_prompt` is called with, whether there is guidance is
what the pipeline itself goes by. Any other batch is refused: nothing is guessed from its size.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

from heatsink.runtime.errors import AdapterError, InvalidRequest

# Pipelines whose rows are laid out so. A class of one's own inherits a layout with the methods.
_PREFIXES = (
    "StableDiffusion",
    "StableDiffusionXL",
    "StableDiffusionControlNet",
    "StableDiffusionXLControlNet",
)
PIPELINES = {f"{p}{kind}Pipeline" for p in _PREFIXES for kind in ("", "Img2Img", "Inpaint")}
_WRAPPED = ("encode_prompt", "maybe_free_model_hooks")


class PromptRows:
    """Watches a pipeline's calls.

    Args:
        pipe: the pipeline.
        prompts: how many prompts a call must have.
        encoded: whether adapters change what text encoders compute: calls must give prompts then,
            not what someone computed of them.
    """

    def __init__(self, pipe: Any, prompts: int, encoded: bool = False) -> None:
        methods = (getattr(type(pipe), name, None) for name in ("__call__", "encode_prompt"))
        owners = {getattr(method, "__qualname__", "").split(".")[0] for method in methods}
        if not owners <= PIPELINES:
            raise AdapterError(
                f"the rows of a {type(pipe).__name__} are not known, so it can't have adapters by"
                " prompt; one choice for all prompts can be merged"
            )
        # The networks' hooks come here: they must not keep a pipeline that nobody else has.
        self._pipe = weakref.ref(pipe)
        self.prompts = prompts
        self._encoded = encoded
        self._images: int | None = None
        self._encoding = False
        self._before: dict[str, Any] | None = None

    @property
    def pipe(self) -> Any:
        """The pipeline; None when it is gone."""
        return self._pipe()

    def start(self) -> None:
        """Begin to watch: two of the pipeline's methods are wrapped, on this object alone."""
        self._before = {n: vars(self.pipe)[n] for n in _WRAPPED if n in vars(self.pipe)}
        encode, free = (getattr(self.pipe, name) for name in _WRAPPED)
        signature = inspect.signature(encode)

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            self._images = self._checked(given.arguments)
            self._encoding = True
            try:
                return encode(*args, **kwargs)
            finally:
                self._encoding = False

        def maybe_free_model_hooks() -> Any:
            # The last thing a call does.
            self._images = None
            return free()

        vars(self.pipe)["encode_prompt"] = encode_prompt
        vars(self.pipe)["maybe_free_model_hooks"] = maybe_free_model_hooks

    def stop(self) -> None:
        """Leave the pipeline as it was."""
        if self._before is None or self.pipe is None:
            return
        for name in _WRAPPED:
            vars(self.pipe).pop(name, None)
        vars(self.pipe).update(self._before)
        self._before = None

    def _checked(self, given: dict[str, Any]) -> int:
        prompt, embeds = given["prompt"], given["prompt_embeds"]
        if prompt is None:
            count = 0 if embeds is None else len(embeds)
        else:
            count = 1 if isinstance(prompt, str) else len(prompt)
        if count != self.prompts:
            raise InvalidRequest(
                f"adapters are in use for {self.prompts} prompts, the pipeline was called with"
                f" {count}"
            )
        embeddings = [
            n for n, value in given.items() if n.endswith("_embeds") and value is not None
        ]
        if self._encoded and embeddings:
            raise InvalidRequest(
                f"{embeddings[0]} is given, but an adapter in use changes the text encoders, which"
                " compute nothing then: give the prompts, or merge"
            )
        return int(given["num_images_per_prompt"])

    def of(self, component: str, batch: int) -> tuple[int, ...]:
        """The prompt of every row of a component's batch.

        Raises:
            InvalidRequest: the component runs outside of a call, or has another number of rows
                than this call gives it.
        """
        if component.startswith("text_encoder"):
            if not self._encoding:
                raise InvalidRequest(_outside(component))
            allowed, half, images = {self.prompts}, self.prompts, 1
        else:
            if self._images is None:
                raise InvalidRequest(_outside(component))
            images, half = self._images, self.prompts * self._images
            allowed = {half * 2 if self.pipe.do_classifier_free_guidance else half}
            if component == "controlnet":
                allowed.add(half)
        if batch not in allowed:
            raise InvalidRequest(
                f"the {component} has a batch of {batch}, expected"
                f" {' or '.join(map(str, sorted(allowed)))}: {self.prompts} prompts of {images}"
                " images, with or without guidance"
            )
        return tuple(row % half // images for row in range(batch))


def _outside(component: str) -> str:
    return (
        f"the {component} ran outside of a call of the pipeline while adapters are in use by"
        " prompt: whose rows these are is unknown"
    )
