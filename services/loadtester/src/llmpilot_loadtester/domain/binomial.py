"""How sure some successes make one of a share: exact binomial bounds (Clopper & Pearson, Biometrika 26, 1934).

Invariant: nothing is approximated by a normal distribution, so few requests prove little.
"""

import numpy as np


def chance_of_at_least(successes: int, trials: int, share: float) -> float:
    """Return the chance of so many successes or more if each comes with a chance of `share`, between 0 and 1."""
    if successes <= 0:
        return 1.0
    return _upper_tail(successes, trials, share)


def chance_of_at_most(successes: int, trials: int, share: float) -> float:
    """Return the chance of so many successes or fewer."""
    if successes >= trials:
        return 1.0
    return _upper_tail(trials - successes, trials, 1 - share)


def _upper_tail(successes: int, trials: int, share: float) -> float:
    """Add up the terms from `successes` on, each from the one before by their ratio, in logarithms."""
    more = np.arange(1, trials + 1)
    log_binomials = np.concatenate([[0.0], np.cumsum(np.log(trials - more + 1) - np.log(more))])
    counts = np.arange(successes, trials + 1)
    log_terms = log_binomials[counts] + counts * np.log(share) + (trials - counts) * np.log1p(-share)
    return min(float(np.exp(log_terms).sum()), 1.0)
