"""Realistic weight bytes that are a pure function of seed, tensor and position.

A tensor is cut into pages. A page is a run of its distribution's pool, at a hashed place, with some
bits flipped by a run of random bits at another hashed place: any range is made on demand at memory
speed, and two pages are alike with a chance of 2^-40 only. Blocks and scales of one weight share
the place in the pool, so that they stay the two halves of one quantised weight.

Only integers, table lookups and IEEE basic operations, no random generator of numpy's: the bytes
are the same on every machine and with every version of numpy.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from gptoss_convert.codecs.mxfp4.reference import bf16_bits
from gptoss_convert.containers.refs import FileRef
from gptoss_convert.formats import hf
from gptoss_convert.formats.config import Config
from gptoss_convert.layouts.model import load_model
from gptoss_convert.layouts.tables import Tensor
from gptoss_convert.machine.arena import Arena

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float32]

PAGE_VALUES = 1 << 15
"""BF16 values of one page."""
PAGE_BLOCKS = 1 << 12
"""MXFP4 blocks of one page, in blocks and in scales."""
_POOL_VALUES = 1 << 19
_POOL_BLOCKS = 1 << 18
_NOISE_BYTES = 1 << 23
_SLICE_BLOCKS = 1 << 14
"""Blocks quantised at a time, so that their float values take little memory."""
_GOLDEN = 0x9E3779B97F4A7C15
_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Where the rounding of a magnitude goes from one E2M1 code to the next."""
_OCTAVES = 0.5
"""Standard deviation of the blocks' standard deviations, in octaves."""
_OUTLIER_EVERY = 64
_DEEP_EVERY, _DEEPEST = 512, 13
"""A few blocks lie up to 13 octaves below the others: the released weights span 17 octaves."""
_ZERO_EVERY = 1024
"""A few blocks are all zero, half of them with scale byte 0."""
_LOOSE_EVERY = 16
"""Share of the scales whose lowest bit differs from page to page."""


@dataclass(frozen=True, slots=True)
class Normal:
    """A BF16 parameter: normal values, one in 64 `outlier` times as far from the mean."""

    std: float
    mean: float = 0.0
    outlier: float = 1.0
    positive: bool = False


@dataclass(frozen=True, slots=True)
class Quantised:
    """An MXFP4 weight: normal values of this standard deviation, scales rounded up as OpenAI's."""

    std: float


@dataclass(frozen=True, slots=True)
class Pool:
    """Bytes to take pages from, and the bits that may differ from page to page."""

    content: Bytes
    flips: Bytes
    unit: int
    """Bytes between two places where a page may begin."""
    page: int
    """Bytes of a page."""


