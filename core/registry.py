"""Every model by name: domains' own and, for vision, timm's registry filled by the same decorator.

Importing a domain registers its models, and `sinuous.core.domains` finds the domains; core imports none of them.

A model built by its name knows how it was built, in two attributes that timm gives its own models: `pretrained_cfg`
(among its entries `architecture` and `tag`) and `_model_args`, the arguments of the constructor. `sinuous.save` writes
them. A model that changes its sizes later writes them into `_model_args`, with timm's `update_model_args`.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from timm.models import PretrainedCfg
from timm.models import register_model as register_with_timm
from torch import Tensor, nn

from sinuous.core.checkpoints import data_facts, load_state_dict
from sinuous.core.domains import load_domains
from sinuous.core.weights import read_card

EntryPoint = Callable[..., nn.Module]
T = TypeVar("T")


_NOT_KEPT = ("pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "cache_dir", "device", "dtype")
"""Arguments that say where weights come from or where they go, not what the model is."""


@dataclass(frozen=True)
class Entry:
    """A registered model.

    Attributes:
        build: the registered function.
        domain: where it belongs.
        cfgs: by tag.
        in_timm: registered with timm, too.
    """

    build: EntryPoint
    domain: str
    cfgs: Mapping[str, PretrainedCfg]
    in_timm: bool


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
        card: what is known of the weights that ship with the package, see `sinuous.core.weights`; empty without any.
        description: one sentence on the weights, where they have one, or else on the architecture.
    """

    name: str
    domain: str
    params: int
    input_size: tuple[int, ...] | None
    paper: str | None
    license: str | None
    weights: tuple[str, ...]
    card: Mapping[str, Any] = field(default_factory=dict)
    description: str | None = None

    @property
    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """Scores of the weights, `{split: {score: value}}`."""
        return dict(self.card.get("scores", {}))

    @property
    def scores(self) -> Mapping[str, float]:
        """Scores of the weights on the test set."""
        return dict(self.metrics.get("test", {}))


_MODELS: dict[str, Entry] = {}


def register_model(fn: EntryPoint | None = None, *, domain: str, default_cfgs: Mapping[str, Any] | None = None) -> Any:
    """Decorator: register the function `name(pretrained=False, **kwargs) -> nn.Module` under its own name.

    What it builds is told its name and its arguments. The function itself is never asked for weights: with
    `pretrained=True` they are loaded into what it has built.

    Args:
        fn: the function.
        domain: where it belongs.
        default_cfgs: as made by timm's `generate_default_cfgs`; those of the function's module if absent.

    Raises:
        ValueError: if another function has that name.
    """
    if fn is None:
        return functools.partial(register_model, domain=domain, default_cfgs=default_cfgs)
    return _register(fn, domain, default_cfgs, in_timm=False)


def register_vision_model(fn: EntryPoint | None = None, *, domain: str = "vision") -> Any:
    """Decorator: `register_model` here and in timm, for models of images and clips; timm loads their weights."""
    if fn is None:
        return functools.partial(register_vision_model, domain=domain)
    return register_with_timm(_register(fn, domain, None, in_timm=True))


def _register(fn: EntryPoint, domain: str, default_cfgs: Mapping[str, Any] | None, in_timm: bool) -> EntryPoint:
    name = fn.__name__
    known = _MODELS.get(name)
    if known is not None and known.build.__module__ != fn.__module__:
        raise ValueError(f"model name {name!r} is taken by {known.build.__module__}; choose another")
    all_cfgs = getattr(sys.modules[fn.__module__], "default_cfgs", {}) if default_cfgs is None else default_cfgs
    cfgs: dict[str, PretrainedCfg] = dict(all_cfgs[name].cfgs) if name in all_cfgs else {}

    @functools.wraps(fn)
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        tag = kwargs.get("pretrained_cfg")  # of timm: a tag, or a whole configuration that stands for itself
        from_elsewhere = {"state_dict", "file"} & set(kwargs.get("pretrained_cfg_overlay") or ())
        if pretrained and not tag and not from_elsewhere:
            tag = next(iter(_weight_tags(cfgs)), "")
        cfg = cfgs.get(tag) if isinstance(tag, str) else None
        of_tag = _card(cfg).get("model_args", {})
        arguments = {**of_tag, **kwargs}
        recorded = {key: value for key, value in arguments.items() if key not in _NOT_KEPT}
        model: Any
        if in_timm:
            if of_tag:
                arguments.setdefault("pretrained_model_args", of_tag)
            model = fn(pretrained=pretrained, **arguments)
            model._model_args = {**getattr(model, "_model_args", {}), **recorded}
            return cast("nn.Module", model)
        if pretrained:
            _check_has_weights(name, str(tag or ""), cfgs)
        placed = {key: arguments[key] for key in ("device", "dtype") if key in arguments}
        model = fn(pretrained=False, **recorded, **placed)
        model._model_args = recorded
        model.pretrained_cfg = _entries_given(name, str(tag or next(iter(cfgs), "")), cfgs)
        if pretrained:
            model.load_state_dict(fitted(load_state_dict(_file_of(cfgs[str(tag)], name)), model, fn))
        return cast("nn.Module", model)

    _MODELS[name] = Entry(build, domain, cfgs, in_timm)
    return build


