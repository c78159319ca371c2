"""`lastcall unit` prints artefacts that fit the grace, and the shipped files are what it prints."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lastcall.supervisor.cli.deployment import _unit
from lastcall.supervisor.config.loading import Loader
from lastcall.supervisor.config.options import Start
from lastcall.supervisor.deploy import docker, k8s, systemd, template
from lastcall.supervisor.deploy.service import Service, Timers
from lastcall.supervisor.deploy.tree import BY_HAND, shipped
from lastcall.supervisor.errors import ConfigError, UsageError
from tests.support.harness import LASTCALL

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "scripts" / "deploy"


def unit(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LASTCALL, "unit", *arguments], capture_output=True, text=True, timeout=60, cwd=cwd, check=False
    )


def test_shipped_files_are_what_the_source_of_truth_says() -> None:
    """Every file under scripts/deploy but those written by hand, and no other; scripts/units writes them."""
    found = {str(path.relative_to(DEPLOY)): path.read_text() for path in DEPLOY.rglob("*") if path.is_file()}
    assert {name: text for name, text in found.items() if name not in BY_HAND} == dict(shipped())
    assert found.keys() >= BY_HAND


def test_each_template_has_its_twin() -> None:
    """The templates mirror the shipped files, and each rendered file has all its placeholders filled in."""
    templates = Path(template.__file__).parent / "templates"
    assert {str(path.relative_to(templates)) for path in templates.rglob("*") if path.is_file()} == set(
        shipped()
    )
    assert not [name for name, text in shipped().items() if "{{" in text]


def test_values_are_not_read_as_placeholders() -> None:
    """A target with braces in its name arrives as it is; an unknown placeholder is an error."""
    service = Service(target="{{ name }}.py", printed_by="lastcall unit compose '{{ name }}.py'")
    assert yaml.safe_load(docker.compose(service))["services"]["agent"]["command"] == ["{{ name }}.py"]
    assert docker.compose(service).startswith("# lastcall unit compose '{{ name }}.py'\n")
    with pytest.raises(KeyError, match="quoted_target"):
        template.render("compose.yaml", service)


@pytest.mark.parametrize("name", ["lastcall.service", systemd.SHUTDOWN, "Dockerfile", "compose.yaml"])
def test_shipped_file_is_printed_by_the_command_in_its_first_line(name: str) -> None:
    """The command that a file names, run as it stands, prints the file."""
    text = (DEPLOY / name).read_text()
    words = shlex.split(text.splitlines()[0].removeprefix("# "))
    assert words[:2] == ["lastcall", "unit"]
    done = unit(*words[2:])
    assert (done.stdout, done.stderr, done.returncode) == (text, "", 0)


def test_shipped_base_is_printed_by_the_command_in_its_kustomization() -> None:
    """The same for Kubernetes, whose resources are printed as one stream."""
    text = (DEPLOY / "k8s/base/kustomization.yaml").read_text()
    done = unit(*shlex.split(text.splitlines()[0].removeprefix("# "))[2:])
    files = [DEPLOY / "k8s/base" / name for name in yaml.safe_load(text)["resources"]]
    assert list(yaml.safe_load_all(done.stdout)) == [yaml.safe_load(file.read_text()) for file in files]
    for file in files:
        assert file.read_text() in done.stdout


@pytest.mark.parametrize("grace", [45.5, 540.0, 3600.0, 86400.0])
def test_every_kill_timer_is_grace_and_a_margin(grace: float) -> None:
    """30 s after the end of grace, on each platform; on Kubernetes after preStop and grace."""
    service = Service(target="a.py", directory="/srv", program="/srv/lastcall", timers=Timers(grace=grace))
    after = Timers(grace=grace).kill_after
    assert grace + 30 <= after < grace + 31
    assert f"TimeoutStopSec={after}\n" in systemd.unit(service)
    shutdown_after = int(systemd.shutdown_drop_in(service).rpartition("JobTimeoutSec=")[2])
    assert shutdown_after == max(1800, after + 300)
    assert f"-t {after}:" in docker.dockerfile(service)
    assert yaml.safe_load(docker.compose(service))["services"]["agent"]["stop_grace_period"] == f"{after}s"
    paused = Service(target="a.py", timers=Timers(grace=grace, pre_stop=5))
    pod = yaml.safe_load(k8s.base(paused)["deployment.yaml"])["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == after + 5
    (container,) = pod["containers"]
    assert container["lifecycle"]["preStop"]["sleep"]["seconds"] == 5
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert environment["LASTCALL_PLATFORM_GRACE"] == str(after)
    assert float(str(environment["LASTCALL_GRACE"])) == grace


def test_values_of_the_command_line_arrive() -> None:
    """Name, image, workers and grace are where each platform looks for them."""
    done = unit(
        "k8s", "pkg.agent:server", "--name", "bot", "--image", "r.example/bot:7", "-w", "3", "--grace", "60"
    )
    deployment, pdb, hpa, policy = yaml.safe_load_all(done.stdout)
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    assert (container["image"], container["args"]) == ("r.example/bot:7", ["pkg.agent:server"])
    assert {"name": "LASTCALL_WORKERS", "value": "3"} in container["env"]
    assert {document["metadata"]["name"] for document in (deployment, pdb, hpa, policy)} == {"bot"}
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert pdb["spec"]["selector"]["matchLabels"] == labels == policy["spec"]["podSelector"]["matchLabels"]
    assert "--grace 60" in done.stdout.splitlines()[0]


def test_systemd_unit_takes_paths_as_they_are(tmp_path: Path) -> None:
    """Spaces, percent and dollar signs in a path reach the program; the target is made absolute."""
    service = Service(
        target="a b%/$x.py:make",
        arguments=("$HOME", "${HOME}", "50%", "a\\b", ";"),
        directory="/srv/it's",
        program="/opt/l c%/$d/lastcall",
        name="bot",
        workers=2,
    )
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # the documented way to keep capitals
    parser.read_string(systemd.unit(service))
    section = parser["Service"]
    assert section["ExecStart"].startswith(
        '"/opt/l c%%/$d/lastcall" run "/srv/it\'s/a b%%/$$x.py:make" --workers 2'
    )
    assert section["ExecStart"].endswith(' --args $$HOME $${HOME} 50%% "a\\\\b" ";"')
    assert "--control /run/bot/control.sock" in section["ExecStart"]
    assert section["WorkingDirectory"] == "/srv/it's/a b%%"
    assert section["RuntimeDirectory"] == "bot"


FILE = """
target = "agent.py"
args = ["--model", "big"]
grace = 600
workers = 3
http = "127.0.0.1:9000"
control = "auto"
[start]
timeout = 300
"""


def test_configuration_file_counts_and_stays_in_charge(tmp_path: Path) -> None:
    """Timers fit the grace of the file, and no option of the file is repeated where that would hide it."""
    (tmp_path / "lastcall.toml").write_text(FILE)
    compose = unit("compose", cwd=tmp_path).stdout
    agent = yaml.safe_load(compose)["services"]["agent"]
    assert (agent["command"], agent["stop_grace_period"]) == (["agent.py"], "630s")
    # The kill timer beside it is for this grace.
    assert agent["environment"]["LASTCALL_GRACE"] == "600"
    assert "LASTCALL_WORKERS" not in agent["environment"]
    assert f"Print it again when {tmp_path}/lastcall.toml changes" in compose
    dockerfile = unit("docker", cwd=tmp_path).stdout
    assert "docker stop -t 630" in dockerfile and "LASTCALL_" not in dockerfile
    assert "JobTimeoutSec=1800\n" in unit("poweroff", cwd=tmp_path).stdout
    flags = unit("docker", "--grace", "4000", "-w", "2", cwd=tmp_path).stdout
    assert "-t 4030" in flags and "LASTCALL_GRACE=4000" in flags and "LASTCALL_WORKERS=2" in flags
    (tmp_path / "lastcall.toml").write_text('receipt = "/data/receipt.json"\n')
    assert unit("docker", "agent.py", cwd=tmp_path).returncode == 0
    (tmp_path / "lastcall.toml").write_text("grace = 'x'\n")
    done = unit("docker", "agent.py", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (78, "", 1)


def variables_of(kind: str, text: str) -> dict[str, str]:
    """Return the LASTCALL_ variables of an image, a service or a pod; their values without quotes."""
    if kind == "docker":
        lines = [line.removeprefix("ENV ") for line in text.splitlines() if line.startswith("ENV LASTCALL_")]
        found = dict(word.split("=", 1) for line in lines for word in shlex.split(line.replace("\\$", "$")))
    elif kind == "compose":
        found = yaml.safe_load(text)["services"]["agent"]["environment"]
    else:
        pod = next(iter(yaml.safe_load_all(text)))["spec"]["template"]["spec"]
        found = {each["name"]: each.get("value") for each in pod["containers"][0]["env"]}
    return {
        name: found[name]
        for name in ("LASTCALL_GRACE", "LASTCALL_WORKERS", "LASTCALL_CONFIG")
        if name in found
    }


@pytest.mark.parametrize("kind", ["docker", "compose", "k8s"])
@pytest.mark.parametrize(
    ("file", "named", "says"),
    [
        ("lastcall.toml", None, ""),
        ("lastcall.toml", "", ""),
        ("pyproject.toml", None, ""),
        ("prod.toml", "prod.toml", "prod.toml"),
        ("conf/a b.toml", "./conf/a b.toml", "conf/a b.toml"),
        ("pyproject.toml", "ABOVE/app/pyproject.toml", "pyproject.toml"),
        ("../prod.toml", "../prod.toml", None),
        ("../prod.toml", "ABOVE/prod.toml", None),
    ],
)
def test_an_image_has_the_grace_of_the_configuration(
    kind: str,
    file: str,
    named: str | None,
    says: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The image has the file and finds it, or else the variables have what the file says."""
    (tmp_path / "app/conf").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "app")
    table = "[tool.lastcall]\n" if file == "pyproject.toml" else ""
    Path(file).write_text(f"{table}grace = 120\nworkers = 3\n")
    monkeypatch.delenv("LASTCALL_CONFIG", raising=False)
    if named is not None:
        monkeypatch.setenv("LASTCALL_CONFIG", named.replace("ABOVE", str(tmp_path)))
    _unit(kind, "agent.py")
    printed = capsys.readouterr()
    found = variables_of(kind, printed.out)
    assert "150" in printed.out and "Print it again when " in printed.out
    assert found.get("LASTCALL_CONFIG") == (says or None)
    if kind != "docker":
        assert found["LASTCALL_GRACE"] == "120", "the kill timer stands beside it"
    if says is None:
        assert (found["LASTCALL_GRACE"], found["LASTCALL_WORKERS"]) == ("120", "3")
    else:
        assert "LASTCALL_WORKERS" not in found and (kind != "docker" or "LASTCALL_GRACE" not in found)
    assert ("the image does not have " in printed.err) == (says is None)
    assert printed.out.startswith("# LASTCALL_CONFIG=" if named else "# lastcall unit ")


