"""Every exception that the docstrings of the public ops promise: its type, and a message that says what was wrong."""

import pytest
import torch

import hbert_kernels as hk

pytestmark = pytest.mark.usefixtures("reference")

T, B, H, HEADS, V = 6, 2, 8, 2, 11
# Valid arguments of every op; each case below spoils one of them.
VALID = {
    "layer_norm": dict(x=(T, H), weight=(H,), bias=(H,)),
    "add_layer_norm": dict(x=(T, H), residual=(T, H), weight=(H,), bias=(H,)),
    "activation_layer_norm": dict(x=(T, H), weight=(H,), bias=(H,), input_bias=(H,), activation="gelu"),
    "conv_layer_norm": dict(x=(T, H), weight=(H,), bias=(H,), conv_weight=(3, H), cu_seqlens=[0, 2, 6]),
    "gated_layer_norm": dict(x=(T, H), gate=(B, H), cu_seqlens=[0, 2, 6], weight=(H,), bias=(H,)),
    "additive_pool": dict(
        x=(T, H), scorer=(HEADS, H), cu_seqlens=[0, 2, 6], max_seqlen=4, num_heads=HEADS, output="slice"
    ),
    "additive_attention": dict(
        query=(T, H), x=(T, H), query_att=(HEADS, H), key_weight=(H, H), key_bias=(H,), key_att=(HEADS, H),
        cu_seqlens=[0, 2, 6], max_seqlen=4, num_heads=HEADS, query_att_bias=(HEADS,), key_att_bias=(HEADS,),
        norm_weight=(H,), norm_bias=(H,), sub_norm=True, form="auto",
    ),
    "attention": dict(qkv=(T, 3 * H), cu_seqlens=[0, 2, 6], max_seqlen=4, num_heads=HEADS, dropout_p=0.0),
    "masked_lm_loss": dict(hidden=(T, H), weight=(V, H), bias=(V,), labels="labels", label_smoothing=0.0),
}  # fmt: skip


def valid(op):
    """Fresh arguments: shapes become random tensors, lists cu_seqlens."""

    def build(value):
        if isinstance(value, tuple):
            return torch.randn(value)
        if isinstance(value, list):
            return torch.tensor(value, dtype=torch.int32)
        return torch.arange(T) if value == "labels" else value

    return {name: build(value) for name, value in VALID[op].items()}


def assert_refused(op, error, message, **spoiled):
    with pytest.raises(error, match=message):
        getattr(hk, op)(**valid(op) | spoiled)


def floats(op):
    return [name for name, value in VALID[op].items() if isinstance(value, tuple)]


EVERY_OP = list(VALID)
EVERY_FLOAT = [(op, name) for op in VALID for name in floats(op)]
PACKED_OPS = [op for op in VALID if "cu_seqlens" in VALID[op]]
BOUNDED_OPS = [op for op in VALID if "max_seqlen" in VALID[op]]


@pytest.mark.parametrize("op", EVERY_OP)
def test_the_valid_arguments_are_valid(op):
    getattr(hk, op)(**valid(op))


def test_every_op_is_covered():
    assert set(VALID) == set(hk.OPS)


@pytest.mark.parametrize(("op", "name"), EVERY_FLOAT)
@pytest.mark.parametrize(
    ("dtype", "message"),
    [(torch.float16, "float16 .* use bfloat16 on a CPU"), (torch.int64, "int64.*allowed: float32, bfloat16, float64")],
    ids=str,
)
def test_dtypes_that_the_cpu_does_not_take(op, name, dtype, message):
    assert_refused(op, TypeError, f"{op}: {name} has dtype torch.{message}", **{name: valid(op)[name].to(dtype)})


@pytest.mark.parametrize("op", EVERY_OP)
def test_all_in_float16(op):
    arguments = valid(op)
    halves = {name: arguments[name].half() for name in floats(op)}
    assert_refused(op, TypeError, f"{op}: .*float16 is for GPUs", **halves)


@pytest.mark.parametrize(("op", "name"), [pair for pair in EVERY_FLOAT if pair[0] != "attention"])
def test_float64_does_not_mix(op, name):
    assert_refused(op, TypeError, f"{op}: float64 does not mix.*{name} ", **{name: valid(op)[name].double()})


