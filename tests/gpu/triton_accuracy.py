"""The numerics policy for one run of a slow kernel: against plain torch on some neighbouring inputs too."""

from ops import checks

from hbert_kernels import _accuracy


def assert_accurate(op, formula, inputs, summed_rows=1):
    """Outputs and gradients of ``op`` obey the policy; those of all inputs but the first are sums over rows.

    What plain torch loses is the error of the formula at the dtypes of the inputs, the largest on these and on
    inputs that differ by an ulp: a single one is a matter of luck.
    """
    exact = checks.evaluate(formula, [t.double() for t in inputs])
    plain = _accuracy._plain_bounds(formula, inputs, exact)
    for name, value in checks.evaluate(op, inputs).items():
        shared = name.startswith("gradient") and name != "gradient 0"
        bound = checks.error_bound(exact[name], plain[name], value.dtype, summed_rows if shared else 1)
        error = checks.max_error(value, exact[name])
        assert error <= bound, f"{name}: error {error:.3g} > {bound:.3g}"
