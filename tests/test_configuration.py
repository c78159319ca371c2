"""The configuration: which source wins, what the environment may hold, and how mistakes are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lastcall.supervisor.config import user_files
from lastcall.supervisor.config.env_file import environment_of
from lastcall.supervisor.config.loading import Loader, load
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
    (
        {"LASTCALL_COMMAND": "node x"},
        """LASTCALL_COMMAND: got 'node x', expected a JSON list, as in ["node", "agent.js"]""",
    ),
    ({"LASTCALL_COMMAND": '"node"'}, "LASTCALL_COMMAND: got 'node', expected a list"),
    ({"LASTCALL_STOP": "{"}, """LASTCALL_STOP: got '{', expected a JSON object, as in {"fence": 2}"""),
    (
        {"LASTCALL_STOP": '{"fence": true}'},
        "LASTCALL_STOP__FENCE: got true, expected a number, not a boolean",
    ),
    (
        {"LASTCALL_RESTART__BACKOFF": "[false, 1]"},
        "LASTCALL_RESTART__BACKOFF: got [False, 1], expected a number, not a boolean",
    ),
    (
        {"LASTCALL_COMMAND": '["a\\u0000"]'},
        "LASTCALL_COMMAND: got ['a\\x00'], expected text without a NUL byte",
    ),
    (
        {"LASTCALL_HTTP": "a..b:80"},
        "LASTCALL_HTTP: got 'a..b:80', expected HOST:PORT or off;"
        " 'a..b' can't be the name of a host: expected labels of 1 to 63 characters, with dots between them",
    ),
    ({"LASTCALL_HTTP": "x:\u00b2"}, "LASTCALL_HTTP: got 'x:\u00b2', expected HOST:PORT or off"),
    (
        {"LASTCALL_INWORLD__WS_URL": "ws://[x/"},
        "LASTCALL_INWORLD__WS_URL: got 'ws://[x/', expected wss://HOST/; Invalid IPv6 URL",
    ),
    ({"LASTCALL_RESTART__BACKOFF": "[1]"}, "LASTCALL_RESTART__BACKOFF__1: got [1], expected more values"),
    ({"LASTCALL_INWORLD__WS_URL": "x"}, "LASTCALL_INWORLD__WS_URL: got 'x', expected wss://HOST/"),
    (
        {"LASTCALL_INWORLD__WS_URL": "wss://user:pass@word@host/"},
        "LASTCALL_INWORLD__WS_URL: got 'wss://…@host/', expected wss://HOST/ without user and password",
    ),
    (
        {"LASTCALL_INWORLD__BASE_URL": "https://user:pa/ss@host/"},
        "LASTCALL_INWORLD__BASE_URL: got 'https://…@host/', expected https://HOST/ without user and password",
    ),
    (
        {"LASTCALL_INWORLD__WS_URL": "wss://a..b/"},
        "LASTCALL_INWORLD__WS_URL: got 'wss://a..b/', expected wss://HOST/;"
        " 'a..b' can't be the name of a host: expected labels of 1 to 63 characters, with dots between them",
    ),
    (
        {"LASTCALL_INWORLD__WS_URL": "wss://ho\nst/"},
        "LASTCALL_INWORLD__WS_URL: got 'wss://ho\\nst/', expected wss://HOST/ without spaces and line breaks",
    ),
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
    """The page on configuration is rendered from the definitions of the options."""
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
        assert f"{spelt} {flag.metavar} {Config.options[name].description}" in shown
    for default in (
        "[1]",
        "[3600]",
        "[127.0.0.1:8080]",
        "[auto: in a directory of the user's own]",
        "[auto]",
    ):
        assert default in shown


@contextmanager
def written(path: Path, text: str) -> Iterator[None]:
    """Have a thread write into a named pipe, as a secret manager does, whenever one reads from it."""
    os.mkfifo(path)
    is_over = threading.Event()

    def write() -> None:
        while not is_over.is_set():
            with path.open("w") as pipe:
                pipe.write("" if is_over.is_set() else text)
            is_over.wait(0.01)  # so that a reader sees the end between two texts

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        thread.join()
        os.close(reader)


def pipe_of_a_shell(text: str) -> tuple[str, int]:
    """Return a path as `<(…)` gives it, and the descriptor behind it."""
    read, write = os.pipe()
    os.write(write, text.encode())
    os.close(write)
    return f"/dev/fd/{read}", read


def test_what_is_no_regular_file_is_read(tmp_path: Path) -> None:
    """A named pipe, a pipe of the shell, /dev/null; and a byte order mark is no part of the first name."""
    with written(tmp_path / "pipe.env", "A=1\n"):
        assert environment_of(str(tmp_path / "pipe.env")) == {"A": "1"}
        assert environment_of(str(tmp_path / "pipe.env"), again=True) == {"A": "1"}
    with written(tmp_path / "pipe.toml", "grace = 5\n"):
        assert load({}, {}, file=str(tmp_path / "pipe.toml")).grace == 5
    path, fd = pipe_of_a_shell("A=1\n")
    assert environment_of(path) == {"A": "1"}
    os.close(fd)
    assert environment_of("/dev/null") == {}
    assert load({}, {"LASTCALL_CONFIG": "/dev/null"}) == Config()
    (tmp_path / "bom.env").write_bytes(b"\xef\xbb\xbfA=1\r\nB=2\r\n")
    assert environment_of(str(tmp_path / "bom.env")) == {"A": "1", "B": "2"}
    (tmp_path / "bom.toml").write_bytes(b"\xef\xbb\xbfgrace = 5\r\n")
    assert load({}, {}, file=str(tmp_path / "bom.toml")).grace == 5


def test_a_pipe_that_nobody_writes_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up after a while; so is what never ends, and what is too large."""
    monkeypatch.setattr(user_files, "READ_WITHIN", 0.2)
    monkeypatch.setattr(user_files, "MAX_BYTES", 1 << 20)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"^env_file: '.*pipe' can't be read: it has not come to an end"):
        environment_of(str(tmp_path / "pipe"))
    holder = os.open(tmp_path / "pipe", os.O_RDWR)
    os.write(holder, b"A=1\n")
    with pytest.raises(ConfigError, match="it has not come to an end"):
        environment_of(str(tmp_path / "pipe"))
    os.close(holder)
    with pytest.raises(ConfigError, match="it has more than 1 MB"):
        environment_of("/dev/zero")


