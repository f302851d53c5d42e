"""Linear time-invariant systems: the convolution of S4D."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sinuous.apps.bench.op_cases.contract import Case, Inputs, Peer, Prepared, channels_first, lstm
from sinuous.core.hippo import diagonal_response
from sinuous.core.ops.laws import lti_conv


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
    laws=lti_conv.LAWS,
    sample=lambda shape: lti_conv.sample_of(shape.dim, max(shape.state // 2, 1), 0, "zoh", full=True),
    uses=("u", "dt", "A", "B", "C", "D"),
    peers=(
        Peer("torch.fft", "torch", _fourier),
        Peer("fft, few powers", "torch", _fourier_of_few_powers),
        Peer("nn.LSTM", "torch", lstm, same_function=False),
    ),
    versus="torch.fft",
)