@pytest.mark.parametrize("name", ["$HOME.toml", 'a"b\\.toml', "$(X) {{ name }}.toml"])
def test_the_name_of_a_configuration_arrives(name: str) -> None:
    """Compose, Kubernetes and Docker read it as it is."""
    service = Service(target="a.py", config_file=f"/srv/{name}", config_variable=name)
    assert variables_of("docker", docker.dockerfile(service))["LASTCALL_CONFIG"] == name
    for kind, text in (("compose", docker.compose(service)), ("k8s", k8s.stream(service))):
        assert variables_of(kind, text)["LASTCALL_CONFIG"].replace("$$", "$") == name
    with pytest.raises(UsageError, match="configuration file: got"):
        Service(target="a.py", config_file="/srv/a\nRUN b.toml")


def test_words_of_the_program_arrive() -> None:
    """Docker takes them as they are; Compose and Kubernetes replace variables that are not escaped."""
    words = ("$(HOME)", "$HOME", "$$(X)", "${X}", "a$", "50%", 'a"b\\', "\U0001f600 ü", "\x85\u2028")
    service = Service(target="$(X)/a$b.py", arguments=words)
    wanted = ["$(X)/a$b.py", "--args", *words]
    (line,) = [line for line in docker.dockerfile(service).split("\n") if line.startswith("CMD ")]
    assert json.loads(line.removeprefix("CMD ")) == wanted
    given = yaml.safe_load(docker.compose(service))["services"]["agent"]["command"]
    assert [word.replace("$$", "$") for word in given] == wanted
    assert not any(re.search(r"(?<!\$)(\$\$)*\$(?!\$)", word) for word in given), "nothing left to replace"
    pod = next(iter(yaml.safe_load_all(k8s.stream(service))))["spec"]["template"]["spec"]
    assert [expanded(word) for word in pod["containers"][0]["args"]] == wanted
    with pytest.raises(UsageError, match="--args: got"):
        Service(target="a.py", arguments=("a\rb",))


