r"""Shares of a picture's parts in the score of a class: Vim's scans read as attention.

With Δ, B and C held, the selective scan is linear in its input, and each channel d has a T×T matrix of its own,

    y_t[d] = Σ_{s≤t} M^d_ts u_s[d] + D[d] u_t[d],     M^d_ts = Σ_n C_t[n] exp(A[d,n] Σ_{r=s+1..t} Δ_r[d]) Δ_s[d] B_s[n],

and the scan from the other end has Σ_{s≥t}, with r running over t..s-1: a pair of scans looks both ways, as attention
does. The matrix need not be formed. For weights g on the outputs, the mixed row Σ_t g_t[d] M^d_ts is one scan in the
opposite direction,

    λ_s = exp(Δ_{s+1} A) ⊙ λ_{s+1} + g_s C_s,         Σ_t g_t[d] M^d_ts = Δ_s[d] (λ_s[d] · B_s),

that is, the gradient of the scan in its input: linear in T, at the speed of the kernels.

One layer's row for the class token says little, since the layers below have already mixed the tokens (with it, removing
the highest-ranked patches first lowered the class's probability no faster than removing them in random order). So the
rows of all layers are multiplied, with everything else that depends on the picture held as well: the gates, the slope
of each silu, the scale of each norm. What remains is a linear map J from pixels to the class's score, and

    score(x) = score_held(x₀) + Σ_pixels J ⊙ (x - x₀)                  exactly, for every baseline picture x₀,

so that each pixel has a share, and the shares add up. The class token's row of the product is one backward pass.

Source: the matrix is from Ali, Zimerman and Wolf, "The Hidden Attention of Mamba Models" (arXiv 2403.01590), section 3;
holding the factors so that shares add up is from Jafari et al., "MambaLRP" (arXiv 2406.07592), here with the whole
share of `y ⊙ silu(z)` going to y.

Other models have no such map. Their shares are the gradient's mean along the straight line from the baseline,

    share_i = (x - x₀)_i · 1/n Σ_k ∂score/∂x_i (x₀ + (k - ½)/n · (x - x₀)),

which add up to score(x) - score(x₀) as the number of steps n grows (Sundararajan, Taly and Yan, "Axiomatic Attribution
for Deep Networks", arXiv 1703.01365).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sinuous.core.checks import check_sizes
from sinuous.core.mixers.bidirectional import Bidirectional
from sinuous.core.mixers.contract import Mixer
from sinuous.core.mixers.mamba import Mamba
from sinuous.core.mixers.vim_pair import VimPair
from sinuous.core.ops.family import FAMILIES
from sinuous.core.ops.operators import operators


def attention_rows(
    weights: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    reverse: bool = False,
) -> Tensor:
    """`Σ_t weights_t[d] M^d_ts`: rows of a scan's implicit attention, mixed by `weights`, without the matrix.

    Args:
        weights: `[B, T, D]`; one at a single step and zero elsewhere gives that step's row for every channel.
        u, dt, A, B, C, dt_bias, dt_softplus, reverse: as in `sinuous.ops.selective_scan`.

    Returns:
        `[B, T, D]`, how much each channel of each step s counts. Rows times `u`, summed over s, are the scan's output
        without its skip term, mixed by `weights`.
    """
    with HeldCoefficients(), torch.enable_grad():
        source = u.detach().requires_grad_()
        y, _, _ = operators.selective_scan(
            source, dt, A, B, C, dt_bias=dt_bias, dt_softplus=dt_softplus, reverse=reverse
        )
    (rows,) = torch.autograd.grad(y, source, weights)
    return rows


class HeldCoefficients(TorchFunctionMode):
    """Inside, a stack of Mamba or Vim mixers computes what it always does, and differentiates as if it were linear.

    Gradients treat as constants: Δ, A, B and C of selective scans, gates `silu(z)`, the slope `sigmoid(x)` of the silu
    behind a convolution, and the root mean square of RMSNorm.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        held: Any = {
            operators.selective_scan: self._scan,
            operators.causal_conv1d: self._conv,
            F.rms_norm: self._rms_norm,
            F.silu: lambda x, **_: F.silu(x.detach()),
        }.get(func)
        return func(*args, **(kwargs or {})) if held is None else held(*args, **(kwargs or {}))

    @staticmethod
    def _scan(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        call, backend = FAMILIES["selective_scan"].bind(*args, **kwargs)
        coefficients = {name: getattr(call, name) for name in ("dt", "A", "B", "C", "z")}
        held = {name: None if t is None else t.detach() for name, t in coefficients.items()}
        return operators.selective_scan(*call._replace(**held), backend)

    @staticmethod
    def _conv(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        call, backend = FAMILIES["causal_conv1d"].bind(*args, **kwargs)
        y, state = operators.causal_conv1d(*call._replace(silu=False), backend)
        return (y * torch.sigmoid(y.detach()) if call.silu else y), state

    @staticmethod
    def _rms_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        axes = tuple(range(-len(shape), 0))
        y = x * torch.rsqrt(x.detach().square().mean(axes, keepdim=True) + eps)
        return y if weight is None else y * weight


class Evidence(NamedTuple):
    """Shares of pixels in scores: `pixels[i].sum()` is `scores[i]` less the held score of the baseline.

    logits: `[B, classes]`; classes: the class explained per picture, `[B]`; pixels: `[B, H, W]`, summed over channels;
    method: how they were found, in a few words.
    """

    logits: Tensor
    classes: Tensor
    pixels: Tensor
    method: str


def evidence(
    model: nn.Module, images: Tensor, *, baseline: float | Tensor = 0.0, classes: Tensor | None = None
) -> Evidence:
    """The share of each pixel in the score (logit) of a class.

    Args:
        model: a classifier of mixers `vim_pair` or `mamba` with RMSNorm between them.
        images: `[B, C, H, W]`, normalised as the model wants them.
        baseline: x₀, the picture that has nothing to say, broadcastable to `images`: a pixel equal to it has no share.
        classes: the class to explain for each picture `[B]`, or one for all `[1]`; the one with the highest score if
            absent.

    Raises:
        ValueError: if `classes` has another number of them.
        ValueError: if the model has mixers that do not become linear when their coefficients are held.
    """
    if others := _not_linear(model):
        raise ValueError(f"evidence is defined for models of Vim's and Mamba's mixers (got {', '.join(others)})")
    with HeldCoefficients(), torch.enable_grad():
        source = images.detach().requires_grad_()
        logits = model(source)
    classes = _explained(logits, classes)
    (slope,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), source)
    method = "the two scans of every layer, read as attention, multiplied through the network"
    return Evidence(logits.detach(), classes, (slope * (images - baseline)).sum(1), method)


def integrated_gradients(
    model: nn.Module,
    images: Tensor,
    *,
    baseline: float | Tensor = 0.0,
    classes: Tensor | None = None,
    steps: int = 32,
) -> Evidence:
    """The share of each pixel in the score (logit) of a class, of any classifier.

    Args:
        model: a classifier `[B, C, H, W]` to `[B, classes]`.
        images, baseline, classes: as in `evidence`; the shares add up to the score less the baseline's.
        steps: n, places along the line from the baseline, one forward and backward pass each.

    Raises:
        ValueError: if `classes` has another number of them, or `steps` is not positive.
    """
    check_sizes(steps=steps)
    images = images.detach()
    with torch.no_grad():
        logits = model(images)
    classes = _explained(logits, classes)
    slope = torch.zeros_like(images)
    for step in range(steps):
        with torch.enable_grad():
            source = (baseline + (step + 0.5) / steps * (images - baseline)).requires_grad_()
            scores = model(source).gather(1, classes[:, None]).sum()
        slope += torch.autograd.grad(scores, source)[0] / steps
    method = f"the mean slope of the score over {steps} steps from one to the other (integrated gradients)"
    return Evidence(logits, classes, (slope * (images - baseline)).sum(1), method)


def pixel_shares(model: nn.Module, images: Tensor, *, baseline: float | Tensor = 0.0) -> Evidence:
    """`evidence` where the model's mixers allow it, else `integrated_gradients`."""
    return (integrated_gradients if _not_linear(model) else evidence)(model, images, baseline=baseline)


def _not_linear(model: nn.Module) -> list[str]:
    """Mixers of a model that do not become linear when their coefficients are held, or the model where it has none."""
    linear = (VimPair, Mamba, Bidirectional)
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    if not mixers:
        return [type(model).__name__]
    return sorted({type(mixer).__name__ for mixer in mixers if not isinstance(mixer, linear)})


def _explained(logits: Tensor, classes: Tensor | None) -> Tensor:
    """One class for each picture."""
    classes = logits.argmax(-1) if classes is None else classes
    if classes.ndim != 1 or len(classes) not in (1, len(logits)):
        raise ValueError(
            f"classes must have one class for each of the {len(logits)} pictures, or one for all (got shape "
            f"{list(classes.shape)})"
        )
    return classes.expand(len(logits))
