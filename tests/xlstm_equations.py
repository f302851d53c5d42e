"""Files as the authors of the first xLSTM and of Bio-xLSTM write them, and their models by the equations, in float64.

Keys and shapes are those of NX-AI/xlstm and ml-jku's repositories; no two numbers of a file are alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]
EPS = 1e-6  # of the mLSTM cell


@dataclass(frozen=True)
class Sizes:
    """Of a model: `kinds` has a letter for each block, m or s; U is the width of the feed-forward after an sLSTM."""

    vocab: int
    dim: int
    kinds: str
    heads: int
    up: int = 0
    bias: bool = False
    rotary: bool = False
    sinusoidal: bool = False
    published_strands: bool = False

    @property
    def inner(self) -> int:
        return 2 * self.dim // 64 * 64


def draw(*shape: int, scale: float = 0.3) -> Tensor:
    return torch.randn(shape, dtype=torch.float64) * scale


def file_of(sizes: Sizes) -> State:
    """Weights by the authors' names, without their prefixes, of a model of one strand."""
    D, E, H = sizes.dim, sizes.inner, sizes.heads
    state = {
        "token_embedding.weight": draw(sizes.vocab, D, scale=1),
        "lm_head.weight": draw(sizes.vocab, D),
        "xlstm_block_stack.post_blocks_norm.weight": draw(D),
    }
    if sizes.sinusoidal:
        state["xlstm_block_stack.absolute_pos_embeds.scale"] = draw(1)
    for i, kind in enumerate(sizes.kinds):
        block = f"xlstm_block_stack.blocks.{i}."
        layer = block + "xlstm."
        state[block + "xlstm_norm.weight"] = draw(D)
        width = E if kind == "m" else D
        state[layer + "conv1d.conv.weight"], state[layer + "conv1d.conv.bias"] = draw(width, 1, 4), draw(width)
        if kind == "m":
            linear = {"proj_up": (2 * E, D), "proj_down": (D, E)} | {f"{x}_proj": (E // 4, 4, 4) for x in "qkv"}
            biased = {"proj_up": 2 * E, "proj_down": D} | {f"{x}_proj": E for x in "qkv"}
            state |= {f"{layer}{name}.weight": draw(*shape) for name, shape in linear.items()}
            state |= {f"{layer}{name}.bias": draw(width) for name, width in biased.items() if sizes.bias}
            for gate in ("igate", "fgate"):
                state[f"{layer}mlstm_cell.{gate}.weight"] = draw(H, 3 * E, scale=0.1)
                state[f"{layer}mlstm_cell.{gate}.bias"] = draw(H)
            state[layer + "mlstm_cell.outnorm.weight"] = draw(E)
            state[layer + "learnable_skip"] = draw(E)
        else:
            state |= {f"{layer}{gate}gate.weight": draw(H, D // H, D // H) for gate in "fizo"}
            state[layer + "slstm_cell._recurrent_kernel_"] = draw(H, 4 * D // H, D // H)
            state[layer + "slstm_cell._bias_"] = draw(4 * D)
            state[layer + "group_norm.weight"] = draw(D)
            state[block + "ffn_norm.weight"] = draw(D)
            state[block + "ffn.proj_up.weight"] = draw(2 * sizes.up, D)
            state[block + "ffn.proj_down.weight"] = draw(D, sizes.up)
    return state


def with_shared_strands(state: State, complement: Tensor) -> State:
    """The names of the authors' model of both strands."""
    named = {}
    for name, tensor in state.items():
        for part in (".xlstm_norm", ".xlstm", ".ffn_norm", ".ffn", ".post_blocks_norm"):
            name = name.replace(part + ".", part + ".submodule.")
        name = name.replace("token_embedding.", "token_embedding.embedding.").replace("lm_head.", "lm_head.lm_head.")
        named[name] = tensor
    return {**named, "token_embedding.complement_map": complement, "lm_head.complement_map": complement}


def features(state: State, sizes: Sizes, ids: Tensor, direction: str = "causal", second: bool = False) -> Tensor:
    """Features `[B, T, D]` of ids; `second` for the second strand of published weights, whose heads are reversed."""
    x = state["token_embedding.weight"][ids]
    if sizes.sinusoidal:
        x = x + state["xlstm_block_stack.absolute_pos_embeds.scale"] * sinusoids(x.shape[1], sizes.dim)
    for i in range(len(sizes.kinds)):
        if direction == "tied":
            x = block(state, sizes, i, x, second) + block(state, sizes, i, x.flip(1), second).flip(1)
        elif direction == "alternating" and i % 2 == 0:
            x = block(state, sizes, i, x.flip(1), second).flip(1)
        else:
            x = block(state, sizes, i, x, second)
    return norm(x, state["xlstm_block_stack.post_blocks_norm.weight"])


def both_strands(state: State, sizes: Sizes, ids: Tensor, complement: Tensor, direction: str = "causal") -> Tensor:
    """Features `[B, T, 2 D]` of the authors' model of both strands: [u, v], v reversed in time and channels."""
    u = features(state, sizes, ids, direction)
    v = features(state, sizes, complement[ids].flip(1), direction, sizes.published_strands)
    return torch.cat([u, v.flip(1, 2)], -1)


def sinusoids(length: int, dim: int) -> Tensor:
    rates = 1e5 ** -(torch.arange(dim // 2, dtype=torch.float32) / (dim // 2))
    angle = torch.arange(length, dtype=torch.float64).outer(rates.double())
    return torch.cat([angle.sin(), angle.cos()], -1)


def norm(x: Tensor, weight: Tensor, heads: int = 1) -> Tensor:
    """Layer norm of each head by itself; the weight is kept as its difference from one."""
    return F.group_norm(x.flatten(0, 1), heads, 1 + weight).view_as(x)


def block(state: State, sizes: Sizes, i: int, x: Tensor, second: bool = False) -> Tensor:
    p = {name.split(f".{i}.", 1)[1]: t for name, t in state.items() if f"blocks.{i}." in name}
    layer = {name.removeprefix("xlstm."): t for name, t in p.items() if name.startswith("xlstm.")}
    normed = norm(x, p["xlstm_norm.weight"])
    if sizes.kinds[i] == "m":
        return x + mlstm(layer, sizes, normed)
    x = x + slstm(layer, sizes.heads, normed, second)
    a, b = (norm(x, p["ffn_norm.weight"]) @ p["ffn.proj_up.weight"].T).chunk(2, -1)
    return x + (F.gelu(a) * b) @ p["ffn.proj_down.weight"].T


def convolved(layer: State, x: Tensor) -> Tensor:
    weight, bias = layer["conv1d.conv.weight"], layer["conv1d.conv.bias"]
    return F.silu(F.conv1d(F.pad(x.mT, (3, 0)), weight, bias, groups=x.shape[2]).mT)


def linear(layer: State, name: str, x: Tensor) -> Tensor:
    weight, bias = layer[f"{name}.weight"], layer.get(f"{name}.bias")
    return F.linear(x, torch.block_diag(*weight) if weight.ndim == 3 else weight, bias)


def rotated(x: Tensor, theta: float = 5e5) -> Tensor:
    """Pairs of neighbouring channels of each head, `[B, T, H, K]`, turned by their step, counted from 0."""
    rate = theta ** -(torch.arange(0, x.shape[3], 2, dtype=torch.float64) / x.shape[3])
    angle = torch.arange(x.shape[1], dtype=torch.float64).outer(rate)[:, None]
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten(-2)


def mlstm(layer: State, sizes: Sizes, x: Tensor) -> Tensor:
    H = sizes.heads
    u, z = linear(layer, "proj_up", x).chunk(2, -1)
    c = convolved(layer, u)
    q, k, v = linear(layer, "q_proj", c), linear(layer, "k_proj", c), linear(layer, "v_proj", u)
    i, f = (linear(layer, f"mlstm_cell.{gate}", torch.cat([q, k, v], -1)) for gate in ("igate", "fgate"))
    q, k, v = (t.unflatten(-1, (H, -1)) for t in (q, k, v))
    if sizes.rotary:
        q, k = rotated(q), rotated(k)
    B, T, _, K = q.shape
    C, n, m = q.new_zeros(B, H, K, K), q.new_zeros(B, H, K), q.new_zeros(B, H)
    h = []
    for t in range(T):
        log_f = F.logsigmoid(f[:, t])
        m_before, m = m, torch.maximum(log_f + m, i[:, t])
        decay, gain = (log_f + m_before - m).exp(), (i[:, t] - m).exp()
        C = decay[..., None, None] * C + gain[..., None, None] * k[:, t, :, :, None] * v[:, t, :, None]
        n = decay[..., None] * n + gain[..., None] * k[:, t]
        query = q[:, t] * K**-0.5
        size = torch.maximum((query * n).sum(-1).abs(), (-m).exp()) + EPS
        h.append((query[..., None] * C).sum(-2) / size[..., None])
    y = norm(torch.stack(h, 1).flatten(-2), layer["mlstm_cell.outnorm.weight"], H) + layer["learnable_skip"] * c
    return linear(layer, "proj_down", y * F.silu(z))


def slstm(layer: State, H: int, x: Tensor, reversed_heads: bool) -> Tensor:
    c = convolved(layer, x)
    # The layer called fgate gives the input gate, and igate the forget gate.
    gates = torch.stack([linear(layer, "fgate", c), linear(layer, "igate", c)]
                        + [linear(layer, gate, x) for gate in ("zgate", "ogate")], 2)  # fmt: skip
    gates = gates.unflatten(-1, (H, -1))
    B, T, _, _, D = gates.shape
    R = layer["slstm_cell._recurrent_kernel_"].view(H, 4, D, D)
    bias = layer["slstm_cell._bias_"].view(4, H, D)
    y, cell, n, m = (x.new_zeros(B, H, D) for _ in range(4))
    out = []
    for t in range(T):
        i, f, z, o = (gates[:, t] + torch.einsum("bhd,hged->bghe", y, R) + bias).unbind(1)
        m_before, m = m, i if t == 0 else torch.maximum(F.logsigmoid(f) + m, i)
        gain, decay = (i - m).exp(), (F.logsigmoid(f) + m_before - m).exp() * (t > 0)
        cell, n = decay * cell + gain * z.tanh(), decay * n + gain
        y = o.sigmoid() * cell / n
        out.append(y)
    hidden = torch.stack(out, 1)
    return norm((hidden.flip(2) if reversed_heads else hidden).flatten(-2), layer["group_norm.weight"], H)
