"""The Triton kernel of coefficients.py, which holds the maths, the op and the readable torch oracle.

One program in float64. Every direction is written as uh_k = alpha_k u_k + beta_k u + gamma_k m_k (D is never formed):
joint (0, 1, 0), none (1, 0, 0), orthogonal (1, -p_k, 0), projected (0, p_k, 0), friendly (1, 0, -sigma_k).
"""

from .common import jit, load_number, tl

# Partials summed at a time: 8192 float64 are 64 registers a thread; the fewer trips, the fewer waits for memory.
PARTIAL_ELEMENTS = 8192
WARPS = 8
# One program owns its SM; without a bound ptxas takes few registers and spills. With it nothing spills
# for G up to 32 and for 64. In between odd G did, around float64 divisions, whatever the bound and the number of warps:
# coefficients.py fills those up with absent groups to 64.
MAX_REGISTERS = 240


@jit
def _load_block(
    gram_ptr, n_partials, row, column, present,
    R: tl.constexpr, G: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The [G, G] block of M at (row, column), summed over the partials; absent groups and the padding are zero."""
    cell = tl.arange(0, GROUPS * GROUPS)
    i = cell // GROUPS
    j = cell % GROUPS
    inside = (i < G) & (j < G)
    offsets = (row + i) * R + column + j
    acc = tl.zeros([GROUPS * GROUPS], dtype=tl.float64)
    for start in range(0, n_partials, PARTS):
        p = start + tl.arange(0, PARTS)
        mask = (p < n_partials)[:, None] & inside[None, :]
        acc += tl.sum(tl.load(gram_ptr + p[:, None] * (R * R) + offsets[None, :], mask=mask, other=0.0), axis=0)
    return tl.where(present[:, None] & present[None, :], tl.reshape(acc, [GROUPS, GROUPS]), 0.0)


@jit
def _diagonal(matrix, k):
    return tl.sum(tl.where(k[:, None] == k[None, :], matrix, 0.0), axis=1)


@jit
def _bilinear(matrix, x, y):
    """x' matrix y."""
    return tl.sum(x * tl.sum(matrix * y[None, :], axis=1), axis=0)


@jit
def _size(matrix):
    """Sum of magnitudes: finite exactly if every entry is."""
    return tl.sum(tl.sum(tl.abs(matrix), axis=1), axis=0)


@jit
def _theta_sq(theta_sq_ptr, n_partials, BLOCK: tl.constexpr):
    acc = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, n_partials, BLOCK):
        p = start + tl.arange(0, BLOCK)
        acc += tl.load(theta_sq_ptr + p, mask=p < n_partials, other=0.0)
    return tl.sum(acc, axis=0)


@jit
def _global_direction(gram_w, global_sq, k, one, DIRECTION: tl.constexpr):
    """(alpha, beta) of the directions made of u_k and u."""
    p = tl.where(global_sq > 0.0, gram_w / tl.where(global_sq > 0.0, global_sq, 1.0), 0.0)
    alpha = one
    beta = p * 0.0
    if DIRECTION == "joint":
        alpha = p * 0.0
        beta = tl.where(k == 0, one, 0.0)
    if DIRECTION == "orthogonal":
        beta = -p
    if DIRECTION == "projected":
        alpha = p * 0.0
        beta = p
    return alpha, beta


@jit
def _rule(
    norm_sq, theta_norm_sq, root_d, counts_ptr, scale_ptr, scale, low_ptr, low, high_ptr, high, k, inside,
    DIRECTION: tl.constexpr,
):  # fmt: skip
    """Eq. 13 and the sqrt(d) of Eq. 15: (rho before the clip, which bound it met, sqrt(d) * clipped rho)."""
    n = tl.load(counts_ptr + k, mask=inside, other=0).to(tl.float64)
    if DIRECTION == "joint":
        n = n * 0.0 + tl.sum(n, axis=0)
    n = tl.where(n < 2.0, 1.0, n - 1.0)
    d = tl.cast(root_d, tl.float64)
    low64 = load_number(low_ptr, low).to(tl.float64)
    high64 = load_number(high_ptr, high).to(tl.float64)
    root = tl.sqrt(theta_norm_sq / (4.0 * norm_sq * n))  # the fourth powers of Eq. 13's roots
    radius = load_number(scale_ptr, scale).to(tl.float64) * tl.sqrt(root / d)
    clipped = tl.where(radius > high64, 1.0, 0.0) - tl.where(radius < low64, 1.0, 0.0)
    return radius, clipped, d * tl.where(radius > high64, high64, tl.where(radius < low64, low64, radius))


