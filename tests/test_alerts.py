"""Alert rules, the query of KEDA and the dashboard under promtool, with the labels that targets really have.

A scenario is what Prometheus has scraped, as steps of (value, minutes). A value of None is no sample.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from lastcall.supervisor.receipt import Ledger, StopRecord, textfile, write
from tests.support.left_out import PROMTOOL

pytestmark = pytest.mark.promtool

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "scripts" / "deploy"
ALERTS = DEPLOY / "alerts.yaml"
Steps = Sequence[tuple[float | None, float]]
POD = "lastcall-6d4cf56db6-x7k2p"
# On a host a target has instance and job; on Kubernetes a target has what relabelling gives it.
TARGETS = {
    "host": {"job": "lastcall", "instance": "host:8080"},
    "kubernetes": {
        "job": "kubernetes-pods",
        "instance": "10.1.2.3:8080",
        "namespace": "voice",
        "pod": POD,
        "container": "agent",
        "node": "node-1",
        "app_kubernetes_io_name": "lastcall",
        "pod_template_hash": "6d4cf56db6",
    },
}
RESTARTS = 'lastcall_restarts_total{slot="0",reason="never ready"}'
FAILED = 'lastcall_operations_total{verb="reload",result="failed"}'
FULL = 'lastcall_full_seconds_total{reason="load"}'
QUARANTINED = 'lastcall_slots{state="quarantined"}'
LAST_CUT = 'lastcall_last_stop_jobs{receipt="/r.json",fate="cut"}'
LAST_LOST = 'lastcall_last_stop_jobs{receipt="/r.json",fate="lost"}'
LAST_AT = 'lastcall_last_stop_timestamp_seconds{receipt="/r.json"}'
LONG = 200.0
# A supervisor with two calls, of which nothing is to be said.
ORDINARY: Mapping[str, Steps] = {
    "up": [(1, LONG)],
    "lastcall_jobs_cut_total": [(0, LONG)],
    "lastcall_jobs_lost_total": [(0, LONG)],
    "lastcall_workers_accepting": [(2, LONG)],
    "lastcall_workers_wanted": [(2, LONG)],
    "lastcall_stopping": [(0, LONG)],
    "lastcall_held": [(0, LONG)],
    FULL: [(0, LONG)],
    QUARANTINED: [(0, LONG)],
    "lastcall_stalls_total": [(0, LONG)],
    FAILED: [(0, LONG)],
    RESTARTS: [(0, LONG)],
    "lastcall_drain_left_seconds": [(0, LONG)],
    "lastcall_jobs_to_cut": [(0, LONG)],
    "lastcall_grace_left_seconds": [(0, LONG)],
    'lastcall_jobs_running{slot="0"}': [(2, LONG)],
    LAST_CUT: [(0, LONG)],
    LAST_LOST: [(0, LONG)],
    LAST_AT: [(0, LONG)],
}


def gone(**last: Steps) -> dict[str, Steps]:
    """Return the samples of a supervisor that is silent after ten minutes, and what it says before."""
    silent = {
        name: [(steps[0][0], 10.0), (None, LONG)] for name, steps in ORDINARY.items() if "last_" not in name
    }
    return {**silent, "up": [(1, 10.0), (0, LONG)], **last}


# The samples that differ from the ordinary, a minute, and the alerts of that minute with their summaries.
SCENARIOS: dict[str, tuple[Mapping[str, Steps], float, Mapping[str, str]]] = {
    "ordinary": ({}, 40, {}),
    "a reload cut a job": (
        {"lastcall_jobs_cut_total": [(0, 10), (1, LONG)]}, 12,
        {"LastcallJobsCut": "INSTANCE ended jobs that were not over"},
    ),
    "a worker died": (
        {"lastcall_jobs_lost_total": [(0, 10), (2, LONG)]}, 12,
        {"LastcallJobsLost": "INSTANCE lost jobs with their worker"},
    ),
    "no worker accepts": (
        {"lastcall_workers_accepting": [(2, 10), (0, LONG)]}, 13,
        {"LastcallNoWorkerAccepts": "INSTANCE takes no calls"},
    ),
    "no worker accepts in a stop with calls": (
        {
            "lastcall_workers_accepting": [(2, 10), (0, LONG)],
            "lastcall_stopping": [(0, 10), (1, LONG)],
            "lastcall_drain_left_seconds": [(0, 10), (3000, LONG)],
            "lastcall_jobs_to_cut": [(0, 10), (2, LONG)],
        }, 15, {},
    ),
    "a hold": (
        {"lastcall_workers_accepting": [(2, 10), (0, LONG)], "lastcall_held": [(0, 10), (1, LONG)]}, 30, {},
    ),
    "a hold that was forgotten": (
        {"lastcall_workers_accepting": [(2, 10), (0, LONG)], "lastcall_held": [(0, 10), (1, LONG)]}, 45,
        {"LastcallHeldForLong": "INSTANCE has been on hold for half an hour"},
    ),
    "no worker takes calls for its load": (
        {FULL: [(0, 10), *((60 * minute, 1) for minute in range(1, 8)), (480, LONG)]}, 17,
        {"LastcallFull": "No worker of INSTANCE took calls for half of ten minutes: load"},
    ),
    "a slot is quarantined": (
        {QUARANTINED: [(0, 10), (1, LONG)]}, 12,
        {"LastcallSlotQuarantined": "INSTANCE has given a slot up"},
    ),
    "a worker is stalled": (
        {"lastcall_stalls_total": [(0, 10), (1, LONG)]}, 12,
        {"LastcallWorkerStalled": "A worker of INSTANCE stopped beating"},
    ),
    "a reload failed": (
        {FAILED: [(0, 10), (1, LONG)]}, 12, {"LastcallReloadFailed": "INSTANCE still runs the old code"},
    ),
    "one restart": ({RESTARTS: [(0, 10), (1, LONG)]}, 12, {}),
    "restarts": (
        {RESTARTS: [(0, 10), (5, LONG)]}, 12,
        {"LastcallWorkersRestart": "INSTANCE does not keep its workers up"},
    ),
    "a drain runs short": (
        {
            "lastcall_drain_left_seconds": [(0, 10), (100, LONG)],
            "lastcall_jobs_to_cut": [(0, 10), (1, LONG)],
        }, 12,
        {"LastcallStopRunsShort": "INSTANCE will cut jobs in 1m 40s"},
    ),
    "a drain has time": (
        {
            "lastcall_drain_left_seconds": [(0, 10), (500, LONG)],
            "lastcall_jobs_to_cut": [(0, 10), (1, LONG)],
        }, 12, {},
    ),
    "a stop hangs": (
        {"lastcall_stopping": [(0, 10), (1, LONG)]}, 14,
        {"LastcallStopTakesLong": "INSTANCE has been stopping for a minute without calls"},
    ),
    "an opaque program drains, and nobody knows its calls": (
        {
            "lastcall_workers_accepting": [(2, 10), (0, LONG)],
            "lastcall_stopping": [(0, 10), (1, LONG)],
            "lastcall_grace_left_seconds": [(0, 10), (60, LONG)],
            "lastcall_jobs_to_cut": [(None, LONG)],
            "lastcall_drain_left_seconds": [(None, LONG)],
        }, 15, {},
    ),
    "the last stop cut jobs": (
        {
            LAST_CUT: [(0, 10), (2, LONG)],
            LAST_LOST: [(0, 10), (1, LONG)],
            LAST_AT: [(0, 10), (600, LONG)],
        }, 12,
        {
            "LastcallLastStopCutJobs/cut": "Calls of /r.json that were cut in the last stop: 2",
            "LastcallLastStopCutJobs/lost": "Calls of /r.json that were lost in the last stop: 1",
        },
    ),
    "a stop of long ago cut jobs": ({LAST_CUT: [(2, LONG)], LAST_AT: [(0, 10), (600, LONG)]}, 80, {}),
    "a supervisor does not answer": (
        gone(), 15, {"LastcallDown": "INSTANCE does not answer, and was a lastcall in the last day"},
    ),
    "a pod is taken away": (gone(up=[(1, 10), (None, LONG)]), 15, {}),
    "something else is down": ({**{name: [(None, LONG)] for name in ORDINARY}, "up": [(0, LONG)]}, 15, {}),
}  # fmt: skip
# Alerts of a stop of the whole that cuts a job, by the seconds between two scrapes. The job is counted 15 s
# before the supervisor is gone.
CUT_AT_THE_END = gone(
    lastcall_jobs_cut_total=[(0, 9.75), (1, 0.25), (None, LONG)],
    lastcall_jobs_to_cut=[(0, 5), (1, 4.75), (0, 0.25), (None, LONG)],
    lastcall_drain_left_seconds=[(0, 5), (100, 4.75), (0, 0.25), (None, LONG)],
    up=[(1, 10), (None, LONG)],
)


def series(name: str, target: Mapping[str, str]) -> str:
    """Return a series with the labels of its target added."""
    base, _, own = name.removesuffix("}").partition("{")
    labels = [own] if own else []
    labels += [f'{key}="{value}"' for key, value in target.items()]
    return f"{base}{{{','.join(labels)}}}"


def values(steps: Steps, interval: int, until: float = 30.0) -> str:
    """Return the samples of steps, up to a minute: at each scrape the value of that moment."""
    samples, start = [], 0.0
    ends = []
    for value, minutes in steps:
        start += minutes * 60
        ends.append((start, value))
    for at in range(0, int(min(start, until * 60) + 1), interval):
        value = next(value for end, value in ends if at < end)
        samples.append("_" if value is None else f"{value:g}")
    # A target that is silent is marked so, where its last sample would count for five minutes more.
    return re.sub(r"(\d) _", r"\1 stale", " ".join(samples))


def inputs(
    scenario: Mapping[str, Steps], target: Mapping[str, str], interval: int, until: float
) -> list[dict[str, str]]:
    return [
        {"series": series(name, target), "values": values(steps, interval, until)}
        for name, steps in {**ORDINARY, **scenario}.items()
    ]


@functools.cache  # to parse it takes 20 ms
def rules() -> dict[str, Any]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def expected(alert: str, fires: Mapping[str, str], target: Mapping[str, str]) -> list[dict[str, Any]]:
    rule = rules()[alert]
    own = {
        "LastcallFull": {"reason": "load"},
        "LastcallSlotQuarantined": {"state": "quarantined"},
        "LastcallReloadFailed": {"verb": "reload", "result": "failed"},
    }.get(alert, {})
    found = []
    for key, summary in fires.items():
        name, _, fate = key.partition("/")
        if name == alert:
            last = {"receipt": "/r.json", "fate": fate} if fate else {}
            annotations = {
                "summary": summary.replace("INSTANCE", target["instance"]),
                "description": rule["annotations"]["description"],
            }
            labels = {**target, **rule["labels"], **own, **last}
            found.append({"exp_labels": labels, "exp_annotations": annotations})
    return found


def promtool(tmp_path: Path, tests: Sequence[Mapping[str, Any]]) -> None:
    """Have promtool run unit tests; its report is the message."""
    path = tmp_path / "test.yaml"
    document = {"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": tests}
    path.write_text(json.dumps(document))  # JSON is YAML
    call("test", "rules", str(path))


def call(*arguments: str, text: str = "") -> None:
    done = subprocess.run(
        [PROMTOOL, *arguments], input=text, check=False, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_rule_fires_and_fires_no_more() -> None:
    """The scenarios below have each rule once at least."""
    named = {key.partition("/")[0] for _, _, fires in SCENARIOS.values() for key in fires}
    assert named == set(rules())


@pytest.mark.parametrize("interval", [15, 60])
def test_rules(tmp_path: Path, interval: int) -> None:
    """In each scenario exactly the alerts named fire, with every label of the target and the right words.

    All kinds of targets are there at once, for no rule may take a sample of one for one of another.
    """
    tests = [
        {
            "name": name,
            "interval": f"{interval}s",
            "input_series": [
                each for target in TARGETS.values() for each in inputs(scenario, target, interval, minute)
            ],
            "alert_rule_test": [
                {
                    "eval_time": f"{minute:g}m",
                    "alertname": alert,
                    "exp_alerts": [
                        each for target in TARGETS.values() for each in expected(alert, fires, target)
                    ],
                }
                for alert in rules()
            ],
        }
        for name, (scenario, minute, fires) in SCENARIOS.items()
    ]
    promtool(tmp_path, tests)


@pytest.mark.parametrize(("interval", "is_seen"), [(15, True), (60, False)])
def test_a_job_that_is_cut_in_the_last_seconds(tmp_path: Path, interval: int, is_seen: bool) -> None:
    """A scrape every 15 s sees it, one every 60 s does not; both have seen before what would be cut."""
    target = TARGETS["kubernetes"]
    seen = {"LastcallJobsCut": "INSTANCE ended jobs that were not over"} if is_seen else {}
    short = {"LastcallStopRunsShort": "INSTANCE will cut jobs in 1m 40s"}
    tests = [
        {
            "interval": f"{interval}s",
            "input_series": inputs(CUT_AT_THE_END, target, interval, 11),
            "alert_rule_test": [
                {"eval_time": at, "alertname": alert, "exp_alerts": expected(alert, fires, target)}
                for at, alert, fires in (
                    ("9m", "LastcallStopRunsShort", short),
                    ("11m", "LastcallStopRunsShort", {}),
                    ("11m", "LastcallJobsCut", seen),
                    ("11m", "LastcallDown", {}),
                )
            ],
        }
    ]
    promtool(tmp_path, tests)


def keda_query(name: str, namespace: str) -> str:
    """Return the query of the ScaledObject as kustomize leaves it; `test_lint` has kustomize do so."""
    (trigger,) = yaml.safe_load((DEPLOY / "k8s" / "keda" / "scaledobject.yaml").read_text())["spec"][
        "triggers"
    ]
    assert trigger["metadata"]["ignoreNullValues"] == "false", "no answer would count as zero"
    query: str = trigger["metadata"]["query"]
    return query.replace("$(LASTCALL_NAME)", name).replace("$(LASTCALL_NAMESPACE)", namespace)


def pod(name: str, namespace: str, jobs: Steps, stopping: Steps = ((0, LONG),)) -> list[dict[str, str]]:
    target = {**TARGETS["kubernetes"], "namespace": namespace, "pod": name}
    return [
        {"series": series('lastcall_jobs_running{slot="0"}', target), "values": values(jobs, 15)},
        {"series": series('lastcall_jobs_running{slot="1"}', target), "values": values(jobs, 15)},
        {"series": series("lastcall_stopping", target), "values": values(stopping, 15)},
    ]


def test_keda_counts_its_own_deployment(tmp_path: Path) -> None:
    """All slots of its pods; no job of another deployment, namespace or prefix, nor of a pod that drains."""
    ours = [
        *pod("a-lastcall-6d4cf56db6-x7k2p", "voice", [(3, LONG)]),
        *pod("a-lastcall-6d4cf56db6-zz99b", "voice", [(4, LONG)], [(1, LONG)]),
        *pod("a-lastcall-7f8b9c6d5-bcdfg", "voice", [(5, 10), (None, 2), (5, LONG)]),
    ]
    others = [
        *pod("lastcall-6d4cf56db6-x7k2p", "voice", [(100, LONG)]),
        *pod("a-lastcall-6d4cf56db6-x7k2q", "staging", [(100, LONG)]),
        *pod("a-lastcall-extra-6d4cf56db6-x7k2p", "voice", [(100, LONG)]),
        *pod("a-lastcall-0", "voice", [(100, LONG)]),
        *pod("b-a-lastcall-6d4cf56db6-x7k2p", "voice", [(100, LONG)]),
    ]
    query = keda_query("a-lastcall", "voice")
    counted = [{"labels": "{}", "value": 16}]
    drained = pod(POD, "voice", [(3, LONG)], [(0, 10), (1, LONG)])

    def asked(at: str, samples: list[dict[str, Any]], expr: str = query) -> dict[str, Any]:
        return {"expr": expr, "eval_time": at, "exp_samples": samples}

    tests = [
        {"interval": "15s", "input_series": ours + others,
         "promql_expr_test": [asked("9m", counted), asked("11m", counted), asked("20m", counted)]},
        {"interval": "15s", "input_series": others, "promql_expr_test": [asked("9m", [])]},
        {"interval": "15s", "input_series": drained, "promql_expr_test": [
            asked("9m", [{"labels": "{}", "value": 6}], keda_query("lastcall", "voice")),
            asked("12m", [{"labels": "{}", "value": 0}], keda_query("lastcall", "voice")),
        ]},
    ]  # fmt: skip
    promtool(tmp_path, tests)


@pytest.mark.parametrize("where", TARGETS)
def test_every_query_of_the_dashboard_answers(tmp_path: Path, where: str) -> None:
    """Each has a value while a supervisor stops that has cut a job, with the labels of its target."""
    target = TARGETS[where]
    names = {
        **ORDINARY,
        "lastcall_stopping": [(0, 10), (1, LONG)],
        "lastcall_grace_left_seconds": [(0, 10), (100, LONG)],
        "lastcall_jobs_finished_total": [(0, 10), (1, LONG)],
        "lastcall_jobs_failed_total": [(0, LONG)],
        "lastcall_operations_total{verb=\"reload\",result=\"done\"}": [(0, 10), (1, LONG)],
        'lastcall_slots{state="ready"}': [(2, LONG)],
        'lastcall_worker_loop_lag_seconds{slot="0",generation="1"}': [(0, LONG)],
        'lastcall_worker_resident_memory_bytes{slot="0",generation="1"}': [(1e8, LONG)],
        **{
            f'lastcall_{what}_seconds_bucket{{le="{bound}"}}': [(0, 10), (1, LONG)]
            for what in ("drain", "fence")
            for bound in ("1", "+Inf")
        },
    }  # fmt: skip
    panels = json.loads((DEPLOY / "grafana.json").read_text())["panels"]
    queries = [each["expr"].replace("$job", ".*") for panel in panels for each in panel.get("targets", [])]
    assert queries
    promtool(
        tmp_path,
        [
            {
                "interval": "15s",
                "input_series": inputs(names, target, 15, 12),
                "promql_expr_test": [
                    {
                        "expr": f"count({query}) > bool 0",
                        "eval_time": "12m",
                        "exp_samples": [{"labels": "{}", "value": 1}],
                    }
                    for query in queries
                ],
            }
        ],
    )


def test_the_textfile_is_one(tmp_path: Path) -> None:
    """promtool finds nothing wrong with names, types and help of the last stop's figures."""
    document = write(StopRecord(phases={"draining": 1.0}), Ledger(), grace=60.0, pid=1)
    call("check", "metrics", text=textfile.text_of(document, "/var/lib/lastcall/receipt.json", 1.0))
