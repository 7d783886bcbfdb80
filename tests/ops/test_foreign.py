"""Layers of other quantizers against their formats spelled out: fields packed and weights computed one by one."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_accel_patch.ops.foreign import awq, bitsandbytes_4bit, bitsandbytes_8bit, dense_gptq, gptq

AWQ_WORD = [0, 2, 4, 6, 1, 3, 5, 7]  # the output feature in each half-byte, from the lowest


def random(seed=0):
    return np.random.default_rng(seed)


def word(fields, bits=4, minus_one=False):
    """One int32 of the fields, the first in the low bits; v1 of GPTQ takes one from each, and the borrows go on."""
    value = sum(int(field) << bits * i for i, field in enumerate(fields))
    value -= sum(1 << bits * i for i in range(len(fields))) if minus_one else 0
    value %= 2**32
    return value - 2**32 if value >= 2**31 else value


def rows_of_words(codes, **options):
    """[R, C] to int32 [R, ceil(C / fields)], fields along the row."""
    fields = 32 // options.get("bits", 4)
    words = [[word(row[i : i + fields], **options) for i in range(0, len(row), fields)] for row in codes.tolist()]
    return torch.tensor(words, dtype=torch.int32)


def layer(N, K, G, bits=4, groups=None, dtype=torch.float16):
    """Codes, zeros, scales and, from the definition, the weights in float64."""
    codes = random().integers(0, 2**bits, (N, K))
    zeros = random(1).integers(0, 2**bits, (N, K // G))
    zeros.flat[:: max(2, zeros.size // 7)] = 0  # the value that wraps
    scales = torch.from_numpy(random(2).uniform(1e-3, 1e-2, (N, K // G))).to(dtype)
    groups = [k // G for k in range(K)] if groups is None else groups
    weight = torch.empty(N, K, dtype=torch.float64)
    for n in range(N):
        for k in range(K):
            weight[n, k] = float(int(codes[n, k]) - int(zeros[n, groups[k]])) * scales[n, groups[k]].item()
    return SimpleNamespace(codes=codes, zeros=zeros, scales=scales, weight=weight, groups=groups)


def gptq_tensors(x, bits=4, v1=True):
    return {
        "qweight": rows_of_words(x.codes, bits=bits).T.contiguous(),
        "qzeros": rows_of_words(x.zeros.T, bits=bits, minus_one=v1),
        "scales": x.scales.T.contiguous(),
        "g_idx": torch.tensor(x.groups, dtype=torch.int32),
    }


def weights(grouped, group):
    """The weights in float64 as the fields of Grouped are documented, which are checked too."""
    N, K = grouped.codes.shape
    assert grouped.codes.dtype == torch.uint8 and grouped.codes.is_contiguous() and grouped.codes.max() <= 15
    assert grouped.scale.dtype == grouped.zero.dtype == torch.float32
    assert grouped.scale.shape == grouped.zero.shape == (N, K // group)
    scale, zero = (x.double().repeat_interleave(group, 1) for x in (grouped.scale, grouped.zero))
    sorted_weight = (grouped.codes.double() - 8) * scale + zero
    if grouped.order is None:
        return sorted_weight
    assert grouped.order.dtype == torch.int64
    weight = torch.full_like(sorted_weight, math.nan)
    weight[:, grouped.order] = sorted_weight
    return weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("v1", [True, False], ids=["v1", "v2"])
def test_gptq_says_the_same_weights(v1, dtype):
    x = layer(16, 128, 64, dtype=dtype)
    read = gptq(gptq_tensors(x, v1=v1), 4, 64, v1=v1)
    if dtype == torch.float32:  # 24 bits times a code do not fit in float32
        torch.testing.assert_close(weights(read, 64), x.weight, rtol=0, atol=16 * 0.01 * 2**-23)
    else:
        assert torch.equal(weights(read, 64), x.weight)
    assert read.order is None


def test_gptq_v1_zeros_wrap_over_the_fields_of_a_word():
    x = layer(16, 32, 32)
    x.zeros[:, 0] = [0, 0, 1, 15, 0, 8, 7, 0] * 2
    qzeros = gptq_tensors(x)["qzeros"]
    assert qzeros[0, 0] == word([15, 14, 15, 13, 15, 6, 6, 15])  # each borrow from the zero above
    read = gptq(gptq_tensors(x), 4, 32, v1=True)
    assert torch.equal((8 - read.zero / read.scale).round()[:, 0], torch.from_numpy(x.zeros[:, 0]).float())


@pytest.mark.parametrize("g_idx", ["absent", "all zero", "int64"])
def test_gptq_without_act_order(g_idx):
    x = layer(8, 128, 32)
    tensors = gptq_tensors(x)
    if g_idx == "absent":
        del tensors["g_idx"]
    else:
        tensors["g_idx"] = torch.zeros_like(tensors["g_idx"]) if g_idx == "all zero" else tensors["g_idx"].long()
    read = gptq(tensors, 4, 32, v1=True)
    assert torch.equal(weights(read, 32), x.weight) and read.order is None


def test_gptq_act_order_sorts_the_columns_by_group():
    groups = random(3).permutation([k // 64 for k in range(256)]).tolist()
    x = layer(8, 256, 64, groups=groups)
    read = gptq(gptq_tensors(x), 4, 64, v1=True)
    assert torch.equal(weights(read, 64), x.weight)
    assert read.order.tolist() == sorted(range(256), key=lambda k: groups[k])


@pytest.mark.parametrize(
    ("K", "group_size", "kernel"), [(256, -1, 128), (192, -1, 64), (96, -1, 32), (512, 256, 128), (192, 96, 32)]
)
def test_wide_groups_are_split(K, group_size, kernel):
    G = K if group_size == -1 else group_size
    x = layer(8, K, G)
    assert torch.equal(weights(gptq(gptq_tensors(x), 4, group_size, v1=True), kernel), x.weight)
    assert torch.equal(weights(awq(awq_gemm(x), 4, group_size, "gemm"), kernel), x.weight)


def test_gptq_output_features_need_not_fill_a_word():
    x = layer(13, 32, 32)
    assert torch.equal(weights(gptq(gptq_tensors(x), 4, 32, v1=True), 32), x.weight)


@pytest.mark.parametrize("v1", [True, False], ids=["v1", "v2"])
@pytest.mark.parametrize("bits", [4, 8])
def test_dense_gptq(bits, v1):
    groups = random(3).integers(0, 4, 64).tolist()  # act-order with groups of any size, and of 16
    x = layer(300, 64, 16, bits=bits, groups=groups)
    weight = dense_gptq(gptq_tensors(x, bits, v1), bits, 16, v1=v1)
    assert weight.dtype == torch.float32 and torch.equal(weight.double(), x.weight)


def awq_gemm(x):
    reordered = [np.concatenate([y[i : i + 8][AWQ_WORD] for i in range(0, len(y), 8)]).T for y in (x.codes, x.zeros)]
    return {
        "qweight": rows_of_words(reordered[0]),
        "qzeros": rows_of_words(reordered[1]),
        "scales": x.scales.T.contiguous(),
    }


def awq_gemv(x, width):
    """With zeros of `width` words in a row, and as many scales; what lies past the groups is no part of the weights."""
    N, groups = x.zeros.shape
    zeros, scales = np.full((N, width * 8), 5), torch.full((N, width * 8), 3.0, dtype=x.scales.dtype)
    zeros[:, :groups], scales[:, :groups] = x.zeros, x.scales
    return {"qweight": rows_of_words(x.codes), "qzeros": rows_of_words(zeros), "scales": scales}


@pytest.mark.parametrize("G", [32, 64, 128])
def test_awq_says_the_same_weights(G):
    x = layer(16, 256, G)
    read = [awq(awq_gemm(x), 4, G, "GEMM"), awq(awq_gemv(x, 128 // G), 4, G, "gemv")]
    for grouped in read:
        assert torch.equal(weights(grouped, G), x.weight) and grouped.order is None


def bnb_4bit(N, K, block, nested=False, kind="nf4"):
    """Tensors as in a checkpoint, and the weights of a loop over the flattened ones in float32."""
    codes, blocks = random().integers(0, 16, N * K), -(-N * K // block)
    table, scale = np.sort(random(1).uniform(-1, 1, 16)).astype(np.float32), random(2).random(blocks, dtype=np.float32)
    state = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [N, K]}
    tensors = {
        "weight": torch.tensor([[codes[i] * 16 + codes[i + 1]] for i in range(0, N * K, 2)], dtype=torch.uint8),
        "absmax": torch.from_numpy(scale),
        "quant_map": torch.from_numpy(table),
    }
    if nested:
        coded, nested_map = random(3).integers(0, 256, blocks), random(4).uniform(-1, 1, 256).astype(np.float32)
        nested_scale, offset = random(5).random(-(-blocks // 256), dtype=np.float32), np.float32(0.1)
        scale = [nested_map[coded[i]] * nested_scale[i // 256] + offset for i in range(blocks)]
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
        tensors["absmax"] = torch.from_numpy(coded.astype(np.uint8))
        tensors |= {"nested_absmax": torch.from_numpy(nested_scale), "nested_quant_map": torch.from_numpy(nested_map)}
    tensors["quant_state.bitsandbytes__" + kind] = json_tensor(state)
    weight = np.array([table[codes[i]] * scale[i // block] for i in range(N * K)]).reshape(N, K)
    return tensors, torch.from_numpy(weight)


def json_tensor(value):
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def looked_up(read, group):
    N, K = read.codes.shape
    assert read.codes.dtype == torch.uint8 and read.absmax.shape == (N, K // group)
    return read.table[read.codes.long()] * read.absmax.repeat_interleave(group, 1)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize(
    ("N", "K", "block", "group"),
    [
        (6, 128, 64, 64),
        (2, 64, 32, 32),
        (2, 256, 128, 128),
        (3, 512, 256, 128),  # blocks that are split
        (5, 96, 64, 32),  # blocks that end within rows, the last one short
        (7, 64, 4096, 64),  # one block of all rows
        (257, 64, 64, 64),  # more than one nested block
    ],
)
def test_bitsandbytes_4bit_says_the_same_weights(N, K, block, group, nested, kind):
    tensors, weight = bnb_4bit(N, K, block, nested, kind)
    assert torch.equal(looked_up(bitsandbytes_4bit(tensors, (N, K)), group), weight)
    checkpoint = {name if name == "weight" else f"weight.{name}": tensor for name, tensor in tensors.items()}
    checkpoint["weight"] = checkpoint["weight"].flatten().view(torch.bfloat16)[:, None]  # as for FSDP
    assert torch.equal(looked_up(bitsandbytes_4bit(checkpoint, (N, K)), group), weight)


def test_bitsandbytes_8bit_scales_rows():
    tensors = {
        "weight": torch.from_numpy(random().integers(-127, 128, (5, 32)).astype(np.int8)),
        "SCB": torch.from_numpy(random(1).random(5, dtype=np.float32)),
    }
    expected = tensors["weight"].double() * tensors["SCB"].double()[:, None] / 127
    for extra in ({}, {"weight_format": torch.tensor(0, dtype=torch.uint8)}):
        read = bitsandbytes_8bit(tensors | extra)
        assert read.codes.dtype == torch.int8 and read.scale.dtype == torch.float32
        torch.testing.assert_close(read.codes.double() * read.scale.double()[:, None], expected, rtol=2**-23, atol=0)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("block", [64, 256])
def test_bitsandbytes_itself_reads_the_same_weights(kind, nested, block):
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.from_numpy(random().standard_normal((48, 768), dtype=np.float32))
    data, state = functional.quantize_4bit(weight, blocksize=block, compress_statistics=nested, quant_type=kind)
    tensors = {"weight": data} | {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    read = bitsandbytes_4bit(tensors, (48, 768))
    assert torch.equal(looked_up(read, min(block, 128)), functional.dequantize_4bit(data, state))


def zeros(kind, *shape):
    return torch.zeros(shape, dtype=getattr(torch, kind))


GPTQ = gptq_tensors(layer(8, 128, 64))
UNEVEN = torch.tensor([0] * 70 + [1] * 58, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"qzeros": None}, {}, "tensor qzeros is missing; found g_idx, qweight, scales"),
        ({"qweight": zeros("float16", 16, 8)}, {}, r"qweight should be int32 \[any, any\], found float16 \[16, 8\]"),
        ({"qweight": zeros("int32", 128)}, {}, r"qweight should be int32 \[any, any\], found int32 \[128\]"),
        ({"qweight": zeros("int32", 0, 8)}, {}, r"qweight should be int32 \[any, any\], found int32 \[0, 8\]"),
        ({"qzeros": zeros("int32", 1, 1)}, {}, r"qzeros should be int32 \[2, 1\], found int32 \[1, 1\]"),
        (
            {"scales": zeros("float64", 2, 8)},
            {},
            r"scales should be float16 or bfloat16 or float32 \[2, 8\], found float64 \[2, 8\]",
        ),
        ({"g_idx": zeros("int32", 64)}, {}, r"g_idx should be int32 or int64 \[128\], found int32 \[64\]"),
        ({"g_idx": UNEVEN + 1}, {}, r"g_idx should be in 0..1 for 2 groups, found 1 to 2"),
        ({"g_idx": UNEVEN - 1}, {}, r"g_idx should be in 0..1 for 2 groups, found -1 to 0"),
        ({"g_idx": UNEVEN}, {}, "every GPTQ group should have 64 of the 128 input features; group 0 has 70"),
        ({}, {"bits": 3}, "GPTQ weights keep their codes with 4 bits only, not 3"),
        ({}, {"group_size": 0}, "GPTQ group_size should be -1 or divide the 128 input features, found 0"),
        ({}, {"group_size": 96}, "GPTQ group_size should be -1 or divide the 128 input features, found 96"),
        (gptq_tensors(layer(8, 128, 16)), {"group_size": 16}, "groups of 16 input features cannot be split into"),
    ],
)
def test_gptq_refuses(changes, options, message):
    tensors = {name: tensor for name, tensor in (GPTQ | changes).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        gptq(tensors, **({"bits": 4, "group_size": 64, "v1": True} | options))


@pytest.mark.parametrize("bits", [2, 3])
def test_dense_gptq_refuses_other_bits(bits):
    with pytest.raises(ValueError, match=f"GPTQ weights are supported with 4 or 8 bits, not {bits}"):
        dense_gptq(GPTQ, bits, 64, v1=True)


AWQ = awq_gemm(layer(8, 128, 64))
GEMV = awq_gemv(layer(8, 128, 64), 1)


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        (AWQ, {"bits": 8}, "AWQ weights are supported with 4 bits, not 8"),
        (AWQ, {"version": "gemv_fast"}, "AWQ weights are supported in versions gemm and gemv, not 'gemv_fast'"),
        (AWQ, {"group_size": 48}, "AWQ group_size should be -1 or divide the 128 input features, found 48"),
        (AWQ, {"group_size": 32}, r"qzeros should be int32 \[4, 1\], found int32 \[2, 1\]"),
        (AWQ | {"scales": zeros("float16", 2, 4)}, {}, r"scales should be .* \[2, 8\], found float16 \[2, 4\]"),
        (GEMV | {"qzeros": zeros("int32", 4, 1)}, {"version": "gemv"}, r"qzeros should be int32 \[8, any\], found"),
        (GEMV | {"scales": zeros("float16", 8, 2)}, {"version": "gemv"}, r"scales should be .* \[8, 8\], found"),
        (
            awq_gemv(layer(8, 1024, 64), 2) | {"qzeros": zeros("int32", 8, 1), "scales": zeros("float16", 8, 8)},
            {"version": "gemv"},
            "scales should have at least 16 columns, found 8",
        ),
    ],
)
def test_awq_refuses(tensors, options, message):
    with pytest.raises(ValueError, match=message):
        awq(tensors, **({"bits": 4, "group_size": 64, "version": "gemm"} | options))


STATE = {"quant_type": "nf4", "blocksize": 64, "shape": [4, 128], "nested_blocksize": 256, "nested_offset": 0.5}
NF4 = bnb_4bit(4, 128, 64, nested=True)[0]
KEY = "quant_state.bitsandbytes__nf4"


def with_state(**changes):
    return {KEY: json_tensor(STATE | changes)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": zeros("uint8", 255, 1)}, r"weight should have 256 bytes for a shape of \[4, 128\], found 255"),
        ({"weight": zeros("int32", 64, 1)}, r"weight should be uint8 or .*, found int32 \[64, 1\]"),
        ({"weight": None}, "tensor weight is missing"),
        ({"absmax": zeros("uint8", 7)}, r"absmax should be uint8 or .* \[8\], found uint8 \[7\]"),
        ({"quant_map": zeros("float16", 16)}, r"quant_map should be float32 \[16\], found float16 \[16\]"),
        ({"nested_absmax": None}, "tensor nested_absmax is missing"),
        ({"nested_absmax": torch.zeros(2)}, r"nested_absmax should be float32 \[1\], found float32 \[2\]"),
        ({"nested_quant_map": torch.zeros(16)}, r"nested_quant_map should be float32 \[256\], found float32 \[16\]"),
        ({KEY: None}, "expected one tensor quant_state.bitsandbytes__nf4 or quant_state.bitsandbytes__fp4, found"),
        ({"quant_state.bitsandbytes__fp4": NF4[KEY]}, "expected one tensor quant_state.bitsandbytes__nf4 or"),
        ({KEY: zeros("uint8", 4097)}, "__nf4 should be a short JSON object, found 4097 bytes"),
        ({KEY: NF4[KEY][:-1]}, "__nf4 should be the bytes of a JSON object: "),
        ({KEY: torch.full((4,), 255, dtype=torch.uint8)}, "__nf4 should be the bytes of a JSON object: "),
        ({KEY: torch.full((4096,), ord("["), dtype=torch.uint8)}, "__nf4 should be the bytes of a JSON object: "),
        ({KEY: json_tensor([1])}, r"__nf4 should be a JSON object of that quant_type, found \[1\]"),
        (with_state(quant_type="fp4"), "__nf4 should be a JSON object of that quant_type, found "),
        (with_state(shape=[128, 4]), r"should be of a weight of shape \[4, 128\], found \[128, 4\]"),
        (with_state(blocksize=48), r"blocksize of quant_state should be one of \(32, .*\), found 48"),
        (with_state(blocksize=64.0), r"blocksize of quant_state should be one of \(32, .*\), found 64.0"),
        (with_state(nested_blocksize=10**30), "nested_blocksize of quant_state should be one of"),
        (with_state(nested_offset=math.nan), "nested_offset of quant_state should be a finite number, found nan"),
        (with_state(nested_offset=None), "nested_offset of quant_state should be a finite number, found None"),
    ],
)
def test_bitsandbytes_4bit_refuses(changes, message):
    tensors = {name: tensor for name, tensor in (NF4 | changes).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        bitsandbytes_4bit(tensors, (4, 128))


def test_bitsandbytes_4bit_refuses_rows_that_blocks_cross_anywhere():
    with pytest.raises(ValueError, match="bitsandbytes blocks of 64 weights in rows of 80 cannot be split into groups"):
        bitsandbytes_4bit(bnb_4bit(4, 80, 64)[0], (4, 80))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SCB": None}, "tensor SCB is missing; found weight"),
        ({"SCB": torch.zeros(3)}, r"SCB should be float32 \[4\], found float32 \[3\]"),
        ({"weight": zeros("uint8", 4, 8)}, r"weight should be int8 \[any, any\], found uint8 \[4, 8\]"),
        ({"weight_format": torch.tensor(1)}, r"weight_format should be 0 \(rows\), found 1"),
        ({"weight_format": torch.tensor([0, 0])}, r"weight_format should be 0 \(rows\), found \[0, 0\]"),
    ],
)
def test_bitsandbytes_8bit_refuses(changes, message):
    tensors = {"weight": torch.zeros(4, 8, dtype=torch.int8), "SCB": torch.zeros(4)} | changes
    with pytest.raises(ValueError, match=message):
        bitsandbytes_8bit({name: tensor for name, tensor in tensors.items() if tensor is not None})
