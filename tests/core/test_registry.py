from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from timm.models import PretrainedCfg
from torch import nn

import sinuous
from sinuous.core import registry
from sinuous.core.checkpoints import load_state_dict, save_safetensors

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
    with pytest.raises(ValueError, match=r"has a stranger, layers.3"):
        sinuous.create_model("test_vim", checkpoint_path=published[0], depth=3, num_classes=3)
    save_safetensors({"weight": torch.ones(2)}, tmp_path / "linear.safetensors")
    with pytest.raises(ValueError, match="is not one of this Vim: it lacks"):
        sinuous.create_model("test_vim", checkpoint_path=tmp_path / "linear.safetensors")
    with pytest.raises(FileNotFoundError):
        sinuous.create_model("test_vim", checkpoint_path=tmp_path / "absent.pth")


def test_saves_for_the_hub_and_loads_from_the_folder(tmp_path: Path) -> None:
    model = sinuous.create_model("test_vim", num_classes=7, mixer="mamba").eval()
    model.set_input_size((64, 96))
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    wide = torch.randn(1, 3, 64, 96)
    assert torch.equal(sinuous.load(tmp_path).eval()(wide), model(wide))


def test_places_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config.json; give a folder written by"):
        sinuous.load(tmp_path)
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"x")
    with pytest.raises(ValueError, match="is a file, which does not say what model it is for"):
        sinuous.load(file)
    with pytest.raises(ValueError, match="there is nothing at"):
        sinuous.load(tmp_path / "absent" / "model")


@pytest.mark.parametrize("error", [OfflineModeIsEnabled("off"), LocalEntryNotFoundError("no"), ConnectionError("no")])
def test_says_in_one_sentence_that_the_hub_is_out_of_reach(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def unreachable(name: str, **_: Any) -> nn.Module:
        assert name == "hf-hub:somebody/vim"
        raise error

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(ConnectionError, match=r"cannot get 'somebody/vim' from the .* Hub .*give sinuous.load"):
        sinuous.load("somebody/vim")


def test_model_info(models: dict[str, Any], tmp_path: Path) -> None:
    info = sinuous.model_info("vim_tiny_patch16_224")
    assert (info.domain, info.params, info.input_size) == ("vision", 7_148_008, (3, 224, 224))
    assert info.license == "apache-2.0"
    assert "2401.09417" in str(info.paper)
    assert (info.weights, info.metrics) == ((), {})
    assert info.description == "Vim-Ti: 76.1 % on ImageNet-1k in the paper."
    weights = tmp_path / "test_vim.toy.safetensors"
    weights.with_suffix(".json").write_text(json.dumps({"accuracy": 0.5}))
    entry = models["test_vim"]
    models["test_vim"] = registry._Entry(
        entry.build, "vision", {"toy": PretrainedCfg(file=str(weights), description="a toy")}
    )
    info = sinuous.model_info("test_vim.toy")
    assert (info.weights, info.metrics) == (("toy",), {"accuracy": 0.5})
    assert info.description == "a toy"
    assert "test_vim.toy" in sinuous.list_models(pretrained=True)


def test_shipped_weights_load_through_both_registries_and_say_how_good_they_are() -> None:
    names = sinuous.list_models(pretrained=True, domain="vision")
    assert "vim_nano.fashion_mnist" in names
    for name in names:
        file = Path(sinuous.create_model(name).pretrained_cfg["file"])
        loaded = (sinuous.load(name), timm.create_model(name, pretrained=True))
        for key, stored in load_state_dict(file).items():
            assert all(torch.equal(model.state_dict()[key], stored) for model in loaded)
        info = sinuous.model_info(name)
        assert 0 < info.metrics["test_accuracy"] <= 1
        assert info.weights == (name.partition(".")[2],)


def test_a_domain_registers_without_timm(models: dict[str, Any], tmp_path: Path) -> None:
    @registry.register_model(domain="audio", default_cfgs={})
    def hum(pretrained: bool = False, width: int = 3) -> nn.Module:
        return nn.Linear(width, 1)

    assert sinuous.list_models(domain="audio") == ["hum"]
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


def test_a_broken_domain_is_left_out_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    good = importlib.metadata.EntryPoint("vision", "sinuous.vision", "sinuous.models")
    broken = importlib.metadata.EntryPoint("mine", "no_such_module_of_mine", "sinuous.models")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [broken, good])
    registry._find_domains.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"models of mine .* are left out: ModuleNotFoundError"):
        assert "vim_nano" in sinuous.list_models()
    registry._find_domains.cache_clear()


def test_importing_the_package_imports_neither_torch_nor_timm() -> None:
    early = "[m for m in ('torch', 'timm') if m in sys.modules]"
    code = f"import sys, sinuous; print({early}, sinuous.list_models('test_vim'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] ['test_vim']"
