"""Models written as ONNX give, in onnxruntime, the outputs of the models themselves."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sinuous
from sinuous.core.mixers import build_mixer, list_mixers, mixer_class
from sinuous.core.ops.family import FAMILIES
from sinuous.core.ops.tracing import definitions
from sinuous.core.sequence_model import SequenceModel

QUICK = {"mamba2", "gla"}
COMPLEX = {"gate_loop", "lru", "s4", "s4d", "s5"}
STEPS = [
    name
    for name in list_mixers()
    if mixer_class(name).causal and mixer_class(name).constant_state and name not in COMPLEX
]


def runtime() -> Any:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="needs sinuous[export]")
    return pytest.importorskip("onnxruntime", reason="needs sinuous[export]")


def check_close(actual: Any, expected: Tensor) -> None:
    reference = expected.detach()
    torch.testing.assert_close(torch.from_numpy(actual), reference, rtol=0, atol=1e-5 * float(reference.abs().max()))


@pytest.mark.parametrize("name", ["test_vim", pytest.param("vim_nano", marks=pytest.mark.slow)])
def test_a_vim_runs_in_onnxruntime_at_another_batch_size(name: str, tmp_path: Path) -> None:
    ort = runtime()
    from sinuous.core.onnx import export

    model = sinuous.create_model(name)
    size = model.pretrained_cfg["input_size"]
    path = tmp_path / "vim.onnx"
    assert export(model, torch.randn(1, *size), path, metadata={"licence": "of the weights"}) <= 1e-5
    assert model.training
    session = ort.InferenceSession(path)
    assert session.get_modelmeta().custom_metadata_map["licence"] == "of the weights"
    pictures = torch.randn(5, *size)
    check_close(session.run(["y"], {"x": pictures.numpy()})[0], model.eval()(pictures))
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert path.stat().st_size < weights + 100_000
    assert str(Path(__file__).parents[2]).encode() not in path.read_bytes()


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in STEPS])
def test_steps_of_a_sequence_model_run_in_onnxruntime(name: str, tmp_path: Path) -> None:
    ort = runtime()
    from sinuous.core.onnx import export_step

    model = SequenceModel(17, 32, 2, pattern=name).eval()
    path = tmp_path / "step.onnx"
    export_step(model, torch.tensor([1]), path)
    session = ort.InferenceSession(path)
    ids, state = torch.randint(17, (3, 4)), model.initial_state(3)
    inputs = [argument.name for argument in session.get_inputs()]
    leaves = [t.numpy() for t in torch.utils._pytree.tree_leaves(state)]
    for t in range(ids.shape[1]):
        expected, state = model.step(ids[:, t], state)
        y, *leaves = session.run(None, dict(zip(inputs, [ids[:, t].numpy(), *leaves], strict=True)))
        check_close(y, expected)
    outputs = [result.name for result in session.get_outputs()]
    assert [f"next_{name}" for name in inputs[1:]] == outputs[1:]


def test_a_forward_pass_through_time_is_a_scan(tmp_path: Path) -> None:
    runtime()
    import onnx

    from sinuous.core.onnx import export

    export(build_mixer("gla", 16), torch.randn(2, 40, 16), tmp_path / "gla.onnx")
    nodes = onnx.load(tmp_path / "gla.onnx").graph.node
    assert [node.op_type for node in nodes].count("Scan") == 1
    assert len(nodes) < 100


def test_what_cannot_be_written_is_refused_in_a_sentence(tmp_path: Path) -> None:
    runtime()
    from sinuous.core.onnx import export, export_step

    path, ids = tmp_path / "x.onnx", torch.tensor([1])
    with pytest.raises(ValueError, match="SoftmaxAttention grows from step to step"):
        export_step(SequenceModel(17, 32, 1, pattern="softmax_attention"), ids, path)
    with pytest.raises(ValueError, match="Linear has no step"):
        export_step(nn.Linear(4, 4), torch.zeros(1, 4), path)
    with pytest.raises(ValueError, match=r"weight of Linear is torch.float64; export model.float"):
        export(nn.Linear(4, 4).double(), torch.zeros(1, 4), path)
    with pytest.raises(ValueError, match="grid_scan runs along 2 axes"):
        export(build_mixer("plstm_grid", 16), torch.zeros(1, 4, 16), path)
    with pytest.raises(ValueError, match="computes with complex numbers"):
        export_step(build_mixer("lru", 16), torch.zeros(1, 16), path)
    with pytest.raises(ValueError, match="batch on axis 0"):
        export(nn.Linear(4, 4), torch.tensor(1.0), path)
    assert not path.exists()


def test_outputs_that_differ_leave_no_file(tmp_path: Path) -> None:
    runtime()
    from sinuous.core.onnx import export

    with pytest.raises(ValueError, match="differ from the model's by"):
        export(build_mixer("gla", 16), torch.randn(2, 3, 16), tmp_path / "x.onnx", tolerance=0)
    assert not (tmp_path / "x.onnx").exists()


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sinuous.core import onnx

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match=r"onnx, which is not installed: pip install 'sinuous\[export\]'"):
        onnx.export(nn.Linear(4, 4), torch.zeros(1, 4), tmp_path / "x.onnx")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("taps", [1, 4])
def test_the_convolution_that_tracers_see_is_the_definition(reverse: bool, with_state: bool, taps: int) -> None:
    family = FAMILIES["causal_conv1d"]
    x, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 7, 3), (3, taps), (3,)))
    state = torch.randn(2, taps - 1, 3, dtype=torch.float64) if with_state else None
    assert family.traced is not None
    args = family.arguments(x, weight, bias, state, silu=True, reverse=reverse)
    torch.testing.assert_close(family.traced(args), family.recurrent(args))


def test_packed_sequences_have_no_visible_definition() -> None:
    mixer = build_mixer("gla", 16)
    with definitions(), pytest.raises(ValueError, match="packed sequences"):
        mixer(torch.randn(1, 5, 16), cu_seqlens=torch.tensor([0, 2, 5]))