def expanded(text: str) -> str:
    """Replace variables as the kubelet does (third_party/forked/golang/expansion/expand.go)."""
    return re.sub(r"\$\$|\$\((\w+)\)", lambda found: "$" if found[1] is None else "replaced", text)


@pytest.mark.parametrize(
    "receipt", ["/data/of/the/service/receipt.json", "/", "/proc/self/mem/x", "/" + "x" * 300]
)
def test_paths_of_the_file_are_those_of_another_machine(
    receipt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that only the service has is no mistake where units are printed; it is where they run."""
    monkeypatch.chdir(tmp_path)
    Path("lastcall.toml").write_text(f"grace = 60\nreceipt = {json.dumps(receipt)}\n")
    assert Loader({}, {}, for_elsewhere=True)().receipt == receipt
    with pytest.raises(ConfigError, match="receipt: got"):
        Loader({}, {})()
    Path("lastcall.toml").write_text("grace = 60\nreceipt = 7\n")
    with pytest.raises(ConfigError, match="receipt: got 7"):
        Loader({}, {}, for_elsewhere=True)()


def test_unit_names_its_configuration_file() -> None:
    """It is found wherever the target is, and what it sets is no flag, which would win over it."""
    service = Service(
        target="sub/agent.py",
        directory="/srv",
        program="/opt/lastcall",
        workers=3,
        timers=Timers(grace=600),
        start=Start(timeout=300),
        config_file="/srv/lastcall.toml",
        in_file=frozenset({"grace", "workers", "http"}),
    )
    text = systemd.unit(service)
    (command,) = [line for line in text.splitlines() if line.startswith("ExecStart=")]
    own = "--control /run/lastcall/control.sock --receipt /var/lib/lastcall/receipt.json"
    assert command == f"ExecStart=/opt/lastcall run /srv/sub/agent.py {own} --config /srv/lastcall.toml"
    assert "TimeoutStopSec=630\nTimeoutStartSec=331\n" in text
    assert "WorkingDirectory=/srv\n" in text, "relative paths of the file mean what they mean here"
    assert "LASTCALL_HTTP" not in text


def test_units_of_one_machine_share_no_port() -> None:
    """HTTP is off until a port is given, in the file of variables, which wins over the unit's own line."""
    for name in ("lastcall", "bot"):
        text = systemd.unit(Service(target="agent.py", directory="/srv", name=name))
        assert "Environment=LASTCALL_HTTP=off\n" in text and "--http" not in text
        assert f"/run/{name}/control.sock" in text and f"RuntimeDirectory={name}\n" in text


def test_home_directories_stay_visible_when_the_program_is_there() -> None:
    """ProtectHome would hide it; a directory for temporary files can't be shown, which is an error."""
    there = Service(target="agent.py", directory="/home/ann/agent", program="/opt/lastcall")
    assert "ProtectHome=read-only" in systemd.unit(there)
    assert "ProtectHome=yes" in systemd.unit(Service(target="agent.py", directory="/srv"))
    with pytest.raises(UsageError, match="PrivateTmp"):
        systemd.unit(Service(target="m:attr", directory="/tmp/x"))


def test_short_grace_is_said() -> None:
    """When a cut job's callbacks would not run, the artefact and standard error say so."""
    done = unit("docker", "agent.py", "--grace", "20")
    assert done.returncode == 0
    assert "callbacks may not run" in done.stdout.splitlines()[1] and "callbacks may not run" in done.stderr
    assert not Timers(grace=28).warning and Timers(grace=27).warning
    assert "calls have 5 s to end by themselves, and then 10 s to shut down" in done.stdout.splitlines()[2]
    assert "calls have 3570 s" in unit("docker", "agent.py").stdout.splitlines()[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["vms", "a.py"], "'vms' is no kind of unit: expected systemd"),
        (["docker", "agent"], "'agent' is no target"),
        (["docker", "a.py", "--grace", "0"], "--grace: got 0"),
        (["docker", "a.py", "--grace", "nan"], "--grace: got nan"),
        (["docker", "a.py", "--grace", "inf"], "--grace: got inf"),
        (["docker", "a.py", "--workers", "0"], "--workers: got 0"),
        (["docker", "a.py", "--name", "No Good"], "--name: got 'No Good'"),
        (["systemd", "/opt/a.py", "--name", "daemon"], "--name: got 'daemon', the name of a user"),
        (["docker", "a.py", "--image", "x"], "--image: docker names no image"),
        (["compose", "a.py", "--image", "x y"], "--image: got 'x y'"),
        (["docker", "/opt/a.py"], "'/opt/a.py' would not be in the image"),
        (["docker", "../a.py"], "'../a.py' would not be in the image"),
        (["k8s", "a.py", "--exec", "/x"], "--exec: k8s starts what is in the image"),
        (["systemd", "a.py", "--exec", "lastcall"], "--exec: got 'lastcall', expected the absolute path"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], says: str) -> None:
    """The value, what was expected, exit code 2, and nothing printed that could be taken for a unit."""
    done = unit(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        *((good, True) for good in ("a.py", "/x/a.py", "a.py:b", "m:a", "p.m:a")),
        *((bad, False) for bad in ("a", ".py", "a.py:", "a.py:1", "m:", ":a", "p..m:a", "a\nb.py", "")),
    ],
)
def test_targets(text: str, is_one: bool) -> None:
    """TARGET has three forms."""
    if is_one:
        Service(target=text)
        return
    with pytest.raises(UsageError, match="expected"):
        Service(target=text)


