"""Time and memory of models of sequences: training against NX-AI's xlstm and attention of equal size, and reading and
writing, whose state does not grow, against attention."""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import time
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sinuous.core.bench import measure
from sinuous.core.bench.options import add_machine, add_outputs, positive_integers
from sinuous.core.checks import check_choice
from sinuous.core.registry import create_model, list_models
from sinuous.core.sequence_model import SequenceModel
from sinuous.core.tables import Row, command, show, write_csv, write_markdown

METHOD = """Models have random weights and read random letters. Training is forward and backward of the loss of the next
letter; the candidates of a length take turns in one process, and figures are medians. Reading takes the letters in
chunks of {chunk}, as generation does, and writing goes on from there by {tokens} greedy steps; both are timed once, in
a process of their own, and the state is what is kept between two letters. Peaks are what a call needs beyond weights
and letters, in a fresh process each. Ratios are the row's figure over that of the model of ours above it. NX-AI's
models are those of the package xlstm ({nx_ai}), with the same blocks, width, depth and heads and without rotary
positions; attention is fused, with rotary positions and an MLP that brings it to the same number of parameters. Rows
without figures of training are longer than --train-up-to."""

NX_AI, ATTENTION = "NX-AI's xlstm", "attention"
KINDS = {"mlstm", "slstm"}
"""Mixers that NX-AI's package has."""
CHUNK = 2048
COLUMNS = (
    "length", "model", "parameters", "median_ms", "tokens_per_s", "ratio", "peak_mb", "memory_ratio",
    "read_tokens_per_s", "write_tokens_per_s", "state_kb", "read_peak_mb",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default="dna_xlstm_2m,dna_xlstm_2m_mlstm", help="causal models of sinuous.genomics")
    parser.add_argument("--lengths", default="2048,16384,65536", help="comma-separated numbers of letters")
    parser.add_argument("--train-up-to", type=int, default=2048, help="longest sequence to train on")
    parser.add_argument("--batch", type=int, default=1, help="sequences in a step of training")
    parser.add_argument("--tokens", type=int, default=16, help="letters to write")
    parser.add_argument("--repeats", type=int, default=5, help="samples of training, of which the median is shown")
    add_machine(parser)
    parser.add_argument("--clock", default="wall", choices=sorted(measure.CLOCKS), help="cpu suits a busy machine")
    parser.add_argument("--no-peers", action="store_true", help="our models alone")
    parser.add_argument("--no-memory", action="store_true", help="skip the peaks of training")
    add_outputs(parser)


def build(name: str, peer: str, length: int) -> nn.Module:
    """Our model `name`, or a `peer` of equal size for sequences of `length`, randomly initialised.

    Raises:
        ValueError: if there is no such model, or it sees both sides.
    """
    torch.manual_seed(0)
    if name not in list_models(domain="genomics"):
        raise ValueError(f"--models: there is no model {name!r} of sequences; `sinuous models` lists them")
    model = create_model(name)
    if not (isinstance(model, SequenceModel) and model.causal):
        raise ValueError(f"--models: {name} sees both sides and neither reads nor writes in steps; name a causal model")
    return {"": lambda: model, NX_AI: lambda: of_nx_ai(model, length), ATTENTION: lambda: of_attention(model)}[peer]()


def of_nx_ai(model: SequenceModel, length: int) -> nn.Module:
    """The same blocks as the package xlstm has them, in its plain torch."""
    xlstm = importlib.import_module("xlstm")
    kinds = [model.layers.pattern[i % len(model.layers.pattern)] for i in range(model.depth)]
    mixers: dict[str, Any] = {kind: block.mixer for kind, block in zip(kinds, model.layers, strict=True)}
    options: dict[str, Any] = {}
    if "mlstm" in mixers:
        of_mlstm = mixers["mlstm"]
        layer = xlstm.mLSTMLayerConfig(
            num_heads=of_mlstm.memory_shape[0],
            proj_factor=of_mlstm.inner / model.dim,
            round_proj_up_to_multiple_of=1,
        )
        options |= {"mlstm_block": xlstm.mLSTMBlockConfig(layer), "bias": of_mlstm.proj_up.bias is not None}
    if "slstm" in mixers:
        blocks: list[Any] = list(model.layers)
        hidden = blocks[kinds.index("slstm")].mlp.fc2.weight.shape[1]
        wide = xlstm.FeedForwardConfig(proj_factor=hidden / model.dim, round_proj_up_to_multiple_of=1)
        cell = xlstm.sLSTMLayerConfig(num_heads=mixers["slstm"].num_heads, backend="vanilla")
        options["slstm_block"] = xlstm.sLSTMBlockConfig(cell, feedforward=wide)
    built: nn.Module = xlstm.xLSTMLMModel(
        xlstm.xLSTMLMModelConfig(
            vocab_size=model.padded_vocab_size,
            embedding_dim=model.dim,
            num_blocks=model.depth,
            context_length=length,
            slstm_at=[i for i, kind in enumerate(kinds) if kind == "slstm"],
            **options,
        )
    )
    built.reset_parameters()  # type: ignore[operator]
    return built


