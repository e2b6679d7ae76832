"""Packed collators: what they build, and that models and the Trainer take it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from model_helpers import VOCAB, small_masked_lm, small_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import DataCollatorForTokenClassification, PreTrainedTokenizerFast, Trainer, TrainingArguments

from hbert import HBertForSequenceClassification, HBertForTokenClassification, PackedCollator, PackedMaskedLMCollator

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[MASK]", *(f"w{i}" for i in range(VOCAB - 4))]


def tokenizer(**special) -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=model, **{**names, **special})


def examples(lengths=(3, 1, 5), **columns) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(4, VOCAB, (n,), generator=generator).tolist()} for n in lengths]
    return [{**row, **{name: values[i] for name, values in columns.items()}} for i, row in enumerate(rows)]


def test_tokens_follow_each_other_and_padding_is_left_out():
    rows = examples((4, 2), attention_mask=[[1, 1, 1, 0], [1, 1]], token_type_ids=[[0, 0, 1, 1], [0, 1]])
    batch = PackedCollator()(rows)
    assert batch["input_ids"].tolist() == rows[0]["input_ids"][:3] + rows[1]["input_ids"]
    assert batch["token_type_ids"].tolist() == [0, 0, 1, 0, 1]
    assert batch["cu_seqlens"].tolist() == [0, 3, 5] and batch["cu_seqlens"].dtype == torch.int32
    assert batch["max_seqlen"] == 3 and type(batch["max_seqlen"]) is int
    assert set(batch) == {"input_ids", "token_type_ids", "cu_seqlens", "max_seqlen"}


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        ("label", [2, 0, 1], torch.tensor([2, 0, 1])),
        ("labels", [0.5, 1.0, -2.0], torch.tensor([0.5, 1.0, -2.0])),
        ("labels", [[1.0, 0.0]] * 3, torch.tensor([[1.0, 0.0]] * 3)),
        ("labels", [[1, 2, 3], [4], [5, 6, 7, 8, 9]], torch.arange(1, 10)),
        ("labels", [[1, 2]] * 3, torch.tensor([[1, 2]] * 3)),
    ],
)
def test_labels_of_examples_and_of_tokens(name, labels, expected):
    found = PackedCollator()(examples(**{name: labels}))["labels"]
    assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_labels_of_padding_are_left_out():
    rows = examples((3, 2), attention_mask=[[0, 1, 1], [1, 1]], labels=[[7, 8, 9], [1, 2]])
    assert PackedCollator()(rows)["labels"].tolist() == [8, 9, 1, 2]


def test_a_model_gives_the_padded_logits():
    model = small_model(HBertForSequenceClassification, num_labels=3, dtype=torch.float64)
    rows = examples(label=[0, 2, 1])
    out = model(**PackedCollator()(rows))
    alone = [model(torch.tensor([row["input_ids"]])).logits[0] for row in rows]
    torch.testing.assert_close(out.logits, torch.stack(alone))


def test_masking_spares_special_tokens_and_names_its_positions():
    torch.manual_seed(3)
    rows = [{"input_ids": [2, *row["input_ids"]]} for row in examples([40] * 20)]
    collator = PackedMaskedLMCollator(tokenizer(), rate=0.3, mask_replace_prob=1.0, random_replace_prob=0.0)
    batch, original = collator(rows), PackedCollator()(rows)["input_ids"]
    masked = batch["labels"] != -100
    assert torch.equal(masked.nonzero().squeeze(1), batch["masked_positions"])
    assert torch.equal(batch["labels"][masked], original[masked])
    assert torch.equal(batch["input_ids"], torch.where(masked, 3, original))
    assert not masked[original == 2].any()
    assert 0.2 < masked.double().mean() < 0.4
    again = collator(rows)
    assert not torch.equal(again["labels"], batch["labels"])
    torch.manual_seed(3)
    assert torch.equal(collator(rows)["labels"], batch["labels"])


def test_masked_positions_give_the_loss_that_is_read_from_the_labels():
    model = small_masked_lm().train()
    batch = PackedMaskedLMCollator(tokenizer(), rate=0.5)(examples((9, 8, 7)))
    given = model(**batch)
    read = model(**{name: value for name, value in batch.items() if name != "masked_positions"})
    assert torch.equal(given.loss, read.loss) and torch.equal(given.num_correct, read.num_correct)
    assert int(given.num_masked) == len(batch["masked_positions"]) > 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"masked_positions": torch.tensor([0, 99])}, ValueError, r"masked_positions must be in \[0, 8\)"),
        ({"masked_positions": torch.tensor([0.5])}, TypeError, "masked_positions must be int64"),
        ({"attention_mask": torch.ones(2, 4, dtype=torch.int64)}, ValueError, "cannot be combined with attention_mask"),
    ],
)
def test_bad_masked_positions(changes, error, message):
    ids = torch.ones(2, 4, dtype=torch.int64)
    arguments = {"input_ids": ids, "labels": ids, "masked_positions": torch.tensor([0, 7]), **changes}
    with pytest.raises(error, match=message):
        small_masked_lm()(**arguments)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one example"),
        ([{"labels": 1}], "examples without input_ids; columns found: labels"),
        ([{"input_ids": [5], "label": 1}, {"input_ids": [5]}], "examples without label"),
        ([{"input_ids": [5, 6], "token_type_ids": [0]}], "token_type_ids has shape"),
        ([{"input_ids": [5, 6], "attention_mask": [1]}], "attention_mask has shape"),
        ([{"input_ids": [5], "label": 1, "labels": 0}], "both label and labels"),
        (
            examples(labels=[[1, 2, 3], [4], [5, 6]]),
            r"labels of example 2 of the batch have shape \(2,\), its .* \(5,\)",
        ),
        (examples(labels=[[1, 2], [4], [5] * 5]), r"labels of example 0 of the batch have shape \(2,\), its .* \(3,\)"),
        (examples(labels=[[0.5] * 3, [1.0], [0.0] * 5]), "an int for each token must have the same shape"),
        (examples(labels=[[0.5, 1.0], [1.0], [0.0]]), r"labels of example 0 of the batch have shape \(2,\)"),
    ],
)
def test_bad_examples(rows, message):
    with pytest.raises(ValueError, match=message):
        PackedCollator()(rows)


def test_bad_masking():
    with pytest.raises(ValueError, match="no mask token"):
        PackedMaskedLMCollator(tokenizer(mask_token=None))
    with pytest.raises(ValueError, match="masking makes its own"):
        PackedMaskedLMCollator(tokenizer())(examples(label=[1, 2, 3]))


def training(folder, steps: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=0.01,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )


def test_the_trainer_learns_from_packed_batches(tmp_path):
    torch.manual_seed(0)
    rows = [{"input_ids": [4 + i % 9, *[20 + j for j in range(i % 4)]], "label": i % 9 % 2} for i in range(64)]
    model = small_model(HBertForSequenceClassification, dtype=torch.float32, num_labels=2).train()
    trainer = Trainer(
        model, training(tmp_path, 60), data_collator=PackedCollator(), train_dataset=rows, eval_dataset=rows
    )
    trainer.train()
    predictions = trainer.predict(rows).predictions
    assert (predictions.argmax(1) == [row["label"] for row in rows]).mean() > 0.95


def test_the_trainer_predicts_all_tokens_from_padded_batches(tmp_path):
    lengths = (3, 1, 5, 4, 2, 6, 3, 2, 7, 4)  # batches of 8 and of 2
    rows = examples(lengths, labels=[[i % 2] * n for i, n in enumerate(lengths)])
    model = small_model(HBertForTokenClassification, dtype=torch.float32, num_labels=2).train()
    trainer = Trainer(model, training(tmp_path, 2), data_collator=PackedCollator(), train_dataset=rows)
    trainer.train()
    trainer.data_collator = DataCollatorForTokenClassification(tokenizer())
    found = trainer.predict(rows)
    assert (found.label_ids != -100).sum() == 37
    for row, logits, labels in zip(rows, found.predictions, found.label_ids, strict=True):
        n = len(row["input_ids"])
        alone = model(torch.tensor([row["input_ids"]])).logits[0].detach().numpy()
        np.testing.assert_allclose(logits[:n], alone, rtol=1e-4, atol=1e-5)
        assert labels[:n].tolist() == row["labels"]


def test_the_trainer_pretrains_from_packed_batches(tmp_path):
    rows = [{"input_ids": [4 + i % 5] * (2 + i % 6)} for i in range(64)]
    model = small_masked_lm(dtype=torch.float32).train()
    collator = PackedMaskedLMCollator(tokenizer(), rate=0.3)
    trainer = Trainer(model, training(tmp_path, 60), data_collator=collator, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * before
