"""McNemar's test, the bootstrap and naive Bayes against other ways to the same numbers."""

import math

import numpy as np
import pytest
from finetune_helpers import write_tsv

from hbert.errors import HbertError
from hbert.finetune.naive_bayes import SMOOTHINGS, NaiveBayes, features
from hbert.finetune.significance import compare, mcnemar, paired_bootstrap


def test_mcnemar():
    # 2 (1 + 10 + 45) / 2^10
    assert mcnemar(2, 8) == mcnemar(8, 2) == pytest.approx(112 / 1024)
    assert mcnemar(5, 5) == mcnemar(0, 0) == 1
    assert mcnemar(0, 1) == 1 and mcnemar(0, 6) == pytest.approx(2 / 64)
    # The normal approximation with continuity correction, for large counts.
    z = (abs(460 - 540) - 1) / math.sqrt(1000)
    assert mcnemar(460, 540) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)


@pytest.fixture
def outcomes():
    """Labels of 400 texts in 3 classes, and predictions that are right with probability 0.7 and 0.8."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 400)

    def guesses(p):
        return np.where(rng.random(400) < p, labels, rng.integers(0, 3, 400))

    return labels, guesses(0.7), guesses(0.8)


def test_bootstrap_of_accuracy_has_the_width_of_theory(outcomes):
    labels, first, second = outcomes
    gain = (second == labels).astype(float) - (first == labels)
    found = paired_bootstrap(labels, first, second)
    half = 1.96 * gain.std() / math.sqrt(400)
    assert found.difference == pytest.approx(gain.mean())
    assert found.low == pytest.approx(gain.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(gain.mean() + half, abs=0.1 * half)
    assert paired_bootstrap(labels, first, second) == found
    narrow = paired_bootstrap(labels, first, second, level=0.5)
    assert found.low < narrow.low < narrow.high < found.high


def test_bootstrap_of_macro_f1(outcomes):
    labels, first, second = outcomes

    def macro_f1(guess):
        scores = []
        for k in range(3):
            tp = ((guess == k) & (labels == k)).sum()
            scores.append(2 * tp / ((guess == k).sum() + (labels == k).sum()))
        return np.mean(scores)

    found = paired_bootstrap(labels, first, second, "macro_f1", samples=400)
    assert found.difference == pytest.approx(macro_f1(second) - macro_f1(first))
    assert found.low < found.difference < found.high
    # Close to the accuracy's, the classes being equally frequent.
    accuracy = paired_bootstrap(labels, first, second)
    assert found.high - found.low == pytest.approx(accuracy.high - accuracy.low, rel=0.2)


def test_seeds_are_averaged_and_equal_models_do_not_differ(outcomes):
    labels, first, second = outcomes
    both = paired_bootstrap(labels, np.stack([first, second]), second)
    assert both.difference == pytest.approx(paired_bootstrap(labels, first, second).difference / 2)
    same = paired_bootstrap(labels, first, first, samples=100)
    assert (same.difference, same.low, same.high) == (0, 0, 0)


def test_ranges(outcomes):
    labels, first, second = outcomes
    for options in ({"metric": "mcc"}, {"samples": 0}, {"level": 1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            paired_bootstrap(labels, first, second, **options)


def prediction_file(path, labels, predictions):
    rows = [(a, b, "0.5") for a, b in zip(labels, predictions, strict=True)]
    return write_tsv(path, rows, header=("label", "prediction", "probability"))


def test_files(tmp_path):
    one = prediction_file(tmp_path / "one.tsv", "xyxyxyxy", "xyxyyxxx")  # right: 1-4, 7
    two = prediction_file(tmp_path / "two.tsv", "xyxyxyxy", "yyxyxyxy")  # right: all but the first
    found = compare(one, two, samples=200)
    assert (found.first, found.second) == (5 / 8, 7 / 8)
    assert found.interval.difference == pytest.approx(2 / 8)
    assert (found.only_first, found.only_second) == (1, 3) and found.mcnemar_p == (mcnemar(1, 3),)
    seeds = compare([one, two], [two, two], metric="macro_f1", samples=50)
    assert seeds.mcnemar_p == (mcnemar(1, 3), 1) and seeds.metric == "macro_f1"
    other = prediction_file(tmp_path / "other.tsv", "xyxyxyxx", "xyxyyxxx")
    with pytest.raises(HbertError, match="one.tsv and .*other.tsv are not predictions on the same"):
        compare(one, other)
    bare = write_tsv(tmp_path / "bare.tsv", [("x", "1")], header=("prediction", "probability"))
    with pytest.raises(HbertError, match="has no column 'label'"):
        compare(one, bare)
    twice = write_tsv(tmp_path / "twice.tsv", [("x", "x", "y")], header=("label", "prediction", "label"))
    with pytest.raises(HbertError, match="has 2 columns 'label'; rename all but one"):
        compare(one, twice)


def test_features():
    assert features("Don't stop, NOW") == ["don't", "stop", ",", "now", "don't stop", "stop ,", ", now"]


def test_naive_bayes_by_hand():
    model = NaiveBayes(["a b", "b", "a"], np.array([0, 0, 1]), 2)
    # Features a, b, "a b"; class 0 counts 1, 2, 1 and class 1 counts 1, 0, 0.
    joint = [2 / 3 * (2 / 7) * (3 / 7) * (2 / 7), 1 / 3 * (2 / 4) * (1 / 4) * (1 / 4)]
    expected = np.array(joint) / sum(joint)
    np.testing.assert_allclose(model.probabilities(["a b", "A c B"])[0], expected)
    # "c" and the pairs with it were never seen.
    joint = [2 / 3 * (2 / 7) * (3 / 7), 1 / 3 * (2 / 4) * (1 / 4)]
    np.testing.assert_allclose(model.probabilities(["A c B"])[0], np.array(joint) / sum(joint))
    np.testing.assert_allclose(model.probabilities(["zzz"])[0], [2 / 3, 1 / 3])


def test_the_smoothing_is_the_most_accurate_on_validation():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 300)
    texts = [" ".join([f"w{rng.integers(0, 150)}" for _ in range(6)] + [f"k{k}{rng.integers(0, 30)}"]) for k in labels]
    train, valid = slice(0, 200), slice(200, 300)
    chosen = NaiveBayes.fit(texts[train], labels[train], 4, texts[valid], labels[valid])
    scores = {}
    for smoothing in SMOOTHINGS:
        found = NaiveBayes(texts[train], labels[train], 4, smoothing).probabilities(texts[valid])
        scores[smoothing] = (found.argmax(1) == labels[valid]).mean()
    assert len(set(scores.values())) > 1 and scores[chosen.smoothing] == max(scores.values())
    np.testing.assert_array_equal(
        chosen.probabilities(texts[valid]),
        NaiveBayes(texts[train], labels[train], 4, chosen.smoothing).probabilities(texts[valid]),
    )


def test_a_class_without_training_texts_is_never_predicted():
    found = NaiveBayes(["a", "b"], np.array([0, 2]), 3).probabilities(["a", "b", "c"])
    assert (found[:, 1] == 0).all() and found.argmax(1).tolist()[:2] == [0, 2]
