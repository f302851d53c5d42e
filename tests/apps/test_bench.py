"""`sinuous bench`: measurements that mean what their columns say."""

from __future__ import annotations

import csv
import math
import os
import re
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from sinuous.apps import cli
from sinuous.apps.bench import op_cases, ops, state_tracking
from sinuous.core.bench import measure
from sinuous.core.ops.laws import LAWS
from sinuous.vision.bench import backbones


def main(arguments: list[str]) -> int:
    return cli.main(["bench", *arguments])


CPU = torch.device("cpu")
MEGABYTE = 1_000_000


class Clock:
    """Time that passes only when a candidate works."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setitem(measure.CLOCKS, "wall", lambda: self.now)

    def work(self, seconds: float) -> None:
        self.now += seconds


def test_candidates_take_turns(monkeypatch):
    clock, calls = Clock(monkeypatch), []
    candidates = {name: lambda name=name: (calls.append(name), clock.work(0.006)) for name in "ab"}
    samples = measure.round_robin(candidates, CPU, repeats=3)
    assert calls == ["a", "a", "b", "b"] + ["a", "b"] * 3
    assert samples["a"] == pytest.approx([0.006] * 3)


def test_short_calls_are_repeated_inside_a_sample(monkeypatch):
    clock, calls = Clock(monkeypatch), []
    samples = measure.round_robin({"short": lambda: (calls.append(1), clock.work(0.0004))}, CPU, repeats=1)
    assert len(calls) == 2 + 13, "as often as fills the shortest sample"
    assert samples["short"] == pytest.approx([0.0004]), "a sample is the mean of its calls, not their sum"


def _allocate(megabytes: int) -> torch.Tensor:
    return torch.zeros(megabytes * MEGABYTE // 4).add_(1)


def _peaks() -> dict[str, float] | None:
    kept = _allocate(30)
    assert kept.numel()
    return measure.peak_growth({"small": partial(_allocate, 20), "large": partial(_allocate, 80)}, CPU)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reading one's own peak needs Linux")
def test_peak_counts_what_a_call_needs_and_nothing_held_before():
    peaks = measure.in_fresh_process(_peaks, timeout=120)
    assert peaks["small"] == pytest.approx(20 * MEGABYTE, rel=0.15)
    assert peaks["large"] == pytest.approx(80 * MEGABYTE, rel=0.15)


def test_a_process_that_dies_or_hangs_gives_no_figure():
    assert measure.in_fresh_process(os._exit, 1, timeout=60) is None
    start = time.perf_counter()
    assert measure.in_fresh_process(time.sleep, 600, timeout=3) is None
    assert time.perf_counter() - start < 60


def _rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


SMALL = ["--lengths", "48,96", "--batch", "2", "--dim", "8", "--state", "4", "--repeats", "1"]


def test_every_op_is_compared():
    assert set(op_cases.CASES) == set(LAWS)


def test_ops_compares_every_backend_and_peer_on_the_same_function(tmp_path):
    path = tmp_path / "ops.csv"
    assert main(["ops", *SMALL, "--no-memory", "--csv", str(path)]) == 0
    rows = _rows(path)
    for case in op_cases.CASES.values():
        mine = [row for row in rows if row["op"] == case.name]
        wanted = {n for n, reason in op_cases.backends(case, CPU).items() if reason is None}
        wanted |= {peer.name for peer in case.peers if peer.unavailable(CPU) is None}
        for length in ("48", "96"):
            for which in ops.PASSES:
                part = [row for row in mine if row["length"] == length and row["pass"] == which]
                assert {row["implementation"] for row in part} == wanted
                assert all(float(row["median_ms"]) > 0 for row in part)
        for row in mine:
            if row["implementation"] == "nn.LSTM":
                assert row["difference"] == ""
            else:
                assert float(row["difference"]) < 1e-5, row
            if row["implementation"] == row["versus"]:
                assert float(row["ratio"]) == 1


def test_a_peer_that_computes_something_else_is_seen(monkeypatch):
    case = op_cases.CAUSAL_CONV1D

    def without_activation(inputs):
        return op_cases.Prepared(lambda: case.run("recurrent", **inputs) * 1.01, list(inputs.values()))

    wrong = op_cases.Peer("wrong", "torch", without_activation)
    monkeypatch.setitem(op_cases.CASES, "causal_conv1d", replace(case, peers=(wrong,), versus="wrong"))
    options = ops_options("--op", "causal_conv1d", "--lengths", "32", "--dim", "8", "--repeats", "1", "--no-memory")
    rows = ops.run(options)
    assert [row["difference"] for row in rows if row["implementation"] == "wrong"] == pytest.approx(
        [0.01] * 2, rel=0.01
    )


def ops_options(*arguments):
    import argparse

    parser = argparse.ArgumentParser()
    ops.add_arguments(parser)
    return parser.parse_args(arguments)


def test_a_quadratic_candidate_is_left_out_before_it_runs():
    budget = ops.Budget(limit=10)
    budget.note("peer", "forward", 256, 0.5)
    assert budget.allows("peer", "forward", 4096, quadratic=False)
    assert not budget.allows("peer", "forward", 4096, quadratic=True)
    assert budget.expected("peer", "forward", 1024, quadratic=True) == pytest.approx(8.0)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reading one's own peak needs Linux")
def test_our_peak_stays_below_one_tensor_of_all_states_and_mambapys_does_not():
    shape = op_cases.Shape(batch=2, length=2048, dim=64, state=16)
    states = 4 * shape.batch * shape.length * shape.dim * shape.state
    for name, bounds in (("torch", (0.2, 1.0)), ("mambapy", (3.0, 20.0))):
        # A system that takes back idle pages between two readings adds them to a peak: the lower of two is nearer.
        arguments = (ops.measure_peak, "selective_scan", name, shape, "cpu", 1)
        peak = min(measure.in_fresh_process(*arguments, timeout=200)["forward+backward"] for _ in range(2))
        assert bounds[0] * states < peak < bounds[1] * states, (name, peak)


def test_pages_hold_the_command_that_made_them(tmp_path):
    path = tmp_path / "ops.md"
    arguments = [*SMALL, "--op", "causal_conv1d", "--no-memory", "--no-peers", "--markdown", str(path)]
    assert main(["ops", *arguments]) == 0
    page = path.read_text()
    (line,) = [line.strip() for line in page.splitlines() if line.startswith("    sinuous bench ops")]
    again = ops_options(*line.split()[3:])
    assert (again.op, again.lengths, again.dim, again.no_peers) == (["causal_conv1d"], "48,96", 8, True)
    assert page.count("| causal_conv1d | forward |") >= 2


def test_backbones_times_attention_fused_and_plain(tmp_path):
    table, figure = tmp_path / "b.csv", tmp_path / "b.png"
    arguments = [
        "--models",
        "deit_tiny_patch16_224,vit_tiny_patch16_224",
        "--sizes",
        "32,64",
        "--repeats",
        "1",
        "--plain",
    ]
    assert main(["backbones", *arguments, "--no-memory", "--csv", str(table), "--figure", str(figure)]) == 0
    rows = _rows(table)
    assert len(rows) == 2 * 2 * 2
    assert {row["tokens"] for row in rows if row["size"] == "64"} == {"16"}
    assert {row["versus"] for row in rows} == {"vit_tiny_patch16_224, fused attention"}
    assert figure.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_crossings_compare_each_of_ours_with_each_other(tmp_path):
    times = {"ours": [4, 4, 4], "slow": [9, 9, 9], "theirs": [1, 4, 16]}
    rows = [
        {"size": size, "model": model, "ours": model != "theirs", "median_ms": values[i], "peak_mb": None}
        for i, size in enumerate([100, 200, 400])
        for model, values in times.items()
    ]
    assert backbones.crossings(rows) == [
        {
            "model": model,
            "versus": "theirs",
            "faster_from_px": pytest.approx(start),
            "ratio_at_largest": pytest.approx(ratio),
            "leaner_from_px": None,
            "memory_ratio_at_largest": None,
        }
        for model, start, ratio in (("ours", 200, 4), ("slow", 200 * 2 ** (math.log(9 / 4) / math.log(4)), 16 / 9))
    ]


def test_backbones_of_every_kind_make_a_page_and_a_figure(tmp_path, capsys):
    page, figure = tmp_path / "b.md", tmp_path / "b.png"
    arguments = ["--models", "test_vim,test_vmamba,deit_tiny_patch16_224", "--sizes", "64,96", "--repeats", "1"]
    assert main(["backbones", *arguments, "--no-memory", "--markdown", str(page), "--figure", str(figure)]) == 0
    text = page.read_text()
    assert re.search(r"\| 96 \| 144 \| test_vim \|", text)
    assert re.search(r"\| 96 \| 576 \| test_vmamba \|", text)
    assert "| test_vmamba | deit_tiny_patch16_224 | " in text
    assert "Size from which a model stays ahead" in capsys.readouterr().out
    assert figure.stat().st_size > 5000


def test_fused_and_plain_attention_are_the_same_model():
    image = torch.randn(1, 3, 64, 64)
    outputs = []
    for kind in backbones.ATTENTION:
        model = backbones.build("deit_tiny_patch16_224", 64, kind, CPU)
        flags = {module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")}
        assert flags == {kind == "fused attention"}
        with torch.inference_mode():
            outputs.append(model(image))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs", "wanted"),
    [
        ([4, 4, 4], [1, 4, 16], 200.0),
        ([4, 4, 4], [2, 8, 32], 100 * 2**0.5),
        ([1, 1, 1], [2, 2, 2], 100.0),
        ([1, 3, 3], [2, 2, 2], None),
        ([1, 4, 1], [2, 1, 4], 200 * 2**0.5),
    ],
)
def test_crossing_is_where_ours_stays_ahead(ours, theirs, wanted):
    found = backbones.crossing([100, 200, 400], ours, theirs)
    assert found == (None if wanted is None else pytest.approx(wanted))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["ops", "--lengths", "12,x"], "--lengths"),
        (["ops", "--lengths", "0"], "--lengths"),
        (["ops", "--threads", "0"], "--threads must be at least 1"),
        (["ops", "--csv", f"{__file__}/x.csv"], "--csv cannot be written"),
        (["recall", "--markdown", "/proc"], "--markdown must name a file"),
        (["recall", "--steps", "-1"], "--steps must be at least 1"),
        (["backbones", "--sizes", "224;512"], "--sizes"),
        (["backbones", "--models", "no_such_model"], "no_such_model"),
        (["backbones", "--models", "deit_tiny_patch16_224", "--sizes", "32", "--versus", "x"], "--versus"),
        pytest.param(
            ["ops", "--device", "cuda"],
            "--device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, named, capsys):
    assert main(arguments) == 2
    message = capsys.readouterr().err.strip()
    assert named in message
    assert "Traceback" not in message
    assert message.count("\n") == 0


def test_recall_is_resumed_and_drawn(tmp_path, capsys):
    path, picture = tmp_path / "recall.csv", tmp_path / "recall.png"
    small = ["--steps", "2", "--batch", "2", "--tests", "4", "--dim", "32", "--csv", str(path)]
    assert main(["recall", *small, "--mixer", "delta_net", "--task", "parity"]) == 0
    first = _rows(path)
    assert [row["mixer"] for row in first] == ["delta_net", "delta_net, negative"]
    more = ["--mixer", "delta_net", "--mixer", "lru", "--task", "parity", "--task", "recall"]
    page = tmp_path / "recall.md"
    arguments = [*small, *more, "--resume", "--figure", str(picture), "--markdown", str(page)]
    assert main(["recall", *arguments]) == 0
    rows = _rows(path)
    assert [row for row in rows if row in first] == first
    assert len(rows) == 6
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows)
    assert picture.stat().st_size > 5000
    assert "sinuous bench recall" in page.read_text()
    assert main(["recall", "--mixer", "vim_pair"]) == 2
    assert "'vim_pair' sees the future" in capsys.readouterr().err
    path.write_text("a,b\n1,2\n")
    assert main(["recall", *arguments]) == 2
    assert "was not written by sinuous bench recall" in capsys.readouterr().err


def test_the_groups_of_recall_are_groups():
    for table in (state_tracking.cyclic(5), state_tracking.alternating(5)[1]):
        order = len(table)
        assert order in (5, 60)
        assert torch.equal(table[0], torch.arange(order))
        assert all(len(set(row.tolist())) == order for row in table)
        i, j, k = torch.randint(order, (3, 200), generator=torch.Generator().manual_seed(0))
        assert torch.equal(table[table[i, j], k], table[i, table[j, k]])


def test_the_answers_of_recall_are_right():
    generator = torch.Generator().manual_seed(0)
    inputs, targets = state_tracking.TASKS["parity"].draw(3, 20, generator)
    assert torch.equal(targets, inputs.cumsum(1) % 2)
    inputs, targets = state_tracking.TASKS["count mod 5"].draw(3, 20, generator)
    assert torch.equal(targets, inputs.cumsum(1) % 5)
    inputs, targets = state_tracking.TASKS["recall"].draw(3, 48, generator)
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        memory = dict(zip(row[:16:2], row[1:16:2], strict=True))
        assert wanted[:16] == [state_tracking.IGNORED] * 16
        assert [memory[key] for key in row[16:]] == wanted[16:]
    reached = state_tracking.TASKS["A5"].draw(50, 40, generator)[1]
    assert len(set(reached.flatten().tolist())) == 60


def test_generation_measures_speed_and_state(tmp_path, capsys):
    path = tmp_path / "generation.csv"
    arguments = ["--mixers", "mamba2,softmax_attention", "--contexts", "8,32", "--tokens", "2", "--repeats", "1"]
    assert main(["generation", *arguments, "--csv", str(path)]) == 0
    states = {(row["mixer"], row["context"]): float(row["state_mb"]) for row in _rows(path)}
    assert states["mamba2", "8"] == states["mamba2", "32"]
    assert states["softmax_attention", "32"] == pytest.approx(4 * states["softmax_attention", "8"], rel=0.05)
    assert main(["generation", "--contexts", "x"]) == 2
    assert "--contexts must be positive integers" in capsys.readouterr().err
