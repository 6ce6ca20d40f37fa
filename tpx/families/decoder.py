"""Steps that decoders share: embedding, grouped-query attention, the output head.

Parameters have the names of Hugging Face's Llama-like checkpoints, layers numbered `*`.
"""

from __future__ import annotations

from .flow import Step

LAYER = "model.layers.*"


def norm(out: str, name: str) -> Step:
    """An RMSNorm of `h`, with one weight."""
    return Step("whole", out, ("h",), (f"{name}.weight",))


def linear(
    out: str, of: str, name: str, weights: tuple[str, ...] = ("weight",), along: str = ""
) -> Step:
    return Step("linear", out, (of,), tuple(f"{name}.{weight}" for weight in weights), along)


def bias(of: str, *names: str) -> Step:
    return Step("bias", of, (of,), names)


def embedding() -> tuple[Step, ...]:
    """From `tokens` to `h`."""
    return (
        Step("lookup", "h", ("tokens",), ("model.embed_tokens.weight",), along="V"),
        Step("meet", "h", ("h",), name="embed"),
    )


def attention(*parameters: str) -> tuple[Step, ...]:
    """Pre-norm attention with biases, added to `h`. parameters: of the core, a value a head."""
    at = f"{LAYER}.self_attn"
    return (
        norm("x", f"{LAYER}.input_layernorm"),
        *(
            step
            for name in "qkv"
            for step in (
                linear(name, "x", f"{at}.{name}_proj"),
                bias(name, f"{at}.{name}_proj.bias"),
            )
        ),
        Step("attention", "a", ("q", "k", "v"), tuple(f"{at}.{name}" for name in parameters)),
        linear("o", "a", f"{at}.o_proj", along="Q"),
        Step("meet", "o", ("o",), name="attention"),
        bias("o", f"{at}.o_proj.bias"),
        Step("add", "h", ("h", "o")),
    )


def router(name: str) -> tuple[Step, ...]:
    """From `x` to `ids` and `weights` of its experts."""
    return (
        linear("scores", "x", name),
        bias("scores", f"{name}.bias"),
        Step("whole", "ids", ("scores",)),
        Step("whole", "weights", ("scores",)),
    )


def experts(name: str, ends: tuple[str, ...]) -> tuple[Step, ...]:
    """From `rows` to `y`: gate and up in one product, then down. ends: of the weights' names."""
    up, down = (tuple(f"{side}_proj{end}" for end in ends) for side in ("gate_up", "down"))
    return (
        linear("y", "rows", name, up),
        bias("y", f"{name}.gate_up_proj_bias"),
        Step("elementwise", "y", ("y",)),
        linear("y", "y", name, down, along="I"),
        bias("y", f"{name}.down_proj_bias"),
    )


def head(logical: str) -> tuple[Step, ...]:
    """From `h` to `logits`. logical: the rows of the head's table, which the all-gather joins."""
    return (
        norm("x", "model.norm"),
        linear("logits", "x", "lm_head"),
        Step("meet", "logits", ("logits",), along=logical, name="head"),
    )
