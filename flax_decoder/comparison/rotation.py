"""What a rotary embedding did, read off its input and output."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rotation:
    """How the pairs of a head turn with the position.

    Attributes:
        layouts: which numbers may make the pairs: "half" (i with i + R/2), "interleaved" (2 i with 2 i + 1), or both
            where a head is too narrow to tell.
        width: R, how many numbers of a head turn.
        angles: (R / 2,), radians per position.
        start: position of the first token.
    """

    layouts: frozenset[str]
    width: int
    angles: np.ndarray
    start: float

    @property
    def layout(self) -> str:
        """A word for the layout."""
        return "half-by-half" if "half" in self.layouts else "interleaved"

    @property
    def base(self) -> float | None:
        """The base of which the angles are base^(-2 i / R); None where they are not, or too few to tell."""
        if len(self.angles) < 2 or self.angles[1] <= 0:
            return None
        base = float(self.angles[1] ** (-self.width / 2))
        expected = base ** (-np.arange(0, self.width, 2) / self.width)
        return base if np.allclose(self.angles, expected, rtol=1e-5, atol=0) else None


def read_rotation(before_BTNH: np.ndarray, after_BTNH: np.ndarray) -> Rotation | None:
    """The rotation that leads from one array to the other; None where it is none.

    Args:
        before_BTNH: queries or keys, float64, at least two positions.
        after_BTNH: the same, rotated.
    """
    changed_H = np.abs(after_BTNH - before_BTNH).max((0, 1, 2)) > 1e-9 * np.abs(before_BTNH).max()
    H = len(changed_H)
    found: dict[str, tuple[int, np.ndarray, float]] = {}
    # The slowest pair may hardly turn: the width is the smallest that holds all that changes.
    for width in range(2 * ((int(np.flatnonzero(changed_H).max(initial=0)) + 2) // 2), H + 1, 2):
        for layout in ("half", "interleaved"):
            before, after = _pairs(before_BTNH, width, layout), _pairs(after_BTNH, width, layout)
            kept = np.abs(np.abs(before) - np.abs(after)).max() < 1e-6 * np.abs(before).max()
            if layout not in found and kept:
                read = _angles(before, after)
                if read is not None:
                    found[layout] = (width, *read)
        if found:
            break
    if not found:
        return None
    width, angles, start = next(iter(found.values()))
    return Rotation(frozenset(found), width, angles, start)


def _pairs(x_BTNH: np.ndarray, width: int, layout: str) -> np.ndarray:
    """The pairs as complex numbers, (B, T, N, R / 2)."""
    x = x_BTNH[..., :width]
    if layout == "half":
        return np.asarray(x[..., : width // 2] + 1j * x[..., width // 2 :])
    return np.asarray(x[..., 0::2] + 1j * x[..., 1::2])


def _angles(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, float] | None:
    """Angle per position, and the position of the first token, where all tokens turn by such angles."""
    turns_TR = (after * before.conj()).sum((0, 2))
    per_step_R = np.angle(turns_TR[1:] * turns_TR[:-1].conj()).mean(0)
    first_R = np.angle(turns_TR[0])
    start = float(first_R[0] / per_step_R[0]) if per_step_R[0] != 0 else 0.0
    positions_T = np.arange(len(turns_TR))
    turned = before * np.exp(1j * (first_R + positions_T[:, None] * per_step_R))[None, :, None, :]
    return (per_step_R, start) if np.allclose(turned, after, atol=1e-5 * np.abs(after).max()) else None