def _entries_given(architecture: str, tag: str, cfgs: Mapping[str, PretrainedCfg]) -> dict[str, Any]:
    """Entries of a configuration that were given; the defaults of the others are for pictures."""
    defaults = vars(PretrainedCfg())
    entries = vars(cfgs[tag]) if tag in cfgs else {}
    given = {key: value for key, value in entries.items() if value != defaults[key]}
    return {**given, "architecture": architecture, **({"tag": tag} if tag else {})}


def _check_has_weights(architecture: str, tag: str, cfgs: Mapping[str, PretrainedCfg]) -> None:
    tags = _weight_tags(cfgs)
    if tag not in tags if tag else not tags:
        known = ", ".join(list_models(pretrained=True)) or "no model yet"
        name = f"{architecture}.{tag}" if tag else architecture
        raise ValueError(
            f"sinuous has no weights for {name!r} (it has them for {known}); "
            "give the authors' file as checkpoint_path, or pretrained=False"
        )


def _card(cfg: PretrainedCfg | None) -> Mapping[str, Any]:
    file = Path(cfg.file) if cfg is not None and cfg.file else None
    return read_card(file) if file is not None and file.with_suffix(".json").is_file() else {}


def _file_of(cfg: PretrainedCfg, name: str) -> str:
    place = (cfg.hf_hub_id, cfg.hf_hub_filename or "model.safetensors")
    return cfg.file or reaching_the_hub(name, lambda: hf_hub_download(*place))


def fitted(state: Mapping[str, Tensor], model: nn.Module, build: EntryPoint) -> Mapping[str, Tensor]:
    """`state` in the names of a model of `build`, through the `checkpoint_filter_fn` of its module where it has one.

    Raises:
        ValueError: if the weights are of another model.
    """
    to_ours = getattr(sys.modules[build.__module__], "checkpoint_filter_fn", None)
    state = state if to_ours is None else to_ours(state, model)
    check_weights(state, model)
    return state


def find_entry(name: str) -> tuple[str, str, Entry]:
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


def _weight_tags(cfgs: Mapping[str, PretrainedCfg]) -> tuple[str, ...]:
    return tuple(tag for tag, cfg in cfgs.items() if cfg.has_weights)


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
        for full in ([f"{name}.{tag}" for tag in _weight_tags(entry.cfgs)] if pretrained else [name])
    ]
    return sorted(name for name in names if not pattern or fnmatch.fnmatch(name, pattern))


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint_path: str | os.PathLike[str] | None = None,
    prefer: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a model, with random weights, weights of ours, or those of a file.

    Args:
        name: an architecture, or `architecture.tag` for certain weights.
        pretrained: load the weights of the tag, or of the first one that has any.
        checkpoint_path: load this file instead: of ours, of `sinuous train`, or as the authors publish it; keys are
            renamed and positions resampled as needed. Where `num_classes` and `in_chans` are not given, the file says;
            a head for another number of classes is left out with a warning.
        prefer: which weights of the file to take where it has several, such as `"model_ema"` for averaged ones; those
            called `"ema"` come first, where there are some.
        **kwargs: for the model's constructor.

    Raises:
        ValueError: if there is no such model (naming the closest) or no such weights, or the file is for another model.
        FileNotFoundError: if there is no such file.
        ConnectionError: if weights lie on the hub and the hub cannot be reached.
    """
    architecture, tag, entry = find_entry(name)
    if checkpoint_path is not None:
        if pretrained:
            raise ValueError("pretrained=True and checkpoint_path both say where weights come from; give one of them")
        return _from_file(architecture, tag, entry, checkpoint_path, prefer, kwargs)
    if pretrained:
        _check_has_weights(architecture, tag, entry.cfgs)
    if entry.in_timm:
        model: nn.Module = reaching_the_hub(name, lambda: timm.create_model(name, pretrained=pretrained, **kwargs))
        return model
    return entry.build(pretrained=pretrained, pretrained_cfg=tag, **kwargs)


_CFG_ENTRIES = {"mean": "mean", "std": "std", "classes": "label_names"}
"""Entries of timm's configuration for facts that weights of `sinuous train` know of their data."""