@pytest.mark.parametrize(("op", "name"), EVERY_FLOAT)
def test_what_is_not_a_tensor(op, name):
    spoiled = {name: valid(op)[name].tolist()}
    assert_refused(op, TypeError, f"{op}: {name} must be a torch.Tensor, got list", **spoiled)


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in VALID for name in floats(op)[1:]])
def test_shapes_that_do_not_fit(op, name):
    grown = torch.randn([n + 1 for n in VALID[op][name]])
    assert_refused(op, ValueError, rf"{op}: {name} .*\({grown.shape[0]},", **{name: grown})
    assert_refused(op, ValueError, rf"{op}: {name} ", **{name: torch.randn(1, 1, 1, 1)})


@pytest.mark.parametrize(("op", "name"), [(op, floats(op)[0]) for op in VALID])
def test_activations_without_features(op, name):
    assert_refused(op, ValueError, rf"{op}: {name} .*got shape \(\)", **{name: torch.randn(())})
    assert_refused(op, ValueError, rf"{op}: {name} .*\(6, 0\)", **{name: torch.randn(6, 0)})


@pytest.mark.parametrize("op", [op for op in VALID if floats(op)[0] == "x" and op in PACKED_OPS])
def test_padded_batches_are_not_packed_tokens(op):
    assert_refused(op, ValueError, rf"{op}: x must be packed tokens \[T, H\]", x=torch.randn(2, 3, H))


@pytest.mark.parametrize(("op", "name"), [pair for pair in EVERY_FLOAT if pair[0] != "attention"])
def test_devices_that_differ(op, name):
    culprit = name if name != floats(op)[0] else r"\w+"
    message = f"{op}: {culprit} is on .*, but the first input is on"
    assert_refused(op, ValueError, message, **{name: valid(op)[name].to("meta")})


def test_labels_on_another_device():
    labels = torch.arange(T, device="meta")
    assert_refused("masked_lm_loss", ValueError, "masked_lm_loss: labels .* on meta", labels=labels)


@pytest.mark.parametrize("op", PACKED_OPS)
@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([0, 4, 3, 6], r"must not decrease, but cu_seqlens\[1\] = 4 > 3"),
        ([1, 2, 6], "must start at 0, got 1"),
        ([0, 2, 7], "ends at 7, but there are only 6 tokens"),
    ],
    ids=str,
)
def test_values_of_cu_seqlens(op, bounds, message):
    assert_refused(op, ValueError, f"{op}: cu_seqlens {message}", cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


@pytest.mark.parametrize("op", PACKED_OPS)
def test_kind_of_cu_seqlens(op):
    good = valid(op)["cu_seqlens"]
    assert_refused(op, TypeError, f"{op}: cu_seqlens must be an int32 tensor.*int64", cu_seqlens=good.long())
    assert_refused(op, TypeError, f"{op}: cu_seqlens must be a torch.Tensor, got list", cu_seqlens=good.tolist())
    assert_refused(op, ValueError, f"{op}: cu_seqlens is on meta", cu_seqlens=good.to("meta"))


@pytest.mark.parametrize("op", PACKED_OPS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 1)], ids=str)
def test_shape_of_cu_seqlens(op, shape):
    cu = torch.zeros(shape, dtype=torch.int32)
    assert_refused(op, ValueError, rf"{op}: cu_seqlens must be \[B\+1\], got shape", cu_seqlens=cu)


@pytest.mark.parametrize("op", BOUNDED_OPS)
def test_a_sequence_longer_than_max_seqlen(op):
    assert_refused(op, ValueError, f"{op}: a sequence has 4 tokens, but max_seqlen is 3", max_seqlen=3)


@pytest.mark.parametrize("op", BOUNDED_OPS)
@pytest.mark.parametrize("heads", [0, -1, 3, 16])
def test_heads_that_do_not_divide(op, heads):
    assert_refused(op, ValueError, f"{op}: hidden size 8 is not divisible by num_heads {heads}", num_heads=heads)


@pytest.mark.parametrize("shape", [(2, 3), (3, 2, 8), (2, 8, 1), (8,)], ids=str)
def test_scorers_of_the_pool(shape):
    message = r"additive_pool: scorer has shape .*allowed: \(2, 8\), \(2, 2, 8\), \(2, 4\)"
    assert_refused("additive_pool", ValueError, message, scorer=torch.randn(shape))