@jit
def _direction(
    gram, cross, moments, w, present, sigma_ptr, sigma, k, inside,
    SIGMA_STRIDE: tl.constexpr, G: tl.constexpr, DIRECTION: tl.constexpr, FALLBACK: tl.constexpr,
):  # fmt: skip
    """(alpha, beta, gamma, |uh|^2, which of them fell back to u_k, which point anywhere)."""
    zero = tl.zeros([k.shape[0]], dtype=tl.float64)
    one = tl.where(inside, zero + 1.0, zero)
    plain_sq = _diagonal(gram, k)
    gram_w = tl.sum(gram * w[None, :], axis=1)
    global_sq = tl.sum(gram_w * w, axis=0)
    alpha, beta = _global_direction(gram_w, global_sq, k, one, DIRECTION)
    gamma = zero
    norm_sq = alpha * alpha * plain_sq + 2.0 * alpha * beta * gram_w + beta * beta * global_sq
    if DIRECTION == "friendly":
        if sigma_ptr is not None:
            gamma = -tl.load(sigma_ptr + k * SIGMA_STRIDE, mask=inside, other=0.0).to(tl.float64)
        else:
            gamma = -tl.cast(sigma, tl.float64) * one
        norm_sq = plain_sq + gamma * (2.0 * _diagonal(cross, k) + gamma * _diagonal(moments, k))
    if DIRECTION == "joint":
        fallback = k < 0
        valid = (k == 0) & (norm_sq > 0.0)
    else:
        fallback = present & (norm_sq <= FALLBACK * plain_sq)
        if G == 1 and (DIRECTION == "orthogonal" or DIRECTION == "projected"):
            fallback = present
        norm_sq = tl.where(fallback, plain_sq, norm_sq)
        alpha = tl.where(fallback, 1.0, alpha)
        beta = tl.where(fallback, 0.0, beta)
        gamma = tl.where(fallback, 0.0, gamma)
        valid = present & (norm_sq > 0.0)
    return alpha, beta, gamma, norm_sq, fallback, valid


@jit
def _shared_sum(
    gram, cross, moments, alpha, beta, gamma, w, present, valid, r, intended,
    DIRECTION: tl.constexpr, UNIFORM: tl.constexpr, FALLBACK: tl.constexpr,
):  # fmt: skip
    """(coefficients of u [G], of m [G], squared length) of the one perturbation sum_k a_k r_k uh_k."""
    zero = tl.zeros([w.shape[0]], dtype=tl.float64)
    a = r
    if DIRECTION != "joint":
        weight = zero + 1.0 if UNIFORM else w
        weight = tl.where(present, weight, 0.0)
        weight = weight / tl.sum(weight, axis=0)
        a = tl.where(valid, r * weight, 0.0)
    c = a * alpha + w * tl.sum(a * beta, axis=0)
    c_moments = a * gamma
    length_sq = zero + _bilinear(gram, c, c)
    if DIRECTION == "friendly":
        length_sq += 2.0 * _bilinear(cross, c, c_moments) + _bilinear(moments, c_moments, c_moments)
    if DIRECTION != "joint":
        reach = tl.sum(tl.where(valid, intended * weight, 0.0), axis=0)
        vanishes = length_sq <= FALLBACK * reach * reach
        c = tl.where(vanishes, 0.0, c)
        c_moments = tl.where(vanishes, 0.0, c_moments)
        length_sq = tl.where(vanishes, 0.0, length_sq)
    return c.to(tl.float32), c_moments.to(tl.float32), length_sq


