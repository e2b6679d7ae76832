"""A patched model computes what it computed before, where a token is valid, and zeros elsewhere."""

import copy
import itertools

import pytest
import torch
import transformers
from patch_helpers import FAMILIES, MASKS, assert_equal_where_valid, batch_of, layers_of, pair

from hbert.patching import patch

CLASSES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "distilbert": "DistilBert"}


@pytest.mark.parametrize(("family", "masked_lm", "padding"), list(itertools.product(FAMILIES, (False, True), MASKS)))
@torch.no_grad()
def test_every_output_in_float64(family, masked_lm, padding):
    plain, patched = pair(family, masked_lm)
    inputs = batch_of(plain, padding)
    outputs = [model(**inputs, output_hidden_states=True) for model in (plain, patched)]
    assert outputs[0].keys() == outputs[1].keys() and type(outputs[0]) is type(outputs[1])
    assert len(outputs[1].hidden_states) == 4
    if padding in ("left", "holes") and "pooler_output" in outputs[0]:
        # It is made of the first column, which here is padding in some rows.
        kept = inputs["attention_mask"][:, 0] == 1
        for output in outputs:
            output["pooler_output"] = output.pooler_output[kept]
    assert_equal_where_valid(*outputs, inputs.get("attention_mask"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rounding_errors_are_those_of_plain_torch(family, dtype):
    """Error against float64 at most twice that of the original at the same dtype."""
    plain, patched = pair(family, dtype=dtype, hidden_size=48, dim=48, intermediate_size=96, hidden_dim=96)
    inputs = batch_of(plain)
    valid = inputs["attention_mask"] == 1
    expected, original, found = (
        model(**inputs).last_hidden_state[valid].double() for model in (copy.deepcopy(plain).double(), plain, patched)
    )
    allowed = 2 * (original - expected).abs().max() + 2 * torch.finfo(dtype).eps * expected.abs().max()
    assert (found - expected).abs().max() <= allowed
    if dtype == torch.float32:
        assert (found - original).abs().max() <= 1e-5 * original.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_positions_and_embeddings_that_are_given(family):
    plain, patched = pair(family)
    inputs = batch_of(plain, "left")
    mask, ids = inputs["attention_mask"], inputs.pop("input_ids")
    positions = torch.arange(11).flip(0)[None] + 2
    embeds = plain.get_input_embeddings()(ids)
    for own in (
        {"input_ids": ids, "position_ids": positions},
        {"input_ids": ids, "position_ids": positions.expand(4, 11)},
        {"inputs_embeds": embeds},
        {"inputs_embeds": embeds, "position_ids": positions},
    ):
        found = [model(**inputs, **own).last_hidden_state for model in (plain, patched)]
        assert_equal_where_valid(found[:1], found[1:], mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
@torch.no_grad()
def test_masks_of_other_dtypes(dtype):
    plain, patched = pair("bert")
    inputs = batch_of(plain)
    mask = inputs.pop("attention_mask")
    found = [model(**inputs, attention_mask=mask.to(dtype)).last_hidden_state for model in (plain, patched)]
    assert_equal_where_valid(found[:1], found[1:], mask)


@torch.no_grad()
def test_positional_arguments_and_tuples():
    for family in FAMILIES:
        plain, patched = pair(family)
        inputs = batch_of(plain)
        positional = (inputs["input_ids"], inputs["attention_mask"])
        found = [model(*positional, return_dict=False) for model in (plain, patched)]
        assert type(found[1]) is tuple
        assert_equal_where_valid(*found, inputs["attention_mask"])
        for model in (plain, patched):
            model.config.return_dict = False
            model.config.output_hidden_states = True
        found = [model(*positional) for model in (plain, patched)]
        assert type(found[1]) is tuple
        assert_equal_where_valid(*found, inputs["attention_mask"])


@torch.no_grad()
def test_what_stands_under_the_mask_changes_no_bit_and_empty_rows_are_zero():
    _, patched = pair("bert", dtype=torch.float32)
    inputs = batch_of(patched, "holes")
    inputs["attention_mask"][1] = 0
    before = patched(**inputs).last_hidden_state
    assert not before[1].any() and before[0].any()
    inputs["input_ids"][inputs["attention_mask"] == 0] = 7
    assert torch.equal(patched(**inputs).last_hidden_state, before)


def loss_and_gradients(model, inputs):
    loss = model(**inputs).loss
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same_training(plain, patched, inputs):
    expected, found = (loss_and_gradients(model.train(), inputs) for model in (plain, patched))
    names = [[name for name, p in model.named_parameters() if p.grad is not None] for model in (plain, patched)]
    assert names[0] == names[1] and len(names[0]) > 20
    largest = max(float(t.abs().max()) for t in expected[1:])
    assert abs(expected[0] - found[0]) <= 1e-12 * abs(expected[0])
    for name, e, f in zip(names[0], expected[1:], found[1:], strict=True):
        assert (e - f).abs().max() <= 1e-11 * largest, name


DROPOUTS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob"),
    *("dropout", "attention_dropout", "seq_classif_dropout", "qa_dropout"),
)
WITHOUT_DROPOUT = dict.fromkeys(DROPOUTS, 0.0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_masked_lm_loss_and_gradients(family, tied):
    plain, patched = pair(family, masked_lm=True, tie_word_embeddings=tied, **WITHOUT_DROPOUT)
    inputs = batch_of(plain)
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | (torch.arange(11) % 3 > 0), -100)
    assert_same_training(plain, patched, {**inputs, "labels": labels})
    output = patched(**inputs, labels=labels)
    assert output.logits is None
    with torch.no_grad():
        outputs = [model.eval()(**inputs, labels=labels) for model in (plain, patched)]
    assert_equal_where_valid(*outputs, inputs["attention_mask"])


@pytest.mark.parametrize("activation", ["relu", "gelu_new", "silu"])
def test_other_activations_of_the_head(activation):
    for family in ("bert", "distilbert"):
        fields = {"hidden_act": activation, "activation": activation, **WITHOUT_DROPOUT}
        plain, patched = pair(family, masked_lm=True, **fields)
        inputs = batch_of(plain)
        assert_same_training(plain, patched, {**inputs, "labels": inputs["input_ids"]} | {"attention_mask": None})


HEADS = {
    "SequenceClassification": {"labels": torch.tensor([0, 1, 1, 0])},
    "TokenClassification": {"labels": torch.arange(44).view(4, 11) % 2},
    "QuestionAnswering": {"start_positions": torch.tensor([0, 0, 2, 3]), "end_positions": torch.tensor([5, 0, 4, 3])},
}


@pytest.mark.parametrize(("family", "head"), list(itertools.product(FAMILIES, HEADS)))
def test_heads_of_other_tasks(family, head):
    kind = getattr(transformers, f"{CLASSES[family]}For{head}")
    plain, patched = pair(family, kind=kind, **WITHOUT_DROPOUT)
    inputs, labels = batch_of(plain), dict(HEADS[head])
    if head == "TokenClassification":
        labels["labels"] = labels["labels"].masked_fill(inputs["attention_mask"] == 0, -100)
    if head == "QuestionAnswering":
        # The answer is sought among all columns, and at padding the original has hidden states too.
        del inputs["attention_mask"]
    assert_same_training(plain, patched, {**inputs, **labels})


def test_multiple_choice_and_pretraining():
    plain, patched = pair("bert", kind=transformers.BertForMultipleChoice, **WITHOUT_DROPOUT)
    inputs = {name: t.unflatten(0, (2, 2)) for name, t in batch_of(plain).items()}
    assert_same_training(plain, patched, {**inputs, "labels": torch.tensor([0, 1])})
    plain, patched = pair("bert", kind=transformers.BertForPreTraining, **WITHOUT_DROPOUT)
    inputs = batch_of(plain)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    targets = {"labels": labels, "next_sentence_label": torch.tensor([0, 1, 1, 0])}
    assert_same_training(plain, patched, {**inputs, **targets})


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_bit(family):
    _, patched = pair(family, masked_lm=True)
    inputs = batch_of(patched)
    inputs["labels"] = inputs["input_ids"]
    layer, calls = layers_of(patched.base_model)[1], []
    layer.register_forward_hook(lambda *_: calls.append("layer"))
    next(m for m in layer.modules() if isinstance(m, torch.nn.Linear)).register_forward_hook(
        lambda *_: calls.append("linear")
    )
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(loss_and_gradients(patched.train(), inputs))
        patched.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert calls.count("layer") == 2 and calls.count("linear") == 3
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("family", ["roberta", "distilbert"])
def test_dropout_has_the_same_statistics(family):
    """Mean and spread of the loss over many draws, with dropout at every place; none in evaluation."""
    chances = dict.fromkeys(DROPOUTS, 0.15)
    plain, patched = pair(family, dtype=torch.float32, **chances)
    inputs = batch_of(plain)
    valid = inputs["attention_mask"] == 1
    samples = []
    for model in (plain, patched):
        model.train()
        torch.manual_seed(0)
        with torch.no_grad():
            samples.append(torch.stack([model(**inputs).last_hidden_state[valid] for _ in range(200)]))
    means, spreads = [s.mean(0) for s in samples], [s.std(0) for s in samples]
    error = ((spreads[0] ** 2 + spreads[1] ** 2) / 200).sqrt()
    assert ((means[0] - means[1]) / error).abs().mean() < 1.2  # 0.8 where they are the same
    assert (spreads[0].mean() / spreads[1].mean() - 1).abs() < 0.03


@pytest.mark.parametrize("family", ["roberta", "distilbert"])
def test_each_dropout_acts_where_it_did(family):
    """With one dropout at a time all but certain, the outputs have the variance of the original's."""
    plain, patched = pair(family, dtype=torch.float32, **WITHOUT_DROPOUT)
    inputs = batch_of(plain, "none")
    names = [name for name, m in plain.named_modules() if isinstance(m, torch.nn.Dropout)]
    assert len(names) == 1 + 3 * (2 if family == "distilbert" else 3)
    for name in names[:4]:
        spread = []
        for model in (plain, patched):
            model.train()
            model.get_submodule(name).p = 0.5
            torch.manual_seed(0)
            with torch.no_grad():
                spread.append(torch.stack([model(**inputs).last_hidden_state for _ in range(60)]).std(0).mean())
            model.get_submodule(name).p = 0.0
        assert spread[0] > 1e-3
        assert abs(spread[1] / spread[0] - 1) < 0.1, name


@pytest.mark.parametrize("family", FAMILIES)
def test_under_autocast_the_stream_stays_in_float32(family):
    plain, patched = pair(family, masked_lm=True, dtype=torch.float32, **WITHOUT_DROPOUT)
    inputs = batch_of(plain)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    exact = loss_and_gradients(copy.deepcopy(plain).train(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        original, found = (loss_and_gradients(model.train(), inputs) for model in (plain, patched))
        del inputs["labels"]
        states = [model.base_model(**inputs)[0] for model in (plain, patched)]
    assert states[0].dtype == states[1].dtype == torch.float32
    errors = [
        sum(float((a - b).square().sum()) for a, b in zip(run[1:], exact[1:], strict=True)) ** 0.5
        for run in (original, found)
    ]
    assert 0 < errors[1] <= 2 * errors[0]
    assert [t.dtype for t in found] == [t.dtype for t in exact]


def test_minilm(minilm):
    plain = transformers.AutoModel.from_pretrained(minilm).eval()
    patched = copy.deepcopy(plain)
    assert "6 attention blocks" in str(patch(patched))
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    sentences = ["A short one.", "Padding must change nothing, however long the others are."]
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    assert 0 < inputs["attention_mask"][0].sum() < inputs["attention_mask"][1].sum()
    with torch.no_grad():
        outputs = [model(**inputs, output_hidden_states=True) for model in (plain, patched)]
    assert_equal_where_valid(*outputs, inputs["attention_mask"], tolerance=1e-5)


def test_a_model_of_float16_on_a_cpu_runs_as_before():
    plain, patched = (model.half() for model in pair("bert"))
    inputs = batch_of(plain)
    with torch.no_grad(), pytest.warns(UserWarning, match="float16 on a CPU"):
        assert torch.equal(patched(**inputs)[0], plain(**inputs)[0])
