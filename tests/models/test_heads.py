"""The task heads against formulas on the encoder's hidden states, in every layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from model_helpers import VOCAB, batch, dense_twin, small_model

from hbert import HBertForQuestionAnswering, HBertForSequenceClassification, HBertForTokenClassification
from hbert_kernels.packing import Packing

EXACT = {"rtol": 1e-11, "atol": 1e-12}
LABELS = 5


def classifier(**fields) -> HBertForSequenceClassification:
    return small_model(HBertForSequenceClassification, num_labels=LABELS, **fields)


def packed(ids: torch.Tensor, mask: torch.Tensor) -> dict:
    packing = Packing.from_mask(mask, static=False)
    return {"input_ids": ids[mask], "cu_seqlens": packing.cu_seqlens, "max_seqlen": packing.max_seqlen}


def pooled(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    rows = [h[m] for h, m in zip(hidden, mask, strict=True)]
    zero = hidden.new_zeros(hidden.shape[-1])
    return torch.stack([zero if not len(row) else row.mean(0) if pooling == "mean" else row[0] for row in rows])


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_sequence_logits_follow_the_formula(pooling, dense):
    model = classifier(classifier_pooling=pooling, layer_types="AS")
    ids, mask = batch()
    mask[2, 0], mask[3] = False, True
    run = dense_twin(model) if dense else model
    hidden = model.hbert(ids, mask).last_hidden_state
    head = model.classifier
    middle = torch.tanh(pooled(hidden, mask, pooling) @ head.dense.weight.T + head.dense.bias)
    torch.testing.assert_close(run(ids, mask).logits, middle @ head.out.weight.T + head.out.bias, **EXACT)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_packed_and_compiled_sequences_give_the_padded_logits(pooling):
    model = classifier(classifier_pooling=pooling)
    ids, mask = batch()
    expected = model(ids, mask).logits
    torch.testing.assert_close(model(**packed(ids, mask)).logits, expected, **EXACT)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, mask).logits, expected, **EXACT)
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits, **EXACT)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_batches_of_padding_alone_pool_to_zero(pooling):
    model = classifier(classifier_pooling=pooling)
    ids = torch.ones(2, 3, dtype=torch.int64)
    head = model.classifier
    expected = head.out(head.dense.bias.tanh()).expand(2, -1)
    for run in (model, dense_twin(model)):
        torch.testing.assert_close(run(ids, torch.zeros(2, 3, dtype=torch.bool)).logits, expected, **EXACT)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_gradients_agree_between_layouts(pooling):
    model = classifier(classifier_pooling=pooling, layer_types="AS", conv_kernel_size=3)
    ids, mask = batch(rows=5)
    labels = torch.tensor([0, 4, 2, 1, 3])
    both = []
    for run in (model, dense_twin(model)):
        run.zero_grad()
        run(ids, mask, labels=labels).loss.backward()
        both.append([p.grad for p in run.parameters()])
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(
            torch.zeros(()) if a is None else a,
            torch.zeros(()) if b is None else b,
            rtol=1e-7,
            atol=1e-10,
            check_dtype=False,
        )


def test_losses_of_every_problem_type():
    ids, mask = batch()
    classes = torch.tensor([1, 0, 4, 4])
    model = classifier()
    out = model(ids, mask, labels=classes)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, classes))
    assert model.config.problem_type == "single_label_classification"
    many = (torch.rand(4, LABELS, generator=torch.Generator().manual_seed(0)) > 0.5).double()
    out = classifier()(ids, mask, labels=many)
    torch.testing.assert_close(out.loss, F.binary_cross_entropy_with_logits(out.logits, many))
    targets = torch.tensor([0.5, -2.0, 1.0, 3.0], dtype=torch.float64)
    regression = small_model(HBertForSequenceClassification, num_labels=1)
    out = regression(ids, mask, labels=targets)
    torch.testing.assert_close(out.loss, (out.logits.squeeze(1) - targets).pow(2).mean())


def squared_error(logits, targets):
    return (logits - targets.view_as(logits)).pow(2).mean()


NUMBERS = torch.randn(4, LABELS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "labels", "loss"),
    [
        ("single_label_classification", LABELS, torch.tensor([1, 0, 4, 4]), F.cross_entropy),
        ("multi_label_classification", LABELS, (NUMBERS > 0).double(), F.binary_cross_entropy_with_logits),
        ("multi_label_classification", 1, (NUMBERS[:, :1] > 0).double(), F.binary_cross_entropy_with_logits),
        ("regression", LABELS, NUMBERS, squared_error),
        ("regression", 1, NUMBERS[:, :1], squared_error),
        ("regression", 1, NUMBERS[:, 0], squared_error),
    ],
)
def test_the_problem_type_decides_the_loss(problem_type, num_labels, labels, loss):
    model = small_model(HBertForSequenceClassification, num_labels=num_labels, problem_type=problem_type)
    ids, mask = batch()
    for run in (model, dense_twin(model)):
        out = run(ids, mask, labels=labels)
        assert out.logits.shape == (4, num_labels)
        torch.testing.assert_close(out.loss, loss(out.logits, labels))
    assert model.config.problem_type == problem_type


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 2)])
def test_several_targets_need_a_number_each(shape):
    # As many sequences as targets: [4] would be stretched over [4, 4] without an error.
    model = small_model(HBertForSequenceClassification, num_labels=4, problem_type="regression")
    with pytest.raises(ValueError, match="4 numbers a sequence, but labels have shape"):
        model(*batch(), labels=torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("dense", [False, True])
def test_token_logits_and_loss(dense):
    model = small_model(HBertForTokenClassification, num_labels=LABELS)
    ids, mask = batch()
    labels = torch.randint(LABELS, ids.shape, generator=torch.Generator().manual_seed(2))
    labels[0, 3] = -100
    hidden = model.hbert(ids, mask).last_hidden_state
    logits = (hidden @ model.classifier.weight.T + model.classifier.bias).masked_fill(~mask[..., None], 0)
    counted = mask & (labels >= 0)
    out = (dense_twin(model) if dense else model)(ids, mask, labels=labels)
    torch.testing.assert_close(out.logits, logits, **EXACT)
    torch.testing.assert_close(out.loss, F.cross_entropy(logits[counted].float(), labels[counted]))


def test_packed_and_compiled_tokens_give_the_padded_logits():
    model = small_model(HBertForTokenClassification, num_labels=LABELS)
    ids, mask = batch()
    labels = torch.randint(LABELS, ids.shape, generator=torch.Generator().manual_seed(2))
    expected = model(ids, mask, labels=labels)
    out = model(**packed(ids, mask), labels=labels[mask])
    torch.testing.assert_close(out.logits, expected.logits[mask], **EXACT)
    torch.testing.assert_close(out.loss, expected.loss)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, mask, labels=labels)
    torch.testing.assert_close(compiled.logits, expected.logits, **EXACT)
    torch.testing.assert_close(compiled.loss, expected.loss)


def test_compiled_answers_give_the_same_logits():
    model = small_model(HBertForQuestionAnswering)
    ids, mask = batch()
    expected = model(ids, mask)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, mask)
    for name in ("start_logits", "end_logits"):
        torch.testing.assert_close(compiled[name], expected[name], **EXACT)


@pytest.mark.parametrize("dense", [False, True])
def test_answers_are_never_in_the_padding(dense):
    model = small_model(HBertForQuestionAnswering)
    ids, mask = batch()
    first, last = torch.tensor([0, 7, 7, 5]), torch.tensor([6, 7, 7, 5])
    mask[3, 5] = True
    out = (dense_twin(model) if dense else model)(ids, mask, start_positions=first, end_positions=last)
    hidden = model.hbert(ids, mask).last_hidden_state
    both = hidden @ model.qa_outputs.weight.T + model.qa_outputs.bias
    for row in (0, 2, 3):
        kept = mask[row]
        torch.testing.assert_close(out.start_logits[row][kept], both[row, kept, 0], **EXACT)
        assert not out.start_logits[row].softmax(0)[~kept].any()
        assert not out.end_logits[row].softmax(0)[~kept].any()
    # Rows 1 and 2 point behind the input: they do not count.
    start, end = F.cross_entropy(out.start_logits[::3], first[::3]), F.cross_entropy(out.end_logits[::3], last[::3])
    torch.testing.assert_close(out.loss, (start + end) / 2)
    with pytest.raises(ValueError, match="position 6 of sequence 1 is padding"):
        model(ids, mask, start_positions=last, end_positions=torch.tensor([0, 6, 7, 5]))


def test_heads_pass_on_hidden_states_attentions_and_tuples():
    ids, mask = batch()
    for kind in (HBertForSequenceClassification, HBertForTokenClassification, HBertForQuestionAnswering):
        model = small_model(kind, layer_types="ASA")
        out = model(ids, mask, output_hidden_states=True, output_attentions=True)
        base = model.hbert(ids, mask, output_hidden_states=True, output_attentions=True)
        assert all(torch.equal(a, b) for a, b in zip(out.hidden_states, base.hidden_states, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(out.attentions, base.attentions, strict=True))
        parts = model(ids, mask, return_dict=False)
        assert len(parts) == (2 if kind is HBertForQuestionAnswering else 1)
        assert torch.equal(parts[0], model(ids, mask)[0])


BAD = [
    (HBertForSequenceClassification, {"labels": torch.zeros(3, dtype=torch.int64)}, "4 sequences, but labels"),
    (HBertForSequenceClassification, {"labels": torch.tensor(1)}, "4 sequences, but labels"),
    (HBertForSequenceClassification, {"labels": torch.full((4,), LABELS)}, r"labels must be in \[0, 5\)"),
    (HBertForTokenClassification, {"labels": torch.zeros(4, dtype=torch.int64)}, "labels must have the shape"),
    (HBertForTokenClassification, {"labels": torch.full((4, 7), -1)}, r"labels must be in \[0, 5\)"),
    (HBertForQuestionAnswering, {"start_positions": torch.zeros(4, dtype=torch.int64)}, "must be given together"),
    (
        HBertForQuestionAnswering,
        {"start_positions": torch.zeros(3, dtype=torch.int64), "end_positions": torch.zeros(4, dtype=torch.int64)},
        "4 sequences, but positions",
    ),
]


@pytest.mark.parametrize(("kind", "arguments", "message"), BAD)
def test_bad_labels(kind, arguments, message):
    fields = {} if kind is HBertForQuestionAnswering else {"num_labels": LABELS}
    with pytest.raises(ValueError, match=message):
        small_model(kind, **fields)(torch.ones(4, 7, dtype=torch.int64), **arguments)


def test_what_stands_under_the_mask_changes_no_bit():
    ids, mask = batch()
    other = torch.where(mask, ids, (ids + 13) % VOCAB)
    for kind in (HBertForSequenceClassification, HBertForTokenClassification, HBertForQuestionAnswering):
        model = small_model(kind)
        for run in (model, dense_twin(model)):
            assert torch.equal(run(ids, mask)[0], run(other, mask)[0])


def test_classifier_dropout_overrides_hidden_dropout():
    model = classifier(hidden_dropout_prob=0.3)
    assert model.classifier.dropout.p == 0.3
    assert classifier(hidden_dropout_prob=0.3, classifier_dropout=0.0).classifier.dropout.p == 0.0
