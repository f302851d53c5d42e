"""Compiling the C kernels on first use: the cache, the ways it can fail, processes and threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sinuous
from sinuous.kernels import cpu
from sinuous.kernels.cpu import build

REASON = cpu.unavailable(torch.device("cpu"), torch.float32)
needs_compiler = pytest.mark.skipif(REASON is not None, reason=f"no C kernels here: {REASON}")

SCAN = """
import torch
from sinuous.core.ops import selective_scan
u = torch.ones(1, 3, 2)
print(selective_scan(u, u, -torch.ones(2, 1), torch.ones(1, 3, 1), torch.ones(1, 3, 1)).sum().item())
"""


def python(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "2", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


@needs_compiler
def test_processes_that_start_together_leave_whole_libraries_and_later_ones_call_no_compiler(
    tmp_path: Path,
) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    log, wrapper = tmp_path / "calls", tmp_path / "cc"
    wrapper.write_text(f'#!/bin/sh\necho called >> {log}\nexec {compiler} "$@"\n')
    wrapper.chmod(0o755)
    cache = {"SINUOUS_CACHE": str(tmp_path / "cache"), "CC": str(wrapper)}
    answers = [finish(p)[0] for p in [python(SCAN, **cache), python(SCAN, **cache)]]
    calls = len(log.read_text().splitlines())
    assert calls >= 1
    assert answers[0] == answers[1]
    sources = sorted({path.stem for path in build.SOURCES.glob("*.c")} - set(cpu.INTERPRETERS))
    assert sources == sorted(cpu.FAMILIES)
    assert sorted(path.name.split("-32-")[0] for path in (tmp_path / "cache").glob("*.so")) == sources
    assert len(list((tmp_path / "cache").iterdir())) == len(sources)
    assert finish(python(SCAN, **cache))[0] == answers[0]
    assert len(log.read_text().splitlines()) == calls


def test_without_a_compiler_the_ops_say_so_once_and_run_in_torch(tmp_path: Path) -> None:
    code = SCAN + SCAN
    nowhere = {"PATH": str(tmp_path), "SINUOUS_CACHE": str(tmp_path / "cache"), "CC": ""}
    out, err = finish(python(code, **nowhere))
    assert err.count("no C compiler was found") == 1
    assert len(set(out.split())) == 1
    assert out.split()[0] == finish(python(SCAN, SINUOUS_BACKEND="torch"))[0].strip()


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'cc: internal error' >&2\nexit 1\n")
    broken.chmod(0o755)
    _, err = finish(python(SCAN, SINUOUS_CACHE=str(tmp_path / "cache"), CC=str(broken)))
    assert ".c (cc: internal error)" in err
    assert not list((tmp_path / "cache").iterdir())


@needs_compiler
def test_the_compiler_may_be_a_command_of_several_words(tmp_path: Path) -> None:
    launcher = tmp_path / "launcher"
    launcher.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path / "calls"}\nexec "$@"\n')
    launcher.chmod(0o755)
    _, err = finish(python(SCAN, SINUOUS_CACHE=str(tmp_path / "cache"), CC=f"{launcher} {build._compiler()[0]}"))
    assert err == ""
    assert set((tmp_path / "calls").read_text().split()) == {build._compiler()[0]}


@needs_compiler
@pytest.mark.parametrize("refused", ["selective_scan.c", "REAL_BITS=64"])
def test_one_library_that_fails_leaves_every_op_to_torch(tmp_path: Path, refused: str) -> None:
    partial = tmp_path / "cc"
    partial.write_text(f'#!/bin/sh\ncase "$*" in *{refused}*) exit 1;; esac\nexec {build._compiler()[0]} "$@"\n')
    partial.chmod(0o755)
    code = """
import torch
from sinuous.core.ops import causal_conv1d, selective_scan
for dtype in (torch.float32, torch.float64):
    u = torch.ones(1, 3, 2, dtype=dtype)
    A = -torch.ones(2, 1, dtype=dtype)
    for op, arguments in ((causal_conv1d, (u, A)), (selective_scan, (u, u, A, u[..., :1], u[..., :1]))):
        torch.testing.assert_close(op(*arguments), op(*arguments, backend="torch"))
"""
    _, err = finish(python(code, SINUOUS_CACHE=str(tmp_path / "cache"), CC=str(partial)))
    assert "RuntimeWarning: the C kernels cannot be used, ops run in plain torch" in err


def test_the_kernels_can_be_forbidden() -> None:
    code = "from sinuous.kernels import cpu; import torch; print(cpu.unavailable(torch.device('cpu'), torch.float32))"
    out, err = finish(python(code, SINUOUS_CPU_KERNELS="0"))
    assert out.strip() == "SINUOUS_CPU_KERNELS=0 forbids it"
    assert err == ""


def test_a_cache_that_cannot_be_written_gives_way_to_a_private_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file, where the folder should be")
    monkeypatch.setenv("SINUOUS_CACHE", str(blocked / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = build.cache_folder()
    assert folder == tmp_path / f"sinuous-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr("tempfile.tempdir", str(blocked))
    with pytest.raises(build.BuildError, match="SINUOUS_CACHE"):
        build.cache_folder()


def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SINUOUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("os.getuid", lambda: os.stat(tmp_path).st_uid + 1)
    with pytest.raises(build.BuildError, match="neither the cache folder nor a temporary one"):
        build.cache_folder()


@needs_compiler
def test_a_damaged_library_is_reported_and_the_ops_run_in_torch(tmp_path: Path) -> None:
    answer, _ = finish(python(SCAN, SINUOUS_CACHE=str(tmp_path)))
    for path in tmp_path.iterdir():
        path.write_bytes(b"not a library")
    out, err = finish(python(SCAN, SINUOUS_CACHE=str(tmp_path)))
    assert "could not be loaded" in err
    assert float(out) == pytest.approx(float(answer))


@needs_compiler
def test_a_fork_after_first_use_does_not_wait_for_threads_that_it_lacks() -> None:
    code = """
import os, torch
from sinuous.core.ops import selective_scan
torch.set_num_threads(2)
u = torch.randn(4, 200, 128)
call = lambda: selective_scan(u, u, -torch.ones(128, 16), u[..., :16], u[..., :16], backend="cpu")
y = call()
child = os.fork()
if child == 0:
    os._exit(0 if call().numpy().tobytes() == y.numpy().tobytes() else 1)  # torch.equal would itself wait
print(os.waitpid(child, 0)[1])
"""
    process = python(code)
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail("the child hangs")
    assert out.strip() == "0", err


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"u": (3, 150, 200), "dt": (3, 150, 200), "B": (3, 150, 16), "C": (3, 150, 16), "z": (3, 150, 200)}
    tensors = {k: torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for k, s in shapes.items()}
    A = -torch.rand(200, 16, generator=generator, dtype=dtype).requires_grad_()
    results, before = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = sinuous.ops.selective_scan(A=A, **tensors, backend="cpu")
            x = sinuous.ops.causal_conv1d(y, A[:, :4], activation="silu", backend="cpu")
            results.append((x, *torch.autograd.grad(x.square().sum(), [A, *tensors.values()])))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_compiler
def test_denormals_survive_the_loading_of_the_kernels() -> None:
    tiny = torch.tensor(1e-39)
    build.library("selective_scan", 32)
    assert (tiny * 1.0).item() > 0
