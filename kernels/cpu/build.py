"""Compiles the C sources beside this file on first use, into a cache of the user's.

The name of a compiled library says all that it depends on: sources, flags, compiler and CPU. It is written under
another name first and moved into place, so that processes that start together need no lock and never load half a
file. Nothing here raises to the user: where a library cannot be had, `problem()` says why and the ops take another
backend.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
FLAGS = (
    "-O2",
    "-std=gnu11",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-shared",
    "-fPIC",
    "-Wno-psabi",
)
TIMEOUT_S = 120


class BuildError(Exception):
    """A library could not be compiled or loaded; the message says why, in one sentence."""


_forked = False


def _after_fork() -> None:
    # A child of a fork inherits the OpenMP runtime's belief in threads that it does not have, and would wait for them.
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


def threads() -> int:
    """Number of threads that a kernel may use: torch's number, and one in a forked child."""
    return 1 if _forked else torch.get_num_threads()


def _compiler() -> tuple[str, ...]:
    """The command of the compiler; `CC` may be more than a name (`ccache gcc`, `gcc -pthread`)."""
    # gcc first: its OpenMP runtime is the one that torch brings, and a second one would fight for the cores.
    for command in (os.environ.get("CC", ""), "gcc", "cc", "clang"):
        words = command.split()
        path = shutil.which(words[0]) if words else None
        if path:
            return (path, *words[1:])
    raise BuildError("no C compiler was found (install gcc, or name one in CC)")


def _executables(compiler: tuple[str, ...]) -> list[str]:
    """The files that a command runs, behind their links: of `ccache gcc` both."""
    return [os.path.realpath(path) for word in compiler if (path := shutil.which(word))]


def _variants(compiler: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Sets of further flags to try in turn; not every compiler knows each."""
    native = "-mcpu=native" if platform.machine() in ("arm64", "ppc64le") else "-march=native"
    clang = any("clang" in os.path.basename(path) for path in _executables(compiler))
    parallel = () if clang else ("-fopenmp",)
    return list(dict.fromkeys([(native, *parallel), (native,), parallel, ()]))


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())


def cache_folder() -> Path:
    """A folder to keep libraries in: `SINUOUS_CACHE`, the user's cache, or a private one among temporary files.

    Raises:
        BuildError: if none of them can be written.
    """
    named = os.environ.get("SINUOUS_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    for folder in (
        Path(named) if named else Path(base) / "sinuous",
        Path(tempfile.gettempdir()) / f"sinuous-{os.getuid()}",
    ):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_uid != os.getuid():
                continue  # a library of somebody else's would be run here
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    raise BuildError("neither the cache folder nor a temporary one can be written (name one in SINUOUS_CACHE)")


def _compile(compiler: tuple[str, ...], source: Path, bits: int, target: Path) -> None:
    messages = []
    for variant in _variants(compiler):
        handle, temporary = tempfile.mkstemp(suffix=".so", dir=target.parent)
        os.close(handle)
        command = [*compiler, *FLAGS, *variant, f"-DREAL_BITS={bits}", str(source), "-o", temporary]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
            if done.returncode == 0:
                os.replace(temporary, target)
                return
            messages.append(done.stderr.strip().splitlines()[0] if done.stderr.strip() else f"exit {done.returncode}")
        except (OSError, subprocess.TimeoutExpired) as error:
            messages.append(str(error))
        finally:
            Path(temporary).unlink(missing_ok=True)
    raise BuildError(f"{' '.join(compiler)} could not compile {source.name} ({messages[0]})")


@functools.cache
def library(family: str, bits: int) -> ctypes.CDLL:
    """The compiled kernels of `family` in `bits` = 32 or 64 bit floating point.

    Raises:
        BuildError: if there is no compiler, no place to write to, or the compiler fails.
    """
    compiler, source = _compiler(), SOURCES / f"{family}.c"
    parts = [path.read_bytes() for path in (source, *sorted(SOURCES.glob("*.h")))]
    parts += [repr((FLAGS, compiler, bits)).encode(), _cpu().encode()]
    for path in _executables(compiler):  # instead of asking for versions, which would start a process each time
        stat = os.stat(path)
        parts.append(f"{path} {stat.st_size} {stat.st_mtime_ns}".encode())
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]
    target = cache_folder() / f"{family}-{bits}-{key}.so"
    if not target.exists():
        _compile(compiler, source, bits, target)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise BuildError(f"the compiled {target} could not be loaded ({error})") from error
