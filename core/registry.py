"""Every model by name: domains' own and, for vision, timm's registry filled by the same decorator.

Domains are found by their entry points, see `sinuous.core.domains`: importing one registers its models. Core thus
imports no domain, and other packages can join.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from timm.models import PretrainedCfg
from timm.models import register_model as register_with_timm
from torch import Tensor, nn

from sinuous.core.domains import load_domains

EntryPoint = Callable[..., nn.Module]


@dataclass(frozen=True)
class _Entry:
    build: EntryPoint
    domain: str
    cfgs: Mapping[str, PretrainedCfg]


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model without building it in memory.

    Attributes:
        name: with its tag, where one was asked for.
        domain: `vision`, `audio`, `video`, `genomics`, `language` or that of a third party.
        params: number of parameters.
        input_size: of one input, without the batch.
        paper: title, and number on arXiv.
        license: of the weights.
        weights: tags under which weights exist.
        metrics: what was measured of the weights, and what made them; empty where nothing was.
        description: one sentence on the weights, where they have one, or else on the architecture.
    """

    name: str
    domain: str
    params: int
    input_size: tuple[int, ...] | None
    paper: str | None
    license: str | None
    weights: tuple[str, ...]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    description: str | None = None


_MODELS: dict[str, _Entry] = {}


def register_model(fn: EntryPoint | None = None, *, domain: str, default_cfgs: Mapping[str, Any] | None = None) -> Any:
    """Decorator: register the function `name(pretrained=False, **kwargs) -> nn.Module` under its own name.

    Args:
        fn: the function.
        domain: where it belongs.
        default_cfgs: as made by timm's `generate_default_cfgs`; those of the function's module if absent.

    Raises:
        ValueError: if another function has that name.
    """
    if fn is None:
        return functools.partial(register_model, domain=domain, default_cfgs=default_cfgs)
    name = fn.__name__
    known = _MODELS.get(name)
    if known is not None and known.build.__module__ != fn.__module__:
        raise ValueError(f"model name {name!r} is taken by {known.build.__module__}; choose another")
    cfgs = getattr(sys.modules[fn.__module__], "default_cfgs", {}) if default_cfgs is None else default_cfgs
    _MODELS[name] = _Entry(fn, domain, dict(cfgs[name].cfgs) if name in cfgs else {})
    return fn


def register_vision_model(fn: EntryPoint | None = None, *, domain: str = "vision") -> Any:
    """Decorator: `register_model` here and in timm, for models of images and clips."""
    if fn is None:
        return functools.partial(register_vision_model, domain=domain)
    register_model(fn, domain=domain)
    return register_with_timm(fn)


