"""The maths of every op as direct formulas: the oracle of the tests.

Written from the definitions, not from the implementation: sequences and heads are plain loops, padding does not exist,
and autograd gives the gradients. Float64 inputs give the oracle. Other inputs give the error that plain torch makes at
their dtypes: linears run in the dtype of the activations, as under autocast, the rest in float32, and the result is
rounded once. Arguments are those of the public ops; max_seqlen is accepted so that a formula and an op take the same
call, and ignored.
"""

import math

import torch
from torch.nn.functional import linear


def wide(*tensors):
    """The tensors in the dtype that statistics are computed in: float64 stays, the rest becomes float32; None stays."""
    return [t if t is None or t.dtype == torch.float64 else t.float() for t in tensors]


def to_dtype(tensor, dtype):
    """``tensor`` in ``dtype``; None stays None."""
    return None if tensor is None else tensor.to(dtype)


def sequences(cu_seqlens):
    """The slice of rows of each sequence."""
    bounds = cu_seqlens.tolist()
    return [slice(start, end) for start, end in zip(bounds, bounds[1:], strict=False)]


def with_dead_rows(pieces, x):
    """The rows of all sequences one below the other, then zeros up to the T rows of ``x``; dtype of x."""
    used = sum(len(piece) for piece in pieces)
    return torch.cat([*[piece.to(x.dtype) for piece in pieces], x.new_zeros(len(x) - used, x.shape[1])])


def layer_norm(x, weight=None, bias=None, eps=1e-5):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension, var biased, from the centred row."""
    return _normalize(*wide(x, weight, bias), eps).to(x.dtype)


def _normalize(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias


def add_layer_norm(x, residual, weight=None, bias=None, eps=1e-5):
    """(LN(x + residual), x + residual)."""
    total = x + residual
    return layer_norm(total, weight, bias, eps).to(x.dtype), total


def activate(x, name):
    """gelu: x Phi(x) by erf; gelu_tanh: Hendrycks and Gimpel's approximation; relu: max(x, 0)."""
    if name == "gelu":
        return x / 2 * (1 + torch.erf(x / math.sqrt(2)))
    if name == "gelu_tanh":
        return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return torch.where(x > 0, x, 0)


def activation_layer_norm(x, weight=None, bias=None, eps=1e-5, *, activation="gelu", input_bias=None):
    """LN(act(x + input_bias))."""
    rows, weight, bias, input_bias = wide(x, weight, bias, input_bias)
    shifted = rows if input_bias is None else rows + input_bias
    return _normalize(activate(shifted, activation), weight, bias, eps).to(x.dtype)


def gated_layer_norm(x, gate, cu_seqlens, weight=None, bias=None, eps=1e-5):
    """LN(x_t o gate_b) for the tokens t of sequence b; zeros in dead rows."""
    tokens, gate, weight, bias = wide(x, gate, weight, bias)
    pieces = [_normalize(tokens[rows] * gate[b], weight, bias, eps) for b, rows in enumerate(sequences(cu_seqlens))]
    return with_dead_rows(pieces, x)


def conv_layer_norm(x, weight, bias, conv_weight, cu_seqlens, eps=1e-5):
    """Y = LN(x), then Y_t + sum over taps i of conv_weight[i] o Y_{t + i - k//2}, tokens of the same sequence only."""
    tokens, weight, bias, conv_weight = wide(x, weight, bias, conv_weight)
    reach = len(conv_weight) // 2
    pieces = []
    for rows in sequences(cu_seqlens):
        normed = _normalize(tokens[rows], weight, bias, eps)
        nothing = normed.new_zeros(reach, x.shape[1])
        padded = torch.cat([nothing, normed, nothing])
        pieces.append(normed + sum(tap * padded[i : i + len(normed)] for i, tap in enumerate(conv_weight)))
    return with_dead_rows(pieces, x)


def additive_pool(x, scorer, cu_seqlens, max_seqlen, num_heads, *, output="slice"):
    """p_j = sum_t softmax_t(s_tj / sqrt(d)) x_t per sequence and head.

    The score s_tj is the product of the row (scorer [h, H] or [B, h, H]) or of the head's slice (scorer [h, d]) with
    the scorer of head j. "slice" keeps slice j of p_j and concatenates to [B, H], "full" stacks to [B, h, H].
    """
    x, scorer = wide(x, scorer)
    width = x.shape[1]
    head_dim = width // num_heads
    out = x.new_zeros(len(cu_seqlens) - 1, num_heads, width)
    for b, rows in enumerate(sequences(cu_seqlens)):
        vectors = scorer[b] if scorer.dim() == 3 else scorer
        for j in range(num_heads):
            own = slice(j * head_dim, (j + 1) * head_dim)
            seen = x[rows] if vectors.shape[1] == width else x[rows, own]
            out[b, j] = softmax(seen @ vectors[j] / math.sqrt(head_dim), 0) @ x[rows]
    if output == "full":
        return out
    return torch.cat([out[:, j, j * head_dim : (j + 1) * head_dim] for j in range(num_heads)], 1)


