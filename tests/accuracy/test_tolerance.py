"""What storing weights changes, against PyTorch's own functions."""

import numpy as np
import pytest

from gta_edge.accuracy.tolerance import difference, quantisation

SHAPE = (2, 7, 50)  # [B, T, V]


def logits(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, SHAPE).astype(np.float32)


@pytest.mark.parametrize("offset", [0, 1000])  # adding a number to all logits changes no distribution
def test_the_divergence_is_pytorchs(offset: float) -> None:
    torch = pytest.importorskip("torch", reason="the reference is PyTorch's kl_div")
    own = logits(0)
    stored = own + logits(1) / 10 + np.float32(offset)
    log_p, log_q = (torch.from_numpy(each).double().log_softmax(-1).flatten(0, 1) for each in (own, stored))
    expected = torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    found = quantisation(stored, own)
    assert found.mean_kl_divergence == pytest.approx(float(expected), rel=1e-4 if offset else 1e-9)
    assert (found.max_abs_error, found.top1_agreement) == (
        difference(stored, own).max_abs_error,
        float((stored.argmax(-1) == own.argmax(-1)).mean()),
    )


def test_the_checkpoint_is_what_it_diverges_from() -> None:
    """KL is not symmetric: a token that the checkpoint likes and the bundle has dropped costs much."""
    sure, even = np.array([[20.0, 0.0]], np.float32), np.array([[0.0, 0.0]], np.float32)
    assert quantisation(even, sure).mean_kl_divergence == pytest.approx(np.log(2), rel=1e-6)
    assert quantisation(sure, even).mean_kl_divergence > 9


def test_the_same_weights_change_nothing() -> None:
    found = quantisation(logits(0), logits(0))
    assert (found.max_abs_error, found.top1_agreement, found.mean_kl_divergence) == (0, 1, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_infinitely_far(value: float) -> None:
    broken = logits(0)
    broken[0, 3, 5] = value
    for pair in ((broken, logits(0)), (logits(0), broken)):
        assert quantisation(*pair).mean_kl_divergence == np.inf
