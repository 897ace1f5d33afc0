import zlib

import numpy as np
import pytest
import zstandard

from slime.weights.delta import decode, digest, encode

OLD = np.array([7, 7, 0, 255, 1], np.uint8)
NEW = np.array([7, 8, 0, 0, 1], np.uint8)


@pytest.mark.parametrize(
    ("encoding", "raw"),
    [
        ("xor", bytes([0, 15, 0, 255, 0])),
        # Two bytes differ, those at 1 and 3: count, places, values.
        ("overwrite", bytes([2, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0, 8, 0])),
    ],
)
def test_a_difference_is_as_the_format_says_and_gives_the_new_bytes(encoding, raw):
    packed = encode(OLD, NEW, encoding)
    assert zstandard.ZstdDecompressor().decompress(packed) == raw
    assert decode(OLD, packed, encoding).tolist() == NEW.tolist()
    assert decode(OLD, encode(OLD, OLD, encoding), encoding).tolist() == OLD.tolist()


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_random_bytes_come_back(encoding):
    generator = np.random.default_rng(0)
    old, new = (generator.integers(0, 256, 10_000, np.uint8) for _ in range(2))
    assert np.array_equal(decode(old, encode(old, new, encoding), encoding), new)


@pytest.mark.parametrize(
    ("packed", "encoding", "told"),
    [
        (b"no zstd", "xor", "cannot be unpacked"),
        (zstandard.compress(b"\0\0\0"), "xor", "of 3 bytes, the tensor has 5"),
        (zstandard.compress(bytes([2, 0, 0, 0, 1])), "overwrite", "says 2 bytes and holds 5"),
        (zstandard.compress(bytes([1, 0, 0, 0, 5, 0, 0, 0, 9])), "overwrite", "changes byte 5 of 5"),
    ],
)
def test_a_difference_of_another_tensor_is_refused(packed, encoding, told):
    with pytest.raises(ValueError, match=told):
        decode(OLD, packed, encoding)


def test_digests_are_the_published_algorithms():
    data = np.frombuffer(b"abc", np.uint8)
    # The test vectors of XXH3 (128 bits) and of BLAKE3 for these bytes.
    assert digest(data, "xxh3-128") == "06b05ab6733a618578af5f94892f3950"
    assert digest(data, "blake3") == "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"
    assert digest(data, "adler32") == f"{zlib.adler32(b'abc'):08x}" == "024d0127"
