"""Widths under a multiplier."""


def scaled(channels: int, width: float, name: str) -> int:
    """``channels * width`` rounded to the nearest multiple of 8, at least 8 and at least 90 % of the product.

    Args:
        channels: the published width.
        width: the multiplier.
        name: of the encoder, for the error.

    Raises:
        ValueError: ``width`` is not positive.
    """
    if not width > 0:
        raise ValueError(f"{name}: width is {width}; use a positive multiplier, such as 0.5")
    product = channels * width
    rounded = max(8, int(product + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * product else rounded + 8
