"""Packages of extras that are absent or do not load: one sentence, with the command that helps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sinuous.core.extras import package


def test_an_absent_package_is_named_with_its_extra() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"needs no_such_module, .* pip install 'sinuous\[audio\]'") as caught:
        package("no_such_module.inside", "audio")
    assert caught.value.name == "no_such_module"


@pytest.mark.parametrize(
    "raised", ['OSError("libfoo.so: cannot open")', 'RuntimeError("CUDA 13.0,\\n not 13.2.")', "ImportError()"]
)
def test_a_package_that_does_not_load_is_one_sentence(
    raised: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package.py").write_text(f"raise {raised}")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="broken_package is installed and does not load") as caught:
        package("broken_package", "audio")
    assert "\n" not in str(caught.value)
    assert "broken_package" not in sys.modules


def test_an_error_inside_a_package_of_ours_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wanting.py").write_text("import something_else_entirely")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError) as caught:
        package("wanting", "audio")
    assert caught.value.name == "something_else_entirely"