def test_entrypoint_turns_the_environment_into_a_command(tmp_path: Path) -> None:
    """It understands target, options or verb, PORT, and secrets from files; a variable that is set wins."""
    fake = tmp_path / "lastcall"
    fake.write_text(
        f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv[1:], dict(os.environ)]))\n"
    )
    fake.chmod(0o755)
    secret = tmp_path / "secret"
    secret.write_text("s3cret\n")

    def enter(*arguments: str, **environment: str) -> tuple[list[str], dict[str, str]]:
        done = subprocess.run(
            [str(ROOT / "scripts/entrypoint"), *arguments],
            env={"PATH": f"{tmp_path}:/usr/bin:/bin", **environment},
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        words, seen = json.loads(done.stdout)
        return words, seen

    assert enter("agent.py", "-w", "2")[0] == ["run", "agent.py", "-w", "2"]
    assert enter("m:server")[0] == ["run", "m:server"]
    assert enter("--", "node", "x")[0] == ["run", "--", "node", "x"]
    assert enter()[0] == ["run"]
    assert enter("--version")[0] == ["--version"]
    assert enter("--help")[0] == ["--help"]
    assert enter("--grace", "9", "a.py")[0] == ["run", "--grace", "9", "a.py"]
    assert enter("doctor")[0] == ["doctor"]
    assert enter()[1]["LASTCALL_HTTP"] == "0.0.0.0:8080"
    assert enter(PORT="10000")[1]["LASTCALL_HTTP"] == "0.0.0.0:10000"
    assert enter(PORT="10000", LASTCALL_HTTP="off")[1]["LASTCALL_HTTP"] == "off"
    assert enter(LIVEKIT_API_SECRET_FILE=str(secret))[1]["LIVEKIT_API_SECRET"] == "s3cret"
    both = {"LIVEKIT_API_SECRET_FILE": str(secret), "LIVEKIT_API_SECRET": "a $(b) 'c'"}
    assert enter(**both)[1]["LIVEKIT_API_SECRET"] == "a $(b) 'c'"


def test_entrypoint_without_its_secret(tmp_path: Path) -> None:
    """A secret's file that can't be read, or is empty, is a wrong configuration, by its name; one line."""
    (tmp_path / "empty").write_text("\n")
    for name in ("none", "empty"):
        done = subprocess.run(
            [str(ROOT / "scripts/entrypoint"), "agent.py"],
            env={"PATH": "/usr/bin:/bin", "LIVEKIT_API_KEY_FILE": str(tmp_path / name)},
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert done.returncode == 78
        assert "LIVEKIT_API_KEY_FILE" in done.stderr and done.stderr.count("\n") == 1
