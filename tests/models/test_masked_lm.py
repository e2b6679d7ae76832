"""The masked-LM head: loss on the masked tokens only, tied decoder, logits on demand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from model_helpers import VOCAB, batch, dense_twin, small_masked_lm

IGNORED = -100


def labelled_batch(rows: int = 5, length: int = 7):
    ids, mask = batch(rows, length)
    chosen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    labels = torch.where(chosen & mask, ids.flip(1), IGNORED)
    assert (labels != IGNORED).sum() >= 3
    return ids, mask, labels


@pytest.mark.parametrize("style", ["sub_ln", "post_ln"])
@pytest.mark.parametrize("training", [False, True])
def test_loss_and_counts_equal_cross_entropy_of_the_logits(style, training):
    model = small_masked_lm(norm_style=style)
    ids, mask, labels = labelled_batch()
    logits = model(ids, mask).logits
    model.train(training)
    out = model(ids, mask, labels=labels)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)
    assert int(out.num_masked) == int((labels != IGNORED).sum())
    assert int(out.num_correct) == int((logits.argmax(-1) == labels).sum())
    if training:
        assert out.logits is None
    else:
        assert torch.equal(out.logits, logits)


def test_logits_follow_the_formula_and_are_zero_under_the_mask():
    model = small_masked_lm()
    ids, mask, _ = labelled_batch()
    head = model.head
    hidden = F.gelu(model.hbert(ids, mask).last_hidden_state @ head.dense.weight.T + head.dense.bias)
    hidden = F.layer_norm(hidden, (12,), head.norm.weight, head.norm.bias, head.norm.eps)
    expected = hidden @ model.hbert.embeddings.word_embeddings.weight.T + head.decoder.bias
    logits = model(ids, mask).logits
    torch.testing.assert_close(logits[mask], expected[mask], rtol=1e-10, atol=1e-10)
    assert not logits[~mask].any()


def test_gradients_equal_those_of_the_full_logits():
    model = small_masked_lm().train()
    ids, mask, labels = labelled_batch()
    parameters = list(model.parameters())
    got = torch.autograd.grad(model(ids, mask, labels=labels).loss, parameters)
    logits = dense_twin(model).eval()
    loss = F.cross_entropy(logits(ids, mask).logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    expected = torch.autograd.grad(loss, list(logits.parameters()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_labels_of_padding_do_not_count():
    model = small_masked_lm().train()
    ids, mask, labels = labelled_batch()
    noisy = torch.where(mask, labels, torch.full_like(labels, 10**6))
    for variant in (model, dense_twin(model)):
        clean, dirty = variant(ids, mask, labels=labels), variant(ids, mask, labels=noisy)
        assert torch.equal(clean.loss, dirty.loss)
        assert clean.num_masked == dirty.num_masked == (labels != IGNORED).sum()


def test_labels_of_dead_rows_do_not_count():
    model = small_masked_lm().train()
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    ids = torch.arange(1, 9)
    live = model(ids[:5], labels=ids[:5], cu_seqlens=cu, max_seqlen=3)
    out = model(ids, labels=ids, cu_seqlens=cu, max_seqlen=3)
    assert out.num_masked == 5
    torch.testing.assert_close(out.loss, live.loss, rtol=1e-12, atol=0)


def test_a_batch_without_masked_tokens_has_zero_loss_and_zero_gradients():
    model = small_masked_lm().train()
    ids, mask, labels = labelled_batch()
    out = model(ids, mask, labels=torch.full_like(labels, IGNORED))
    out.loss.backward()
    assert out.loss == 0 and out.num_masked == 0 and out.num_correct == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_accumulated_micro_batches_equal_the_whole_batch():
    model = small_masked_lm().train()
    ids, mask, labels = labelled_batch()
    whole = model(ids, mask, labels=labels)
    total = int(whole.num_masked)
    parts = [model(ids[r], mask[r], labels=labels[r], num_masked=total).loss for r in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(sum(parts), whole.loss, rtol=1e-12, atol=0)


def test_packed_inputs_give_the_padded_loss():
    model = small_masked_lm().train()
    ids, mask, labels = labelled_batch()
    lengths = mask.sum(1)
    cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    packed = model(ids[mask], labels=labels[mask], cu_seqlens=cu, max_seqlen=7)
    assert torch.equal(packed.loss, model(ids, mask, labels=labels).loss)
    model.eval()
    logits = model(ids[mask], cu_seqlens=cu, max_seqlen=7).logits
    assert torch.equal(logits, model(ids, mask).logits[mask])


def test_decoder_is_tied_unless_the_configuration_says_otherwise():
    tied = small_masked_lm()
    assert tied.head.decoder.weight is tied.get_input_embeddings().weight
    untied = small_masked_lm(tie_word_embeddings=False)
    assert untied.head.decoder.weight is not untied.get_input_embeddings().weight


@pytest.mark.parametrize("size", [VOCAB + 9, VOCAB - 9])
def test_resizing_the_vocabulary_keeps_the_tie_and_the_old_tokens(size):
    model = small_masked_lm()
    ids = torch.randint(0, VOCAB - 9, (2, 7))
    before = model(ids).logits
    model.resize_token_embeddings(size)
    assert model.head.decoder.weight is model.get_input_embeddings().weight
    assert model.config.vocab_size == size and model.head.decoder.bias.shape == (size,)
    after = model(ids).logits
    assert after.shape == (2, 7, size)
    kept = min(size, VOCAB)
    torch.testing.assert_close(after[..., :kept], before[..., :kept], rtol=1e-12, atol=1e-12)


def test_hidden_states_are_padded_like_the_base_models():
    model = small_masked_lm()
    ids, mask, labels = labelled_batch()
    got = model(ids, mask, labels=labels, output_hidden_states=True).hidden_states
    expected = model.hbert(ids, mask, output_hidden_states=True).hidden_states
    assert len(got) == 3 and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_tuples_instead_of_outputs():
    model = small_masked_lm()
    ids, mask, labels = labelled_batch()
    named = model(ids, mask, labels=labels)
    loss, logits, num_masked, num_correct = model(ids, mask, labels=labels, return_dict=False)
    assert torch.equal(loss, named.loss) and torch.equal(logits, named.logits)
    assert num_masked == named.num_masked and num_correct == named.num_correct
