"""Pictures of classes from AiM: codes drawn one after another with a carried state, then decoded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

from sinuous.core.checks import check_choice, described, is_number
from sinuous.core.modes import evaluating
from sinuous.core.sampling import Sampling
from sinuous.vision.generation.pipelines import (
    Labels,
    as_images,
    check_generators,
    class_names,
    label_numbers,
    with_defaults,
)

OUTPUTS = ("pil", "np", "pt", "codes")


class AiMPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Draw the codes of pictures, and decode them.

    Args:
        transformer: an `AiM`.
        vqvae: diffusers' `VQModel`, as `load_vq_tokenizer` reads it.
        id2label: names of the classes by their numbers; several names of one are divided by commas.
        defaults: arguments of a call that hold where it does not give them, such as those of its scores.
    """

    model_cpu_offload_seq = "transformer->vqvae"

    def __init__(
        self,
        transformer: Any,
        vqvae: Any,
        id2label: dict[str, str] | dict[int, str] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vqvae=vqvae)
        names = {str(number): name for number, name in (id2label or {}).items()}
        self.register_to_config(id2label=names, defaults=dict(defaults or {}))
        self.labels = class_names(names)

    @torch.no_grad()
    @with_defaults
    def __call__(
        self,
        class_labels: Labels,
        guidance_scale: float = 1.5,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Make one square picture for each class.

        Args:
            class_labels: numbers or names; `None` for no class.
            guidance_scale: s of `u + s (c - u)`, of the logits with (c) and without the class (u); 1 for c alone.
            temperature: logits are divided by it; 0 takes the most probable code.
            top_k: keep the k most probable codes.
            top_p: keep the fewest most probable codes that together have at least this probability.
            generator: on the CPU, of the draws; one for each picture makes each as it is made alone.
            output_type: `"pil"`; `"np"`, `[B, h, w, C]` from 0 to 1; `"pt"`, `[B, C, h, w]`; `"codes"`, `[B, h, w]`.
            return_dict: an `ImagePipelineOutput`; a tuple if False.

        Raises:
            ValueError: for a class, number or choice that cannot be.
        """
        check_choice("output_type", output_type, OUTPUTS)
        drawn = self.stream(class_labels, guidance_scale, temperature, top_k, top_p, generator)
        codes = torch.stack(list(drawn), 1)
        side = math.isqrt(codes.shape[1])
        codes = codes.unflatten(1, [side, -1])
        images = codes if output_type == "codes" else as_images(self.decode(codes), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @with_defaults
    def stream(
        self,
        class_labels: Labels,
        guidance_scale: float = 1.5,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Iterator[Tensor]:
        """Codes `[B]` of the pictures as they are drawn, row by row; arguments as of a call.

        Raises:
            ValueError: for a class or number that cannot be, before the first code.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        if not is_number(guidance_scale) or not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number (got {described(guidance_scale)}); 1 is none")
        numbers = label_numbers(class_labels, self.labels, self.transformer.num_classes)
        generators = check_generators(generator, len(numbers))
        return self._drawn(numbers, float(guidance_scale), sampling, generators)

    def decode(self, codes: Tensor) -> Tensor:
        """Pictures `[B, C, h, w]` from -1 to 1 of codes `[B, rows, columns]`."""
        with torch.no_grad(), evaluating(self.vqvae):
            shape = (*codes.shape, self.vqvae.quantize.embedding.embedding_dim)
            vectors = self.vqvae.quantize.get_codebook_entry(codes.flatten(), shape)
            pictures: Tensor = self.vqvae.decode(vectors, force_not_quantize=True).sample
        return pictures

    def _drawn(self, numbers: list[int], scale: float, sampling: Sampling, generators: Any) -> Iterator[Tensor]:
        model, count = self.transformer, len(numbers)
        labels = torch.tensor(numbers, device=self._execution_device)
        guided = scale != 1
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, model.num_classes)])
        state: Any = None
        codes = labels
        for _ in range(model.num_tokens):
            with torch.no_grad(), evaluating(model):
                logits, state = model.start(labels) if state is None else model.step(codes, state)
            if guided:
                own, none = logits.float().chunk(2)
                logits = none + scale * (own - none)
            if not logits.isfinite().all():
                raise ValueError("the logits are not finite; load the model with torch_dtype=torch.float32")
            drawn = sampling.choose(logits, _uniform(generators, count).to(logits.device))
            codes = torch.cat([drawn, drawn]) if guided else drawn
            yield drawn


def _uniform(generators: Any, count: int) -> Tensor:
    if isinstance(generators, list):
        return torch.cat([_uniform(one, 1) for one in generators])
    device = "cpu" if generators is None else generators.device
    return torch.rand(count, generator=generators, dtype=torch.float64, device=device).cpu()