def of_attention(model: SequenceModel) -> SequenceModel:
    """Softmax attention and MLPs of the width and depth of `model`, with about as many parameters."""
    per_block = sum(p.numel() for p in model.layers.parameters()) / model.depth
    hidden = int(per_block - 4 * model.dim**2 - 2 * model.dim) // (2 * model.dim) // 8 * 8
    options: dict[str, Any] = {"mlp": "gelu", "mlp_ratio": hidden / model.dim} if hidden > 0 else {}
    pattern = "softmax_attention"
    return SequenceModel(
        model.vocab_size, model.dim, model.depth, pattern, norm="layer_no_bias", tie_head=model.tie_head, **options
    )


def peers_of(name: str) -> list[str]:
    """Peers that can be built here for our model `name`."""
    model = cast("SequenceModel", build(name, "", 1))
    peers = [ATTENTION]
    if set(model.layers.pattern) <= KINDS:
        if _has_nx_ai():
            peers.insert(0, NX_AI)
        else:
            measure.say("xlstm is not installed, so NX-AI's models are left out; add it by `pip install xlstm`")
    return peers


def _letters(model: nn.Module, length: int, batch: int, device: torch.device) -> Tensor:
    """Letters to read, and one more to come."""
    vocab_size = getattr(model, "vocab_size", None) or cast("Any", model).config.vocab_size
    return torch.randint(vocab_size, (batch, length + 1), device=device)