def _from_file(
    architecture: str,
    tag: str,
    entry: Entry,
    checkpoint_path: str | os.PathLike[str],
    prefer: str | None,
    kwargs: dict[str, Any],
) -> nn.Module:
    state = load_state_dict(checkpoint_path, prefer)
    if not entry.in_timm:
        model = entry.build(pretrained=False, pretrained_cfg=tag, **kwargs)
        model.load_state_dict(fitted(state, model, entry.build))
        return model
    cfg = entry.cfgs[tag] if tag else next(iter(entry.cfgs.values()))
    overlay: dict[str, Any] = {"state_dict": state}
    rename = getattr(sys.modules[entry.build.__module__], "our_names", dict)
    named: Mapping[str, Tensor] = rename(state)
    head, stem = named.get(f"{cfg.classifier}.weight"), named.get(f"{cfg.first_conv}.weight")
    if head is not None:
        overlay["num_classes"] = head.shape[0]
    if stem is not None:
        overlay["input_size"] = (stem.shape[1], *cfg.input_size[1:])
    facts = data_facts(checkpoint_path)
    overlay |= {entry: facts[key] for key, entry in _CFG_ENTRIES.items() if key in facts}
    if "img_size" in facts:
        kwargs = {"img_size": facts["img_size"], "pretrained_model_args": {"img_size": facts["img_size"]}, **kwargs}
    name = f"{architecture}.{tag}" if tag else architecture
    built: nn.Module = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    forget_weights(built)
    wanted = kwargs.get("num_classes", 0)
    if head is not None and wanted not in (0, head.shape[0]):
        warnings.warn(
            f"the head of {os.fspath(checkpoint_path)} is for {head.shape[0]} classes and num_classes={wanted} was "
            "asked for: the new head has random weights and must be trained",
            UserWarning,
            stacklevel=3,
        )
    return built


def forget_weights(model: nn.Module) -> None:
    """Take the copy of the weights out of the configuration that timm leaves with the model."""
    for holder in (model, getattr(model, "model", None)):
        cast("dict[str, Any]", getattr(holder, "pretrained_cfg", {})).pop("state_dict", None)


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
    for names, what in ((missing, "lacks"), (unknown, "has a parameter that the model lacks,")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ValueError(
                f"the checkpoint is not one of this {kind}: it {what} {names[0]}{more}; "
                "choose the model that the file was made with"
            )


def reaching_the_hub(name: str, fetch: Callable[[], T]) -> T:
    """Return `fetch()`, with one error that says what to do for all those of the network.

    Raises:
        ConnectionError: if the hub cannot be reached.
    """
    try:
        return fetch()
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
    _, tag, entry = find_entry(name)
    with torch.device("meta"):
        model = entry.build(pretrained=False, pretrained_cfg=tag)
    tag = tag or next(iter(_weight_tags(entry.cfgs)), next(iter(entry.cfgs), ""))
    cfg = entry.cfgs.get(tag, PretrainedCfg())
    paper = ", ".join(filter(None, (cfg.paper_name, cfg.paper_ids if isinstance(cfg.paper_ids, str) else None)))
    return ModelInfo(
        name=name,
        domain=entry.domain,
        params=sum(p.numel() for p in model.parameters()),
        input_size=tuple(cfg.input_size) if entry.cfgs else None,
        paper=paper or None,
        license=cfg.license,
        weights=_weight_tags(entry.cfgs),
        card=_card(cfg),
        description=cfg.description or inspect.getdoc(entry.build),
    )
