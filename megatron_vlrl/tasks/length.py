"""How well a response's length fits its task: a trapezoid over tokens or characters (OpenVLThinkerV2, eq. 9)."""

from __future__ import annotations

from megatron_vlrl.errors import ConfigError

CORRECT = 0.5  # accuracy from which an answer counts as right: an exact match, or half the overlap of a box


def trapezoid(length: float, band: tuple[float, float, float, float]) -> float:
    """0 below the first and above the last threshold, 1 between the middle two, linear on the two slopes.

    band: (min, low, high, max), in the unit of `length`. Equal neighbours make a step, which already counts as
    inside; max may be infinite. Raises ConfigError for a band that is out of order.

    Example: trapezoid(15, (10, 20, 30, 40)) == 0.5
    """
    floor, low, high, ceiling = band
    if not floor <= low <= high <= ceiling:
        raise ConfigError(f"length band {tuple(band)} is out of order; give min <= low <= high <= max")
    if low <= length <= high:
        return 1.0
    if length <= floor or length >= ceiling:
        return 0.0
    if length < low:
        return (length - floor) / (low - floor)
    return 1.0 - (length - high) / (ceiling - high)


def length_reward(
    length: float, band: tuple[float, float, float, float], *, accuracy: float, only_if_correct: bool
) -> float:
    """The trapezoid; with `only_if_correct`, 0 for a response whose accuracy is under 0.5."""
    shape = trapezoid(length, band)
    return shape if accuracy >= CORRECT or not only_if_correct else 0.0
