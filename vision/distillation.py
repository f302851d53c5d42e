"""Distillation of attention into recurrences: a student that sees a quarter of the patches learns a teacher's tokens.

"ViT-Linearizer: Distilling Quadratic Knowledge into Linear-Time Vision Models" (arXiv 2504.00037, ICCV 2025). The
teacher reads whole pictures. Of the student's patches most are replaced by a learned mask token. Two losses follow:
similarities between visible tokens at the ends of four stages, and the teacher's output at the masked ones.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.layers import Format
from torch import Tensor, nn

from sinuous.core.checks import check_sizes, described
from sinuous.core.norms import at_least_fp32
from sinuous.core.patches import class_row
from sinuous.core.registry import create_model, list_models

__all__ = ["activation_loss", "masked_loss"]


def activation_loss(teacher: Tensor | Sequence[Tensor], student: Tensor | Sequence[Tensor]) -> Tensor:
    """Distance between the patterns of similarity of two models' tokens.

    A_nm = cos(x_n, x_m) for tokens n, m of one picture, its rows a_n scaled to length 1. The loss is the mean of
    1 - ⟨a_n of the teacher, a_n of the student⟩ over rows, pictures and stages; it is 0 for equal features, and
    rotating or scaling all of a model's tokens does not change it. Widths may differ.

    Args:
        teacher: features `[B, L, D]`, or one such tensor for each stage.
        student: the same of the student, `[B, L, D']`.

    Raises:
        ValueError: for different numbers of stages, pictures or tokens.
    """
    pairs = [[x] if isinstance(x, Tensor) else list(x) for x in (teacher, student)]
    if len(pairs[0]) != len(pairs[1]) or not pairs[0]:
        raise ValueError(
            f"teacher and student must have equally many stages, 1 or more (got {len(pairs[0])} and {len(pairs[1])})"
        )
    distances = []
    for x, y in zip(*pairs, strict=True):
        _check_tokens(x, y)
        distances.append(1 - (_similarities(x) * _similarities(y)).sum(-1).mean())
    return torch.stack(distances).mean()


def _similarities(x: Tensor) -> Tensor:
    x = F.normalize(at_least_fp32(x), dim=-1)
    return F.normalize(x @ x.mT, dim=-1)


def masked_loss(teacher: Tensor, student: Tensor, mask: Tensor) -> Tensor:
    """Smooth L1 distance of outputs, averaged over masked tokens and channels; 0 where no token is masked.

    Args:
        teacher: output `[B, L, D]`.
        student: output `[B, L, D]`, projected where the student has another width.
        mask: `[B, L]`, True where the student did not see the patch.

    Raises:
        ValueError: for shapes that differ, or a mask that is not of flags.
    """
    _check_tokens(teacher, student)
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher and student must have equal widths (got {teacher.shape[-1]} and {student.shape[-1]}); project "
            "the student's output"
        )
    if mask.dtype != torch.bool or mask.shape != teacher.shape[:2]:
        raise ValueError(
            f"mask must be flags of shape [B, L], {list(teacher.shape[:2])} (got {described(mask)}); give True where a "
            "token is masked"
        )
    if not bool(mask.any()):
        return student.sum() * 0
    return F.smooth_l1_loss(at_least_fp32(student)[mask], at_least_fp32(teacher)[mask])


def _check_tokens(teacher: Tensor, student: Tensor) -> None:
    if teacher.ndim != 3 or student.ndim != 3 or teacher.shape[:2] != student.shape[:2]:
        raise ValueError(
            "features must be [B, L, D] of as many pictures and tokens for teacher and student (got "
            f"{list(teacher.shape)} and {list(student.shape)}); give both models the same pictures and patches"
        )


def random_mask(pictures: int, patches: int, share: float, generator: torch.Generator | None = None) -> Tensor:
    """A mask `[B, M]` with the same number of masked patches, `share` of all, in each picture; made on the CPU."""
    order = torch.rand(pictures, patches, generator=generator).argsort(1)
    return order < min(max(round(share * patches), 1), patches - 1)


def visible(tokens: Tensor, mask: Tensor) -> Tensor:
    """Tokens `[B, L, D]` that are not masked, `[B, L_visible, D]`; as many in each picture."""
    return tokens[~mask].view(len(tokens), -1, tokens.shape[-1])


@contextlib.contextmanager
def masked_patches(model: nn.Module, mask: Tensor, token: Tensor) -> Iterator[None]:
    """Within the context, `model` reads `token` `[D]` in place of its embedded patches where `mask` `[B, M]` is True.

    Positions are added to it as to any patch.

    Raises:
        ValueError: on a call, if the model has another number of patches.
    """
    embed = cast("nn.Module", model.patch_embed)
    last = getattr(embed, "output_fmt", Format.NCHW) == Format.NHWC

    def replace(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        channels_last = output.ndim == 3 or last
        patches = output if channels_last else output.movedim(1, -1)
        if patches[..., 0].numel() != mask.numel():
            raise ValueError(
                f"the student has {patches[0, ..., 0].numel()} patches and the teacher {mask.shape[1]}; give them the "
                "same img_size and patch_size"
            )
        hidden = torch.where(mask.view(*patches.shape[:-1], 1), token.to(patches.dtype), patches)
        return hidden if channels_last else hidden.movedim(-1, 1)

    handle = embed.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def stages_and_output(model: nn.Module, x: Tensor, stages: int) -> tuple[list[Tensor], Tensor]:
    """Tokens of patches `[B, M, D]` at the ends of so many equal parts of the depth, and those of the output."""
    depth = len(cast("Any", model).feature_info)
    ends = [depth * (k + 1) // stages - 1 for k in range(stages)]
    output, taps = cast("Any", model).forward_intermediates(x, indices=ends, output_fmt="NLC")
    extra = output.shape[1] - taps[-1].shape[1]
    place = getattr(model, "class_token", None)  # of our models; those of timm's have all of theirs in front
    row = class_row(taps[-1].shape[1], place) if extra and isinstance(place, str) else 0
    return list(taps), torch.cat([output[:, :row], output[:, row + extra :]], 1)


def check_isotropic(role: str, model: nn.Module, stages: int) -> nn.Module:
    """Return `model`, which must have patches of one size throughout, and a block for each stage.

    Raises:
        ValueError: if it has not.
    """
    infos = getattr(model, "feature_info", [])
    strides = {info["reduction"] for info in infos} if isinstance(infos, list) else set()
    needed = ("patch_embed", "forward_intermediates")
    if len(strides) != 1 or not all(hasattr(model, name) for name in needed):
        raise ValueError(
            f"the {role} must be an isotropic model, with one stride in all of its blocks (got "
            f"{type(model).__name__}); choose one such as vim_nano, or timm's deit_tiny_patch16_224"
        )
    check_sizes(stages=stages)
    if len(infos) < stages:
        raise ValueError(f"the {role} has {len(infos)} blocks for {stages} stages; lower task.stages")
    return model


def load_teacher(name: str, **options: Any) -> nn.Module:
    """Load a model of ours or timm's with its weights, frozen.

    Raises:
        ValueError: if there is no such model (naming the nearest), or it has no weights.
    """
    ours = list_models()
    if name.partition(".")[0] in ours:
        model = create_model(name, pretrained=True, **options)
    elif timm.is_model(name):
        model = timm.create_model(name, pretrained=True, **options)
    else:
        near = difflib.get_close_matches(name, [*list_models(pretrained=True), *ours, *timm.list_models()], n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "timm.list_models() lists the names"
        raise ValueError(f"there is no teacher {name!r}; {hint}")
    return model
