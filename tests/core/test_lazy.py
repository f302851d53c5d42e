"""Names of packages that are loaded on first use."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sinuous
from sinuous import audio
from sinuous.vision import generation


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package that offers `bread` at once and `cake` with a package that is not there."""
    folder = tmp_path / "shop_of_names"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from sinuous.core.lazy import lazily\n"
        "_LAZY = {'bread': 'oven', 'cake': 'kitchen'}\n"
        "__getattr__, __dir__ = lazily(__name__, _LAZY, {'kitchen': ('no_such_whisk', 'baking')})\n"
    )
    (folder / "oven.py").write_text("bread = object()\n")
    (folder / "kitchen.py").write_text("import no_such_whisk\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "shop_of_names"
    for name in [name for name in sys.modules if name.startswith("shop_of_names")]:
        del sys.modules[name]


def test_a_name_is_loaded_when_it_is_asked_for_and_is_the_same_afterwards(shop: str) -> None:
    package = importlib.import_module(shop)
    assert f"{shop}.oven" not in sys.modules
    assert {"bread", "cake"} <= set(dir(package))
    first = package.bread
    assert f"{shop}.oven" in sys.modules
    assert package.bread is first is vars(package)["bread"]
    with pytest.raises(AttributeError, match="module 'shop_of_names' has no attribute 'butter'"):
        package.butter  # noqa: B018


def test_a_name_whose_package_is_missing_says_which_extra_brings_it(shop: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"needs no_such_whisk.*pip install 'sinuous\[baking\]'"):
        importlib.import_module(shop).cake  # noqa: B018


@pytest.mark.parametrize("name", ["lamamba_diff_nano", "aim_nano", "test_diffwave"])
def test_models_without_diffusers_name_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)  # type: ignore[arg-type]
    with pytest.raises(ModuleNotFoundError, match=r"needs diffusers.*pip install 'sinuous\[diffusion\]'"):
        sinuous.create_model(name)


@pytest.mark.parametrize(
    ("package", "modules"),
    [
        (audio, ("diffusion_pipeline", "diffwave")),
        (generation, tuple(module for module, (needed, _) in generation._NEEDS.items() if needed == "diffusers")),
    ],
)
def test_every_name_that_needs_diffusers_names_the_extra(package: object, modules: tuple[str, ...]) -> None:
    table = package._LAZY  # type: ignore[attr-defined]
    names = [name for name, module in table.items() if module in modules]
    code = (
        "import importlib, sys; sys.modules['diffusers'] = None\n"
        f"package = importlib.import_module({package.__name__!r})\n"  # type: ignore[attr-defined]
        f"for name in {names}:\n"
        "    try:\n        getattr(package, name)\n"
        "    except ModuleNotFoundError as error:\n        assert 'sinuous[diffusion]' in str(error), error\n"
        "    else:\n        raise SystemExit(f'{name} was loaded')\n"
    )
    assert names
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
