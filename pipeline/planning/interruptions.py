"""What machines that may be taken away cost: expected time and money of work that is done in segments.

A segment is what is lost when its machine is taken away: the time between two checkpoints of a training, or the task
of a shard. Interruptions are a Poisson process while a machine is paid for, also while it starts. The expectation is
that of J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation
Computer Systems 22 (2006), with unpaid seconds in addition.
"""

import math
from dataclasses import dataclass, replace

_MOST_EXPONENT = 100.0  # 10^43 tries: such a segment never ends


@dataclass(frozen=True, slots=True)
class Interruptions:
    """How often a machine is taken away, and what then passes before the work goes on."""

    per_s: float
    """Rate per second of a paid machine; 0 for a machine that stays."""
    wait_s: float = 0.0
    """Unpaid seconds from an interruption until another machine is there."""
    start_s: float = 0.0
    """Paid seconds of that machine before it works; it may be taken away in them as well."""

    def starting_in(self, further_s: float) -> "Interruptions":
        """The same, with further paid seconds before a machine works."""
        return replace(self, start_s=self.start_s + further_s)

    def paid_s(self, segment_s: float) -> float:
        """Expected paid seconds until a segment is done, on a machine that works already; infinite if it never is."""
        if not self.per_s:
            return segment_s
        exponent = self.per_s * (self.start_s + segment_s)
        if exponent > _MOST_EXPONENT:
            return math.inf
        return math.exp(self.per_s * self.start_s) * math.expm1(self.per_s * segment_s) / self.per_s

    def all_s(self, paid_s: float) -> float:
        """Expected seconds in which so many are paid."""
        return paid_s * (1 + self.per_s * self.wait_s)

    def redone_s(self, segment_s: float) -> float:
        """Of `paid_s`, the expected seconds of work that is lost and done again; without the starts of machines."""
        if not self.per_s:
            return 0.0
        paid_s = self.paid_s(segment_s)
        if math.isinf(paid_s):
            return math.inf
        started_s = -math.expm1(-self.per_s * self.start_s) / self.per_s  # of a start, which may be interrupted
        return paid_s - segment_s - self.per_s * paid_s * started_s

    def best_work_s(self, overhead_s: float, further_s: float = 0.0) -> float:
        """The seconds of work per segment for which the expected cost of all work is least; infinite without
        interruptions, 0 without overhead.

        With x = per_s * work, d = per_s * overhead and k = per_s * further * exp(-per_s * start), it is where the
        derivative of (exp(x + d) - 1 + k) / x is 0: x = 1 + W((k - 1) exp(-1 - d)), W being Lambert's function.
        Young's sqrt(2 * overhead / per_s) is its limit for small d and k = 0.

        Args:
            overhead_s: seconds of each segment that are no work, such as those in which a checkpoint is written.
            further_s: what each segment that is done costs in addition, in paid seconds.
        """
        from scipy.special import lambertw

        if not self.per_s:
            return math.inf
        if overhead_s + further_s <= 0:
            return 0.0
        further = self.per_s * further_s * math.exp(-self.per_s * self.start_s)
        value = 1 + lambertw((further - 1) * math.exp(-1 - self.per_s * overhead_s)).real
        return max(0.0, float(value)) / self.per_s