def training(model: nn.Module, letters: Tensor) -> Callable[[], object]:
    """One pass forward and backward."""

    def call() -> object:
        model.zero_grad()
        loss = F.cross_entropy(model(letters[:, :-1]).flatten(0, 1), letters[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return call


def measure_peak(name: str, peer: str, length: int, batch: int, device: str, threads: int) -> dict[str, float] | None:
    """Peak memory of one step of training in this process, beyond the weights; run it in a fresh one."""
    torch.set_num_threads(threads)
    place = torch.device(device)
    model = build(name, peer, length).to(place)
    training(model, _letters(model, min(length, 16), 1, place))()
    model.zero_grad()
    return measure.peak_growth({"training": training(model, _letters(model, length, batch, place))}, place)


@torch.inference_mode()
def read_and_write(model: SequenceModel, letters: Tensor, tokens: int) -> dict[str, float]:
    """Letters a second that one row reads, and writes behind them, and the bytes of its state."""
    state, begin = None, time.perf_counter()
    for chunk in letters.split(CHUNK, 1):
        logits, state = model.prefill(chunk, state, last_only=True)
    next_one, between = logits[:, -1].argmax(-1), time.perf_counter()
    for _ in range(tokens):
        logits, state = model.step(next_one, cast("Any", state))
        next_one = logits.argmax(-1)
    next_one.tolist()  # waits for the device
    end = time.perf_counter()
    kept = sum(t.numel() * t.element_size() for t in tree_leaves(state) if isinstance(t, Tensor))
    rates = {"read_tokens_per_s": letters.shape[1] / (between - begin), "write_tokens_per_s": tokens / (end - between)}
    return {**rates, "state_kb": kept / 1e3}


def measure_reading(name: str, peer: str, length: int, tokens: int, device: str, threads: int) -> dict[str, Any]:
    """`read_and_write` and its peak memory, in this process; run it in a fresh one."""
    torch.set_num_threads(threads)
    place, found = torch.device(device), {}
    model = cast("SequenceModel", build(name, peer, length).to(place).eval())
    read_and_write(model, _letters(model, 16, 1, place), 2)
    call = functools.partial(read_and_write, model, _letters(model, length - 1, 1, place), tokens)
    peak = measure.peak_growth({"reading": lambda: found.update(call())}, place)
    return {**(found or call()), "read_peak_mb": None if peak is None else peak["reading"] / 1e6}


def run(options: argparse.Namespace) -> list[Row]:
    """All rows that the options ask for; the table is printed at the end.

    Raises:
        ValueError: for lengths that are no positive integers, or a model that is unknown or not causal.
    """
    lengths = positive_integers("--lengths", options.lengths)
    check_choice("--clock", options.clock, measure.CLOCKS)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    names = [name.strip() for name in options.models.split(",")]
    candidates = [(name, peer) for name in names for peer in ["", *([] if options.no_peers else peers_of(name))]]
    rows: list[Row] = []
    for length in lengths:
        measure.say(f"{length} letters")
        times = _times(options, candidates, length, device) if length <= options.train_up_to else {}
        there = [pair for pair in candidates if pair in times or pair[1] != NX_AI]  # which does not read in parts
        of_length = [_row(options, name, peer, length, times) for name, peer in there]
        _compare(of_length)
        rows += of_length
    title = (
        f"Sequences: {measure.machine(device)}, {options.threads} thread(s), batch {options.batch}, "
        f"torch {torch.__version__}"
    )
    show(rows, COLUMNS, title=title, group=("length",))
    if options.csv:
        write_csv([{**row, "threads": options.threads, "torch": torch.__version__} for row in rows], options.csv)
        print(options.csv)
    if options.markdown:
        method = METHOD.format(chunk=CHUNK, tokens=options.tokens, nx_ai=_version())
        method = f"{method}\n\n    {command('sequences', options)}"
        write_markdown(rows, COLUMNS, options.markdown, title=title, method=method)
        print(options.markdown)
    return rows


def _version() -> str:
    return str(importlib.import_module("xlstm").__version__) if _has_nx_ai() else "not installed"


def _has_nx_ai() -> bool:
    return importlib.util.find_spec("xlstm") is not None


def _times(
    options: argparse.Namespace, candidates: list[tuple[str, str]], length: int, device: torch.device
) -> dict[tuple[str, str], float]:
    calls: dict[str, Callable[[], object]] = {}
    for name, peer in candidates:
        model = build(name, peer, length).to(device)
        calls[f"{name} {peer}"] = training(model, _letters(model, length, options.batch, device))
    samples = measure.round_robin(calls, device, repeats=options.repeats, clock=options.clock)
    return {pair: measure.median(samples[f"{pair[0]} {pair[1]}"]) for pair in candidates}


def _row(options: argparse.Namespace, name: str, peer: str, length: int, times: dict[tuple[str, str], float]) -> Row:
    seconds, machine = times.get((name, peer)), (options.device, options.threads)
    row: Row = {
        **dict.fromkeys(COLUMNS),
        "length": length,
        "model": f"{name}: {peer}" if peer else name,
        "ours": not peer,
        "parameters": sum(p.numel() for p in build(name, peer, length).parameters()),
        "median_ms": None if seconds is None else seconds * 1e3,
        "tokens_per_s": None if seconds is None else options.batch * length / seconds,
    }
    if seconds is not None and not options.no_memory:
        arguments = (name, peer, length, options.batch, *machine)
        peak = measure.in_fresh_process(measure_peak, *arguments, timeout=3600)
        row["peak_mb"] = None if peak is None else peak["training"] / 1e6
    if peer != NX_AI:
        reading = measure.in_fresh_process(measure_reading, name, peer, length, options.tokens, *machine, timeout=7200)
        row |= reading or {}
    return row


def _compare(rows: list[Row]) -> None:
    """Add the ratios of each row to the model of ours above it."""
    ours = rows[0]
    for row in rows:
        ours = row if row["ours"] else ours
        for figure, ratio in (("median_ms", "ratio"), ("peak_mb", "memory_ratio")):
            row[ratio] = row[figure] / ours[figure] if row[figure] and ours[figure] else None
