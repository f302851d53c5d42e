"""Models in the layout of the Hugging Face Hub: config.json, model.safetensors and README.md in a folder.

    sinuous.save(model, "my_vim")
    model = sinuous.load("my_vim")

config.json names the architecture and the arguments that build it, as timm's own does: timm reads a folder of a model
of pictures (`timm.create_model("local-dir:my_vim", pretrained=True)`), and `load` reads what timm has written.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import timm
import torch
from huggingface_hub import snapshot_download
from timm.models._hub import load_model_config_from_path, save_config_for_hf
from timm.models._input import get_model_args
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sinuous
from sinuous.core import registry
from sinuous.core.checkpoints import load_state_dict, save_safetensors
from sinuous.core.language.fla_checkpoints import fla_options
from sinuous.core.model_card import model_card
from sinuous.core.weights import Weights, all_weights, check_card

CONFIG, WEIGHTS, README = "config.json", "model.safetensors", "README.md"

_PICKLED = "pytorch_model.bin"
_SIZES = ("num_classes", "in_chans", "img_size", "global_pool")
"""Attributes that a model may change after it was built, and that are arguments of its constructor."""


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    card: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model that was built by its name into a folder, from which `load` builds it again, equal in every bit.

    The sizes are those that the model has now (after `reset_classifier` or `set_input_size`), and so are the dtypes.
    An interrupted call leaves the folder as it was, or without a config.json.

    Args:
        model: of `create_model`, `load`, or timm; compiled and data-parallel ones are unwrapped.
        folder: made if it is not there.
        card: what README.md tells of the weights, under the keys of `sinuous.core.weights`; its `pretrained_cfg` goes
            into config.json. If absent, it is the card of the shipped weights that the model's are equal to; without
            any, README.md says that nothing is recorded.
        overwrite: write into a folder that is not empty; other files in it stay.

    Raises:
        ValueError: if the model was not built by its name, or was changed to what no arguments build, or has an
            argument that JSON cannot hold; if the card has a key with another kind of value; if `folder` is a file,
            or is not empty and `overwrite` is False.
        OSError: if a file cannot be written.
    """
    model = _unwrapped(model)
    architecture = _architecture(model)
    arguments = _arguments(model, architecture)
    state = model.state_dict()
    target = Path(folder)
    if target.is_file():
        raise ValueError(f"{target} is a file; give a folder to save into")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"{target} is not empty; give another folder, or overwrite=True")
    shipped = _equal_weights(architecture, state) if card is None else None
    card = (shipped.card if shipped else {}) if card is None else card
    check_card(card, "card", whole=False)
    config = _config(model, architecture, arguments)
    # What the configuration says of the weights that the model began from need not hold for these.
    facts = {key: card.get(key) for key in ("license", "description")} | {"tag": shipped.tag if shipped else None}
    cfg = {**config["pretrained_cfg"], **facts, **card.get("pretrained_cfg", {})}
    config["pretrained_cfg"] = {key: value for key, value in cfg.items() if value is not None}
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=target) as inside:
        unfinished = Path(inside)
        save_safetensors(state, unfinished / WEIGHTS, {"format": "pt"})
        name = shipped.name if shipped else architecture
        (unfinished / README).write_text(model_card(model, name, arguments, card), encoding="utf-8")
        (unfinished / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        with contextlib.suppress(FileNotFoundError):
            (target / CONFIG).unlink()
        for file in (WEIGHTS, README, CONFIG):
            os.replace(unfinished / file, target / file)


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # of torch.compile
            model = inner
        else:
            return model


def _architecture(model: nn.Module) -> str:
    name = cast("dict[str, Any]", getattr(model, "pretrained_cfg", {})).get("architecture")
    kind = type(model).__name__
    if cast("dict[str, Any]", getattr(model, "_model_args", {})).get("features_only"):
        raise ValueError("a model with features_only=True is a part of one; save the whole model, and load it with it")
    if name in registry.list_models() and hasattr(model, "_model_args"):
        return str(name)
    if timm.is_model(str(name)):
        raise ValueError(f"this {kind} is timm's own {name}; save it with timm.models.save_for_hf")
    raise ValueError(
        f"this {kind} was not built by its name, so that nothing is known of how to build it again; build it with "
        "sinuous.create_model, or save its state_dict()"
    )


def _arguments(model: nn.Module, architecture: str) -> dict[str, Any]:
    """Arguments that build a model with the parameters that `model` has now."""
    recorded = dict(cast("dict[str, Any]", model._model_args))
    _, _, entry = registry.find_entry(architecture)
    for key, value in recorded.items():
        try:
            unchanged = json.loads(json.dumps(value)) == _as_json(value)
        except (TypeError, ValueError):
            unchanged = False
        if not unchanged:
            raise ValueError(
                f"the argument {key}={value!r} of {architecture} cannot be written into {CONFIG}; build the model with "
                "numbers, words, lists and dictionaries of them"
            )
    if entry.in_timm:
        # timm leaves these out unless they are given again.
        drop = {key: value for key, value in recorded.items() if key.endswith(("drop_rate", "drop_path_rate"))}
        recorded = get_model_args(model, drop)
    else:
        built = _on_meta(entry, recorded)
        for key in _SIZES:
            now = getattr(model, key, None)
            if isinstance(now, int | str | tuple) and now != getattr(built, key, now):
                recorded[key] = now
    _check_parameters(model, _on_meta(entry, recorded), architecture)
    return {key: _as_json(recorded[key]) for key in sorted(recorded)}


def _on_meta(entry: registry.Entry, arguments: Mapping[str, Any], cfg: Mapping[str, Any] | None = None) -> nn.Module:
    with torch.device("meta"):
        return entry.build(pretrained=False, pretrained_cfg=cfg, **arguments)


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_json(inner) for key, inner in value.items()}
    return [_as_json(inner) for inner in value] if isinstance(value, list | tuple) else value


