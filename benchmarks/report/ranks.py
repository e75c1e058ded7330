"""The rank test of Mann and Whitney (1947), one-sided: are the numbers of b larger than those of a?"""

import math
from functools import lru_cache


@lru_cache(maxsize=None)
def _arrangements(n, m, u):
    """In how many orders of n and m different numbers exactly u pairs have the second number first."""
    if u < 0:
        return 0
    if n == 0 or m == 0:
        return 1 if u == 0 else 0
    return _arrangements(n - 1, m, u - m) + _arrangements(n, m - 1, u)


def p_larger(a, b):
    """Probability that chance alone puts b at least so far above a. Exact without ties up to 20 numbers each, else by
    the normal distribution with corrections for ties and continuity. 1 where either is empty."""
    n, m = len(a), len(b)
    if not n or not m:
        return 1.0
    above = sum((y > x) + 0.5 * (y == x) for x in a for y in b)
    together = sorted([*a, *b])
    if len(set(together)) == n + m and n <= 20 and m <= 20:
        return sum(_arrangements(n, m, u) for u in range(int(above), n * m + 1)) / math.comb(n + m, n)
    ties = sum(count**3 - count for count in map(together.count, set(together)))
    total = n + m
    variance = n * m / 12 * (total + 1 - ties / (total * (total - 1)))
    if variance <= 0:
        return 1.0
    return 0.5 * math.erfc((above - n * m / 2 - 0.5) / math.sqrt(2 * variance))


def smallest_p(n, m):
    """What p_larger gives at best for so many numbers."""
    return 1 / math.comb(n + m, n) if n and m else 1.0