def softmax(logits, dim):
    """exp(z - max z) / sum exp(z - max z); an empty dimension stays empty."""
    if logits.shape[dim] == 0:
        return logits
    powers = torch.exp(logits - logits.detach().amax(dim, keepdim=True))
    return powers / powers.sum(dim, keepdim=True)


def additive_attention(
    query,
    x,
    query_att,
    key_weight,
    key_bias,
    key_att,
    cu_seqlens,
    max_seqlen,
    num_heads,
    *,
    query_att_bias=None,
    key_att_bias=None,
    norm_weight=None,
    norm_bias=None,
    sub_norm=False,
    eps=1e-12,
):
    """Fastformer's official equations with the key materialised and the scorers' biases in the logits.

    g_j = sum_t softmax_t((Q Wa + ba)_tj / sqrt(d)) Q_t[slice j]; P = K o g; k_j likewise from P with Wb and bb;
    U = Q o k, or LN(U) with the sub-layer norm.
    """
    (key,) = wide(linear(x, key_weight.to(x.dtype), to_dtype(key_bias, x.dtype)))
    tokens, query_att, key_att, query_att_bias, key_att_bias = wide(
        query, query_att, key_att, query_att_bias, key_att_bias
    )
    norm_weight, norm_bias = wide(norm_weight, norm_bias)
    pieces = []
    for rows in sequences(cu_seqlens):
        global_query = _summarise(tokens[rows], query_att, query_att_bias, num_heads)
        global_key = _summarise(key[rows] * global_query, key_att, key_att_bias, num_heads)
        mixed = tokens[rows] * global_key
        pieces.append(_normalize(mixed, norm_weight, norm_bias, eps) if sub_norm else mixed)
    return with_dead_rows(pieces, query)


def _summarise(rows, scorer, bias, num_heads):
    """Softmax-weighted sum over the rows [n, H] of one sequence of each head's own slice, concatenated to [H]."""
    head_dim = rows.shape[1] // num_heads
    summary = []
    for j in range(num_heads):
        own = rows[:, j * head_dim : (j + 1) * head_dim]
        logits = (rows if scorer.shape[1] == rows.shape[1] else own) @ scorer[j]
        logits = logits if bias is None else logits + bias[j]
        summary.append(softmax(logits / math.sqrt(head_dim), 0) @ own)
    return torch.cat(summary)


def attention(qkv, cu_seqlens, max_seqlen, num_heads):
    """softmax(q k^T / sqrt(d)) v per sequence and head, qkv = [q | k | v] with the heads side by side in each."""
    (projected,) = wide(qkv)
    width = qkv.shape[1] // 3
    head_dim = width // num_heads
    pieces = []
    for rows in sequences(cu_seqlens):
        heads = []
        for j in range(num_heads):
            q, k, v = (projected[rows, i * width + j * head_dim : i * width + (j + 1) * head_dim] for i in range(3))
            heads.append(softmax(q @ k.T / math.sqrt(head_dim), 1) @ v)
        pieces.append(torch.cat(heads, 1))
    return with_dead_rows(pieces, qkv[:, :width])


def masked_lm_loss(hidden, weight, bias, labels, *, ignore_index=-100, label_smoothing=0.0, num_masked=None):
    """(sum over counted rows of (1 - e) (lse - z_label) + e (lse - mean z), over num_masked; number of right argmaxes).

    lse is log sum exp of the row's logits z; e is label_smoothing.
    """
    (rows,) = wide(linear(hidden, weight.to(hidden.dtype), to_dtype(bias, hidden.dtype)))
    total, counted, correct = rows.new_zeros(()), 0, 0
    for logits, label in zip(rows, labels.tolist(), strict=True):
        if label == ignore_index:
            continue
        largest = logits.detach().max()
        lse = largest + torch.log(torch.exp(logits - largest).sum())
        total = total + (1 - label_smoothing) * (lse - logits[label]) + label_smoothing * (lse - logits.mean())
        counted += 1
        correct += int(logits.argmax()) == label
    return total / (max(counted, 1) if num_masked is None else num_masked), torch.tensor(correct)
