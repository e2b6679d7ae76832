"""What patching does to the object: its class changes, and all that people do with models goes on."""

import copy
import inspect
import io
import pickle
import re

import pytest
import torch
import transformers
from patch_helpers import FAMILIES, assert_equal_where_valid, batch_of, layers_of, pair, small
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModelForMaskedLM, BertForMaskedLM, BertModel, GPT2Config, GPT2Model
from transformers.modeling_outputs import BaseModelOutput

from hbert.patching import patch, unpatch


def classes(model):
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("masked_lm", [False, True])
@torch.no_grad()
def test_unpatch_restores_the_object(family, masked_lm):
    model = small(family, masked_lm)
    inputs = batch_of(model)
    before, kinds, contents = model(**inputs)[0], classes(model), [dict(vars(m)) for m in model.modules()]
    parameters = {name: (p, p.data_ptr()) for name, p in model.named_parameters(remove_duplicate=False)}
    names, text = list(model.state_dict()), repr(model)
    patch(model)
    assert classes(model) != kinds and repr(model) == text and type(model).__name__ == kinds[0].__name__
    assert isinstance(model, kinds[0]) and list(model.state_dict()) == names
    found = model(**inputs)[0]
    assert not torch.equal(found, before)  # zeros under the mask
    unpatch(model)
    assert classes(model) == kinds
    assert [vars(m).keys() for m in model.modules()] == [c.keys() for c in contents]
    assert torch.equal(model(**inputs)[0], before)
    now = dict(model.named_parameters(remove_duplicate=False))
    assert now.keys() == parameters.keys()
    assert all(now[name] is p and p.data_ptr() == place for name, (p, place) in parameters.items())


def test_the_report_says_what_was_replaced_and_what_was_not():
    assert str(patch(small("bert", masked_lm=True))).splitlines() == [
        "replaced  1 encoder, run without padding",
        "replaced  3 attention blocks",
        "replaced  8 norms",
        "replaced  1 masked-LM head, in training run on the masked tokens only",
    ]
    report = patch(small("roberta", kind=transformers.RobertaForSequenceClassification))
    assert report.replaced == {"encoder, run without padding": 1, "attention blocks": 3, "norms": 7}
    assert report.kept == {"RobertaForSequenceClassification": "its own layers read the hidden states, as before"}
    assert patch(small("bert")).kept == {"BertPooler (pooler)": "it works on one token of a sequence"}


def test_several_encoders_in_a_module_and_patching_twice():
    both = nn.ModuleDict({"query": small("bert"), "document": small("distilbert")})
    assert patch(both.query).replaced["attention blocks"] == 3
    report = patch(both)
    assert report.replaced["attention blocks"] == 3
    assert report.kept["BertModel (query)"] == "it is patched already"
    kinds = classes(both)
    assert not patch(both).replaced and classes(both) == kinds
    unpatch(both)
    with pytest.raises(ValueError, match="nothing in this ModuleDict is patched"):
        unpatch(both)


class OwnBert(BertModel):
    """Somebody's own encoder."""


def with_own_attention():
    model = small("bert")
    attention = model.encoder.layer[1].attention.self
    attention.__class__ = type("OwnAttention", (type(attention),), {"__module__": "somewhere"})
    return model


def with_hooked_layer():
    model = small("distilbert")
    layer = model.transformer.layer[2]
    layer.forward = layer.forward
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: GPT2Model(GPT2Config(n_layer=1, n_embd=12, n_head=3, vocab_size=61)),
         "GPT2Model cannot be patched: it holds none of BertModel, RobertaModel, XLMRobertaModel"),
        (lambda: nn.Linear(2, 2), "Linear cannot be patched: it holds none of"),
        (lambda: small("bert", kind=OwnBert), "OwnBert cannot be patched: it holds none of"),
        (lambda: small("bert", is_decoder=True), "BertModel cannot be patched: BertModel: it is a decoder"),
        (with_own_attention, "its encoder.layer.1.attention.self is a OwnAttention of somewhere"),
        (with_hooked_layer, "the forward of its transformer.layer.2 was replaced on the object"),
    ],
)  # fmt: skip
def test_what_cannot_be_patched_is_refused_and_left_alone(model, message):
    model = model()
    kinds = classes(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        patch(model)
    assert classes(model) == kinds


def test_patch_takes_a_module():
    with pytest.raises(TypeError, match="torch.nn.Module, got str"):
        patch("bert-base-uncased")


def test_what_can_be_patched_beside_what_cannot():
    both = nn.ModuleDict({"a": small("bert"), "b": small("bert", is_decoder=True)})
    report = patch(both)
    assert report.replaced["attention blocks"] == 3 and "it is a decoder" in report.kept["BertModel (b)"]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), copy.copy])
