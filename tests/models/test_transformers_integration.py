"""HBERT as a citizen of transformers: Auto classes, checkpoints, pipelines, Trainer, light imports."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from model_helpers import VOCAB, batch, small_masked_lm, small_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, pipeline

import hbert
from hbert import HBertForMaskedLM, HBertModel

WORDS = ["[PAD]", "[UNK]", "[MASK]", *(f"w{i}" for i in range(VOCAB - 3))]


def small_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(WORDS[:3])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"layer_types": "AAS", "conv_kernel_size": 3, "scorer": "per_head"},
        {"norm_style": "merge", "positions": "learned", "type_vocab_size": 2},
        {"norm_style": "post_ln", "tie_word_embeddings": False, "init": "magneto"},
    ],
    ids=["sub_ln", "merge", "untied"],
)
def test_a_reloaded_checkpoint_gives_the_same_bits(tmp_path, fields):
    model = small_masked_lm(dtype=torch.float32, **fields)
    ids, mask = batch()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    for kind in (HBertForMaskedLM, AutoModelForMaskedLM):
        loaded = kind.from_pretrained(tmp_path)
        assert type(loaded) is HBertForMaskedLM
        assert torch.equal(loaded(ids, mask).logits, model(ids, mask).logits)
    tied = loaded.head.decoder.weight is loaded.get_input_embeddings().weight
    assert tied == fields.get("tie_word_embeddings", True)


def test_the_encoder_loads_from_a_masked_lm_checkpoint_and_back(tmp_path):
    model = small_masked_lm(dtype=torch.float32)
    ids, mask = batch()
    model.save_pretrained(tmp_path / "lm")
    encoder = AutoModel.from_pretrained(tmp_path / "lm")
    assert type(encoder) is HBertModel
    assert torch.equal(encoder(ids, mask).last_hidden_state, model.hbert(ids, mask).last_hidden_state)
    encoder.save_pretrained(tmp_path / "encoder")
    again = HBertForMaskedLM.from_pretrained(tmp_path / "encoder")
    assert torch.equal(again.hbert(ids, mask).last_hidden_state, encoder(ids, mask).last_hidden_state)


def test_dtype_and_attention_implementation_are_chosen_at_loading(tmp_path):
    model = small_masked_lm(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    ids, mask = batch()
    eager = AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.hbert.config._attn_implementation == "eager"
    torch.testing.assert_close(eager(ids, mask).logits, model(ids, mask).logits, rtol=1e-4, atol=1e-5)
    narrow = AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {t.dtype for t in (*narrow.parameters(), *narrow.buffers())} == {torch.bfloat16}
    assert torch.equal(narrow(ids, mask).logits, model.to(torch.bfloat16)(ids, mask).logits)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "fields",
    [{"norm_style": "post_ln", "scorer": "per_head"}, {"conv_kernel_size": 3, "type_vocab_size": 2}],
    ids=["per_head", "conv"],
)
@torch.no_grad()
def test_weights_that_a_device_map_leaves_on_the_disk(tmp_path, fields, implementation):
    model = small_masked_lm(dtype=torch.float32, **fields)
    model.save_pretrained(tmp_path)
    offloaded = AutoModelForMaskedLM.from_pretrained(
        tmp_path, device_map={"": "disk"}, offload_folder=tmp_path / "off", attn_implementation=implementation
    )
    for length in (7, 45):  # both forms of additive attention
        ids, mask = batch(rows=2, length=length)
        expected, found = (m(ids, mask, labels=ids) for m in (model, offloaded))
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.loss, expected.loss)
    assert {p.device.type for p in offloaded.parameters()} == {"meta"}


def test_pipelines(tmp_path):
    model, tokenizer = small_masked_lm(dtype=torch.float32), small_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = "w1 w2 [MASK] w4"
    logits = model(**tokenizer(text, return_tensors="pt")).logits[0, 2].detach()
    best = pipeline("fill-mask", model=str(tmp_path))(text, top_k=1)[0]
    assert best["token"] == int(logits.argmax())
    assert best["score"] == pytest.approx(float(logits.softmax(-1).max()), rel=1e-4)
    encoder = AutoModel.from_pretrained(tmp_path)
    features = pipeline("feature-extraction", model=encoder, tokenizer=tokenizer)("w1 w2", return_tensors=True)
    expected = encoder(**tokenizer("w1 w2", return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(features, expected)


def test_trainer_learns_and_evaluates(tmp_path):
    model = small_masked_lm(dtype=torch.float32, hidden_dropout_prob=0.1).train()
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (5, 7, 3, 6):
        ids = torch.randint(3, VOCAB, (7,), generator=generator)
        mask = torch.arange(7) < length
        labels = ids.masked_fill(~mask, -100)
        rows.append({"input_ids": ids, "attention_mask": mask.long(), "labels": labels})
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        learning_rate=0.02,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * before
    assert trainer.predict(rows).predictions.shape == (4, 7, VOCAB)


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_is_light():
    heavy = "print(sorted({'torch', 'transformers', 'hbert_kernels'} & set(sys.modules)))"
    assert run_python(f"import sys, hbert; dir(hbert); hbert.__version__; {heavy}") == "[]"


def test_loading_any_name_registers_the_auto_classes():
    code = (
        "from hbert import HBertConfig; from transformers import AutoConfig, AutoModelForMaskedLM;"
        "config = AutoConfig.for_model('hbert', num_hidden_layers=1, hidden_size=12, vocab_size=9);"
        "print(type(AutoModelForMaskedLM.from_config(config)).__name__)"
    )
    assert run_python(code) == "HBertForMaskedLM"


@pytest.mark.parametrize(
    "imports",
    [
        "import hbert; from transformers import BertModel",
        "import hbert; hbert.optimize",
        "import hbert.inference",
        "import transformers.modeling_layers; import hbert",
    ],
)
def test_the_packages_are_imported_in_any_order(imports):
    code = (
        f"{imports}; from transformers.models.auto.modeling_auto import MODEL_MAPPING;"
        "print('HBertConfig' in [kind.__name__ for kind in MODEL_MAPPING])"
    )
    assert run_python(code) == "True"


def test_hbert_convert_needs_no_import_of_its_own():
    assert run_python("import hbert; print('convert' in dir(hbert), hbert.convert.from_pretrained.__module__)") == (
        "True hbert.convert"
    )


def test_exported_names():
    for name in set(hbert.__all__) - {"__version__"}:
        assert getattr(hbert, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'hbert' has no attribute 'HBert'"):
        _ = hbert.HBert


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="head_mask"):
        small_model()(torch.ones(1, 3, dtype=torch.int64), head_mask=torch.ones(2, 3))
