"""The instructions that make floats of codes, run one after the other in Python: the interpreter knows none of them."""

import random

import pytest
import torch
from interpreter import interpreted, load

from hf_accel_patch.ops.quantize import TABLES

codes = load("triton_codes")
kernels = load("triton_linear")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
WORD = 2**32 - 1


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    with interpreted():
        yield


def floats(word, dtype):
    return torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.int16).view(dtype).double()


def word_of(numbers, dtype):
    low, high = (int(each) & 0xFFFF for each in numbers.to(dtype).view(torch.int16))
    return low | high << 16


def permuted(a, b, selector):
    """PRMT: four of the eight bytes of b and a, by half-bytes, of which the fourth bit repeats the sign."""
    pool, found = (a | b << 32).to_bytes(8, "little"), []
    for at in range(0, 16, 4):
        byte = pool[selector >> at & 7]
        found.append((255 if byte > 127 else 0) if selector >> at & 8 else byte)
    return int.from_bytes(bytes(found), "little")


def combined(a, b, c, table):
    """LOP3: of each three bits, the bit of the table."""
    bits = ((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32))
    return sum(bits)


OPERATIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shr.u32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: a << n & WORD,
    "prmt.b32": permuted,
    "lop3.b32": combined,
    "sub.rn.f16x2": lambda a, b: word_of(floats(a, torch.float16) - floats(b, torch.float16), torch.float16),
    "fma.rn.bf16x2": lambda a, b, c: word_of(
        floats(a, torch.bfloat16) * floats(b, torch.bfloat16) + floats(c, torch.bfloat16), torch.bfloat16
    ),
}


def run(assembly, outputs, inputs):
    """The words $0.. that come out; `inputs` by name."""
    registers = dict(inputs)
    for line in str(getattr(assembly, "value", assembly)).splitlines():
        if line.startswith(("{", "}", ".reg")):
            continue
        name, _, rest = line.rstrip(";").partition(" ")
        to, *operands = rest.split(", ")
        values = [int(each, 0) if each[0].isdigit() else registers[each] for each in operands]
        registers[to] = OPERATIONS[name](*values)
    return [registers[f"${number}"] for number in range(outputs)]


@pytest.fixture
def words():
    draw = random.Random(0)
    every = [[code, code ^ 0x5A, 255 - code, draw.randrange(256)] for code in range(256)]  # each byte in each place
    return [(bytes_, int.from_bytes(bytes(bytes_), "little")) for bytes_ in every]


@pytest.mark.parametrize("name, more", [("bfloat16", 128), ("float16", -8)])
def test_half_bytes(name, more, words):
    assembly = getattr(codes, f"INT4_{name.upper()}")
    for bytes_, word in words:
        found = torch.cat([floats(each, DTYPES[name]) for each in run(assembly, 6, {"$6": word})]).tolist()
        assert found == [(b & 15) + more for b in bytes_] + [(b >> 4) + more for b in bytes_] + [1] * 4


@pytest.mark.parametrize("name", DTYPES)
def test_signed_bytes(name, words):
    assembly = getattr(codes, f"INT8_{name.upper()}")
    for bytes_, word in words:
        found = torch.cat([floats(each, DTYPES[name]) for each in run(assembly, 2, {"$2": word})]).tolist()
        assert found == [b - 256 if b > 127 else b for b in bytes_]


@pytest.mark.parametrize("scheme", TABLES)
@pytest.mark.parametrize("name", DTYPES)
def test_entries_of_a_table(name, scheme, words):
    assembly = getattr(kernels.Table.of(TABLES[scheme], "cpu"), name)
    table = TABLES[scheme].to(DTYPES[name]).double().tolist()
    for bytes_, word in words:
        found = torch.cat([floats(each, DTYPES[name]) for each in run(assembly, 4, {"$4": word})]).tolist()
        assert found == [table[b & 15] for b in bytes_] + [table[b >> 4] for b in bytes_]
