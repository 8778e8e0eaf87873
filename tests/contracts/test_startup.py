"""What a command imports before it works: nothing that takes time, so that --help and a mistake are answered at once."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import sparkme
import sparkme.pretrain
from sparkme.sparse.forms import SPARSE_FORMS

COMMANDS = sorted(p.stem for p in Path(sparkme.__file__).parent.glob("*.py") if 'if __name__ == "__main__":' in p.read_text())

# Runs a command as `python -m` does, and says last which packages it imported beside Python's own.
RUN = """
import json, runpy, sys
before, code = set(sys.modules), None
name, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_module(name, run_name="__main__", alter_sys=True)
except SystemExit as error:
    code = error.code
imported = {module.partition(".")[0] for module in set(sys.modules) - before} - sys.stdlib_module_names
print(json.dumps([code, sorted(imported - {"__mp_main__"})]))
"""

# torchvision 0.29 imports torch._dynamo by itself, though it compiles nothing; here it gets something else in its place.
WITHOUT_TORCHVISIONS = """
import sys, types
import torch
before = set(sys.modules)
dynamo, utils = types.ModuleType("torch._dynamo"), types.ModuleType("torch._dynamo.utils")
dynamo.disable = lambda function, *_, **__: function
utils.is_compile_supported = None
sys.modules |= {dynamo.__name__: dynamo, utils.__name__: utils}
import torchvision.transforms.v2
del sys.modules[dynamo.__name__], sys.modules[utils.__name__]
"""


def python(code: str, *words: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_by(*words: str) -> tuple[int, list[str], str]:
    """The exit code of a command, the packages that it imports, and what it prints."""
    *printed, last = python(RUN, *words).splitlines()
    code, packages = json.loads(last)
    return code, packages, "\n".join(printed)


def test_all_commands_are_looked_at() -> None:
    assert COMMANDS == ["doctor", "export", "finetune", "predict", "pretrain", "probe", "report", "visualize"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_but_python(command: str) -> None:
    code, packages, printed = imported_by(f"sparkme.{command}", "--help")
    assert code == 0 and f"usage: python -m sparkme.{command}" in printed
    assert packages == ["sparkme"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistyped_flag_imports_nothing_but_python(command: str) -> None:
    assert imported_by(f"sparkme.{command}", "--no-such-flag")[:2] == (2, ["sparkme"])


def test_a_mistyped_flag_names_the_one_that_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    for word, text in (("--epohcs=3", "--epohcs=3; did you mean --epochs? (--help"), ("--zzz", "arguments: --zzz (--help")):
        with pytest.raises(SystemExit):
            sparkme.pretrain.main([word])
        assert text in capsys.readouterr().err


def test_names_of_networks_are_listed_without_their_libraries() -> None:
    code, packages, printed = imported_by("sparkme.pretrain", "--list-models", "timm:resnet*")
    assert code == 0 and "timm:resnet50" in printed.splitlines()
    assert packages == ["sparkme"]


def test_public_names_are_listed_at_once_and_imported_when_asked_for() -> None:
    listed = python("import sys, sparkme; assert 'torch' not in sys.modules; print(*sparkme.__all__, *dir(sparkme))").split()
    assert set(listed) == {*sparkme.__all__, "__version__"}
    for name in sparkme.__all__:
        assert getattr(sparkme, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'sparsity'"):
        _ = sparkme.sparsity


def test_where_torch_is_missing_one_line_says_so() -> None:
    code = "import sys; sys.modules['torch'] = None; from sparkme.export import main; sys.exit(main(['last.pt']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: the package torch is not installed; `python -m sparkme.doctor` says how to get it\n"


def test_a_report_is_made_without_torch() -> None:
    assert "torch" not in python("import sys, sparkme.reporting.report; print(*sys.modules)").split()


@pytest.mark.parametrize("work", ["training.pretraining", "weights.export", "training.probing", "reporting.visualize"])
def test_work_imports_no_compiler_and_no_timm_before_it_needs_them(work: str) -> None:
    modules = python(f"{WITHOUT_TORCHVISIONS}\nimport sparkme.{work}\nprint(*set(sys.modules) - before)").split()
    assert f"sparkme.{work}" in modules and "MinkowskiEngine" in modules
    assert not {"torch._dynamo", "torch._inductor", "timm", "tensorboard", "pyarrow"}.intersection(modules)


def test_timms_layers_have_forms_by_names_that_timm_has() -> None:
    names = [key for key in SPARSE_FORMS if isinstance(key, str)]
    assert len(names) == 3
    for name in names:
        module, _, kind = name.rpartition(".")
        layer = getattr(import_module(module), kind)
        assert f"{layer.__module__}.{layer.__qualname__}" == name