def key_of(*parts: object) -> int:
    """A 64-bit number that stands for these parts."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def random_words(key: int, first: int, count: int) -> Words:
    """Words `first` to `first + count` of the stream of `key` (splitmix64, Steele et al. 2014)."""
    steps = np.arange(first + 1, first + 1 + count, dtype=np.uint64)
    words = steps * np.uint64(_GOLDEN) + np.uint64(key)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def noise(seed: int) -> Bytes:
    """Random bits, 8 MiB: what makes two pages of one place differ."""
    return random_words(key_of(seed, "noise"), 0, _NOISE_BYTES // 8).view(np.uint8)


def normal_pool(seed: int, param: str, shape: Normal) -> Pool:
    """The pool of a BF16 parameter; signs vary from page to page where the mean is zero."""
    key = key_of(seed, param)
    distance = _normals(key, 0, _POOL_VALUES) * np.float32(shape.std)
    distance[_rare(key, _OUTLIER_EVERY, _POOL_VALUES)] *= np.float32(shape.outlier)
    values = distance + np.float32(shape.mean)
    if shape.positive:
        values = np.abs(values)
    flips = np.full(_POOL_VALUES, 0x0001 if shape.mean else 0x8001, np.uint16)
    return Pool(bf16_bits(values).view(np.uint8), flips.view(np.uint8), 2, 2 * PAGE_VALUES)


def quantised_pools(seed: int, param: str, shape: Quantised) -> tuple[Pool, Pool]:
    """The pools of the blocks [n, 16] and the scales [n] of one weight; signs vary by page.

    A zero keeps its sign, so that all-zero blocks stay all +0.
    """
    key = key_of(seed, param)
    blocks = np.empty((_POOL_BLOCKS, 16), np.uint8)
    scales = np.empty(_POOL_BLOCKS, np.uint8)
    for first in range(0, _POOL_BLOCKS, _SLICE_BLOCKS):
        part = slice(first, first + _SLICE_BLOCKS)
        values = _normals(key, first * 8, _SLICE_BLOCKS * 32).reshape(-1, 32)
        picked = random_words(key_of(key, "spread"), first, _SLICE_BLOCKS) % np.uint64(64)
        blocks[part], scales[part] = _quantise(values * (_spread(shape.std)[picked])[:, None])
    depth = random_words(key_of(key, "depth"), 0, _POOL_BLOCKS) % np.uint64(_DEEPEST)
    deep = _rare(key_of(key, "deep"), _DEEP_EVERY, _POOL_BLOCKS)
    scales[deep] -= 1 + depth[deep].astype(np.uint8)
    zero = _rare(key_of(key, "zero"), _ZERO_EVERY, _POOL_BLOCKS)
    blocks[zero] = 0
    scales[zero & (depth % np.uint64(2) == 0)] = 0
    loose = _rare(key_of(key, "loose"), _LOOSE_EVERY, _POOL_BLOCKS) & (scales > 0)
    signs = ((blocks & 0x07) != 0) * np.uint8(0x08) | ((blocks & 0x70) != 0) * np.uint8(0x80)
    return (
        Pool(blocks.reshape(-1), signs.reshape(-1), 16, 16 * PAGE_BLOCKS),
        Pool(scales, loose.astype(np.uint8), 1, PAGE_BLOCKS),
    )


def fill(pool: Pool, bits: Bytes, key: int, offset: int, out: Bytes) -> None:
    """Write the bytes from `offset` on of the tensor that `key` stands for; `bits` is the noise."""
    if not out.size:
        return
    first, last = offset // pool.page, (offset + out.size - 1) // pool.page
    words = random_words(key, first, last - first + 1)
    room = np.uint64((pool.content.size - pool.page) // pool.unit)
    places = (words >> np.uint64(32)) % room * np.uint64(pool.unit)
    phases = (words & np.uint64(0xFFFFFFFF)) % np.uint64(bits.size - pool.page)
    for page, place, phase in zip(
        range(first, last + 1), places.tolist(), phases.tolist(), strict=True
    ):
        start = max(page * pool.page, offset)
        stop = min(page * pool.page + pool.page, offset + out.size)
        low, high = start - page * pool.page, stop - page * pool.page
        part = out[start - offset : stop - offset]
        np.bitwise_and(
            bits[phase + low : phase + high], pool.flips[place + low : place + high], part
        )
        np.bitwise_xor(part, pool.content[place + low : place + high], part)


class SyntheticBytes:
    """The files of a virtual checkpoint: any range of any tensor, made when it is read."""

    def __init__(self, config: Config, seed: int) -> None:
        self._noise = noise(seed)
        pools = _pools(config, seed)
        self._tensors = {
            tensor.name: (pools[tensor.rule.params[0]], _stream(tensor, seed))
            for tensor in tensors_of(config)
        }

    def read(self, file: FileRef, offset: int, nbytes: int, arena: Arena, position: int) -> None:
        """Fill the arena at `position` with bytes of a tensor, a file of its own; thread-safe."""
        pool, key = self._tensors[file.name]
        out = np.frombuffer(arena.memory, np.uint8, nbytes, position)
        fill(pool, self._noise, key, offset, out)


def distributions(config: Config) -> dict[str, Normal | Quantised]:
    """How the values of each parameter are distributed.

    Chosen so that every part of the forward pass matters: routing is decisive, sinks take a share,
    some activations reach the clamp, and the residual stream grows no faster than its sum.
    """
    hidden = config.hidden_size**-0.5
    norm = Normal(0.15, mean=1.0, outlier=15.0, positive=True)
    return {
        "embedding.weight": Normal(0.5),
        "attention.norm.weight": norm,
        "attention.q.weight": Normal(1.3 * hidden),
        "attention.q.bias": Normal(0.4, outlier=6.0),
        "attention.k.weight": Normal(1.3 * hidden),
        "attention.k.bias": Normal(0.4, outlier=6.0),
        "attention.v.weight": Normal(1.0 * hidden),
        "attention.v.bias": Normal(0.1, outlier=6.0),
        "attention.sinks": Normal(1.5, mean=0.5),
        "attention.out.weight": Normal((config.num_attention_heads * config.head_dim) ** -0.5),
        "attention.out.bias": Normal(0.1, outlier=10.0),
        "mlp.norm.weight": norm,
        "router.weight": Normal(2.5 * hidden),
        "router.bias": Normal(0.4),
        "gate_up.weight": Quantised(1.6 * hidden),
        "gate_up.bias": Normal(0.7, outlier=6.0),
        "down.weight": Quantised(1.6 * config.intermediate_size**-0.5),
        "down.bias": Normal(0.1, outlier=10.0),
        "norm.weight": norm,
        "unembedding.weight": Normal(2.5 * hidden),
    }


def _pools(config: Config, seed: int) -> dict[str, Pool]:
    """The pool of every parameter that an HF MXFP4 checkpoint holds."""
    families = load_model().families
    pools: dict[str, Pool] = {}
    for param, shape in distributions(config).items():
        if isinstance(shape, Normal):
            pools[param] = normal_pool(seed, param, shape)
        else:
            blocks, scales = families[param].encodings[0].params
            pools[blocks], pools[scales] = quantised_pools(seed, param, shape)
    return pools


def _stream(tensor: Tensor, seed: int) -> int:
    """The key of a tensor's pages: one for blocks and scales, which belong together."""
    (param,) = tensor.rule.params
    for family in load_model().families.values():
        if param in family.members:
            param = family.weight
    return key_of(seed, param, tensor.bound.get("layer"))


