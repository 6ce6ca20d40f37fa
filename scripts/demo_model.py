"""gpt-oss as train_demo.py trains it: float32 weights, every expert computed for every token.

Written apart from tpx's own model, so that the two can be compared. Knows nothing of text or files.
B sequences of S tokens, D hidden, E experts, F intermediate, L layers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tpx.mxfp4 import Mxfp4, dequantize, quantize

Config = dict[str, Any]
ALPHA = 1.702  # of gpt-oss's SwiGLU


def mxfp4_of(weight: Tensor) -> Mxfp4:
    """[..., K] packed. A block's scale is by OCP's rule or twice that, whichever errs less."""
    low = quantize(weight)
    scales = [low.scales, (low.scales.int() + 1).clamp(max=254).to(torch.uint8)]
    tried = [low, quantize(weight, scales[1])]
    errors = [
        (dequantize(one, torch.float32) - weight).unflatten(-1, (-1, 32)).square().sum(-1)
        for one in tried
    ]
    first = errors[0] <= errors[1]
    blocks = torch.where(first.unsqueeze(-1), tried[0].blocks, tried[1].blocks)
    return Mxfp4(blocks, torch.where(first, scales[0], scales[1]))


def straight_through(weight: Tensor) -> Tensor:
    """The values that MXFP4 would keep, with the gradient of the weight itself."""
    with torch.no_grad():
        kept = dequantize(mxfp4_of(weight), torch.float32)
    return weight + (kept - weight).detach()


def yarn_rope(config: Config, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin [S, head_dim / 2] (YaRN, arXiv 2309.00071, as gpt-oss: truncate false)."""
    rope, dim, base = config["rope_scaling"], config["head_dim"], config["rope_theta"]
    original, factor = rope["original_max_position_embeddings"], rope["factor"]

    def pair_at(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_at(rope["beta_fast"]), pair_at(rope["beta_slow"])
    low, high = max(low, 0), min(high, dim - 1)
    pairs = torch.arange(0, dim, 2, dtype=torch.float32)
    fast = 1 / base ** (pairs / dim)
    slowed = ((pairs / 2 - low) / (high - low)).clamp(0, 1)
    frequency = fast * (1 - slowed) + fast / factor * slowed
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    stretch = 0.1 * math.log(factor) + 1
    return angles.cos() * stretch, angles.sin() * stretch


def masks(config: Config, length: int) -> Tensor:
    """[2, S, S] to add to scores: a causal mask, and one of the sliding window."""
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    causal = distance >= 0
    both = torch.stack([causal, causal & (distance < config["sliding_window"])])
    return torch.zeros(both.shape).masked_fill(~both, float("-inf"))


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x.float(), weight.shape, weight, 1e-5)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class DemoModel(nn.Module):
    """Weights of all layers stacked, so that L layers quantise as one tensor."""

    def __init__(self, config: Config, length: int):
        super().__init__()
        self.config = config
        layers, hidden = config["num_hidden_layers"], config["hidden_size"]
        experts, width = config["num_local_experts"], config["intermediate_size"]
        head, vocab = config["head_dim"], config["vocab_size"]
        query, key = (config[f"num_{kind}_heads"] * head for kind in ("attention", "key_value"))
        shapes = {"q_proj": (query, hidden), "k_proj": (key, hidden), "v_proj": (key, hidden)}
        shapes["o_proj"] = (hidden, query)
        self.attention = nn.ParameterDict()
        for name, shape in shapes.items():
            self.attention[f"{name}_weight"] = self.matrix(layers, *shape)
            self.attention[f"{name}_bias"] = nn.Parameter(torch.zeros(layers, shape[0]))
        self.sinks = nn.Parameter(torch.zeros(layers, config["num_attention_heads"]))
        self.router_weight = self.matrix(layers, experts, hidden)
        self.router_bias = nn.Parameter(torch.zeros(layers, experts))
        self.gate_up_proj = self.matrix(layers, experts, 2 * width, hidden)
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(layers, experts, 2 * width))
        self.down_proj = self.matrix(layers, experts, hidden, width)
        self.down_proj_bias = nn.Parameter(torch.zeros(layers, experts, hidden))
        self.input_norm = nn.Parameter(torch.ones(layers, hidden))
        self.post_norm = nn.Parameter(torch.ones(layers, hidden))
        self.final_norm = nn.Parameter(torch.ones(hidden))
        self.embed = nn.Parameter(torch.randn(vocab, hidden) * 0.5)
        self.head = nn.Parameter(torch.randn(vocab, hidden) * hidden**-0.5 * 0.1)
        self.window = [kind == "sliding_attention" for kind in config["layer_types"]]
        for name, tensor in zip(("cos", "sin"), yarn_rope(config, length), strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self.register_buffer("masks", masks(config, length), persistent=False)

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.1, self.training)

    @staticmethod
    def matrix(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape) * 0.5 * shape[-1] ** -0.5)

    def attend(self, layer: int, x_BSD: Tensor) -> Tensor:
        batch, length, _ = x_BSD.shape
        head, heads = self.config["head_dim"], self.config["num_attention_heads"]
        parts = {}
        for name in ("q", "k", "v"):
            weight, bias = (
                self.attention[f"{name}_proj_{end}"][layer] for end in ("weight", "bias")
            )
            parts[name] = (
                F.linear(x_BSD, weight, bias).view(batch, length, -1, head).transpose(1, 2)
            )
        cos, sin = self.cos[:length], self.sin[:length]
        q, k = rotate(parts["q"], cos, sin), rotate(parts["k"], cos, sin)
        groups = heads // self.config["num_key_value_heads"]
        k, v = (part.repeat_interleave(groups, dim=1) for part in (k, parts["v"]))
        scores = q @ k.transpose(-1, -2) * head**-0.5
        scores = scores.float() + self.masks[int(self.window[layer]), :length, :length]
        sink = self.sinks[layer].view(1, -1, 1, 1)
        top = torch.maximum(scores.amax(-1, keepdim=True), sink)
        weights = (scores - top).exp()
        weights = weights / (weights.sum(-1, keepdim=True) + (sink - top).exp())
        out = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)
        return F.linear(
            out, self.attention["o_proj_weight"][layer], self.attention["o_proj_bias"][layer]
        )

    def mix(self, layer: int, x_TD: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """The MoE layer, and its load-balancing loss (Switch, arXiv 2101.03961, eq. 4)."""
        logits_TE = F.linear(x_TD, self.router_weight[layer], self.router_bias[layer]).float()
        top = logits_TE.topk(self.config["num_experts_per_tok"], dim=-1)
        weights_TE = torch.zeros_like(logits_TE).scatter(1, top.indices, top.values.softmax(-1))
        chosen_E = (weights_TE > 0).float().mean(0) / self.config["num_experts_per_tok"]
        balance = logits_TE.shape[1] * (chosen_E * logits_TE.softmax(-1).mean(0)).sum()
        both = F.linear(x_TD, gate_up.flatten(0, 1), self.gate_up_proj_bias[layer].flatten())
        both = both.unflatten(1, gate_up.shape[:2])
        limit = self.config["swiglu_limit"]
        gate, up = both[..., ::2].clamp(max=limit), both[..., 1::2].clamp(-limit, limit)
        inner_TEF = (up + 1) * gate * torch.sigmoid(ALPHA * gate) * weights_TE.unsqueeze(-1)
        out = F.linear(inner_TEF.flatten(1).to(both.dtype), down.transpose(0, 1).flatten(1))
        return out + weights_TE.to(out.dtype) @ self.down_proj_bias[layer], balance

    def forward(self, ids_BS: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, S, V] and the mean load-balancing loss, with the experts' weights as given."""
        x_BSD = self.drop(F.embedding(ids_BS, self.embed))
        balance = x_BSD.new_zeros(())
        for layer in range(len(self.window)):
            x_BSD = x_BSD + self.drop(self.attend(layer, norm(x_BSD, self.input_norm[layer])))
            h_TD = norm(x_BSD, self.post_norm[layer]).flatten(0, 1)
            y_TD, more = self.mix(layer, h_TD, gate_up[layer], down[layer])
            x_BSD, balance = x_BSD + self.drop(y_TD.view_as(x_BSD)), balance + more
        return F.linear(norm(x_BSD, self.final_norm), self.head), balance / len(self.window)

    @torch.no_grad()
    def checkpoint(self) -> dict[str, Tensor]:
        """Every tensor as a published checkpoint stores it: experts in MXFP4, the rest in bf16."""
        tensors = {
            "model.embed_tokens.weight": self.embed,
            "model.norm.weight": self.final_norm,
            "lm_head.weight": self.head,
        }
        stacked = {
            "input_layernorm.weight": self.input_norm,
            "post_attention_layernorm.weight": self.post_norm,
            "self_attn.sinks": self.sinks,
            "mlp.router.weight": self.router_weight,
            "mlp.router.bias": self.router_bias,
            "mlp.experts.gate_up_proj_bias": self.gate_up_proj_bias,
            "mlp.experts.down_proj_bias": self.down_proj_bias,
        }
        for name, weight in self.attention.items():
            stacked[f"self_attn.{name.replace('proj_', 'proj.')}"] = weight
        for name, weight in (("gate_up_proj", self.gate_up_proj), ("down_proj", self.down_proj)):
            packed = mxfp4_of(weight)
            stacked[f"mlp.experts.{name}_blocks"] = packed.blocks
            stacked[f"mlp.experts.{name}_scales"] = packed.scales
        for name, weight in stacked.items():
            tensors |= {f"model.layers.{i}.{name}": one for i, one in enumerate(weight)}
        return {
            name: (t if t.dtype == torch.uint8 else t.to(torch.bfloat16)).cpu().contiguous()
            for name, t in tensors.items()
        }


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonal (K. Jordan, 2024), scaled to AdamW's size (0.2 RMS,
    arXiv 2502.16982). Parameters are stacks of matrices [..., rows, columns]."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, decay: float):
        super().__init__(parameters, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                momentum = state.setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 0.05)
                update = orthogonal(weight.grad.lerp(momentum, 0.95))
                weight.mul_(1 - group["lr"] * group["decay"])
                weight.add_(update, alpha=-group["lr"] * 0.2 * max(weight.shape[-2:]) ** 0.5)


def orthogonal(matrices: Tensor) -> Tensor:
    """Five Newton-Schulz steps towards the nearest orthogonal matrix, in bf16."""
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.mT if tall else x).float()