@torch.no_grad()
def test_copies_are_patched_and_can_be_unpatched(again):
    model = small("bert", masked_lm=True)
    inputs = batch_of(model)
    before = model(**inputs).logits
    patch(model)
    twin = again(model)
    assert type(twin) is type(model)
    assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
    assert twin.cls.predictions.decoder.weight is twin.bert.embeddings.word_embeddings.weight
    unpatch(twin)
    assert torch.equal(twin(**inputs).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_saving_and_loading(family, tmp_path):
    model = small(family, masked_lm=True)
    kind, inputs = type(model), batch_of(model)
    before = model(**inputs).logits
    patch(model)
    model.save_pretrained(tmp_path)
    for load in (AutoModelForMaskedLM, kind, type(model)):
        loaded = load.from_pretrained(tmp_path).eval()
        assert type(loaded) is kind and type(loaded.base_model) is type(model.base_model).__base__
        assert torch.equal(loaded(**inputs).logits, before)
    assert loaded.config.architectures == [kind.__name__]
    assert type(type(model)(model.config)) is kind
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    model.load_state_dict(torch.load(stream))
    weight = model.get_output_embeddings().weight
    assert weight is model.get_input_embeddings().weight
    model.resize_token_embeddings(70)
    assert model(**inputs).logits.shape[-1] == 70


def test_moving_and_casting_afterwards():
    plain, patched = pair("bert", dtype=torch.float32)
    inputs = batch_of(plain)
    for dtype in (torch.float64, torch.bfloat16):
        plain, patched = plain.to(dtype), patched.to(dtype)
        with torch.no_grad():
            outputs = [model(**inputs) for model in (plain, patched)]
        assert outputs[1][0].dtype == dtype
        bound = 1e-12 if dtype == torch.float64 else 0.05
        assert_equal_where_valid(*outputs, inputs["attention_mask"], bound)
    assert patched.to("meta")(**{name: t.to("meta") for name, t in inputs.items() if "mask" not in name})[0].is_meta


def test_modules_put_in_later_are_called():
    """As adapters and quantization do."""

    class Twice(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    plain, patched = pair("bert")
    for model in (plain, patched):
        layer = model.encoder.layer[1]
        for holder, name in (
            (layer.attention.self, "query"),
            (layer.attention.output, "LayerNorm"),
            (layer.intermediate, "dense"),
            (model.embeddings, "word_embeddings"),
            (model.embeddings, "LayerNorm"),
        ):
            setattr(holder, name, Twice(getattr(holder, name)))
    inputs = batch_of(plain)
    with torch.no_grad():
        embeds = {"inputs_embeds": plain.embeddings.word_embeddings(inputs.pop("input_ids"))}
        outputs = [model(**inputs, **embeds) for model in (plain, patched)]
    assert_equal_where_valid(*outputs, inputs["attention_mask"])
    unpatch(patched)
    report = patch(patched)
    assert report.replaced["norms"] == 5
    assert report.kept["2 norms of BertModel"].startswith("they are not torch's LayerNorm, were wrapped, or")


def square_mask(inputs):
    return inputs["attention_mask"][:, None, None].bool().expand(4, 1, 11, 11)


FALLBACKS = {
    "no output_attentions": lambda inputs: {"output_attentions": True},
    "attention_mask is [4, 1, 11, 11]": lambda inputs: {"attention_mask": square_mask(inputs)},
    "no past_key_values": lambda inputs: {"past_key_values": transformers.DynamicCache()},
    "no encoder_hidden_states": lambda inputs: {"encoder_hidden_states": torch.zeros(4, 3, 12)},
    "no head_mask": lambda inputs: {"head_mask": torch.ones(3, 3)},
    "output_hidden_states names some": lambda inputs: {"output_hidden_states": [0, 2]},
}


@pytest.mark.parametrize("reason", FALLBACKS)
@pytest.mark.parametrize("masked_lm", [False, True])
@torch.no_grad()
def test_what_is_not_packed_runs_the_original_forward_and_says_so(reason, masked_lm):
    plain, patched = pair("bert", masked_lm, dtype=torch.float32, attn_implementation="eager")
    inputs = batch_of(plain)
    inputs |= FALLBACKS[reason](inputs)
    expected = plain(**copy.deepcopy(inputs))
    with pytest.warns(UserWarning, match=f"original forward, without packing: .*{re.escape(reason)}"):
        found = patched(**inputs)
    assert expected.keys() == found.keys() and torch.equal(expected[0], found[0])


@torch.no_grad()
def test_fallbacks_by_configuration_and_by_later_changes():
    plain, patched = pair("bert", dtype=torch.float32, attn_implementation="eager")
    inputs = batch_of(plain)
    patched.config.output_attentions = True
    with pytest.warns(UserWarning, match="output_attentions"):
        assert len(patched(**inputs).attentions) == 3
    assert patched(**inputs, output_attentions=False).attentions is None
    patched.config.output_attentions = False
    patched.encoder.layer[1] = copy.deepcopy(plain.encoder.layer[1])
    with pytest.warns(UserWarning, match="a layer was put in after patching"):
        assert torch.equal(patched(**inputs)[0], plain(**inputs)[0])
    plain, patched = pair("bert", masked_lm=True, dtype=torch.float32)
    patched.cls.predictions.decoder = nn.Sequential(patched.cls.predictions.decoder)
    with pytest.warns(UserWarning, match="its decoder is a Sequential"):
        patched(**inputs)


@pytest.mark.parametrize("name", ["cls.predictions.decoder", "bert.encoder.layer.0.attention.output.LayerNorm"])
@pytest.mark.filterwarnings("ignore:BertForMaskedLM runs its original forward, .* its decoder is a Linear whose weight")
def test_parameters_that_a_hook_computes_are_those_of_this_call(name):
    _, patched = pair("bert", masked_lm=True, tie_word_embeddings=False)
    patched.eval()
    module, inputs = patched.get_submodule(name), batch_of(patched, "none")
    inputs["labels"] = inputs["input_ids"]
    prune.l1_unstructured(module, "weight", 0.3)
    with torch.no_grad():
        module.weight_orig.mul_(-3).add_(0.1)
    found = patched(**inputs)
    prune.remove(module, "weight")
    assert_equal_where_valid(patched(**inputs), found)


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_that_were_errors_stay_errors(family):
    _, patched = pair(family, masked_lm=True, dtype=torch.float32)
    ids = batch_of(patched)["input_ids"]
    with pytest.raises(TypeError, match="each once"):
        patched(ids, input_ids=ids)
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": patched.get_input_embeddings()(ids)}):
        with pytest.raises(ValueError, match="exactly one"), pytest.warns(UserWarning):
            patched(**inputs)
    long = ids.repeat(1, 3)
    with pytest.raises(ValueError, match="sequence length 33 exceeds the 24 positions"):
        patched(long)
    labels = torch.full_like(ids, 61)
    with pytest.raises(ValueError, match="label"):
        patched.train()(ids, labels=labels)


@pytest.mark.parametrize("family", FAMILIES)
def test_signatures_and_output_classes_are_those_of_the_original(family):
    plain, patched = pair(family, masked_lm=True)
    for a, b in ((plain, patched), (plain.base_model, patched.base_model)):
        assert inspect.signature(a.forward) == inspect.signature(b.forward)
        assert inspect.signature(type(a).forward) == inspect.signature(type(b).forward)
    with torch.no_grad():
        assert isinstance(patched.base_model(**batch_of(plain)), BaseModelOutput | transformers.utils.ModelOutput)


def test_training_moves_the_parameters_of_the_optimizer():
    model = small("roberta", masked_lm=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    patch(model)
    inputs = batch_of(model)
    losses = []
    for _ in range(5):
        loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    unpatch(model)
    assert losses[-1] < losses[0]
    same = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    # A bias of the keys shifts all scores of a query alike.
    assert all(name.endswith("key.bias") for name in same)
    assert model.lm_head.decoder.weight is model.roberta.embeddings.word_embeddings.weight


def test_the_trainer_in_mixed_precision(tmp_path):
    """It wraps the forward of the object; what it leaves behind goes on working without the patch."""
    model = small("bert", masked_lm=True)
    inputs = batch_of(model)
    rows = [{**{name: t[i] for name, t in inputs.items()}, "labels": inputs["input_ids"][i]} for i in range(4)]
    patch(model)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, bf16=True, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, gradient_accumulation_steps=2, remove_unused_columns=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    assert trainer.train().training_loss > 0
    assert trainer.evaluate()["eval_loss"] > 0
    unpatch(model)
    assert type(model) is BertForMaskedLM
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
        expected = model.cls(model.bert(**inputs)[0])
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()


def test_layers_call_their_hooks():
    _, patched = pair("distilbert")
    seen = []
    for module in (patched.embeddings, *layers_of(patched)):
        module.register_forward_hook(lambda m, _, output: seen.append(output.shape))
    inputs = batch_of(patched)
    patched(**inputs)
    assert seen == [(int(inputs["attention_mask"].sum()), 12)] * 4


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@torch.no_grad()
def test_a_patched_encoder_compiles_as_one_graph(family, fresh_compiler):
    _, patched = pair(family)
    compiled = torch.compile(patched, fullgraph=True, backend="eager")
    for number, padding in enumerate(("right", "left", "holes")):
        inputs = batch_of(patched, padding)
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            found = compiled(**inputs)
        assert_equal_where_valid(patched(**inputs), found, inputs["attention_mask"])


def test_a_compiled_training_step(fresh_compiler):
    _, patched = pair("bert", masked_lm=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    compiled = torch.compile(patched.train(), fullgraph=True, backend="aot_eager")
    inputs = batch_of(patched)
    inputs["labels"] = inputs["input_ids"].masked_fill(torch.arange(11) % 3 > 0, -100)
    parameters = [p for p in patched.parameters()]
    runs = [(model(**inputs).loss, None) for model in (compiled, patched)]
    runs = [(loss, torch.autograd.grad(loss, parameters)) for loss, _ in runs]
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-12, atol=0)
    for a, b in zip(runs[0][1], runs[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_fully_sharded_classes_are_left_to_their_owner():
    model = small("bert")
    patch(model)
    layer = model.encoder.layer[0]
    layer.__class__ = type("Sharded", (type(layer),), {})
    with pytest.raises(ValueError, match="the class of encoder.layer.0 was changed after patching"):
        unpatch(model)
    assert type(model) is not BertModel
