"""Keys and values that a decoder keeps between calls, for every language model."""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int


@flax.struct.dataclass
class Cache:
    """Keys and values of every layer, heads first, as the products with them read them.

    The next ones go to column `end`, the same in all rows, so that they are written in place. Columns that a shorter
    prompt leaves empty are not `used`; `length` counts the tokens of each row.
    """

    key: Float[Array, "L B K S H"]
    value: Float[Array, "L B K S H"]
    end: Int[Array, ""]
    used: Bool[Array, "B S"]  # True from `end` on too: causal attention does not reach so far
    length: Int[Array, " B"]

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int, int], dtype: DTypeLike = jnp.float32) -> "Cache":
        """A cache for so many (layers, rows, key heads, positions, head channels)."""
        _, batch, _, capacity, _ = shape
        used, length = jnp.ones((batch, capacity), bool), jnp.zeros(batch, jnp.int32)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.int32(0), used, length)

    def write(self, key: Float[Array, "L B K T H"], value: Float[Array, "L B K T H"]) -> "Cache":
        """With T more columns; which of them are used, and the new lengths, are the caller's to say."""
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=self.end, axis=3)
        end = self.end + key.shape[3]
        return dataclasses.replace(self, key=put(self.key, key), value=put(self.value, value), end=end)

    def append(self, mask: Bool[Array, "B T"]) -> "Cache":
        """Before `write`: T more columns, of which those are used, and count, that are True."""
        used = jax.lax.dynamic_update_slice_in_dim(self.used, mask, self.end, 1)
        return dataclasses.replace(self, used=used, length=self.length + mask.sum(1))

    def extend(self, lengths: Int[Array, " B"]) -> "Cache":
        """After the first call, on prompts padded on the right: rows hold so many tokens, the rest stays empty."""
        columns = jnp.arange(self.used.shape[1])
        return dataclasses.replace(self, used=(columns < lengths[:, None]) | (columns >= self.end), length=lengths)

    def rows(self, index: Int[Array, " C"]) -> "Cache":
        """The cache of those rows, in that order."""
        return dataclasses.replace(
            self,
            key=self.key[:, index],
            value=self.value[:, index],
            used=self.used[index],
            length=self.length[index],
        )


# A layer's part of the cache: keys and values [B, K, S, H].
LayerCache = tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]


def with_cache(
    key: Float[Array, "B T K H"], value: Float[Array, "B T K H"], cache: LayerCache, end: Int[Array, ""]
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"], LayerCache]:
    """What queries attend to, the layer's cache with this call's keys and values at column `end`; and those alone."""
    new_key, new_value = (x.swapaxes(1, 2).astype(old.dtype) for old, x in zip(cache, (key, value), strict=True))
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=end, axis=2)
    key, value = put(cache[0], new_key).swapaxes(1, 2), put(cache[1], new_value).swapaxes(1, 2)
    return key, value, (new_key, new_value)