def _check_parameters(model: nn.Module, built: nn.Module, architecture: str) -> None:
    now, first = ({name: list(t.shape) for name, t in m.state_dict().items()} for m in (model, built))
    name = next((name for name in {**first, **now} if now.get(name) != first.get(name)), None)
    if name is not None:
        here, there = (f"of shape {shapes[name]}" if name in shapes else "missing" for shapes in (now, first))
        raise ValueError(
            f"this {type(model).__name__} was changed after it was built: {name} is {here}, and {there} in the "
            f"{architecture} that its arguments build; save it before that change, or build a model of its present "
            "sizes and load its state_dict() into that"
        )
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError(f"this {architecture} is on the meta device and has no weights to save; load some first")


def _equal_weights(architecture: str, state: Mapping[str, Tensor]) -> Weights | None:
    """The shipped weights that these are, number by number."""
    for weights in all_weights().values():
        if weights.architecture == architecture:
            stored = load_state_dict(weights.file)
            if stored.keys() == state.keys() and all(
                tensor.shape == state[name].shape and torch.equal(tensor.double(), state[name].detach().cpu().double())
                for name, tensor in stored.items()
            ):
                return weights
    return None


def _config(model: nn.Module, architecture: str, arguments: dict[str, Any]) -> dict[str, Any]:
    if registry.find_entry(architecture)[2].in_timm:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / CONFIG
            save_config_for_hf(model, str(path), model_args=arguments)
            config: dict[str, Any] = {**json.loads(path.read_text()), "model_args": arguments}
    else:
        cfg = dict(cast("dict[str, Any]", model.pretrained_cfg))
        for key in ("architecture", "file", "hf_hub_id", "hf_hub_filename", "url"):
            cfg.pop(key, None)
        classes, labels = getattr(model, "num_classes", None), cfg.get("label_names", ())
        if classes is not None and classes != cfg.get("num_classes", len(labels)):
            cfg = {key: value for key, value in cfg.items() if not key.startswith("label_")}
            cfg["num_classes"] = classes
        config = {"architecture": architecture, "model_args": arguments, "pretrained_cfg": cfg}
    return {**config, "sinuous_version": sinuous.__version__}


def load(path_or_hub_id: str | os.PathLike[str], **kwargs: Any) -> nn.Module:
    """A model with its weights, always: from a name, a folder, or the Hugging Face Hub.

    Args:
        path_or_hub_id: `architecture.tag`, or an architecture that has weights; a folder of `save`, of timm's
            `save_for_hf`, or of a language model of fla's; or `organisation/name` on the hub,
            `organisation/name@revision` for a certain one.
        **kwargs: for the model's constructor, over those that the folder tells. A model of pictures is fitted to
            another `num_classes`, `in_chans` or `img_size` as timm does it.

    Returns:
        The model, in the dtypes of the file unless `dtype` is given; from a name in those of the constructor.

    Raises:
        ValueError: if it is none of these, or config.json is missing or names no known model, or the weights are
            missing, damaged, or of another model.
        ConnectionError: if the hub cannot be reached.
    """
    text = os.fspath(path_or_hub_id)
    if os.path.isdir(text):
        return _from_folder(Path(text), kwargs)
    if os.path.isfile(text):
        raise ValueError(
            f"{text} is a file, which does not say what model it is for; "
            "use sinuous.create_model(name, checkpoint_path=...)"
        )
    hub_id = text.removeprefix("hf-hub:")
    if "/" not in hub_id:
        return registry.create_model(text, pretrained=True, **kwargs)
    if hub_id.count("/") > 1 or hub_id.startswith((".", "/", "~")):
        raise ValueError(f"there is nothing at {text}; check the path")
    name, _, revision = hub_id.partition("@")
    folder = registry.reaching_the_hub(
        hub_id,
        lambda: snapshot_download(
            name, revision=revision or None, cache_dir=kwargs.get("cache_dir"), allow_patterns=[CONFIG, WEIGHTS]
        ),
    )
    return _from_folder(Path(folder), {key: value for key, value in kwargs.items() if key != "cache_dir"}, hub_id)


