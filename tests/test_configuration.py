"""The configuration: which source wins, what the environment may hold, and how mistakes are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lastcall.supervisor.config.env_file import environment_of
from lastcall.supervisor.config.loading import load
from lastcall.supervisor.config.options import Config, flags
from lastcall.supervisor.config.sources import read_environment, warnings
from lastcall.supervisor.errors import ConfigError, UsageError
from tests.support.harness import LASTCALL


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in a directory without a configuration file."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_flags_over_environment_over_file_over_defaults(empty_directory: Path) -> None:
    """Each source wins over the next; a section is merged option by option."""
    (empty_directory / "lastcall.toml").write_text(
        "workers = 2\ngrace = 20\n[stop]\nfence = 3\nclose = 4\nkill = 6\n"
    )
    environ = {"LASTCALL_GRACE": "30", "LASTCALL_STOP": '{"close": 7}', "LASTCALL_STOP__KILL": "8"}
    config = load({"grace": "40", "http": None}, environ, defaults={"workers": 9, "log_format": "json"})
    assert (config.workers, config.grace, config.log_format, config.http) == (2, 40, "json", Config().http)
    assert (config.stop.fence, config.stop.close, config.stop.kill) == (3, 7, 8)


def test_a_flag_for_the_target_takes_the_command_away(empty_directory: Path) -> None:
    """And the other way round: the two exclude each other."""
    (empty_directory / "lastcall.toml").write_text('command = ["sleep", "1"]\n')
    assert load({"target": "a.py"}, {}).command == []
    assert load({"command": ["x"]}, {"LASTCALL_TARGET": "a.py"}).target == ""


@pytest.mark.parametrize(
    ("environ", "values"),
    [
        ({"LASTCALL_WORKERS": "3"}, {"workers": "3"}),
        ({"LASTCALL_WORKERS": ""}, {}),
        ({"lastcall_workers": "3"}, {}),
        ({"LASTCALL_COMMAND": '["a", "b c"]'}, {"command": ["a", "b c"]}),
        ({"LASTCALL_COMMAND": "null"}, {}),
        ({"LASTCALL_STOP__FENCE": "3"}, {"stop": {"fence": "3"}}),
        ({"LASTCALL_STOP__NONE": "3"}, {}),
        ({"LASTCALL_RESTART__BACKOFF": "[1, 2]"}, {"restart": {"backoff": [1, 2]}}),
        (
            {"LASTCALL_STOP": '{"fence": 1, "kill": 2}', "LASTCALL_STOP__FENCE": "3"},
            {"stop": {"fence": "3", "kill": 2}},
        ),
        ({"LASTCALL_STOP": "3", "LASTCALL_STOP__FENCE": "3"}, {"stop": 3}),
        (
            {"LASTCALL_INWORLD__WS_URL": "ws://x/", "LASTCALL_INWORLD_WS_URL": "y"},
            {"inworld": {"ws_url": "ws://x/"}},
        ),
    ],
)
def test_variables(environ: dict[str, str], values: dict[str, Any]) -> None:
    """A single option is text, also one of a section. A list and a section are JSON."""
    assert read_environment(environ) == values


@given(st.dictionaries(st.sampled_from(["fence", "close", "kill"]), st.floats(0.1, 100), min_size=1))
def test_a_section_and_its_options_say_the_same(values: dict[str, float]) -> None:
    """Both ways to write a section give one configuration."""
    apart = {f"LASTCALL_STOP__{name.upper()}": str(value) for name, value in values.items()}
    assert load({}, apart) == load({}, {"LASTCALL_STOP": json.dumps(values)})


MISTAKES: list[tuple[dict[str, str], str]] = [
    ({"LASTCALL_GRACE": "soon"}, "LASTCALL_GRACE: got 'soon', expected a valid number"),
    ({"LASTCALL_STOP__FENCE": "0"}, "LASTCALL_STOP__FENCE: got '0', expected greater than 0"),
    ({"LASTCALL_STOP": "3"}, "LASTCALL_STOP: got 3, expected a table"),
    ({"LASTCALL_STOP": '{"clse": 3}'}, "unknown key 'LASTCALL_STOP__CLSE'; did you mean 'close'?"),
    ({"LASTCALL_COMMAND": "node x"}, "LASTCALL_COMMAND: got 'node x', expected JSON"),
    ({"LASTCALL_RESTART__BACKOFF": "[1]"}, "LASTCALL_RESTART__BACKOFF__1: got [1], expected more values"),
    ({"LASTCALL_INWORLD__WS_URL": "x"}, "LASTCALL_INWORLD__WS_URL: got 'x', expected wss://HOST/"),
]


@pytest.mark.parametrize(("environ", "says"), MISTAKES)
def test_mistakes_in_the_environment(environ: dict[str, str], says: str) -> None:
    """One line: the variable, the value, and what was expected."""
    with pytest.raises(ConfigError) as error:
        load({}, environ)
    assert str(error.value) == f"environment: {says}"


def test_mistake_on_the_command_line() -> None:
    """A flag is named as it is typed."""
    with pytest.raises(UsageError, match=r"^--log-format: got 'xml', expected 'auto', 'json' or 'console'$"):
        load({"log_format": "xml"}, {})


def test_unknown_variables_are_warned_of() -> None:
    """With the nearest name there is; variables that lastcall or Kubernetes sets are known."""
    environ = {"LASTCALL_GRASE": "3", "LASTCALL_STOP__FENSE": "3", "LASTCALL_PORT_80_TCP": "x"}
    assert warnings(environ | {"LASTCALL_INWORLD_URL": "x", "LASTCALL_MARK": "x", "PATH": "x"}) == [
        "unknown environment variable LASTCALL_GRASE; did you mean LASTCALL_GRACE?",
        "unknown environment variable LASTCALL_STOP__FENSE; did you mean LASTCALL_STOP__FENCE?",
    ]


def test_env_file(tmp_path: Path) -> None:
    """A name without a value sets nothing, and a file that is not there is an error."""
    file = tmp_path / "agent.env"
    file.write_text("# comment\nA=1\nB='two words'\nexport C=3\nD\n")
    assert environment_of(str(file)) == {"A": "1", "B": "two words", "C": "3"}
    assert environment_of("") == {}
    with pytest.raises(ConfigError, match="env_file: no file"):
        environment_of(str(tmp_path / "none"))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="can't be read"):
        environment_of(str(file))


def test_the_pages_show_the_options() -> None:
    """README and the page on configuration are rendered from the definitions of the options."""
    script = Path(__file__).parent.parent / "scripts" / "options"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("columns", ["80", "140"])
def test_help_shows_each_flag(columns: str) -> None:
    """`run --help` names each flag with its placeholder, its description and its default."""
    done = subprocess.run(
        [*LASTCALL, "run", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "COLUMNS": columns},
    )
    shown = " ".join(done.stdout.split())
    for name, flag in flags().items():
        spelt = f"{flag.short}, --{name}" if flag.short else f"--{name.replace('_', '-')}"
        assert f"{spelt} {flag.metavar} {Config.model_fields[name].description}" in shown
    for default in (
        "[1]",
        "[3600]",
        "[127.0.0.1:8080]",
        "[auto: in a directory of the user's own]",
        "[auto]",
    ):
        assert default in shown
