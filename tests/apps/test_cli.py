"""The command's frame: quick help, near misses, and failures told in one sentence with the right exit code."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
from collections.abc import Callable

import pytest
from hydra.errors import InstantiationException, MissingConfigException
from omegaconf.errors import ConfigKeyError

from sinuous import __version__
from sinuous.apps import cli


def test_help_is_quick_and_loads_no_torch() -> None:
    code = (
        "import sys, time; began = time.perf_counter()\n"
        "from sinuous.apps.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "print('heavy', sorted({'torch', 'timm', 'hydra', 'lightning'} & sys.modules.keys()))\n"
        "print('seconds', time.perf_counter() - began)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"  {verb} " in done.stdout for verb in cli.VERBS)
    assert "heavy []" in done.stdout
    assert float(done.stdout.split("seconds ")[1]) < 0.5


def test_every_verb_that_is_listed_exists() -> None:
    missing = [verb for verb, (module, _) in cli.VERBS.items() if importlib.util.find_spec(module) is None]
    assert missing == []


def test_version_and_no_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"sinuous {__version__}\n"
    assert cli.main([]) == 2
    assert "verbs:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verb", "hint"),
    [("trian", "did you mean `sinuous train`?"), ("evaluate", "`sinuous eval`"), ("xyz", "train, eval")],
)
def test_an_unknown_verb_offers_the_closest(verb: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb]) == 2
    assert hint in capsys.readouterr().err


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    def install(error: BaseException) -> None:
        def fail(argv: list[str]) -> int:
            raise error

        module = types.ModuleType("failing_verb")
        module.main = fail  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "failing_verb", module)
        monkeypatch.setitem(cli.VERBS, "info", ("failing_verb", "fails"))

    return install


def _wrapped(cause: Exception) -> Exception:
    error = InstantiationException(f"Error in call to target 'a.b':\n{cause!r}\nfull_key: model")
    error.__cause__ = cause
    return error


IN_A_WORKER = ValueError(
    "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
    '  File "a.py", line 1, in f\nValueError: cannot read the picture cat.jpg; replace it\n'
)


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (ValueError("x must be positive (got -1)"), 2, "x must be positive (got -1)"),
        (FileNotFoundError("there is no checkpoint at a.pth"), 2, "there is no checkpoint at a.pth"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (
            ConfigKeyError("Key 'modle' not in 'TrainSchema'\n    full_key: modle\n    object_type=TrainSchema"),
            2,
            "'modle'",
        ),
        (
            MissingConfigException("In 'train': Could not find", "model/vision/vim_nan"),
            2,
            "did you mean model/vision/vim_nano",
        ),
        (_wrapped(ValueError("no model 'vim_nan'; closest: vim_nano")), 2, "no model 'vim_nan'; closest: vim_nano"),
        (_wrapped(TypeError("f() got an unexpected keyword argument 'depht'")), 2, "model: f() got an unexpected"),
        (ModuleNotFoundError("No module named 'lightning'", name="lightning"), 2, "pip install 'sinuous[train]'"),
        (ModuleNotFoundError("No module named 'av'", name="av.container"), 2, "pip install 'sinuous[video]'"),
        (IN_A_WORKER, 2, "cannot read the picture cat.jpg; replace it"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
        (SystemExit(3), 3, ""),
        (SystemExit(None), 0, ""),
    ],
)
def test_expected_failures_are_one_sentence(
    error: BaseException,
    code: int,
    sentence: str,
    failing: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing(error)
    assert cli.main(["info"]) == code
    told = capsys.readouterr().err
    assert sentence in told
    assert "Traceback" not in told
    assert told.strip().count("\n") == 0


def test_the_traceback_can_be_had(failing: Callable[[BaseException], None], monkeypatch: pytest.MonkeyPatch) -> None:
    failing(ValueError("told"))
    monkeypatch.setenv("SINUOUS_DEBUG", "1")
    with pytest.raises(ValueError, match="told"):
        cli.main(["info"])


@pytest.mark.parametrize("defect", [AttributeError("none has no shape"), ModuleNotFoundError("x", name="sinuous.x")])
def test_defects_are_not_hidden(defect: Exception, failing: Callable[[BaseException], None]) -> None:
    failing(defect)
    with pytest.raises(type(defect)):
        cli.main(["info"])
