r"""Pictures of classes from a denoiser and a diffusers scheduler: `ClassConditionalPipeline`, and folders of pipelines.

    x_T ~ N(0, I);   ε̂ = ε(x_t, t, none) + s (ε(x_t, t, class) - ε(x_t, t, none));   x_{t-1} = scheduler(ε̂, t, x_t)

Classifier-free guidance of scale s (Ho and Salimans, arXiv 2207.12598) is for what the scheduler asks for; of a
denoiser of 2 C channels, those of the variance are the class's own.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sinuous.core.checks import check_choice, check_range, check_sizes, described, is_number, is_whole
from sinuous.core.modes import evaluating
from sinuous.core.weights import Weights, all_weights
from sinuous.vision.generation.models import SIZES

Labels = int | str | None | Sequence[int | str | None]

OUTPUTS = ("pil", "np", "pt", "latent")
LEARNED = ("learned", "learned_range")

Call = TypeVar("Call", bound=Callable[..., Any])


def with_defaults(call: Call) -> Call:
    """Decorator of a pipeline's method: arguments that a call leaves out are those of `pipeline.config.defaults`, where
    it has them, and the signature's otherwise."""
    signature = inspect.signature(call)

    @functools.wraps(call)
    def complete(self: Any, *args: Any, **kwargs: Any) -> Any:
        there = signature.bind_partial(self, *args, **kwargs).arguments
        known = (self.config.get("defaults") or {}).items()
        return call(self, *args, **{k: v for k, v in known if k not in there and k in signature.parameters}, **kwargs)

    return cast("Call", complete)


class ClassConditionalPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Make pictures of classes.

    Args:
        transformer: `(x, timestep=…, class_labels=…).sample`, such as `LaMambaDiff` or diffusers' DiT.
        scheduler: of diffusers, also one of flow matching, and one with `variance_type` learned for a denoiser of twice
            the channels.
        vae: decodes what was denoised; without one, that is the picture, from -1 to 1.
        id2label: names of the classes by their numbers; several names of one are divided by commas.
        defaults: arguments of a call that hold where it does not give them, such as those of its scores.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(
        self,
        transformer: Any,
        scheduler: Any,
        vae: Any = None,
        id2label: dict[str, str] | dict[int, str] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        names = {str(number): name for number, name in (id2label or {}).items()}
        self.register_to_config(id2label=names, defaults=dict(defaults or {}))
        self.labels = class_names(names)

    @property
    def num_classes(self) -> int:
        """Number of classes that the denoiser knows; it is also the number of no class."""
        config = self.transformer.config
        return int(config.get("num_classes") or config.get("num_embeds_ada_norm") or 0)

    @torch.no_grad()
    @with_defaults
    def __call__(
        self,
        class_labels: Labels,
        guidance_scale: float = 1.5,
        num_inference_steps: int = 50,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Make one picture for each class.

        Args:
            class_labels: numbers or names; `None` for no class.
            guidance_scale: s; 1 for none.
            num_inference_steps: calls of the denoiser, each of all pictures, with and without their class where s is
                not 1.
            generator: of the first noise and that of the steps; one for each picture makes each as it is made alone.
            height, width: of the pictures in pixels; the size that the denoiser was built for if absent.
            latents: first noise `[B, C, h, w]`, of variance 1, instead of a random one.
            eta: share of noise in the steps of DDIM.
            output_type: `"pil"`; `"np"`, `[B, h, w, C]` from 0 to 1; `"pt"`, `[B, C, h, w]`; `"latent"`, not decoded.
            return_dict: an `ImagePipelineOutput`; a tuple if False.
            callback_on_step_end: called after each step with (pipeline, step, timestep, {"latents": …}); what it
                returns under "latents" is gone on with.

        Raises:
            ValueError: for a class, size, number or choice that cannot be, and if what was denoised is not finite.
        """
        check_choice("output_type", output_type, OUTPUTS)
        check_sizes(num_inference_steps=num_inference_steps)
        check_range(0, 1, eta=eta)
        if not is_number(guidance_scale) or not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number (got {described(guidance_scale)}); 1 is none")
        numbers = label_numbers(class_labels, self.labels, self.num_classes)
        channels = self._check_channels()
        shape = (len(numbers), channels, *self._latent_sides(height, width))
        generators = check_generators(generator, len(numbers))
        x = self._first_noise(shape, latents, generators)
        labels = torch.tensor(numbers, device=x.device)
        guided = guidance_scale != 1 and bool((labels != self.num_classes).any())
        step_options = self._step_options(generators, eta)
        with evaluating(self.transformer):
            self.scheduler.set_timesteps(num_inference_steps, device=x.device)
            x = x * getattr(self.scheduler, "init_noise_sigma", 1.0)
            for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
                output = self._predict(x, t, labels, guidance_scale if guided else None, channels)
                x = self.scheduler.step(output, t, x, **step_options).prev_sample.to(x.dtype)
                if callback_on_step_end is not None:
                    x = callback_on_step_end(self, i, t, {"latents": x}).get("latents", x)
        if not x.isfinite().all():
            raise ValueError(
                "the denoised pictures are not finite; load the denoiser in a wider dtype (torch_dtype=torch.float32), "
                "or check its weights"
            )
        images = x if output_type == "latent" else self._decoded(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_channels(self) -> int:
        config, kind = self.transformer.config, self.scheduler.config.get("variance_type")
        channels = int(config.in_channels)
        if kind in LEARNED and config.out_channels != 2 * channels:
            raise ValueError(
                f"the scheduler's variance_type {kind!r} needs a denoiser of {2 * channels} output channels (got "
                f"{config.out_channels}); choose variance_type='fixed_small', or a denoiser that has them"
            )
        return channels

    def _latent_sides(self, height: int | None, width: int | None) -> tuple[int, int]:
        size = self.transformer.config.sample_size
        sides = [size, size] if is_whole(size) else list(size)
        factor = 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)
        for axis, (name, pixels) in enumerate((("height", height), ("width", width))):
            if pixels is not None:
                check_sizes(**{name: pixels})
                if pixels % factor:
                    raise ValueError(f"{name} must be a multiple of {factor} for this VAE (got {pixels})")
                sides[axis] = pixels // factor
        return sides[0], sides[1]

    def _first_noise(self, shape: tuple[int, ...], latents: Tensor | None, generators: Any) -> Tensor:
        place = {"device": self._execution_device, "dtype": self.transformer.dtype}
        if latents is None:
            return cast("Tensor", randn_tensor(shape, generator=generators, **place))
        if not isinstance(latents, Tensor) or tuple(latents.shape) != shape:
            raise ValueError(f"latents must be a tensor of shape {list(shape)} (got {described(latents)})")
        return latents.to(**place)

    def _step_options(self, generators: Any, eta: float) -> dict[str, Any]:
        """Those of `generator` and `eta` that the scheduler's step takes."""
        known = inspect.signature(self.scheduler.step).parameters
        options = {"generator": generators, "eta": eta}
        return {name: value for name, value in options.items() if name in known}

    def _predict(self, x: Tensor, t: Any, labels: Tensor, guidance_scale: float | None, channels: int) -> Tensor:
        """What the scheduler asks for, of one call of the denoiser."""
        scaled = self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else x
        if guidance_scale is not None:
            scaled, labels = torch.cat([scaled, scaled]), torch.cat([labels, torch.full_like(labels, self.num_classes)])
        timestep = torch.as_tensor(t, device=x.device).expand(len(scaled))
        output: Tensor = self.transformer(scaled, timestep=timestep, class_labels=labels).sample
        if guidance_scale is not None:
            own, none = output.chunk(2)
            told, rest = own[:, :channels], own[:, channels:]
            output = torch.cat([none[:, :channels] + guidance_scale * (told - none[:, :channels]), rest], 1)
        learned = self.scheduler.config.get("variance_type") in LEARNED
        return output if learned else output[:, :channels]

    def _decoded(self, x: Tensor, output_type: str) -> Any:
        if self.vae is not None:
            config = self.vae.config
            x = x / config.scaling_factor + (config.get("shift_factor") or 0.0)
            with evaluating(self.vae):
                x = self.vae.decode(x.to(self.vae.dtype)).sample
        return as_images(x, output_type)


def as_images(x: Tensor, output_type: str) -> Any:
    """Pictures `[B, C, h, w]` from -1 to 1 as `"pt"`, `"np"` or `"pil"`.

    Raises:
        ValueError: if a picture is not finite.
    """
    if not x.isfinite().all():
        raise ValueError("the decoded pictures are not finite; load the decoder with torch_dtype=torch.float32")
    x = (x.float() / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return x
    pixels = x.cpu().permute(0, 2, 3, 1).numpy()
    return pixels if output_type == "np" else DiffusionPipeline.numpy_to_pil(pixels)


def class_names(id2label: Mapping[str, str]) -> dict[str, int]:
    """Numbers of classes by each of their names."""
    pairs = [(name.strip(), int(number)) for number, names in id2label.items() for name in names.split(",")]
    return dict(sorted(pairs))


def label_numbers(class_labels: Labels, names: Mapping[str, int], num_classes: int) -> list[int]:
    """Numbers of classes that are given by number or name, one or several; `num_classes` for no class.

    Raises:
        ValueError: for an unknown name, naming the nearest, or a number out of range.
    """
    several = isinstance(class_labels, Sequence) and not isinstance(class_labels, str)
    labels = list(cast("Sequence[Any]", class_labels)) if several else [class_labels]
    if isinstance(class_labels, Tensor):
        labels = class_labels.flatten().tolist()
    if not labels:
        raise ValueError("class_labels must name at least one class (got none); None stands for no class")
    return [_number(label, names, num_classes) for label in labels]


def _number(label: Any, names: Mapping[str, int], num_classes: int) -> int:
    if label is None:
        return num_classes
    if isinstance(label, str):
        alike = [name for name in names if name.casefold() == label.casefold()]
        if label in names or len(alike) == 1:
            return names[label if label in names else alike[0]]
        near = difflib.get_close_matches(label, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "give its number"
        raise ValueError(f"there is no class {label!r}; {hint}")
    if not is_whole(label):
        raise ValueError(f"a class must be a number, a name or None (got {described(label)})")
    if not 0 <= label < num_classes:
        raise ValueError(f"a class must be from 0 to {num_classes - 1} (got {label}); None stands for no class")
    return int(label)


def check_generators(generator: Any, count: int) -> Any:
    """`generator` as torch's functions of diffusers take it: one, or a list of one for each picture.

    Raises:
        ValueError: if it is neither.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    if not isinstance(generator, Sequence) or not all(isinstance(g, torch.Generator) for g in generator):
        raise ValueError(f"generator must be a torch.Generator or a list of them (got {described(generator)})")
    if len(generator) != count:
        raise ValueError(f"generator must have one for each of the {count} pictures (got {len(generator)})")
    return list(generator)


def load_pipeline(name_or_folder: str | os.PathLike[str], **kwargs: Any) -> DiffusionPipeline:
    """A pipeline by the name of weights that come with the package, or from a folder of `save_pretrained`.

        pipeline = load_pipeline("aim_nano.fashion_mnist")
        pipeline("sneaker").images[0]

    What a call of a shipped pipeline leaves out is as it was when the weights were scored.

    Args:
        name_or_folder: a folder with a model_index.json, whatever wrote its parts; or a name such as
            "lamamba_diff_nano.fashion_mnist", of which the model's part is enough.
        **kwargs: for diffusers' `from_pretrained`, such as `torch_dtype`, the only one that a name takes.

    Raises:
        ValueError: if there is no such folder and no such name, or the folder holds no pipeline of ours or of
            diffusers'.
    """
    import diffusers

    from sinuous.vision import generation

    folder = Path(name_or_folder)
    if not folder.exists() and (weights := weights_of(os.fspath(name_or_folder))) is not None:
        from sinuous.vision.generation.shipped import shipped_pipeline

        if unknown := sorted(kwargs.keys() - {"torch_dtype"}):
            raise ValueError(f"{weights.name} comes with the package and takes torch_dtype alone (got {unknown[0]})")
        return cast("DiffusionPipeline", shipped_pipeline(weights, kwargs.get("torch_dtype")))
    index = folder / "model_index.json"
    if not index.is_file():
        what = "has no model_index.json" if folder.is_dir() else "is not there"
        raise ValueError(f"{folder} {what}; give the folder that a pipeline's save_pretrained wrote{_or_a_name()}")
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
        name = parts["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} names no pipeline ({error}); copy the folder again") from error
    ours = [pipeline for pipeline in ("ClassConditionalPipeline", "AiMPipeline") if pipeline in generation.__all__]
    cls = getattr(generation, name) if name in ours else getattr(diffusers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, DiffusionPipeline)):
        raise ValueError(f"{index} names the pipeline {name!r}, which is neither ours nor diffusers'")
    _import_parts(parts)
    pipeline: DiffusionPipeline = cast("Any", cls).from_pretrained(folder, **kwargs)
    return pipeline


def weights_of(name: str) -> Weights | None:
    """Weights of a model of pictures that come with the package, by their name or their model's; None if there are
    none.

    Raises:
        ValueError: if there is such a model and it comes without weights.
    """
    known = [weights for weights in all_weights().values() if weights.architecture in SIZES]
    chosen = next((weights for weights in known if name in (weights.name, weights.architecture)), None)
    if chosen is None and name.partition(".")[0] in SIZES:
        experiment = "fashion_mnist_aim" if name.startswith("aim") else "fashion_mnist"
        raise ValueError(
            f"the weights {name} do not come with this version of the package; give a pipeline of your own, such as "
            f"the folder pipeline/ that `sinuous train experiment=generation/{experiment}` leaves in its run"
            f"{_or_a_name()}"
        )
    return chosen


def _or_a_name() -> str:
    names = [name for name, weights in all_weights().items() if weights.architecture in SIZES]
    return f", or a name of those that come with the package ({', '.join(names)})" if names else ""


def _import_parts(parts: Mapping[str, Any]) -> None:
    """Import the modules of this package that parts of a pipeline are in; diffusers finds only what is imported."""
    import importlib

    for part in parts.values():
        if isinstance(part, list) and isinstance(part[0], str) and part[0].startswith("sinuous."):
            importlib.import_module(part[0])
