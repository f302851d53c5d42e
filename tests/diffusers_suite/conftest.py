"""Markers of diffusers' own tests, which pytest asks for."""

from __future__ import annotations

import pytest

MARKERS = (
    "attention autoround big_accelerator bitsandbytes cache compile context_parallel cpu_offload gguf group_offload "
    "ip_adapter lora memory modelopt nightly quantization quanto sdnq single_file tensor_parallel torchao training"
)


def pytest_configure(config: pytest.Config) -> None:
    for name in MARKERS.split():
        config.addinivalue_line("markers", f"{name}: of diffusers' tests")
