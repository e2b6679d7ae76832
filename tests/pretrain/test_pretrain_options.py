import argparse

import pytest
import yaml
from pretrain_helpers import SMALL

from hbert.data import HbertError
from hbert.pretrain.options import add_arguments, given_options
from hbert.pretrain.recipes import RECIPES, hyperparameters
from hbert.pretrain.settings import differences, field_values, resolve


def options_of(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return given_options(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def config(tmp_path):
    def write(content):
        path = tmp_path / "run.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return path

    return write


def test_only_what_was_given():
    assert options_of("--budget", "30m", "--lr", "1e-3", "--resume") == {"budget": "30m", "lr": 1e-3, "resume": True}


def test_defaults():
    settings = resolve({"budget": "2m"})
    assert (settings.arch, settings.size, settings.recipe_name) == ("v1c", "mini", "budget")
    assert settings.budget == 120 and settings.max_steps is None and settings.recipe_corpus == "pypi"
    assert str(settings.out) == "runs/v1c-mini-0"
    assert str(resolve({"budget": "2m", "arch": "AAS", "size": "3x64x2", "seed": 7}).out) == "runs/AAS-3x64x2-7"


@pytest.mark.parametrize(
    ("options", "optimizer"),
    [
        ({"size": "tiny"}, "muon"),
        ({"size": "mini"}, "muon"),
        ({"size": "small"}, "adamw"),
        ({"size": "mini", "optimizer": "adamw"}, "adamw"),
        ({"size": "mini", "recipe": "vanilla"}, "adamw"),
        ({"size": "mini", "recipe": "paper"}, "adamw"),
    ],
)
def test_muon_is_for_narrow_models_under_budget(options, optimizer):
    assert resolve({"budget": "2m", **options}).recipe.optimizer == optimizer


def test_each_recipe_has_its_own_model():
    arches = {name: resolve({"budget": "2m", "recipe": name}).arch for name in ("budget", "paper", "vanilla")}
    assert arches == {"budget": "v1c", "paper": "v1", "vanilla": "vanilla"}


def test_help_says_what_every_hyperparameter_is_and_its_values():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    helps = {action.dest: action.help for action in parser._actions}
    recipes = {name: resolve({"budget": "2m", "recipe": name}).recipe for name in RECIPES}
    for name in hyperparameters():
        text, values = helps[name].rsplit(" (default", 1)
        assert len(text) > 10
        found = {recipe: str(getattr(recipes[recipe], name)) for recipe in RECIPES}
        expected = [f"{recipe} {value}" for recipe, value in found.items()]
        assert values == (f" {found['paper']})" if len(set(found.values())) == 1 else f": {', '.join(expected)})")
    assert parser.format_help()


def test_a_file_has_the_names_of_the_flags(config):
    content = {
        "budget": "1h30m",
        "eval-every": 50,
        "batch_size": 8,
        "document-borders": True,
        "compile": False,
        "data": ["a.txt", "b.txt"],
        "set": {"norm_style": "post_ln", "conv_kernel_size": 5, "hidden_size": None},
    }
    options = options_of("--config", config(content))
    assert options == {
        "budget": "1h30m",
        "eval_every": 50,
        "batch_size": 8,
        "document_borders": True,
        "data": ["a.txt", "b.txt"],
        "set": ["norm_style=post_ln", "conv_kernel_size=5", "hidden_size=null"],
    }


def test_numbers_that_yaml_reads_as_text(config):
    assert options_of("--config", config("lr: 1e-3\nbudget: 90s"))["lr"] == 1e-3


def test_flags_win(config):
    path = config({"budget": "2m", "lr": 0.1, "data": ["a.txt"], "set": {"scorer": "dense", "init": "normal"}})
    flags = ["--max-steps", 5, "--lr", 0.2, "--recipe-corpus", "sotu", "--set", "init=magneto"]
    settings = resolve(options_of("--config", path, *flags))
    assert settings.budget is None and settings.max_steps == 5
    assert settings.recipe.lr == 0.2 and settings.recipe_corpus == "sotu" and settings.data == ()
    assert settings.fields == {"scorer": "dense", "init": "magneto"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning-rate: 1", r"run.yaml: unknown learning-rate; allowed: .*budget.*lr"),
        ("config: other.yaml", "unknown config"),
        ("lr: fast", r"run.yaml: argument --lr: invalid float value: 'fast'"),
        ("dtype: fp16", "argument --dtype: invalid choice: 'fp16'"),
        ("- lr", "must hold names and values"),
        ("lr: [", "cannot be read"),
        ("max-steps: [1, 2]", "unrecognized arguments: 2"),
    ],
)
def test_bad_files(config, content, message):
    with pytest.raises(HbertError, match=message):
        options_of("--config", config(content))


def test_a_missing_file():
    with pytest.raises(HbertError, match="nowhere.yaml cannot be read"):
        options_of("--config", "nowhere.yaml")


def test_recipe_fields_can_be_overridden():
    settings = resolve({"budget": "1m", "recipe": "vanilla", "lr": 3e-4, "masking_rate": 0.4, "block_size": 1024})
    assert settings.recipe.lr == 3e-4 and settings.recipe.masking_rate == 0.4
    assert settings.recipe.dropout == 0.1 and settings.recipe.model["norm_style"] == "post_ln"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": None, "max_steps": None}, "give either --budget"),
        ({"budget": "2m"}, "give either --budget"),
        ({"max_steps": None, "budget": "0s"}, "--budget: a duration of 0s is no time"),
        ({"max_steps": None, "budget": "-2m"}, "--budget: '-2m' is not a duration"),
        ({"max_steps": 0}, "max_steps is 0; it must be at least 1"),
        ({"deadline": "soon"}, "--deadline: 'soon' is not a duration"),
        ({"arch": "v3"}, "unknown arch 'v3'; allowed: v1, v2, .*bert, or a letter for each layer"),
        ({"arch": "ASAS"}, "layer_types has 4 entries, but num_hidden_layers is 2"),
        ({"size": "huge"}, "unknown size 'huge'; allowed: tiny, mini, small, base, or layers x width x heads"),
        ({"size": "2x33x2"}, "hidden_size 33 is not divisible by num_attention_heads 2"),
        ({"set": ["norm=post"]}, "HBertConfig has no field norm; allowed: vocab_size, hidden_size"),
        ({"set": ["norm_style"]}, "--set takes FIELD=VALUE, got 'norm_style'"),
        ({"set": ["norm_style=post"]}, "norm_style is 'post'; allowed"),
        ({"arch": "bert", "set": ["norm_style=post_ln"]}, "BertConfig has no field norm_style"),
        ({"set": ["tie_word_embeddings=yes"]}, "tie_word_embeddings must be True or False, got 'yes'"),
        ({"set": ["layer_types=AS"]}, "the arch decides layer_types; give their letters as the arch"),
        ({"arch": "AS", "set": ["layer_types=AS"]}, "the arch decides layer_types; give their letters as the arch"),
        ({"arch": "bert", "set": ["hidden_size=abc"]}, "no bert of .*hidden_size 'abc'.*: .*expected int, got str"),
        ({"arch": "bert", "set": ["hidden_size=null"]}, "no bert of .*hidden_size None"),
        ({"arch": "bert", "set": ["hidden_act=foo"]}, "no bert of .*hidden_act 'foo'"),
        ({"arch": "bert", "document_borders": True}, "which arch bert has not"),
        ({"recipe": "fast"}, "unknown recipe 'fast'"),
        ({"masking_rate": 1.5}, "masking_rate is 1.5"),
        ({"dtype": "fp16"}, "dtype is 'fp16'; allowed: auto, bf16, fp32"),
        ({"seed": -1}, r"seed is -1; it must be in \[0, 2\^64\)"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"keep": 0}, "keep is 0"),
        ({"eval_blocks": 0}, "eval_blocks is 0"),
        ({"data": ["a"], "recipe_corpus": "pypi"}, "choose one text"),
        ({"set": ["max_position_embeddings=16"]}, "block_size 32 exceeds max_position_embeddings 16"),
    ],
)
def test_bad_options(changes, message):
    given = {name: value for name, value in {**SMALL, **changes}.items() if value is not None}
    with pytest.raises((ValueError, HbertError), match=message):
        resolve(given)


def test_values_of_fields_are_json_or_pythons_or_text():
    words = ["a=true", "b=True", "c=False", "d=None", "e=null", "f=1e-3", "g=gelu", 'h="True"']
    values = [True, True, False, None, None, 1e-3, "gelu", "True"]
    assert field_values(words) == dict(zip("abcdefgh", values, strict=True))


def test_identity_leaves_out_what_may_change():
    one = resolve({**SMALL, "out": "a", "keep": 5, "save_every": 7, "deadline": "5m", "resume": True})
    assert one.identity == resolve(SMALL).identity
    other = resolve({**SMALL, "lr": 1e-4, "set": ["init=magneto"]})
    assert differences(resolve(SMALL).identity, other.identity) == [
        "lr (was 0.002, now 0.0001)",
        "model.init (was 'normal', now 'magneto')",
    ]
    places = {"data": ["a"], "tokenizer": "b", "init_from": "c"}
    first, second = (
        resolve({**SMALL, **{name: where + str(place) for name, place in places.items()}}) for where in "xy"
    )
    assert first.identity != second.identity and differences(first.identity, second.identity) == []
