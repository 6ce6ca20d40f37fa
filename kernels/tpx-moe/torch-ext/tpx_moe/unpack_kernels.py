"""Codes to numbers inside a kernel: by assembly for bfloat16, or elementwise for any dtype."""

from __future__ import annotations

import triton
import triton.language as tl

# $4 holds two words, $5 and $6 the scales of columns 0..31 and 32..63 twice. Both halves of a
# register go the same way, and no bit crosses from one to the other.
UNPACK = tl.constexpr("""{
.reg .b32 a, b, c, d;
mov.b32 d, 0x80008000;
and.b32 $0, $4, 0x81C081C0;
shl.b32 a, $4, 3;
and.b32 $1, a, 0x81C081C0;
shl.b32 b, $4, 6;
and.b32 $2, b, 0x81C081C0;
shl.b32 a, $4, 1;
and.b32 a, a, 0x80008000;
shr.b32 b, $4, 5;
shr.b32 c, $4, 4;
lop3.b32 a, b, 0x01000100, a, 0xEA;
lop3.b32 $3, c, 0x00C000C0, a, 0xEA;
fma.rn.bf16x2 $0, $0, $5, d;
fma.rn.bf16x2 $1, $1, $5, d;
fma.rn.bf16x2 $2, $2, $6, d;
fma.rn.bf16x2 $3, $3, $6, d;
}""")


@triton.jit
def unpack(
    codes, scales,
    HIGH: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr, EXACT: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Four [ROWS, 16] parts of a granule (columns 16 * j + c) from codes [ROWS, 16] int16 and the
    granule's two scale bytes in the high or low half of scales [ROWS] int32. Exact in bfloat16 and
    float32."""
    half: tl.constexpr = 16 if HIGH else 0
    if ASM:
        if EXACT:
            fold = tl.full([ROWS, 16], 0x7E80, tl.int16)  # 2**126
            v0, v1, v2, v3 = _assembly(codes, fold, fold)
            s0 = _exact_scale(scales >> half & 0xFF, ROWS)
            s1 = _exact_scale(scales >> half + 8 & 0xFF, ROWS)
            return v0 * s0, v1 * s0, v2 * s1, v3 * s1
        else:  # both halves at once: the compiler keeps them for the other half's granule
            s0 = ((scales << 7 & 0x7F807F80) >> half).to(tl.int16)[:, None]
            s1 = ((scales >> 1 & 0x7F807F80) >> half).to(tl.int16)[:, None]
            s0 = tl.broadcast_to(s0, [ROWS, 16])
            s1 = tl.broadcast_to(s1, [ROWS, 16])
            return _assembly(codes, s0, s1)
    else:
        s0 = _wide_scale(scales >> half & 0xFF, EXACT)
        s1 = _wide_scale(scales >> half + 8 & 0xFF, EXACT)
        words = codes.to(tl.int32)
        v0 = _value(words >> 15, words >> 6 & 7) * s0
        v1 = _value(words >> 12, words >> 3 & 7) * s0
        v2 = _value(words >> 9, words & 7) * s1
        v3 = _value(words >> 14, (words >> 11 & 4) | (words >> 10 & 3)) * s1
        return v0.to(DTYPE), v1.to(DTYPE), v2.to(DTYPE), v3.to(DTYPE)


@triton.jit
def _assembly(codes, s0, s1):
    return tl.inline_asm_elementwise(
        UNPACK,
        "=&r,=&r,=&r,=&r,r,r,r",
        [codes, s0, s1],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _exact_scale(scale, ROWS: tl.constexpr):
    """2**(scale - 127) in bfloat16, 255 as NaN: [ROWS, 1]."""
    bits = tl.where(scale == 0, 0x0040, tl.where(scale == 255, 0x7FC0, scale << 7))
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)[:, None]


@triton.jit
def _wide_scale(scale, EXACT: tl.constexpr):
    """The scale's power of two in float32: [rows, 1]. Folded bytes stand 126 too high."""
    if EXACT:
        bits = tl.where(scale == 0, 0x00400000, tl.where(scale == 255, 0x7FC00000, scale << 23))
        return bits.to(tl.float32, bitcast=True)[:, None]
    else:
        return ((scale << 23).to(tl.float32, bitcast=True) * 1.1754943508222875e-38)[:, None]


@triton.jit
def _value(sign, magnitude):
    """The number of an E2M1 code: sign in the lowest bit, magnitude 0 to 7."""
    exponent = magnitude >> 1
    digits = magnitude & 1
    quarters = tl.where(exponent == 0, 2 * digits, (2 + digits) << exponent)
    value = quarters.to(tl.float32) * 0.25
    return tl.where((sign & 1) == 1, -value, value)
