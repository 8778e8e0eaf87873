"""`python -m sparkme.doctor`: what it says, and its exit status."""

import sys

import pytest

from sparkme import doctor, ops
from sparkme.sparse.engines import create_engine


def test_pretraining_runs_where_the_tests_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    report = capsys.readouterr().out
    assert "Pretraining can run here." in report
    for engine in ("cuda_ext", "minkowski", "masked-dense"):
        assert f"{engine:<16} cpu: works" in report


def test_missing_minkowski_is_fatal_and_has_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "MinkowskiEngine", None)
    monkeypatch.setattr(doctor, "SECTIONS", (("Installed", doctor.check_installed),))
    assert doctor.main([]) == 1
    report = capsys.readouterr().out
    assert "python cuda_ext/minkowski/build.py --install" in report
    assert "Pretraining cannot run here: MinkowskiEngine." in report


def test_engine_with_wrong_numbers_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "engine_error", lambda name, device: float("nan"))
    finding = doctor.check_engine("minkowski", "cpu")
    assert finding.fatal
    assert "WRONG" in finding.text


def test_engine_that_fails_is_reported_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, device: str) -> float:
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr(doctor, "engine_error", fail)
    finding = doctor.check_engine("masked-dense", "cuda")
    assert "no kernel for this device" in finding.text
    assert not finding.fatal  # the CPU may still do


def test_engine_that_was_not_built_is_reported_and_auto_takes_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_LOAD_ERROR", "no such file")
    finding = doctor.check_engine("cuda_ext", "cpu")
    assert "sparkme._C was not built or does not load (no such file)" in finding.text
    assert not finding.fatal
    assert "pip install --no-build-isolation" in doctor.check_operators().mend
    with pytest.raises(ValueError, match=r"--engine cuda_ext cannot run on this cpu: .*_C was not built"):
        create_engine("cuda_ext")
    engine, reason = create_engine("auto")
    assert engine.name == "minkowski" and "cuda_ext cannot run" in reason


def test_missing_package_is_named_with_its_command() -> None:
    finding = doctor.check_package("a-package-that-does-not-exist", "pip install it")
    assert finding.fatal
    assert (finding.text, finding.mend) == ("not installed", "pip install it")
