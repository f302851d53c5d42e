from __future__ import annotations

import warnings

import pytest
import torch

from sinuous.core.ops import dispatch

CPU, FLOAT = torch.device("cpu"), torch.float32
FORMS = ("triton", "torch", "recurrent")


def test_an_argument_beats_the_context_and_the_context_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SINUOUS_BACKEND", "recurrent")
    assert dispatch.choose("x", FORMS, "", CPU, FLOAT) == "recurrent"
    with dispatch.backend("torch"):
        assert dispatch.choose("x", FORMS, "", CPU, FLOAT) == "torch"
        assert dispatch.choose("x", FORMS, "recurrent", CPU, FLOAT) == "recurrent"
    assert dispatch.choose("x", FORMS, "", CPU, FLOAT) == "recurrent"


def test_an_argument_that_cannot_be_met_is_an_error() -> None:
    with pytest.raises(ValueError, match="x has no cpu form"):
        dispatch.choose("x", FORMS, "cpu", CPU, FLOAT)


def test_a_wish_that_cannot_be_met_warns_once_and_takes_the_fastest() -> None:
    dispatch._warned.clear()
    with dispatch.backend("cpu"):
        with pytest.warns(RuntimeWarning, match="does not follow the wish for backend 'cpu'"):
            assert dispatch.choose("x", ("torch", "recurrent"), "", CPU, FLOAT) == "torch"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dispatch.choose("x", ("torch", "recurrent"), "", CPU, FLOAT)


def test_an_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = r"must be one of 'triton', 'cpu', 'torch', 'recurrent' \(got 'cuda'\)"
    with pytest.raises(ValueError, match=f"backend {unknown}"):
        dispatch.choose("x", FORMS, "cuda", CPU, FLOAT)
    with pytest.raises(ValueError, match=f"backend {unknown}"), dispatch.backend("cuda"):
        pass
    monkeypatch.setenv("SINUOUS_BACKEND", "cuda")
    with pytest.raises(ValueError, match=f"SINUOUS_BACKEND {unknown}"):
        dispatch.choose("x", FORMS, "", CPU, FLOAT)