def _from_folder(folder: Path, kwargs: dict[str, Any], name: str | None = None) -> nn.Module:
    name = name or str(folder)
    architecture, config = _read_config(folder, name)
    state = _read_weights(folder, name)
    if architecture not in registry.list_models():
        return _by_timm(folder, state, kwargs)
    _, _, entry = registry.find_entry(architecture)
    arguments = config.get("model_args", {})
    try:
        cfg = None
        if entry.in_timm:
            cfg, _, arguments = load_model_config_from_path(folder)
        weights = registry.fitted(state, _on_meta(entry, arguments, cfg), entry.build)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"the {CONFIG} of {name} does not build {architecture}: {error}; get the folder again, or the version of "
            "the package that wrote it"
        ) from error
    if entry.in_timm:
        # timm fills what the constructor makes: fp32, which holds every number of the narrower kinds.
        wide = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} == {torch.float64}
        model = _by_timm(folder, state, {**({"dtype": torch.float64} if wide else {}), **kwargs})
        if "dtype" not in kwargs:
            _take_dtypes(cast("nn.Module", model.model) if kwargs.get("features_only") else model, state)
        return model
    model = entry.build(pretrained=False, **{**arguments, **kwargs})
    facts = {key: tuple(value) if isinstance(value, list) else value for key, value in config["pretrained_cfg"].items()}
    cast("Any", model).pretrained_cfg = {**facts, "architecture": architecture}
    if "dtype" not in kwargs:
        _take_dtypes(model, weights)
    registry.check_weights(weights, model)
    model.load_state_dict(weights)
    return model


def _read_config(folder: Path, name: str) -> tuple[str, dict[str, Any]]:
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{name} has no {CONFIG}; give a folder written by sinuous.save or timm.models.save_for_hf")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"the {CONFIG} of {name} is not JSON ({error}); copy or download it again") from error
    if isinstance(config, dict) and "model_type" in config and "architecture" not in config:  # transformers' layout
        config = {"architecture": "fla_lm", "model_args": fla_options(config)}
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(architecture, str):
        raise ValueError(
            f"the {CONFIG} of {name} names no architecture; give a folder written by sinuous.save or "
            "timm.models.save_for_hf"
        )
    known = registry.list_models()
    if architecture not in known and not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, known, n=3, cutoff=0.4)
        hint = f" (the closest: {', '.join(map(repr, close))})" if close else ""
        raise ValueError(
            f"{name} is for the model {architecture!r}, which nothing registers here{hint}; install the package that "
            "has it, or a newer version"
        )
    return architecture, {"pretrained_cfg": {}, **config}


def _read_weights(folder: Path, name: str) -> dict[str, Tensor]:
    for file in (WEIGHTS, _PICKLED):
        if (folder / file).is_file():
            return load_state_dict(folder / file)
    raise ValueError(f"{name} has no {WEIGHTS}; get it from where its {CONFIG} came from")


def _by_timm(folder: Path, state: dict[str, Tensor], kwargs: dict[str, Any]) -> nn.Module:
    overlay = {**kwargs.pop("pretrained_cfg_overlay", {}), "source": "", "state_dict": state}
    model: nn.Module = timm.create_model(
        f"local-dir:{folder}", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs
    )
    registry.forget_weights(model)
    return model


def _take_dtypes(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give parameters and buffers the dtypes of `state`; buffers that it lacks the one of all its real numbers."""
    floating = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in state:
            tensor.data = tensor.data.to(state[name].dtype)
        elif len(floating) == 1 and tensor.is_floating_point():
            tensor.data = tensor.data.to(next(iter(floating)))
