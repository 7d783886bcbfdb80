# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"
"""Codes of 4 and 8 bits as 16-bit floats, four bytes at a time, in Triton: what tensor cores multiply.

Where FAST, by instructions of NVIDIA GPUs that move bytes (PRMT) and combine bits (LOP3): two or three times fewer than
the same arithmetic takes as Triton compiles it. Otherwise by that arithmetic, which the interpreter can run.
"""

from __future__ import annotations

import triton
import triton.language as tl


def _asm(*lines: str) -> tl.constexpr:
    return tl.constexpr("{\n.reg .b32 a, b, c, d, e, f, g;\n" + "\n".join(f"{line};" for line in lines) + "\n}")


# Bytes c of $6 as 128 + (c & 15) and 128 + (c >> 4), whose bits are the byte 0x43 and the half-byte, and as ones.
INT4_BFLOAT16 = _asm(
    "and.b32 a, $6, 0x0F0F0F0F",
    "shr.u32 b, $6, 4",
    "and.b32 b, b, 0x0F0F0F0F",
    "prmt.b32 $0, a, 0x43434343, 0x4140",
    "prmt.b32 $1, a, 0x43434343, 0x4342",
    "prmt.b32 $2, b, 0x43434343, 0x4140",
    "prmt.b32 $3, b, 0x43434343, 0x4342",
    "mov.b32 $4, 0x3F803F80",
    "mov.b32 $5, 0x3F803F80",
)
# The same as 1024 + c less 1032, exactly.
INT4_FLOAT16 = _asm(
    "and.b32 a, $6, 0x0F0F0F0F",
    "shr.u32 b, $6, 4",
    "and.b32 b, b, 0x0F0F0F0F",
    "mov.b32 c, 0x64086408",
    "prmt.b32 d, a, 0x64646464, 0x4140",
    "prmt.b32 e, a, 0x64646464, 0x4342",
    "prmt.b32 f, b, 0x64646464, 0x4140",
    "prmt.b32 g, b, 0x64646464, 0x4342",
    "sub.rn.f16x2 $0, d, c",
    "sub.rn.f16x2 $1, e, c",
    "sub.rn.f16x2 $2, f, c",
    "sub.rn.f16x2 $3, g, c",
    "mov.b32 $4, 0x3C003C00",
    "mov.b32 $5, 0x3C003C00",
)
# A signed byte c as 128 + (c & 127) less 128 or, where its sign is set, 256.
INT8_BFLOAT16 = _asm(
    "mov.b32 e, 0xBF80BF80",
    "prmt.b32 a, $2, 0x43434343, 0x4140",
    "prmt.b32 b, $2, 0x43434343, 0x4342",
    "and.b32 c, a, 0xFF80FF80",
    "and.b32 a, a, 0xFF7FFF7F",
    "and.b32 d, b, 0xFF80FF80",
    "and.b32 b, b, 0xFF7FFF7F",
    "fma.rn.bf16x2 $0, c, e, a",
    "fma.rn.bf16x2 $1, d, e, b",
)
# As 1024 + 128 + c less 1152.
INT8_FLOAT16 = _asm(
    "xor.b32 a, $2, 0x80808080",
    "mov.b32 c, 0x64806480",
    "prmt.b32 b, a, 0x64646464, 0x4140",
    "prmt.b32 d, a, 0x64646464, 0x4342",
    "sub.rn.f16x2 $0, b, c",
    "sub.rn.f16x2 $1, d, c",
)


def lookup(table: list[int]) -> str:
    """The entries, 16-bit patterns, at the half-bytes of $4. They are constants: high bytes and low ones, four in a
    word. PRMT takes three bits of each half-byte to choose among eight, and the fourth chooses between two results."""
    high, low = ([f"0x{_word(table[at : at + 4], byte):08X}" for at in range(0, 16, 4)] for byte in (1, 0))
    lines = ["and.b32 a, $4, 0x77777777", "shl.b32 b, $4, 4"]
    for pair, fourths in enumerate(("0xD9C8", "0xFBEA")):  # the fourth bits of two bytes, over a byte each
        lines.append(f"prmt.b32 c, b, $4, {fourths}")
        for to, words in (("f", high), ("g", low)):
            lines.append(f"prmt.b32 d, {words[0]}, {words[1]}, a")
            lines.append(f"prmt.b32 e, {words[2]}, {words[3]}, a")
            lines.append(f"lop3.b32 {to}, d, e, c, 0xD8")  # bits of e where those of c are set, else of d
        lines += [f"prmt.b32 ${pair}, g, f, 0x6240", f"prmt.b32 ${2 + pair}, g, f, 0x7351", "shr.u32 a, a, 16"]
    text: str = _asm(*lines).value
    return text


def _word(patterns: list[int], byte: int) -> int:
    return sum((pattern >> 8 * byte & 255) << 8 * at for at, pattern in enumerate(patterns))


@triton.jit
def half_bytes(codes, dtype: tl.constexpr, FAST: tl.constexpr):
    """The low and the high half-bytes, 128 too large in bfloat16 and 8 too small in float16, and ones alike."""
    if FAST and dtype == tl.float16:
        low, high, one = tl.inline_asm_elementwise(
            INT4_FLOAT16, "=r,=r,=r,=r,=r,=r,r", [codes], (tl.float16, tl.float16, tl.float16), True, 4
        )
    elif FAST:
        low, high, one = tl.inline_asm_elementwise(
            INT4_BFLOAT16, "=r,=r,=r,=r,=r,=r,r", [codes], (tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 4
        )
    else:
        MORE: tl.constexpr = -8.0 if dtype == tl.float16 else 128.0
        low = ((codes & 15).to(tl.float32) + MORE).to(dtype)
        high = ((codes >> 4).to(tl.float32) + MORE).to(dtype)
        one = ((codes & 0).to(tl.float32) + 1.0).to(dtype)
    return low, high, one


@triton.jit
def entries(codes, table, LOOKUP: tl.constexpr, dtype: tl.constexpr, FAST: tl.constexpr):
    """Those of a table at the low and at the high half-bytes, rounded to dtype. LOOKUP: as `lookup` makes it."""
    if FAST and dtype == tl.float16:
        low, high = tl.inline_asm_elementwise(LOOKUP, "=r,=r,=r,=r,r", [codes], (tl.float16, tl.float16), True, 4)
    elif FAST:
        low, high = tl.inline_asm_elementwise(LOOKUP, "=r,=r,=r,=r,r", [codes], (tl.bfloat16, tl.bfloat16), True, 4)
    else:
        low = tl.load(table + (codes & 15)).to(dtype)
        high = tl.load(table + (codes >> 4)).to(dtype)
    return low, high


@triton.jit
def whole_bytes(codes, dtype: tl.constexpr, FAST: tl.constexpr):
    """Signed bytes, exact in both 16-bit types."""
    if FAST and dtype == tl.float16:
        y = tl.inline_asm_elementwise(INT8_FLOAT16, "=r,=r,r", [codes], tl.float16, True, 4)
    elif FAST:
        y = tl.inline_asm_elementwise(INT8_BFLOAT16, "=r,=r,r", [codes], tl.bfloat16, True, 4)
    else:
        y = codes.to(tl.float32).to(dtype)
    return y


@triton.jit
def scale_and_zero(word, OFFSET: tl.constexpr):
    """Of the two bfloat16 in a word, for codes that are OFFSET too large."""
    scale = (word << 16).to(tl.float32, bitcast=True)
    return scale, (word & -65536).to(tl.float32, bitcast=True) - OFFSET * scale
