"""What a batch weighs in the averages, and the gain that follows: parts of the kernels of `tracking`.

Scratch holds, for every part into which the measuring of a set is divided, a sum of the live whitener; with a gain also
the squared norms of what running and live whitener pass on, of the rows and of the live whitener, and for first parts
gain and power before. At last there is the number of the batch, and whether it moves the averages.
"""

import triton
import triton.language as tl

from ..gain import EARLY, TINY
from ..tracking import CYCLE, RECENT

__all__ = ["CONSTANT", "CUMULATIVE", "FROM_RECENT", "FROM_START", "count_live", "judge"]

TINY_: tl.constexpr = tl.constexpr(TINY)
EARLY_: tl.constexpr = tl.constexpr(float(EARLY))
RECENT_: tl.constexpr = tl.constexpr(float(RECENT))
CYCLE_: tl.constexpr = tl.constexpr(CYCLE)
CUMULATIVE, CONSTANT, FROM_START, FROM_RECENT = (tl.constexpr(kind) for kind in range(4))


@triton.jit
def judge(
    gain, power, counter, scratch, rows, features, sets, parts, varies, nonfinite, scale, writes,
    RECOMPUTING: tl.constexpr, GAINED: tl.constexpr, WEIGHT: tl.constexpr, MOMENTUM: tl.constexpr,
    MOST: tl.constexpr, LEAST: tl.constexpr, SETS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Return the weight of the batch, that in each set, the gain afterwards and its change.

    The program that `writes` stores gain, power, counter, and whether the batch is not finite.
    """
    group, field = tl.arange(0, SETS), sets * parts
    real = group < sets
    finite = tl.abs(tl.sum(_of_sets(scratch, sets, parts, SETS, PARTS), 0)) < float("inf")
    count, moves = tl.load(scratch + 8 * field), tl.load(scratch + 8 * field + 1)
    weight = tl.where(finite, moves * _weight(count, WEIGHT, MOMENTUM), 0)
    of_sets = tl.where(tl.load(varies + group, real, other=0) != 0, weight, 0)
    after, change = tl.full((SETS,), 1, tl.float32), tl.full((SETS,), 1, tl.float32)
    if GAINED:
        late = _of_sets(scratch + field, sets, parts, SETS, PARTS)
        live = _of_sets(scratch + 2 * field, sets, parts, SETS, PARTS)
        squares = _of_sets(scratch + 3 * field, sets, parts, SETS, PARTS)
        norms = _of_sets(scratch + 4 * field, sets, parts, SETS, PARTS)
        before = tl.load(scratch + 5 * field + group * parts, real, other=1)
        expected = tl.maximum(squares, tl.sum(squares, 0) / sets) * norms * scale
        late = tl.where(count == 1, expected, late / before / before)
        moving, numbers = of_sets > 0, (rows * features).to(tl.float32)
        passed = tl.load(scratch + 6 * field + group * parts, real, other=0)
        late, passed = _averaged(passed, late / numbers, moving, weight, MOST)
        live_passed = tl.load(scratch + 7 * field + group * parts, real, other=0)
        live, live_passed = _averaged(live_passed, live / numbers, moving, weight, MOST)
        after = tl.maximum(_gain(passed, live_passed, late, live, count, sets), LEAST)
        after = tl.where(moving, after, before).to(gain.dtype.element_ty).to(tl.float32)
        change = after / before
        if writes:
            tl.store(gain + group, after.to(gain.dtype.element_ty), real)
            tl.store(power + group, passed.to(power.dtype.element_ty), real)
            tl.store(power + sets + group, live_passed.to(power.dtype.element_ty), real)
    if writes:
        tl.store(nonfinite, finite == 0)
        if not RECOMPUTING:
            tl.store(counter, tl.load(counter) + 1)
    return weight, of_sets, after, change


@triton.jit
def _averaged(passed, latest, moving, weight, MOST: tl.constexpr):
    """Return the power of the batch, that on average in sets that do not move or whose rows are not finite, and what
    the average becomes."""
    latest = tl.where(moving & (latest >= 0), tl.minimum(latest, MOST), passed)
    return latest, tl.where(moving, (1 - weight) * passed + weight * latest, passed)


@triton.jit
def _gain(passed, live_passed, late, live, count, sets):
    """Compute the gain of every set; see `timm_deconv.kernels.gain`. What is no set has no power."""
    share, tiny = 1 / count, sets * TINY_
    behind = (tl.sum(late, 0) + tiny) / (tl.sum(passed, 0) + tiny)
    behind = tl.maximum(behind / ((tl.sum(live, 0) + tiny) / (tl.sum(live_passed, 0) + tiny)), 1)
    excess = (passed + TINY_) / (live_passed + TINY_)
    excess *= tl.exp2(tl.minimum(share * EARLY_ + 1, 3) * tl.log2(behind))
    return 1 / tl.sqrt(excess * (1 + 2 * share * share))


@triton.jit
def _weight(count, WEIGHT: tl.constexpr, MOMENTUM: tl.constexpr):
    """Compute the weight of a batch, the `count`-th."""
    if WEIGHT == CUMULATIVE:
        return 1 / count
    elif WEIGHT == FROM_RECENT:
        return tl.maximum(1 / (count + (RECENT_ - 1)) * RECENT_, MOMENTUM)
    elif WEIGHT == FROM_START:
        rest = tl.exp(count * tl.log(1 - MOMENTUM + 0 * count))
        return tl.minimum(MOMENTUM / (1 - rest), 1)
    else:
        return MOMENTUM + 0 * count


@triton.jit
def count_live(counter, scratch, FREEZE_ITER: tl.constexpr, RECOMPUTING: tl.constexpr):
    """Hand on which of the live forwards this one is, from 1 on, and whether it moves the averages."""
    forwards = tl.load(counter)
    live, moves = forwards + 1, forwards >= 0
    if FREEZE_ITER > 0:
        begun = forwards % (CYCLE_ * FREEZE_ITER)
        moves = begun <= FREEZE_ITER
        live = forwards // (CYCLE_ * FREEZE_ITER) * (FREEZE_ITER + 1) + tl.minimum(begun, FREEZE_ITER + 1) + 1
    tl.store(scratch, live.to(tl.float32))
    tl.store(scratch + 1, 0.0 if RECOMPUTING else moves.to(tl.float32))


@triton.jit
def _of_sets(scratch, sets, parts, SETS: tl.constexpr, PARTS: tl.constexpr):
    """Add up what the parts of every set hold: (SETS,)."""
    group, part = tl.arange(0, SETS)[:, None], tl.arange(0, PARTS)[None, :]
    return tl.sum(tl.load(scratch + group * parts + part, (group < sets) & (part < parts), other=0), 1)
