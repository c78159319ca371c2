"""Examples of each verb, for the end of the verb's help and for the page of commands."""

from __future__ import annotations

# By verb: commands in shell, and the effect of each. A test has the command line read each of them.
EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "demo": (
        ("lastcall demo", "watch calls flow; Ctrl-C stops while they run"),
        ("lastcall demo --seconds 8", "the same in a pipe, ended by itself"),
    ),
    "dev": (
        ("lastcall dev agent.py", "a new worker for each change, on a local server without LIVEKIT_URL"),
        ("lastcall dev agent.py --env-file .env --watch 'prompts/**/*.md'", "with keys, and more files"),
    ),
    "doctor": (
        ("lastcall doctor", "look at this machine"),
        ("lastcall doctor agent.py", "the same, and start a worker of the agent once"),
        ("lastcall doctor --unit lastcall", "look at the unit as systemd has it now"),
    ),
    "drain": (("lastcall drain --wait", "stop, and return when all is over"),),
    "dump": (
        ("lastcall dump", "where each worker is"),
        ("lastcall dump 0", "where the worker of slot 0 is"),
    ),
    "handover": (("lastcall handover AJ_x1y2z3 --wait", "one call; lastcall status --json has the ids"),),
    "hold": (("lastcall hold", "until lastcall release"),),
    "receipt": (
        ("lastcall receipt /var/lib/lastcall/receipt.json", "of what --receipt has written"),
        ("journalctl -u lastcall -o cat | lastcall receipt -", "of the last stop in a log"),
        ("lastcall receipt receipt.json --html stop.html", "for a browser"),
    ),
    "recycle": (("lastcall recycle 0 --wait", "a new worker for slot 0"),),
    "rehearse": (
        ("lastcall rehearse agent.py", "seven stops, some minutes"),
        ("lastcall rehearse agent.py --junit rehearsal.xml", "in a pipeline"),
        ("lastcall rehearse agent.py --html rehearsal.html", "each stop as a picture"),
    ),
    "release": (("lastcall release", "after lastcall hold"),),
    "reload": (
        ("lastcall reload --wait", "a deploy: calls finish on the old code"),
        ("lastcall reload --wait --handover", "a deploy: calls go on in new workers where they can"),
    ),
    "run": (
        ("lastcall run agent.py", "in place of python agent.py start"),
        ("lastcall run agent.py --workers 2 --grace 1800", "calls have half an hour to end"),
        ("lastcall run -m my.agent --args --voice Anna", "the program's own arguments come last"),
        ("lastcall run -- node agent.js start", "any other program"),
    ),
    "scale": (("lastcall scale 4 --wait", "four workers"),),
    "status": (
        ("lastcall status", "once"),
        ("lastcall status --watch", "until Ctrl-C"),
        ("lastcall status --json | jq .totals", "for a program"),
    ),
    "unit": (
        ("lastcall unit systemd agent.py >lastcall.service", "for /etc/systemd/system"),
        ("lastcall unit compose agent.py --grace 600", "kill timers that fit ten minutes"),
    ),
}  # fmt: skip


def text_of(verb: str) -> str:
    """Return the examples of a verb, two lines each: the effect as a comment, and the command."""
    return "\n".join(f"# {effect}\n{command}" for command, effect in EXAMPLES[verb])


def epilog(verb: str) -> str:
    """Return the end of a verb's help. The first character of a paragraph keeps click from joining lines."""
    lines = text_of(verb).replace("\n", "\n  ")
    return f"\b\nExamples:\n  {lines}"