def test_scorers_of_additive_attention():
    message = r"additive_attention: query_att has shape \(2, 5\), allowed: \(2, 8\) \(dense\) or \(2, 4\) \(per head\)"
    assert_refused("additive_attention", ValueError, message, query_att=torch.randn(2, 5))
    mixed = "additive_attention: key_att has shape .*expected"
    assert_refused("additive_attention", ValueError, mixed, query_att=torch.randn(2, 4))


@pytest.mark.parametrize(
    ("op", "spoiled", "message"),
    [
        ("activation_layer_norm", {"activation": "silu"}, "activation 'silu'; allowed: gelu, gelu_tanh, relu"),
        ("additive_pool", {"output": "mean"}, "additive_pool: output is 'mean', allowed: 'slice', 'full'"),
        ("additive_attention", {"form": "fast"}, "form is 'fast', allowed: 'auto', 'direct', 'key_free'"),
        ("attention", {"qkv": torch.randn(T, 16)}, r"attention: qkv must be \[T, 3H\], got shape \(6, 16\)"),
        ("attention", {"dropout_p": 1.0}, r"attention: dropout_p must be in \[0, 1\), got 1.0"),
        ("attention", {"dropout_p": -0.1}, r"attention: dropout_p must be in \[0, 1\), got -0.1"),
        ("conv_layer_norm", {"conv_weight": torch.randn(4, H)}, r"conv_weight must be \[k, 8\] with k odd.*\(4, 8\)"),
        ("conv_layer_norm", {"conv_weight": torch.randn(3, 7)}, r"conv_weight must be \[k, 8\] with k odd.*\(3, 7\)"),
        ("masked_lm_loss", {"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ("masked_lm_loss", {"label_smoothing": -0.1}, r"label_smoothing must be in \[0, 1\), got -0.1"),
        ("masked_lm_loss", {"weight": torch.randn(V, 7)}, r"masked_lm_loss: weight must be \[V, 8\], got shape"),
        ("masked_lm_loss", {"weight": torch.randn(0, H), "bias": None}, r"the vocabulary is empty: .*\(0, 8\)"),
        ("masked_lm_loss", {"labels": torch.arange(5)}, r"labels has shape \(5,\), expected \(6,\)"),
    ],
)
def test_options_and_special_shapes(op, spoiled, message):
    assert_refused(op, ValueError, message, **spoiled)


@pytest.mark.parametrize(("wrong", "found"), [(V, "to 11"), (-1, "from -1")])
def test_labels_out_of_range(wrong, found):
    labels = torch.tensor([0, 1, wrong, -100, 4, 5])
    message = rf"masked_lm_loss: labels must be -100 \(ignored\) or in \[0, 11\), found values .*{found}"
    assert_refused("masked_lm_loss", ValueError, message, labels=labels)
    with pytest.raises(ValueError, match="labels must be 3"):
        hk.masked_lm_loss(**valid("masked_lm_loss") | {"labels": labels.clamp(-100, 9)}, ignore_index=3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float32], ids=str)
def test_labels_of_another_dtype(dtype):
    message = f"masked_lm_loss: labels must be int64, got {dtype}"
    assert_refused("masked_lm_loss", TypeError, message, labels=torch.zeros(T, dtype=dtype))


@pytest.mark.parametrize("op", EVERY_OP)
def test_nothing_is_changed_by_a_refusal(op):
    arguments = valid(op)
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(TypeError):
        getattr(hk, op)(**arguments | {floats(op)[-1]: arguments[floats(op)[-1]].half()})
    assert all(torch.equal(arguments[name], value) for name, value in before.items())


@pytest.mark.parametrize("count", [0, -3])
def test_a_divisor_below_one(count):
    assert_refused("masked_lm_loss", ValueError, f"num_masked must be at least 1, got {count}", num_masked=count)


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (torch.ones(2), r"num_masked must be one number, got shape \(2,\)"),
        (torch.ones((), device="meta"), "num_masked is on meta, allowed: cpu"),
        (torch.ones((), requires_grad=True), "num_masked requires a gradient, but the loss has none for it"),
    ],
    ids=str,
)
def test_a_divisor_that_is_no_number(count, message):
    assert_refused("masked_lm_loss", ValueError, f"masked_lm_loss: {message}", num_masked=count)


def test_labels_that_are_no_tensor():
    assert_refused("masked_lm_loss", TypeError, "labels must be a torch.Tensor, got list", labels=[1, 2, 3])
