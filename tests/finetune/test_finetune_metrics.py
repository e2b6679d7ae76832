"""Metrics against numbers worked out by hand."""

import math

import matplotlib
import numpy as np
import pytest

from hbert.finetune.confusion import save_confusion_plot
from hbert.finetune.metrics import (
    classification_metrics,
    confusion_matrix,
    decide,
    measure,
    multi_label_metrics,
    per_label,
)

# Labels down, predictions across: 2 of 3 zeros, 1 of 2 ones and 1 of 1 twos are right.
LABELS = np.array([0, 0, 0, 1, 1, 2])
PREDICTIONS = np.array([0, 0, 1, 1, 2, 2])


def test_confusion_matrix():
    assert confusion_matrix(LABELS, PREDICTIONS, 3).tolist() == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("names", [["from_$10_to_$20", "$5"], ["$a_b_c$", r"\alpha"], ["50%", "a_b"]])
@pytest.mark.parametrize("usetex", [False, True])
def test_any_name_of_a_label_can_be_drawn(tmp_path, usetex, names):
    with matplotlib.rc_context({"text.usetex": usetex}):
        save_confusion_plot(np.array([[1, 2], [3, 4]]), names, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_three_classes():
    measured = measure(LABELS, PREDICTIONS, 3)
    assert measured["accuracy"] == pytest.approx(4 / 6)
    # F1: 4/5, 2/4, 2/3
    assert measured["macro_f1"] == pytest.approx((0.8 + 0.5 + 2 / 3) / 3)
    # c n - p.t = 4*6 - (2*3 + 2*2 + 2*1) = 12; n^2 - p.p = 36 - 12 = 24; n^2 - t.t = 36 - 14 = 22
    assert measured["mcc"] == pytest.approx(12 / math.sqrt(24 * 22))


def test_two_classes_agree_with_the_phi_coefficient():
    tp, fp, fn, tn = 6, 3, 1, 10
    measured = classification_metrics(np.array([[tn, fp], [fn, tp]]))
    phi = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert measured["mcc"] == pytest.approx(phi)
    assert measured["accuracy"] == pytest.approx(16 / 20)


def test_classes_that_never_occur_do_not_count_in_macro_f1():
    assert measure(LABELS, PREDICTIONS, 7)["macro_f1"] == pytest.approx((0.8 + 0.5 + 2 / 3) / 3)
    # A class that was predicted in vain does.
    assert measure(np.array([0, 0]), np.array([0, 3]), 4)["macro_f1"] == pytest.approx((2 / 3) / 2)


def test_one_predicted_class_has_no_correlation():
    assert measure(np.array([0, 1, 1]), np.array([1, 1, 1]), 2)["mcc"] == 0


def test_multi_label():
    labels = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0]])
    guesses = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0], [1, 1, 0]])
    measured = multi_label_metrics(labels, guesses)
    assert measured["micro_f1"] == pytest.approx(2 * 3 / (4 + 4))
    assert measured["macro_f1"] == pytest.approx((1 + 0.5) / 2)  # the third label never occurs
    assert measured["exact_match"] == 0.5


def test_per_label():
    rows = per_label(LABELS, PREDICTIONS, 4)
    assert rows[0] == {"precision": 1, "recall": pytest.approx(2 / 3), "f1": pytest.approx(0.8), "texts": 3}
    assert rows[2] == {"precision": 0.5, "recall": 1, "f1": pytest.approx(2 / 3), "texts": 1}
    assert rows[3] == {"precision": None, "recall": None, "f1": 0, "texts": 0}
    multi = per_label(np.array([[1, 0], [1, 1]]), np.array([[1, 1], [0, 1]]), 2)
    assert [row["precision"] for row in multi] == [1, 0.5] and [row["recall"] for row in multi] == [0.5, 1]


def test_decisions():
    scores = np.array([[0.2, 0.7, 0.1], [0.6, 0.5, 0.9]])
    assert decide(scores, multi=False).tolist() == [1, 2]
    assert decide(scores, multi=True).tolist() == [[0, 1, 0], [1, 0, 1]]
    assert decide(np.array([[-0.1, 1e-9]]), multi=True, threshold=0).tolist() == [[0, 1]]