@pytest.mark.parametrize("name", ["lastcall.toml", "pyproject.toml"])
def test_a_file_that_is_there_and_can_not_be_read(empty_directory: Path, name: str) -> None:
    """It does not count as none: a directory, a link to nothing, a loop, text that is not UTF-8."""
    path = empty_directory / name
    path.mkdir()
    with pytest.raises(ConfigError, match=f"^{name} is a directory; expected a configuration in TOML$"):
        load({}, {})
    path.rmdir()
    path.symlink_to("nothing")
    with pytest.raises(ConfigError, match=f"^{name} is a link to a file that is not there"):
        load({}, {})
    path.unlink()
    path.symlink_to(name)
    with pytest.raises(ConfigError, match=f"^{name} can't be read: Too many levels of symbolic links"):
        load({}, {})
    path.unlink()
    path.write_bytes(b"a = '\xe4'\n")
    with pytest.raises(ConfigError, match=f"^{name} can't be read: not UTF-8 at byte 5"):
        load({}, {})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tool = 3\n", "pyproject.toml: tool: got 3, expected a table"),
        ("[tool]\nlastcall = 5\n", "pyproject.toml: tool.lastcall: got 5, expected a table"),
        ("[[tool.lastcall]]\n", "pyproject.toml: tool.lastcall: got [{}], expected a table"),
        ("[tool.lastcall]\nstop = 5\n", "pyproject.toml: stop: got 5, expected a table"),
        (
            "[tool.lastcall]\ngrace = true\n",
            "pyproject.toml: grace: got true, expected a number, not a boolean",
        ),
        ("a = " + "[" * 100_000, "pyproject.toml: not TOML: nested too deeply"),
        ("a = " + "1" * 5000, "pyproject.toml: not TOML: Exceeds the limit"),
    ],
    ids=lambda value: value[:20],
)
def test_mistakes_in_a_project_file(empty_directory: Path, text: str, says: str) -> None:
    """A wrong type at the top, a boolean for a number, and what the parser itself fails at: one line."""
    (empty_directory / "pyproject.toml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load({}, {})
    assert str(error.value).startswith(says) and "\n" not in str(error.value)


def test_a_named_project_file_without_the_section(empty_directory: Path) -> None:
    """A pyproject.toml that the user has named must have the section. Found by itself, it counts as none."""
    (empty_directory / "pyproject.toml").write_text("[tool.black]\n")
    assert load({}, {}) == Config()
    with pytest.raises(ConfigError, match=r"^LASTCALL_CONFIG: no \[tool.lastcall\] in 'pyproject.toml'"):
        load({}, {"LASTCALL_CONFIG": "pyproject.toml"})
    with pytest.raises(ConfigError, match=r"^--config: no configuration file 'none.toml'"):
        load({}, {}, file="none.toml")


def test_a_reload_without_the_file_of_the_start(empty_directory: Path) -> None:
    """It is refused, until the file is there again; a pipe of the shell can't be read twice."""
    file = empty_directory / "lastcall.toml"
    file.write_text("workers = 3\n")
    again = Loader({}, {})
    assert again().workers == 3
    file.rename(empty_directory / "away")
    with pytest.raises(ConfigError, match=r"^lastcall.toml: the configuration that was read from it is gone"):
        again()
    (empty_directory / "pyproject.toml").write_text("[tool.lastcall]\nworkers = 1\n")
    with pytest.raises(ConfigError, match="is gone"):
        again()
    file.write_text("workers = 4\n")
    assert again().workers == 4
    path, fd = pipe_of_a_shell("workers = 2\n")
    from_pipe = Loader({}, {}, file=path)
    assert from_pipe().workers == 2
    with pytest.raises(ConfigError, match="can't be read again: it is a pipe that has been read to its end"):
        from_pipe()
    with pytest.raises(ConfigError, match="can't be read again"):
        environment_of(path, again=True)
    os.close(fd)


@pytest.mark.parametrize("name", ["x" * 300, "/".join(["x" * 200] * 30)])
def test_names_that_are_too_long(name: str) -> None:
    """Nothing can look at such a path; the error is one line, as for a file that is not there."""
    with pytest.raises(UsageError, match=r"--receipt: got .* File name too long$"):
        load({"receipt": name}, {})
    with pytest.raises(ConfigError, match="File name too long"):
        load({}, {"LASTCALL_CONFIG": name})
    with pytest.raises(ConfigError, match=r"env_file: .* File name too long"):
        environment_of(name)


def test_variables_that_no_process_can_have(tmp_path: Path) -> None:
    """They are refused where they are read; the start of a worker would fail on them."""
    file = tmp_path / "agent.env"
    for text in ("A='1\0'\n", "'A=B'=1\n"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"can't be set; expected KEY=value lines"):
            environment_of(str(file))
