"""Where a convolution's kernel lies on an image: its size, steps, padding and dilation."""

from __future__ import annotations

from dataclasses import dataclass

Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """A convolution's geometry; each pair is (height, width).

    Attributes:
        kernel: taps.
        stride: pixels between neighbouring outputs.
        padding: rows and columns of zeros on each side.
        dilation: pixels between neighbouring taps.
    """

    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    def outputs(self, height: int, width: int) -> Pair:
        """The size of the output; not positive where the kernel does not fit."""
        high, wide = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(
                (height, width),
                self.kernel,
                self.stride,
                self.padding,
                self.dilation,
                strict=True,
            )
        )
        return high, wide

    @property
    def pointwise(self) -> bool:
        """Whether it takes each pixel by itself."""
        return (self.kernel, self.stride, self.padding) == ((1, 1), (1, 1), (0, 0))


def as_pair(name: str, value: int | Pair, least: int) -> Pair:
    """One number for both, or (height, width).

    Raises:
        TypeError: unless they are one or two integers.
        ValueError: if one is below `least`.
    """
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(v, int) or isinstance(v, bool) for v in pair):
        raise TypeError(f"{name}: expected an integer or (height, width), got {value!r}")
    if min(pair) < least:
        raise ValueError(f"{name}: expected {least} or more, got {value}")
    return pair[0], pair[1]
