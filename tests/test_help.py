"""Help at the prompt: examples of each verb, words after Tab, and errors that name the next command."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from lastcall.supervisor.cli import examples, run
from lastcall.supervisor.cli.parameters import with_arguments
from tests.support.harness import AGENT, LASTCALL, Run, StartRun

BIN = Path(sys.executable).parent
# Presses Tab at the end of a command line, as bash does for a command with a completion function.
PRESS_TAB = """
source <(_LASTCALL_COMPLETE=source_bash lastcall)
COMP_WORDS=({words}) COMP_CWORD={last}
_lastcall_completion lastcall
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def verbs() -> dict[str, Any]:
    """Return the commands of the whole command line."""
    # Any: click's classes, which newer versions of typer bundle
    root: Any = typer.main.get_command(run.whole())
    return dict(root.commands)


def test_each_verb_has_examples() -> None:
    """The command line takes every example, and the help of each verb ends with them."""
    assert set(examples.EXAMPLES) == set(verbs())
    for name, verb in verbs().items():
        for command, effect in examples.EXAMPLES[name]:
            assert len(f"  # {effect}") <= 80 and len(f"    {command}") <= 80
            (call,) = (part for part in command.split("|") if part.strip().startswith("lastcall"))
            _, word, *arguments = shlex.split(re.sub(r">\S+", "", call))
            assert word == name, command
            if "--" in arguments:
                arguments = arguments[: arguments.index("--")]
            verb.make_context(
                name, with_arguments(arguments)
            )  # raises for a word that the verb does not take


def test_help_shows_the_examples() -> None:
    """Each stands on one line, however narrow the terminal is."""
    done = subprocess.run(
        [*LASTCALL, "run", "--help"],
        env={**os.environ, "COLUMNS": "60"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    lines = [line.strip() for line in done.stdout.splitlines()]
    for command, effect in examples.EXAMPLES["run"]:
        at = lines.index(command)
        assert lines[at - 1] == f"# {effect}"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["status", "--control", "/nowhere"], 69, ["/nowhere", "lastcall run agent.py", "--control PATH"]),
        (["status"], 69, ["no supervisor is running", "lastcall run agent.py", "--control PATH"]),
        (["recycle"], 2, ["'SLOT'", "lastcall recycle --help"]),
        (["rehearse"], 2, ["'TARGET'", "agent.py"]),
        (["run"], 2, ["nothing to run", "lastcall run agent.py"]),
        (["stauts"], 2, ["'stauts'", "lastcall --help"]),
        (["--show-completion", "ksh"], 2, ["'ksh'", "'bash', 'zsh', 'fish'"]),
        (["demo", "--rate", "1000"], 2, ["--rate: got 1000", "more than 0 and less than 1000"]),
    ],
)
def test_an_error_names_the_next_command(
    tmp_path: Path, words: list[str], code: int, says: list[str]
) -> None:
    """One line, with the command that helps."""
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [*LASTCALL, *words],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("lastcall: ")
    assert [each for each in says if each not in line] == [], line


def test_completion_for_a_shell_by_name() -> None:
    """The script is that of the shell which was asked for, whatever shell asks."""
    for words in (["--show-completion", "zsh"], ["--show-completion=zsh"]):
        done = subprocess.run([*LASTCALL, *words], capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.startswith("#compdef lastcall\n")


async def after_tab(*words: str) -> list[str]:
    """Return the words that bash offers; the last of `words` is the begun one."""
    script = PRESS_TAB.format(words=shlex.join(["lastcall", *words]), last=len(words))
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = await asyncio.to_thread(
        subprocess.run, ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    return str(done.stdout).split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
async def test_words_after_tab(run: StartRun) -> None:
    """bash offers verbs and kinds of units, and the slots and jobs of a supervisor that runs."""
    assert set(await after_tab("")) == set(verbs())
    assert await after_tab("re") == ["rehearse", "receipt", "release", "reload", "recycle"]
    assert await after_tab("unit", "sy") == ["systemd"]
    assert await after_tab("reload", "--w") == ["--wait"]
    assert await after_tab("run", "ag") == []  # and bash goes on with the names of files
    assert await after_tab("recycle", "--control", "/nowhere", "") == []

    r: Run = await run("run", AGENT)
    await r.ready()
    job = await r.dispatch(sleep=60)
    control = ("--control", str(r.control))
    assert await after_tab("recycle", *control, "") == ["0"]
    assert await after_tab("dump", *control, "1") == []
    assert await after_tab("handover", *control, "") == [job.job_id]
