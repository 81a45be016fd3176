"""Turns a raw hardware counter that wraps, restarts or steps into joules that only grow.

Knows nothing of NVML or RAPL.
"""

from collections.abc import Sequence


class WrappingCounter:
    """Cumulative joules from a raw counter that starts again at zero past its modulus, or when reset.

    A fall is a wrap where a modulus explains it with a mean power of at most `max_w`; otherwise it is a
    reset (a driver reload): what was counted since is kept, and `num_resets` says that some was lost.
    """

    def __init__(self, moduli: Sequence[int], units_per_joule: float, max_w: float) -> None:
        self._moduli = tuple(sorted(moduli))
        self._units_per_joule = units_per_joule
        self._max_w = max_w
        self._raw: int | None = None
        self._read_s = 0.0
        self._total = 0
        self.num_resets = 0

    def advance(self, now_s: float, raw: int) -> float:
        """Joules from the first reading to this one."""
        if self._raw is not None:
            self._total += self._step(raw - self._raw, raw, now_s - self._read_s)
        self._raw, self._read_s = raw, now_s
        return self._total / self._units_per_joule

    def _step(self, step: int, raw: int, elapsed_s: float) -> int:
        if step >= 0:
            return step
        plausible = self._max_w * (elapsed_s + 1.0) * self._units_per_joule
        for modulus in self._moduli:
            if -step <= modulus and step + modulus <= plausible:
                return step + modulus
        self.num_resets += 1
        return raw if raw <= plausible else 0
