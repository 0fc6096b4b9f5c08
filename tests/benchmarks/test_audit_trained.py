"""The audit of whole runs finds noise that is missing, in secure and in open rounds."""

import pytest

from benchmarks.audit_trained import audit


@pytest.mark.parametrize("kind", ["secure", "fedavg"])
def test_noise_that_is_missing_from_a_run_is_found(kind: str) -> None:
    rows = {drawn: audit(kind, 4.0, 2, 40, drawn, 7) for drawn in (1.0, 0.02)}
    assert rows[0.02]["right"] == rows[0.02]["guesses"] == 20
    assert rows[1.0]["bound"] < rows[1.0]["epsilon"] < rows[0.02]["bound"]