@jit
def _coefficients_kernel(
    gram_ptr, theta_sq_ptr, shares_ptr, counts_ptr, coef_ptr, stats_ptr, n_partials, root_d,
    rho_ptr, rho, scale_ptr, scale, low_ptr, low, high_ptr, high, sigma_ptr, sigma, SIGMA_STRIDE: tl.constexpr,
    R: tl.constexpr, G: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr,
    DIRECTION: tl.constexpr, RULE: tl.constexpr, UNIFORM: tl.constexpr, SHARED: tl.constexpr, FALLBACK: tl.constexpr,
):  # fmt: skip
    k = tl.arange(0, GROUPS)
    inside = k < G
    zero = tl.zeros([GROUPS], dtype=tl.float64)
    if shares_ptr is not None:
        shares = tl.load(shares_ptr + k, mask=inside, other=0.0).to(tl.float64)
    else:
        shares = tl.where(inside, zero + 1.0, zero) / G
    present = shares > 0.0
    w = tl.where(present, shares, 0.0)
    gram = _load_block(gram_ptr, n_partials, 0, 0, present, R, G, GROUPS, PARTS)
    cross = gram
    moments = gram
    size = _size(gram) + tl.sum(tl.abs(shares), axis=0)
    if DIRECTION == "friendly":
        cross = _load_block(gram_ptr, n_partials, 0, G, present, R, G, GROUPS, PARTS)
        moments = _load_block(gram_ptr, n_partials, G, G, present, R, G, GROUPS, PARTS)
        size += _size(cross) + _size(moments)

    alpha, beta, gamma, norm_sq, fallback, valid = _direction(
        gram, cross, moments, w, present, sigma_ptr, sigma, k, inside, SIGMA_STRIDE, G, DIRECTION, FALLBACK
    )
    safe_sq = tl.where(valid, norm_sq, 1.0)
    if RULE:
        theta_norm_sq = _theta_sq(theta_sq_ptr, n_partials, PARTS)
        radius, clipped, intended = _rule(
            safe_sq, theta_norm_sq, root_d, counts_ptr, scale_ptr, scale, low_ptr, low, high_ptr, high, k, inside, DIRECTION
        )  # fmt: skip
    else:
        radius = zero + load_number(rho_ptr, rho).to(tl.float64)
        clipped = zero
        intended = radius
    r = tl.where(valid, intended / tl.sqrt(safe_sq), 0.0)

    some = tl.sum(tl.where(valid, 1, 0), axis=0) > 0
    if SHARED:
        c, c_moments, length_sq = _shared_sum(
            gram, cross, moments, alpha, beta, gamma, w, present, valid, r, intended, DIRECTION, UNIFORM, FALLBACK
        )
        finite = size + tl.sum(tl.abs(c) + tl.abs(c_moments), axis=0) < float("inf")
        ok = some & finite
        tl.store(coef_ptr + k, tl.where(ok, c, 0.0), mask=inside)
        if DIRECTION == "friendly":
            tl.store(coef_ptr + G + k, tl.where(ok, c_moments, 0.0), mask=inside)
    else:
        length_sq = r * r * norm_sq
        same = tl.where(k[:, None] == k[None, :], 1.0, 0.0)
        matrix = (r[:, None] * (alpha[:, None] * same + beta[:, None] * w[None, :])).to(tl.float32)
        matrix_moments = ((r * gamma)[:, None] * same).to(tl.float32)
        finite = size + _size(matrix) + _size(matrix_moments) < float("inf")
        ok = some & finite
        cells = coef_ptr + k[:, None] * R + k[None, :]
        mask = (k < K)[:, None] & inside[None, :]
        tl.store(cells, tl.where(ok, matrix, 0.0), mask=mask)
        if DIRECTION == "friendly":
            tl.store(cells + G, tl.where(ok, matrix_moments, 0.0), mask=mask)

    row = k < K
    stats = stats_ptr + k
    tl.store(stats, tl.where(valid, norm_sq, 0.0).to(tl.float32), mask=row)
    tl.store(stats + K, tl.where(valid, radius, 0.0).to(tl.float32), mask=row)
    tl.store(stats + 2 * K, tl.where(valid, clipped, 0.0).to(tl.float32), mask=row)
    tl.store(stats + 3 * K, tl.where(fallback & valid, 1.0, 0.0), mask=row)
    tl.store(stats + 4 * K, length_sq.to(tl.float32), mask=row)
    tl.store(stats + 5 * K, tl.where(ok, zero + 1.0, zero).to(tl.float32), mask=row)
    tl.store(stats + 6 * K, tl.where(finite, zero, zero + 1.0).to(tl.float32), mask=row)
