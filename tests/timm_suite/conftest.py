"""Runs timm's own test functions on our models.

timm's wheel has no tests; `python tools/fetch_timm_tests.py` puts those of its source distribution into an ignored
folder. Then

    pytest tests/timm_suite                                     # the small models, as in CI
    SINUOUS_TIMM_MODELS=all pytest tests/timm_suite             # every model of ours, at full size
    SINUOUS_TIMM_MODELS=vim_tiny_patch16_224 pytest tests/timm_suite -k forward

TORCH_DEVICE=cuda moves the forward and backward tests to a GPU, and TIMEOUT=seconds widens their limits.
"""

from __future__ import annotations

import pytest

_MARKERS = "base forward backward cfg cfg_nonstd torchscript features fxforward fxbackward"


def pytest_configure(config: pytest.Config) -> None:
    for marker in _MARKERS.split():
        config.addinivalue_line("markers", f"{marker}: of timm's suite")
