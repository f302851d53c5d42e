from __future__ import annotations

import importlib.util
import io
import os
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import timm


@pytest.fixture
def fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool, with an empty cache and a machine that has neither pip nor uv."""
    path = Path(__file__).parents[2] / "tools" / "fetch_timm_tests.py"
    spec = importlib.util.spec_from_file_location("fetch_timm_tests", path)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(tool, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None)
    return tool


def sdist(path: Path) -> Path:
    names = ["tests/test_models.py", "tests/fixture.txt", "timm/models/vit.py", "timm/test_not_here.py"]
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            member = tarfile.TarInfo(f"timm-{timm.__version__}/{name}")
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))
    return path


def program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)


def kept(tool: ModuleType) -> list[str]:
    return sorted(os.listdir(tool.CACHE / "timm_tests" / timm.__version__))


def test_takes_the_tests_out_of_an_archive(fetch: ModuleType, tmp_path: Path) -> None:
    assert fetch.main(["--sdist", str(sdist(tmp_path / "timm.tar.gz"))]) == 0
    assert kept(fetch) == ["test_models.py"]


def test_goes_from_a_broken_pip_to_the_next(fetch: ModuleType, tmp_path: Path) -> None:
    archive = sdist(tmp_path / "here.tar.gz")
    program(tmp_path / "bin" / "pip3", "raise SystemExit('ERROR: no network')")
    take = f"import shutil, sys; shutil.copy({str(archive)!r}, sys.argv[-1] + '/timm-{timm.__version__}.tar.gz')"
    program(tmp_path / "bin" / "pip", take)
    assert fetch.main([]) == 0
    assert kept(fetch) == ["test_models.py"]


def test_says_why_there_are_none_and_succeeds(
    fetch: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch.main([]) == 0
    assert "left out (neither pip nor uv is here); give its source archive" in capsys.readouterr().out
    program(tmp_path / "bin" / "pip", "raise SystemExit('WARNING: slow\\nERROR: no network')")
    assert fetch.main([]) == 0
    assert "left out (no network); give its source archive" in capsys.readouterr().out


def test_refuses_another_archive(fetch: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.tar.gz").write_bytes(b"x")
    with pytest.raises(SystemExit, match="2"):
        fetch.main(["--sdist", str(tmp_path / "x.tar.gz")])
    assert "x.tar.gz is no source archive of timm; give timm-" in capsys.readouterr().err