def _entry(name: str) -> tuple[str, str, _Entry]:
    """(architecture, tag, entry) of a name, or a ValueError that names the closest."""
    load_domains()
    architecture, _, tag = name.partition(".")
    if architecture not in _MODELS:
        if timm.is_model(architecture):
            raise ValueError(f"{name!r} is timm's own; build it with timm.create_model({name!r})")
        if "/" in name or os.path.exists(name):
            raise ValueError(f"{name!r} is a place, not a model's name; open it with sinuous.load({name!r})")
        close = difflib.get_close_matches(architecture, _MODELS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "sinuous.list_models() lists the names"
        raise ValueError(f"there is no model {name!r}; {hint}")
    entry = _MODELS[architecture]
    if tag and tag not in entry.cfgs:
        tags = ", ".join(entry.cfgs) or "none"
        raise ValueError(f"{architecture!r} has no weights tagged {tag!r}; its tags are: {tags}")
    return architecture, tag, entry


def _weight_tags(entry: _Entry) -> tuple[str, ...]:
    return tuple(tag for tag, cfg in entry.cfgs.items() if cfg.has_weights)


def list_models(pattern: str = "", *, domain: str | None = None, pretrained: bool = False) -> list[str]:
    """Names of all models, sorted.

    Args:
        pattern: a glob that the whole name must match, such as `vim*`.
        domain: only those of this domain.
        pretrained: only those with weights, as `name.tag`.
    """
    load_domains()
    names = [
        full
        for name, entry in _MODELS.items()
        if domain in (None, entry.domain)
        for full in ([f"{name}.{tag}" for tag in _weight_tags(entry)] if pretrained else [name])
    ]
    return sorted(name for name in names if not pattern or fnmatch.fnmatch(name, pattern))


def create_model(
    name: str, *, pretrained: bool = False, checkpoint_path: str | os.PathLike[str] | None = None, **kwargs: Any
) -> nn.Module:
    """Build a model, with random weights, weights of ours, or those of a file.

    Args:
        name: an architecture, or `architecture.tag` for certain weights.
        pretrained: load the weights of the tag, or of the first one that has any.
        checkpoint_path: load this file instead: of ours, of `sinuous train`, or as the authors publish it; keys are
            renamed and positions resampled as needed. Where `num_classes` and `in_chans` are not given, the file says;
            a head for another number of classes is left out with a warning.
        **kwargs: for the model's constructor.

    Raises:
        ValueError: if there is no such model (naming the closest) or no such weights, or the file is for another model.
        FileNotFoundError: if there is no such file.
        ConnectionError: if weights lie on the hub and the hub cannot be reached.
    """
    architecture, tag, entry = _entry(name)
    if checkpoint_path is not None:
        if pretrained:
            raise ValueError("pretrained=True and checkpoint_path both say where weights come from; give one of them")
        return _from_file(architecture, entry, checkpoint_path, kwargs)
    tags = _weight_tags(entry)
    if pretrained and (tag not in tags if tag else not tags):
        known = ", ".join(list_models(pretrained=True)) or "no model yet"
        raise ValueError(
            f"sinuous has no weights for {name!r} (it has them for {known}); "
            "give the authors' file as checkpoint_path, or pretrained=False"
        )
    if not timm.is_model(architecture):
        return entry.build(pretrained=pretrained, **kwargs)
    return _reaching_the_hub(name, lambda: timm.create_model(name, pretrained=pretrained, **kwargs))


def _from_file(
    architecture: str, entry: _Entry, checkpoint_path: str | os.PathLike[str], kwargs: dict[str, Any]
) -> nn.Module:
    from sinuous.core.checkpoints import load_state_dict

    state = load_state_dict(checkpoint_path)
    if not timm.is_model(architecture):
        model = entry.build(pretrained=False, **kwargs)
        to_ours = getattr(sys.modules[entry.build.__module__], "checkpoint_filter_fn", None)
        state = state if to_ours is None else to_ours(state, model)
        check_weights(state, model)
        model.load_state_dict(state)
        return model
    cfg = next(iter(entry.cfgs.values()))
    overlay: dict[str, Any] = {"state_dict": state}
    head, stem = state.get(f"{cfg.classifier}.weight"), state.get(f"{cfg.first_conv}.weight")
    if head is not None:
        overlay["num_classes"] = head.shape[0]
    if stem is not None:
        overlay["input_size"] = (stem.shape[1], *cfg.input_size[1:])
    built: nn.Module = timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    for holder in (built, getattr(built, "model", None)):
        cast("dict[str, Any]", getattr(holder, "pretrained_cfg", {})).pop("state_dict", None)  # a copy of the weights
    wanted = kwargs.get("num_classes", 0)
    if head is not None and wanted not in (0, head.shape[0]):
        warnings.warn(
            f"the head of {os.fspath(checkpoint_path)} is for {head.shape[0]} classes and num_classes={wanted} was "
            "asked for: the new head has random weights and must be trained",
            UserWarning,
            stacklevel=3,
        )
    return built


def check_weights(state: Mapping[str, Tensor], model: nn.Module, adapted: tuple[str, ...] = ()) -> None:
    """Refuse a state dict that would leave parts of `model` at random values.

    Args:
        state: in the model's own names.
        model: to be filled.
        adapted: names or prefixes of parameters that may be absent or of another shape (a head, a stem).

    Raises:
        ValueError: naming the first parameter that is missing, has another shape, or is not the model's.
    """
    wanted = {name: t for name, t in model.state_dict().items() if not name.startswith(adapted or ("\0",))}
    missing = [name for name in wanted if name not in state]
    unknown = [name for name in state if name not in model.state_dict() and not name.startswith(adapted or ("\0",))]
    other = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    kind = type(model).__name__
    if other:
        name = other[0]
        raise ValueError(
            f"the checkpoint is for another {kind}: {name} has shape {list(state[name].shape)} there and "
            f"{list(wanted[name].shape)} here; choose the model, or its sizes, that the file was made with"
        )
    for names, what in ((missing, "lacks"), (unknown, "has a stranger,")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ValueError(
                f"the checkpoint is not one of this {kind}: it {what} {names[0]}{more}; "
                "choose the model that the file was made with"
            )


def load(path_or_hub_id: str | os.PathLike[str], **kwargs: Any) -> nn.Module:
    """A model with its weights, always: from a name, a folder, or the Hugging Face Hub.

    Args:
        path_or_hub_id: `architecture.tag` or an architecture that has weights; a folder written by timm's
            `save_for_hf` (`config.json` beside `model.safetensors`); or `organisation/name` on the hub.
        **kwargs: for the model's constructor.

    Raises:
        ValueError: if it is none of these.
        ConnectionError: if the hub cannot be reached.
    """
    place = os.fspath(path_or_hub_id)
    load_domains()
    if os.path.isdir(place):
        if not os.path.exists(os.path.join(place, "config.json")):
            raise ValueError(f"{place} has no config.json; give a folder written by timm.models.save_for_hf")
        restored: nn.Module = timm.create_model(f"local-dir:{place}", pretrained=True, **kwargs)
        return restored
    if os.path.isfile(place):
        raise ValueError(
            f"{place} is a file, which does not say what model it is for; "
            "use sinuous.create_model(name, checkpoint_path=...)"
        )
    hub_id = place.removeprefix("hf-hub:")
    if "/" not in hub_id:
        return create_model(place, pretrained=True, **kwargs)
    if hub_id.count("/") > 1 or hub_id.startswith((".", "/", "~")):
        raise ValueError(f"there is nothing at {place}; check the path")
    return _reaching_the_hub(hub_id, lambda: timm.create_model(f"hf-hub:{hub_id}", pretrained=True, **kwargs))


def _reaching_the_hub(name: str, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        raise ConnectionError(
            f"cannot get {name!r} from the Hugging Face Hub ({type(error).__name__}); check the name and the network, "
            "or download the files and give sinuous.load their folder"
        ) from error


def model_info(name: str) -> ModelInfo:
    """Facts about a model; it is built without memory for its parameters.

    Raises:
        ValueError: if there is no such model, naming the closest.
    """
    _, tag, entry = _entry(name)
    with torch.device("meta"):
        model = entry.build(pretrained=False)
    tag = tag or next(iter(_weight_tags(entry)), next(iter(entry.cfgs), ""))
    cfg = entry.cfgs.get(tag, PretrainedCfg())
    paper = ", ".join(filter(None, (cfg.paper_name, cfg.paper_ids if isinstance(cfg.paper_ids, str) else None)))
    metrics = Path(cfg.file).with_suffix(".json") if cfg.file else None
    return ModelInfo(
        name=name,
        domain=entry.domain,
        params=sum(p.numel() for p in model.parameters()),
        input_size=tuple(cfg.input_size) if entry.cfgs else None,
        paper=paper or None,
        license=cfg.license,
        weights=_weight_tags(entry),
        metrics=json.loads(metrics.read_text()) if metrics is not None and metrics.exists() else {},
        description=cfg.description or inspect.getdoc(entry.build),
    )
