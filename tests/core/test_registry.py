from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.metadata
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from timm.models import PretrainedCfg
from torch import nn

import sinuous
from sinuous.core import domains, registry
from sinuous.core.checkpoints import save_safetensors

IMAGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A copy of the table of models that a test may change."""
    registry.list_models()
    table = dict(registry._MODELS)
    monkeypatch.setattr(registry, "_MODELS", table)
    return table


def test_lists_by_glob_domain_and_weights() -> None:
    names = sinuous.list_models()
    assert {"vim_tiny_patch16_224", "vim_nano", "test_vim"} <= set(names)
    assert names == sorted(names)
    assert sinuous.list_models("vim_*_stride8_*") == ["vim_small_patch16_stride8_224", "vim_tiny_patch16_stride8_224"]
    assert sinuous.list_models("im_*") == []
    assert set(sinuous.list_models("*vim*", domain="vision")) == set(sinuous.list_models("*vim*"))
    assert "vim_nano" not in sinuous.list_models(domain="audio")
    assert all(name.count(".") == 1 for name in sinuous.list_models(pretrained=True))


def test_creates_what_timm_creates() -> None:
    torch.manual_seed(0)
    ours = sinuous.create_model("test_vim", num_classes=7)
    torch.manual_seed(0)
    theirs = timm.create_model("test_vim", num_classes=7)
    assert torch.equal(ours(IMAGE), theirs(IMAGE))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vim_tinny_patch16_224", "no model 'vim_tinny_patch16_224'; did you mean 'vim_tiny_patch16_224'"),
        ("xyzzy", r"no model 'xyzzy'; sinuous.list_models\(\) lists the names"),
        ("resnet18", r"timm's own; build it with timm.create_model\('resnet18'\)"),
        ("org/vim", r"a place, not a model's name; open it with sinuous.load\('org/vim'\)"),
        ("test_vim.imagenet", "'test_vim' has no weights tagged 'imagenet'; its tags are: untrained"),
    ],
)
def test_names_that_are_not_known(name: str, message: str) -> None:
    for call in (sinuous.create_model, sinuous.model_info):
        with pytest.raises(ValueError, match=message):
            call(name)


def test_weights_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"no weights for 'test_vim' .*checkpoint_path"):
        sinuous.create_model("test_vim", pretrained=True)
    with pytest.raises(ValueError, match="no weights for 'test_vim'"):
        sinuous.load("test_vim")
    with pytest.raises(ValueError, match="give one of them"):
        sinuous.create_model("test_vim", pretrained=True, checkpoint_path="x.pth")


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, nn.Module]:
    """A checkpoint as hustvl/Vim publishes it, and the model it holds."""
    model = sinuous.create_model("test_vim", num_classes=7).eval()
    content = {
        "model": {f"module.{name}": t for name, t in model.state_dict().items()},
        "model_ema": {name: torch.zeros_like(t) for name, t in model.state_dict().items()},
        "epoch": 299,
        "args": argparse.Namespace(lr=1e-3),
    }
    torch.save(content, tmp_path / "vim.pth")
    return tmp_path / "vim.pth", model


def test_reads_the_authors_file_and_its_sizes(published: tuple[Path, nn.Module]) -> None:
    path, model = published
    loaded = sinuous.create_model("test_vim", checkpoint_path=path).eval()
    assert torch.equal(loaded(IMAGE), model(IMAGE))
    assert "state_dict" not in loaded.pretrained_cfg
    with pytest.warns(UserWarning, match="is for 7 classes and num_classes=3 was asked for"):
        other_head = sinuous.create_model("test_vim", checkpoint_path=path, num_classes=3).eval()
    assert torch.equal(other_head.forward_features(IMAGE), model.forward_features(IMAGE))
    assert other_head(IMAGE).shape == (1, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        headless = sinuous.create_model("test_vim", checkpoint_path=path, num_classes=0).eval()
    assert torch.equal(headless(IMAGE), model.forward_head(model.forward_features(IMAGE), pre_logits=True))
    gray = sinuous.create_model("test_vim", checkpoint_path=path, in_chans=1).eval()
    torch.testing.assert_close(gray(IMAGE[:, :1]), model(IMAGE[:, :1].expand(-1, 3, -1, -1)), atol=1e-5, rtol=0)


def test_reads_the_authors_file_into_a_feature_extractor(published: tuple[Path, nn.Module]) -> None:
    path, model = published
    features = sinuous.create_model("test_vim", checkpoint_path=path, features_only=True).eval()
    wanted = model.forward_intermediates(IMAGE, intermediates_only=True)
    for found, tap in zip(features(IMAGE), wanted, strict=True):
        torch.testing.assert_close(found, tap)


def test_refuses_the_file_of_another_model(published: tuple[Path, nn.Module], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is for another Vim: cls_token has shape .*choose the model"):
        sinuous.create_model("vim_tiny_patch16_224", checkpoint_path=published[0])
    with pytest.raises(ValueError, match=r"lacks layers.4.* \(and \d+ more\)"):
        sinuous.create_model("test_vim", checkpoint_path=published[0], depth=5)
    with pytest.raises(ValueError, match=r"has a parameter that the model lacks, layers.3"):
        sinuous.create_model("test_vim", checkpoint_path=published[0], depth=3, num_classes=3)
    save_safetensors({"weight": torch.ones(2)}, tmp_path / "linear.safetensors")
    with pytest.raises(ValueError, match="is not one of this Vim: it lacks"):
        sinuous.create_model("test_vim", checkpoint_path=tmp_path / "linear.safetensors")
    with pytest.raises(FileNotFoundError):
        sinuous.create_model("test_vim", checkpoint_path=tmp_path / "absent.pth")


def test_model_info(models: dict[str, Any], tmp_path: Path) -> None:
    info = sinuous.model_info("vim_tiny_patch16_224")
    assert (info.domain, info.params, info.input_size) == ("vision", 7_148_008, (3, 224, 224))
    assert info.license == "apache-2.0"
    assert "2401.09417" in str(info.paper)
    assert (info.weights, info.card, info.metrics, info.scores) == ((), {}, {}, {})
    assert info.description == "Vim-Ti: 76.1 % on ImageNet-1k in the paper."
    weights = tmp_path / "test_vim.toy.safetensors"
    models["test_vim"] = dataclasses.replace(
        models["test_vim"], cfgs={"toy": PretrainedCfg(file=str(weights), description="a toy")}
    )
    info = sinuous.model_info("test_vim")
    assert (info.weights, info.card, info.description) == (("toy",), {}, "a toy")
    assert "test_vim.toy" in sinuous.list_models(pretrained=True)


def test_a_domain_registers_without_timm(models: dict[str, Any], tmp_path: Path) -> None:
    @registry.register_model(domain="audio", default_cfgs={})
    def hum(pretrained: bool = False, width: int = 3) -> nn.Module:
        return nn.Linear(width, 1)

    assert "hum" in sinuous.list_models(domain="audio")
    assert "hum" not in sinuous.list_models(domain="vision")
    assert not timm.is_model("hum")
    assert sinuous.create_model("hum", width=4).in_features == 4
    assert sinuous.model_info("hum").input_size is None
    weights = {"weight": torch.ones(1, 3), "bias": torch.zeros(1)}
    save_safetensors(weights, tmp_path / "hum.safetensors")
    assert sinuous.create_model("hum", checkpoint_path=tmp_path / "hum.safetensors")(torch.ones(3)).item() == 3
    with pytest.raises(ValueError, match="weight has shape"):
        sinuous.create_model("hum", checkpoint_path=tmp_path / "hum.safetensors", width=4)
    vim_nano = SimpleNamespace(__name__="vim_nano", __module__=__name__)
    with pytest.raises(ValueError, match=r"model name 'vim_nano' is taken by sinuous.vision.vim"):
        registry.register_model(vim_nano, domain="audio")  # type: ignore[arg-type]


def test_a_model_knows_its_name_and_its_arguments(models: dict[str, Any]) -> None:
    def known(model: nn.Module) -> tuple[str, dict[str, Any]]:
        return model.pretrained_cfg["architecture"], model._model_args

    @registry.register_model(domain="audio", default_cfgs={})
    def hum(pretrained: bool = False, width: int = 3, dtype: torch.dtype | None = None) -> nn.Module:
        return nn.Linear(width, 1, dtype=dtype)

    assert known(sinuous.create_model("hum", width=4, dtype=torch.float64)) == ("hum", {"width": 4})
    assert known(copy.deepcopy(hum(width=4))) == ("hum", {"width": 4})
    assert known(torch.compile(hum(width=4))) == ("hum", {"width": 4})
    options = {"pretrained_cfg_overlay": {"num_classes": 5}, "cache_dir": "somewhere", "dtype": torch.float64}
    vim = timm.create_model("test_vim", mixer="mamba", **options)
    assert known(vim) == ("test_vim", {"mixer": "mamba"})
    assert vim.num_classes == 5
    assert known(models["test_vim"].build(mixer="mamba", **options)) == ("test_vim", {"mixer": "mamba"})


def test_a_broken_domain_is_left_out_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    good = importlib.metadata.EntryPoint("vision", "sinuous.vision", domains.GROUP)
    broken = importlib.metadata.EntryPoint("mine", "no_such_module_of_mine", domains.GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [broken, good])
    caches = (domains.domains, domains.load_domains)
    for cache in caches:
        cache.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"domain mine .* is left out: ModuleNotFoundError"):
        assert "vim_nano" in sinuous.list_models()
    for cache in caches:
        cache.cache_clear()


def test_what_a_domain_makes_when_it_is_imported_is_on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "domain_with_a_table").mkdir()
    module = tmp_path / "domain_with_a_table" / "__init__.py"
    module.write_text("import torch\n\ntable = torch.tensor([3, 4]).tolist()\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine = importlib.metadata.EntryPoint("mine", "domain_with_a_table", domains.GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [mine])
    caches = (domains.domains, domains.load_domains)
    for cache in caches:
        cache.cache_clear()
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("error")
        domains.load_domains()
    assert sys.modules["domain_with_a_table"].table == [3, 4]
    for cache in caches:
        cache.cache_clear()


def test_importing_the_package_imports_neither_torch_nor_timm() -> None:
    early = "[m for m in ('torch', 'timm') if m in sys.modules]"
    code = f"import sys, sinuous; print({early}, sinuous.list_models('test_vim'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] ['test_vim']"
