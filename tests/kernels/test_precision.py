"""The rule of precision: double stays double, all else is computed in single."""

import pytest
import torch

from sinuous.kernels.precision import at_least_fp32, is_double, real_dtype, working_dtype

SINGLE = (torch.float16, torch.bfloat16, torch.float32, torch.complex64)
DOUBLE = (torch.float64, torch.complex128)


@pytest.mark.parametrize("dtype", [*SINGLE, *DOUBLE])
def test_arithmetic_is_double_for_double_input_alone(dtype):
    double = dtype in DOUBLE
    assert is_double(dtype) == double
    assert real_dtype(dtype) == (torch.float64 if double else torch.float32)
    working = working_dtype(dtype)
    assert working.is_complex == dtype.is_complex
    assert working.to_real() == real_dtype(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_real_tensor_is_widened_to_the_working_dtype_and_no_copy_is_made_of_one_that_has_it(dtype):
    x = torch.ones(3, dtype=dtype)
    wide = at_least_fp32(x)
    assert wide.dtype == working_dtype(dtype)
    assert (wide is x) == (dtype == wide.dtype)
