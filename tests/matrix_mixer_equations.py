"""The equations of mixers with a matrix state, written out one step at a time, or as the sums they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv(layer: nn.Conv1d | None, x: Tensor, activation: Callable[[Tensor], Tensor] = F.silu) -> Tensor:
    if layer is None:
        return x
    return activation(
        F.conv1d(F.pad(x.mT, (layer.weight.shape[2] - 1, 0)), layer.weight, layer.bias, groups=x.shape[2]).mT
    )


def split(x: Tensor, size: int, groups: int = 1) -> Tensor:
    return x.unflatten(-1, (-1, size)).repeat_interleave(groups, -2)


def rms(x: Tensor, norm: Any, width: int | None = None) -> Tensor:
    parts = x.unflatten(-1, (-1, width or x.shape[-1]))
    return (parts / torch.sqrt(parts.square().mean(-1, keepdim=True) + norm.eps)).flatten(-2) * norm.weight


def layer_norm(x: Tensor, eps: float) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + eps)


def outer_products(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """`S ← a_t ⊙ S + k_t v_tᵀ`, `o_t = S q_t`; the decay is broadcast over what it does not depend on."""
    S, found = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1]), []
    for t in range(q.shape[1]):
        S = decay[:, t].expand_as(S) * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        found.append((S * q[:, t, :, :, None]).sum(-2))
    return torch.stack(found, 1)


def qkv(m: Any, x: Tensor, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (conv(getattr(m, f"{n}_conv1d"), getattr(m, f"{n}_proj")(x)) for n in "qkv")
    return split(q, m.head_k_dim), split(k, m.head_k_dim, groups), split(v, m.head_v_dim, groups)


def gated_out(m: Any, x: Tensor, o: Tensor) -> Tensor:
    norm = m.g_norm if m.g_proj is None else m.g_norm_swish_gate
    o = rms(o, norm)
    return m.o_proj((o if m.g_proj is None else o * F.silu(split(m.g_proj(x), m.head_v_dim))).flatten(-2))


def mamba2(m: Any, x: Tensor) -> Tensor:
    groups = m.ngroups * m.d_state
    z0, x0, z, xBC, dt = m.in_proj(x).split([m.d_mlp, m.d_mlp, m.d_ssm, m.d_ssm + 2 * groups, m.nheads], -1)
    u, B, C = conv(m.conv1d, xBC).split([m.d_ssm, groups, groups], -1)
    dt = F.softplus(dt + m.dt_bias).clamp(m.dt_min, m.dt_max)
    B, C = (split(t, m.d_state, m.nheads // m.ngroups) for t in (B, C))
    u = split(u, m.headdim)
    decay = torch.exp(-dt * m.A_log.exp())[..., None, None]
    y = (outer_products(C, B, dt[..., None] * u, decay) + m.D[:, None] * u).flatten(-2)
    if m.norm is None:
        y = y * F.silu(z)
    elif m.norm.norm_before_gate:
        y = rms(y, m.norm, m.d_ssm // m.ngroups) * F.silu(z)
    else:
        y = rms(y * F.silu(z), m.norm, m.d_ssm // m.ngroups)
    return m.out_proj(torch.cat([F.silu(z0) * x0, y], -1))


def linear_attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x, m.kv_groups)
    q, k = m.feature_map_q(q), m.feature_map_k(k)
    if m.norm_q:
        q, k = q / (q.sum(-1, keepdim=True) + 1e-4), k / (k.sum(-1, keepdim=True) + 1e-4)
    weights = torch.einsum("bthk,bshk->bhts", q, k).tril() * q.shape[-1] ** -0.5
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-10) if m.normalize else weights
    o = torch.einsum("bhts,bshv->bthv", weights, v)
    return m.o_proj((o if isinstance(m.norm, nn.Identity) else rms(o, m.norm)).flatten(-2))


def retention(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x, m.kv_groups)
    q, k = m.feature_map(q), m.feature_map(k)
    half = m.head_k_dim // 2
    angle = torch.arange(x.shape[1])[:, None] * m.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    q, k = (torch.complex(*t.chunk(2, -1)) * turn for t in (q, k))
    distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    decay = (1 - 2.0 ** (-5 - torch.arange(m.num_heads, dtype=torch.float64)))[:, None, None] ** distance
    weights = torch.einsum("bthk,bshk->bhts", q, k.conj()).real * decay.tril() * m.head_k_dim**-0.5
    return gated_out(m, x, torch.einsum("bhts,bshv->bthv", weights, v))


def simple_gla(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x, m.kv_groups)
    decay = torch.sigmoid(m.gk_proj(x)) ** (1 / m.gate_logit_normalizer)
    o = outer_products(m.feature_map(q) * m.head_k_dim**-0.5, m.feature_map(k), v, decay[..., None, None])
    return gated_out(m, x, o)


def gla(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x, m.kv_groups)
    decay = torch.sigmoid(m.gk_proj(x)) ** (1 / m.gate_logit_normalizer)
    decay = split(decay.clamp(min=math.exp(m.clamp_min)), m.head_k_dim, m.kv_groups)
    o = outer_products(m.feature_map(q) * m.head_k_dim**-0.5, m.feature_map(k), v, decay[..., None])
    return gated_out(m, x, o)


def hgrn2(m: Any, x: Tensor) -> Tensor:
    q, f, i = (split(conv(getattr(m, f"{n}_conv1d"), getattr(m, f"{n}_proj")(x), nn.Identity()), m.size) for n in "qfi")
    bound = m.lower_bound if m.bounds is None else split(m.bounds, m.size)
    f = bound + (1 - bound) * torch.sigmoid(f)
    o = outer_products(F.silu(q) * m.size**-0.5, 1 - f, i, f[..., None])
    return m.o_proj(rms(o.flatten(-2), m.g_norm))


def gsa(m: Any, x: Tensor) -> Tensor:
    """Slots with a key and a value each, written and read one step at a time."""
    q, k, v = qkv(m, x, m.kv_groups)
    q, k, v = m.feature_map(q), m.feature_map(k), F.silu(v)
    keep = split(torch.sigmoid(m.f_proj(x)) ** (1 / m.gate_logit_normalizer), m.num_slots, m.kv_groups)[..., None]
    keys, values, found = 0.0, 0.0, []
    for t in range(x.shape[1]):
        keys = keep[:, t] * keys + (1 - keep[:, t]) * k[:, t, :, None, :]
        values = keep[:, t] * values + (1 - keep[:, t]) * v[:, t, :, None, :]
        weights = torch.softmax(m.scale * (keys * q[:, t, :, None, :]).sum(-1), -1)
        found.append((weights[..., None] * values).sum(-2))
    return m.o_proj(rms(F.silu(torch.stack(found, 1).flatten(-2)), m.g_norm))


def rwkv6(m: Any, x: Tensor) -> Tensor:
    delta = F.pad(x, (0, 0, 1, -1)) - x
    first, last = m.x_proj["0"], m.x_proj["2"]
    low = torch.tanh(first.linear(x + delta * first.mu)).chunk(5, -1)
    mixes = [a @ w.T + b for a, w, b in zip(low, last.weight.chunk(5, -1), m.x_bias, strict=True)]
    r, w, k, v, g = (x + delta * mix for mix in mixes)
    down, up = m.w_proj.linear.lora["0"], m.w_proj.linear.lora["2"]
    decay = split(torch.exp(-torch.exp(up(torch.tanh(down(w))))), m.head_k_dim)
    r, k = (split(p.linear(t), m.head_k_dim) for p, t in ((m.r_proj, r), (m.k_proj, k)))
    v = split(m.v_proj.linear(v), m.head_v_dim)
    S, found = x.new_zeros(x.shape[0], *m.memory_shape), []
    for t in range(x.shape[1]):
        new = k[:, t, :, :, None] * v[:, t, :, None, :]
        found.append((r[:, t, :, :, None] * (S + m.bonus[..., None] * new)).sum(-2))
        S = decay[:, t, :, :, None] * S + new
    o = layer_norm(torch.stack(found, 1), m.g_norm.eps).flatten(-2) * m.g_norm.weight + m.g_norm.bias
    return m.o_proj(o * F.silu(m.g_proj.linear(g)))


def delta(m: Any, x: Tensor) -> Tensor:
    """Every factor as a matrix of its own."""
    factors = getattr(m, "factors", 1)
    q, k, v = (conv(getattr(m, f"{n}_conv1d"), getattr(m, f"{n}_proj")(x)) for n in "qkv")
    if m.v_conv1d is None:
        v = F.silu(v)
        kind = m.activation.kind if hasattr(m, "activation") else "swish"
        q, k = (F.elu(t) + 1 if kind == "elu" else F.silu(t) for t in (q, k))
    groups = getattr(m, "groups", 1)
    q, k = split(q, m.head_k_dim, groups), split(k, m.head_k_dim, groups)
    k, v = k.unflatten(2, (factors, -1)), split(v, m.head_v_dim).unflatten(2, (factors, -1))
    if getattr(m, "qk_norm", "l2") == "sum":
        q, k = q / q.sum(-1, keepdim=True), k / k.sum(-1, keepdim=True)
    else:
        q, k = (t / torch.sqrt(t.square().sum(-1, keepdim=True) + 1e-6) for t in (q, k))
    beta = x.new_ones(*v.shape[:-1]) if m.b_proj is None else torch.sigmoid(m.b_proj(x)).view(v.shape[:-1])
    beta = beta * m.greatest_beta
    keep = x.new_ones(*v.shape[:2], v.shape[3])
    if getattr(m, "a_proj", None) is not None:
        keep = torch.exp(-m.A_log.exp() * F.softplus(m.a_proj(x) + m.dt_bias))
    S, found, one = x.new_zeros(x.shape[0], *m.memory_shape), [], torch.eye(m.head_k_dim, dtype=x.dtype)
    for t in range(x.shape[1]):
        S = keep[:, t, :, None, None] * S
        for j in range(factors):
            key, b = k[:, t, j, :, :, None], beta[:, t, j, :, None, None]
            S = (one - b * key * key.mT) @ S + b * key * v[:, t, j, :, None, :]
        found.append((q[:, t, :, :, None] * S).sum(-2) * m.head_k_dim**-0.5)
    o = rms(torch.stack(found, 1), m.o_norm)
    if m.g_proj is None:
        return m.o_proj(o.flatten(-2))
    gate = split(m.g_proj(x), m.head_v_dim)
    return m.o_proj((o * (torch.sigmoid(gate) if m.o_norm.sigmoid else F.silu(gate))).flatten(-2))


def memory(m: Any, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
    """xLSTM's equations without a stabiliser, normed per head."""
    gate = torch.exp(i) if m.input_activation == "exp" else torch.sigmoid(i)
    q = q * q.shape[-1] ** -0.5
    C, n, found = q.new_zeros(q.shape[0], *m.memory_shape), q.new_zeros(q.shape[0], *m.memory_shape[:2]), []
    for t in range(q.shape[1]):
        keep, write = torch.sigmoid(f[:, t])[..., None], gate[:, t, :, None] * k[:, t]
        C = keep[..., None] * C + write[..., None] * v[:, t, :, None, :]
        n = keep * n + write
        below = (n * q[:, t]).sum(-1, keepdim=True).abs().clamp(min=1)
        found.append((C * q[:, t, :, :, None]).sum(-2) / below)
    return torch.stack(found, 1)