def tensors_of(config: Config) -> list[Tensor]:
    """Every tensor of the HF MXFP4 checkpoint of a model of this size."""
    return list(hf.FORMAT.table.tensors("mxfp4", load_model().sizes(config.numbers)))


def _quantise(values: Floats) -> tuple[Bytes, Bytes]:
    """Blocks and scales of values [n, 32]: scale 2^ceil(log2(amax / 6)), nearest code."""
    magnitude = np.abs(values)
    fraction, exponent = np.frexp(magnitude.max(axis=-1) / np.float32(6))
    exponent = exponent - (fraction == 0.5)
    magnitude = np.ldexp(magnitude, -exponent[:, None])
    codes = np.signbit(values).astype(np.uint8) * np.uint8(8)
    for midpoint in _MIDPOINTS:
        codes += magnitude > np.float32(midpoint)
    return codes[:, ::2] | codes[:, 1::2] * np.uint8(16), (exponent + 127).astype(np.uint8)


def _normals(key: int, first_word: int, count: int) -> Floats:
    words = random_words(key, first_word, count // 4)
    return _normal_table()[words.view(np.uint16)]


@cache
def _normal_table() -> Floats:
    """The 65536 quantiles of the standard normal distribution: up to 4.3 standard deviations."""
    upper = [NormalDist().inv_cdf((i + 0.5) / 65536) for i in range(32768, 65536)]
    return np.array([-x for x in reversed(upper)] + upper, np.float32)


def _spread(std: float) -> Floats:
    """The 64 standard deviations that the blocks of one weight have."""
    octaves = [_OCTAVES * NormalDist().inv_cdf((i + 0.5) / 64) for i in range(64)]
    return np.array([std * 2.0**x for x in octaves], np.float32)


def _rare(key: int, every: int, count: int) -> npt.NDArray[np.bool_]:
    """One position in `every`, at random."""
    return random_words(key_of(key, "rare"), 0, count) % np.uint64(every) == 0
