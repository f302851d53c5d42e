"""Linear time-invariant systems: the convolution of S4D."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sinuous.apps.bench.op_cases.contract import Case, Inputs, Peer, Prepared, Shape, channels_first, leaves, lstm
from sinuous.core import ops
from sinuous.core.hippo import diagonal_response
from sinuous.core.ops.lti_conv import FAMILY as LTI_CONV_FAMILY


def _inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    g = torch.Generator().manual_seed(0)
    batch, length, dim, state = shape
    modes = max(state // 2, 1)
    frequencies = math.pi * torch.arange(modes).expand(dim, modes)
    parameters = {
        "dt": torch.exp(torch.rand(dim, generator=g) * math.log(100) + math.log(0.001)),
        "A": torch.stack([torch.full((dim, modes), -0.5), frequencies], -1),
        "B": torch.randn(dim, modes, 2, generator=g),
        "C": torch.randn(dim, modes, 2, generator=g),
        "D": torch.randn(dim, generator=g),
    }
    u = torch.randn(batch, length, dim, generator=g).to(device, dtype)
    return leaves({"u": u, **{name: t.to(device) for name, t in parameters.items()}})


def _lti_conv(backend: str, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    y = ops.lti_conv(u, dt, A, B, C, D=D, backend=backend)
    assert isinstance(y, Tensor)
    return y


def _fourier(inputs: Inputs) -> Prepared:
    """The Vandermonde product and the three transforms that S4D's published code does without its CUDA extension."""

    def response(length: int, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        eigenvalues = torch.view_as_complex(A)
        z = dt[:, None] * eigenvalues
        weights = torch.view_as_complex(C) * torch.view_as_complex(B) * (torch.exp(z) - 1) / eigenvalues
        powers = torch.exp(z[..., None] * torch.arange(length, device=dt.device))
        return 2 * torch.einsum("dm,dml->dl", weights, powers).real

    return _transforms(inputs, response)


def _fourier_of_few_powers(inputs: Inputs) -> Prepared:
    """The same with a response made of the products of √T powers twice, in double precision."""
    return _transforms(inputs, lambda length, dt, A, B, C: diagonal_response(dt, A, B, C, length).to(dt.dtype))


def _transforms(inputs: Inputs, response_of: Callable[..., Tensor]) -> Prepared:
    moved = channels_first(inputs, ("u",))
    u, dt, A, B, C, D = moved.values()
    length = u.shape[2]

    def call() -> Tensor:
        response = response_of(length, dt, A, B, C)
        spectrum = torch.fft.rfft(u.float(), n=2 * length) * torch.fft.rfft(response, n=2 * length)
        y: Tensor = torch.fft.irfft(spectrum, n=2 * length)[..., :length] + D[:, None] * u
        return y.to(u.dtype)

    return Prepared(call, [u, dt, A, B, C, D], channels_first=True)


LTI_CONV = Case(
    family=LTI_CONV_FAMILY,
    make=_inputs,
    run=_lti_conv,
    peers=(
        Peer("torch.fft", "torch", _fourier),
        Peer("fft, few powers", "torch", _fourier_of_few_powers),
        Peer("nn.LSTM", "torch", lstm, same_function=False),
    ),
    versus="torch.fft",
)
