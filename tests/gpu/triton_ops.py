"""Triton functions as differentiable ops on CPU tensors, with the public functions' signatures."""

from __future__ import annotations

import torch
from triton_interpreter import checked as checked

from hbert_kernels import _accuracy
from hbert_kernels.triton import conv_layer_norm as conv
from hbert_kernels.triton import row_norm

ACTIVATIONS = ("gelu", "gelu_tanh", "relu")


def differentiable(forward, backward, outputs=1):
    """``op(*tensors)``, where ``forward(*tensors)`` gives the outputs and then what is saved.

    ``backward(cotangents, results, tensors)`` returns one gradient per tensor, with its shape and dtype. A tensor
    may be None; its gradient is then empty or None.
    """

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.results = forward(*[None if t is None else t.detach() for t in tensors])
            ctx.tensors = tensors
            return ctx.results[0] if outputs == 1 else ctx.results[:outputs]

        @staticmethod
        def backward(ctx, *cotangents):
            gradients = backward(cotangents, ctx.results, ctx.tensors)
            for tensor, gradient in zip(ctx.tensors, gradients, strict=True):
                if tensor is None:
                    assert gradient is None or gradient.numel() == 0
                elif gradient is not None:
                    assert (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype)
            return tuple(g if t is not None else None for t, g in zip(ctx.tensors, gradients, strict=True))

    return Op.apply


def layer_norm(x, weight=None, bias=None, eps=1e-5):
    def backward(cotangents, results, tensors):
        x, weight, bias = tensors
        return row_norm.layer_norm_backward(*cotangents, None, x, *results[1:], weight, bias)

    return differentiable(lambda x, w, b: row_norm.layer_norm(x, w, b, eps), backward)(x, weight, bias)


def add_layer_norm(x, residual, weight=None, bias=None, eps=1e-5):
    def backward(cotangents, results, tensors):
        (dy, dtotal), (_, total, mean, rstd), (x, residual, weight, bias) = cotangents, results, tensors
        dx, *rest = row_norm.layer_norm_backward(dy, dtotal, total, mean, rstd, weight, bias)
        return dx.to(x.dtype), dx.to(residual.dtype), *rest

    op = differentiable(lambda x, r, w, b: row_norm.add_layer_norm(x, r, w, b, eps), backward, 2)
    return op(x, residual, weight, bias)


def activation_layer_norm(x, weight=None, bias=None, eps=1e-5, *, activation="gelu", input_bias=None):
    code = ACTIVATIONS.index(activation)

    def backward(cotangents, results, tensors):
        x, weight, bias, input_bias = tensors
        arguments = *cotangents, x, *results[1:], weight, bias, code, input_bias
        return row_norm.activation_layer_norm_backward(*arguments)

    op = differentiable(lambda x, w, b, c: row_norm.activation_layer_norm(x, w, b, eps, code, c), backward)
    return op(x, weight, bias, input_bias)


def gated_layer_norm(x, gate, cu_seqlens, weight=None, bias=None, eps=1e-5):
    def backward(cotangents, results, tensors):
        x, gate, weight, bias = tensors
        arguments = *cotangents, x, gate, cu_seqlens, *results[1:], weight, bias
        return row_norm.gated_layer_norm_backward(*arguments)

    op = differentiable(lambda x, g, w, b: row_norm.gated_layer_norm(x, g, cu_seqlens, w, b, eps), backward)
    return op(x, gate.float(), weight, bias)


def conv_layer_norm(x, weight, bias, conv_weight, cu_seqlens, eps=1e-5):
    def backward(cotangents, results, tensors):
        x, *parameters = tensors
        return conv.conv_layer_norm_backward(*cotangents, x, *results[1:], *parameters, cu_seqlens)

    op = differentiable(lambda x, w, b, taps: conv.conv_layer_norm(x, w, b, taps, cu_seqlens, eps), backward)
    return op(x, weight, bias, conv_weight)


def sizes(*arguments):
    """Bytes of the tensors among the arguments."""
    return sum(a.nbytes for a in arguments if isinstance(a, torch.Tensor))


def assert_accurate(op, formula, inputs, dtype, parameter=None, activations=1):
    """Outputs and gradients of ``op`` obey the numerics policy; the formula at the same dtypes is plain torch.

    Inputs after the first ``activations`` are cast to ``parameter``. Vectors are parameters: their gradients are
    sums over the rows.
    """
    rounded = [t.to(dtype if i < activations else parameter or dtype) for i, t in enumerate(inputs)]
    exact = _accuracy.evaluate(formula, [t.double() for t in rounded])
    plain = _accuracy._plain_bounds(formula, rounded, exact)
    expected = _accuracy.evaluate(formula, rounded)
    for name, value in _accuracy.evaluate(op, rounded).items():
        assert (value.dtype, value.shape) == (expected[name].dtype, expected[name].shape), name
        kind, _, index = name.partition(" ")
        shared = kind == "gradient" and rounded[int(index)].dim() == 1
        bound = _accuracy.error_bound(exact[name], plain[name], value.dtype, len(rounded[0]) if shared else 1)
        error = _accuracy.max_error(value, exact[name])
        assert error <= bound, f"{name}: error {error:.3g} > {bound:.3g}"


def assert_dead_rows_are_not_read(op, inputs, dead):
    """NaN in dead rows of the first input and of the output's gradient changes no bit; those rows are zero."""
    alive, results = len(inputs[0]), []
    for fill in (0.0, torch.nan):
        x = torch.cat([inputs[0], inputs[0].new_full((dead, inputs[0].shape[1]), fill)])
        leaves = [t.clone().requires_grad_() for t in (x, *inputs[1:])]
        output = op(*leaves)
        cotangent = torch.ones_like(output)
        cotangent[alive:] = fill
        results.append([output, *torch.autograd.grad(output, leaves, cotangent)])
    for zero, nan in zip(*results, strict=True):
        assert torch.equal(zero, nan)
    assert not any(results[0][i][alive:].any() for i in (0, 1))