def mlstm(m: Any, x: Tensor) -> Tensor:
    u, z = m.proj_up(x).chunk(2, -1)
    c = conv(m.conv1d.conv, u)
    q, k, v = (
        t @ torch.block_diag(*p.weight).T + (0 if p.bias is None else p.bias)
        for t, p in ((c, m.q_proj), (c, m.k_proj), (u, m.v_proj))
    )
    gates, cell, size = torch.cat([q, k, v], -1), m.mlstm_cell, m.memory_shape[1]
    h = memory(m, split(q, size), split(k, size), split(v, size), cell.igate(gates), cell.fgate(gates))
    normed = layer_norm(h, cell.outnorm.eps).flatten(-2) * (1 + cell.outnorm.weight)
    return m.proj_down((normed + m.learnable_skip * c) * F.silu(z))


def mlstm_large(m: Any, x: Tensor) -> Tensor:
    _, K, V = m.memory_shape
    cap = m.gate_soft_cap
    i, f = (g(x) if cap is None else cap * torch.tanh(g(x) / cap) for g in (m.igate_preact, m.fgate_preact))
    h = memory(m, split(m.q(x), K), split(m.k(x), K), split(m.v(x), V), i, f)
    normed = layer_norm(h, m.multihead_norm.eps).flatten(-2) * m.multihead_norm.weight
    normed = normed if m.multihead_norm.bias is None else normed + m.multihead_norm.bias
    return m.out_proj(torch.sigmoid(m.ogate_preact(x)) * normed)


EQUATIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    **{f.__name__: f for f in (mamba2, linear_attention, retention, simple_gla, gla, hgrn2, gsa, rwkv6)},
    **dict.fromkeys(("delta_net", "gated_delta_net", "delta_product", "gated_delta_product"), delta),
    **{f.__name__: f for f in (mlstm, mlstm_large)},
}
