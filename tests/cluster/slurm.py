"""A SLURM of several nodes on one Debian machine, for tests: each node is a set of namespaces.

A node has its own address, host name, loopback device, process table and /etc/hosts; the file system is shared, as on a
cluster. So nodes talk over a network, a cable can be pulled, and a node can be lost with all its processes. Nothing of
the machine's own network, /etc or services is changed. Needs root and the packages of :data:`PACKAGES`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

PACKAGES = ("slurm-wlm", "slurmctld", "slurmd", "munge", "iproute2", "util-linux", "procps")
_COMMANDS = ("slurmctld", "slurmd", "sbatch", "scontrol", "munged", "ip", "nsenter", "unshare", "pgrep")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_NETWORK = "10.77.0"
_LOGIN = "login"
UP_S = 120.0

_NODE = """
node=$0 folder=$1
hostname "$node"
mount --bind "$folder/hosts-$node" /etc/hosts
mkdir -p "$folder/spool-$node"
slurmd -D -N "$node" -f "$SLURM_CONF" &
while :; do wait; sleep 3600 & done
"""
"""What the first process of a node does; with it all others end."""


def missing() -> str:
    """Why there can be no cluster on this machine; empty: there can."""
    if os.environ.get("MSTAR_CLUSTER") == "0":
        return "MSTAR_CLUSTER=0"
    if os.geteuid() != 0:
        return "namespaces with a network need root"
    absent = [command for command in _COMMANDS if shutil.which(command, path=_PATH) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: apt-get install {' '.join(PACKAGES)})"
    name = f"mstar-probe-{os.getpid()}"
    probe = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, env={"PATH": _PATH})
    if probe.returncode:
        return f"no network namespaces here: {probe.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True, env={"PATH": _PATH})
    return ""


class Cluster:
    """``gpus``: pretend GPUs of each node (empty: none). ``loopback``: host names mean 127.0.1.1, as Debian sets up."""

    def __init__(self, folder: Path, nodes: int, gpus: Sequence[int] = (), loopback: bool = False) -> None:
        self.folder, self.names = folder, [f"node{i + 1}" for i in range(nodes)]
        self._gpus, self._loopback = gpus, loopback
        self._name = f"mstar{os.getpid()}x{time.monotonic_ns() % 10**6}"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = os.environ | {"PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")}

    def up(self) -> None:
        """Start everything; raises RuntimeError where the nodes do not come up."""
        self._configure()
        self._connect()
        munge = self.folder / "munge"
        munge.mkdir(mode=0o711)
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o600)
        files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        self._call("munged", "--force", f"--socket={munge / 'socket'}", *files)
        self._start(_LOGIN, ["slurmctld", "-D", "-i", "-f", str(self.folder / "slurm.conf")])
        for node in self.names:
            self.power_on(node)
        deadline = time.monotonic() + UP_S
        while self.login("sinfo", "-h", "-t", "idle", "-o", "%D", check=False).strip() != str(len(self.names)):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the nodes did not come up; see {self.folder}")
            time.sleep(0.3)

    def down(self) -> None:
        """End everything that was started, and remove the network."""
        for name in [*self.names, _LOGIN]:
            self._kill(name)
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((self.folder / "munge/pid").read_text()), signal.SIGTERM)
        for name in [_LOGIN, *self.names]:
            subprocess.run(["ip", "netns", "del", self._space(name)], capture_output=True, env=self._environment)

    # -- nodes -------------------------------------------------------------------------------------------------------

    def power_on(self, node: str) -> None:
        """Plug the cable in and start the node."""
        self.plug(node, True)
        space = f"--net=/run/netns/{self._space(node)}"
        unshared = ["unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child=KILL"]
        self._spawn(node, ["nsenter", space, *unshared, "bash", "-c", _NODE, node, str(self.folder)])

    def power_off(self, node: str) -> None:
        """The cable first, so that nobody hears its connections close; then all its processes at once."""
        self.plug(node, False)
        self._kill(node)

    def plug(self, node: str, connected: bool) -> None:
        """Plug a node's network cable in, or pull it."""
        self._call("ip", "-n", self._space(_LOGIN), "link", "set", f"to-{node}", "up" if connected else "down")

    def on(self, node: str, *command: str, check: bool = True) -> str:
        """Run a command on a node; returns what it printed."""
        outer = self._processes[node].pid
        inner = self._call("pgrep", "-P", str(outer)).split()[0]
        spaces = ["--net", "--uts", "--mount", "--pid"]
        return self._call("nsenter", "--target", inner, *spaces, "--", *command, check=check)

    def processes(self, text: str) -> list[tuple[str, int]]:
        """(node, process number there) of the processes with this text in their command."""
        found = []
        for node in self.names:
            if node in self._processes:
                found += [(node, int(pid)) for pid in self.on(node, "pgrep", "-f", text, check=False).split()]
        return found

    # -- jobs --------------------------------------------------------------------------------------------------------

    def login(self, *command: str, check: bool = True, environment: Mapping[str, str] | None = None) -> str:
        """Run a command on the login node; returns what it printed."""
        program = 'hostname login; mount --bind "$0" /etc/hosts; exec "$@"'
        net = f"--net=/run/netns/{self._space(_LOGIN)}"
        inside = ["unshare", "--uts", "--mount", "bash", "-c", program, str(self.folder / f"hosts-{_LOGIN}"), *command]
        return self._call("nsenter", net, *inside, check=check, environment=environment)

    def sbatch(self, *arguments: str, **environment: str) -> str:
        """Submit a job; returns its number. The log is :meth:`log`."""
        output = ["--parsable", "--output", str(self.folder / "%j.log")]
        return self.login("sbatch", *output, *arguments, environment=environment).strip().partition(";")[0]

    def log(self, job: str) -> str:
        """What a job has printed."""
        path = self.folder / f"{job}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def field(self, job: str, name: str) -> str:
        """One field of ``scontrol show job``."""
        fields = self.login("scontrol", "-o", "show", "job", job).split()
        return next((each.partition("=")[2] for each in fields if each.startswith(f"{name}=")), "")

    def until(self, condition: Callable[[], bool], what: str, seconds: float, job: str = "") -> float:
        """Wait; returns for how long. Raises AssertionError with the job's log."""
        begun = time.monotonic()
        while not condition():
            assert time.monotonic() - begun < seconds, f"{what} was not seen in {seconds:.0f} s\n{self.log(job)}"
            time.sleep(0.1)
        return time.monotonic() - begun

    def until_state(self, job: str, *states: str, seconds: float = 900.0) -> float:
        """Wait until the job is in one of the states; returns for how long."""
        return self.until(lambda: self.field(job, "JobState") in states, "/".join(states), seconds, job)

    def start_now(self, job: str) -> None:
        """Let a requeued job start without SLURM's own two minutes."""
        self.until_state(job, "PENDING", seconds=120)
        self.login("scontrol", "update", f"JobId={job}", "StartTime=now")

    # -- inside ------------------------------------------------------------------------------------------------------

    def _space(self, name: str) -> str:
        return f"{self._name}-{name}"

    def _call(self, *command: str, check: bool = True, environment: Mapping[str, str] | None = None) -> str:
        of_call = self._environment | dict(environment or {})
        done = subprocess.run(command, capture_output=True, text=True, env=of_call, timeout=120)
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def _start(self, name: str, command: list[str]) -> None:
        program = 'hostname login; mount --bind "$0" /etc/hosts; exec "$@"'
        net = f"--net=/run/netns/{self._space(name)}"
        hosts = str(self.folder / f"hosts-{name}")
        self._spawn(name, ["nsenter", net, "unshare", "--uts", "--mount", "bash", "-c", program, hosts, *command])

    def _spawn(self, name: str, command: list[str]) -> None:
        with open(self.folder / f"{name}.out", "ab") as log:
            self._processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment, start_new_session=True
            )

    def _kill(self, name: str) -> None:
        process = self._processes.pop(name, None)
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _connect(self) -> None:
        login = self._space(_LOGIN)
        self._call("ip", "netns", "add", login)
        self._call("ip", "-n", login, "link", "set", "lo", "up")
        self._call("ip", "-n", login, "link", "add", "name", "br0", "type", "bridge")
        self._call("ip", "-n", login, "addr", "add", f"{_NETWORK}.254/24", "dev", "br0")
        self._call("ip", "-n", login, "link", "set", "br0", "up")
        for number, node in enumerate(self.names, 1):
            space = self._space(node)
            self._call("ip", "netns", "add", space)
            self._call("ip", "-n", space, "link", "set", "lo", "up")
            peer = ["peer", "name", f"to-{node}", "netns", login]
            self._call("ip", "-n", space, "link", "add", "name", "eth0", "type", "veth", *peer)
            self._call("ip", "-n", space, "addr", "add", f"{_NETWORK}.{number}/24", "dev", "eth0")
            self._call("ip", "-n", space, "link", "set", "eth0", "up")
            self._call("ip", "-n", login, "link", "set", f"to-{node}", "master", "br0")

    def _configure(self) -> None:
        folder = self.folder
        folder.chmod(0o755)
        (folder / "state").mkdir()
        settings = {
            "ClusterName": "test", "SlurmctldHost": f"{_LOGIN}({_NETWORK}.254)", "SlurmUser": "root",
            "SlurmdUser": "root", "AuthType": "auth/munge", "AuthInfo": f"socket={folder / 'munge/socket'}",
            "StateSaveLocation": folder / "state", "SlurmdSpoolDir": folder / "spool-%n",
            "SlurmctldPidFile": folder / "slurmctld.pid", "SlurmdPidFile": folder / "slurmd-%n.pid",
            "SlurmctldLogFile": folder / "slurmctld.log", "SlurmdLogFile": folder / "slurmd-%n.log",
            "ProctrackType": "proctrack/linuxproc", "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none", "MpiDefault": "none",
            "SlurmdParameters": "config_overrides", "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core", "SchedulerType": "sched/backfill", "ReturnToService": 2,
            "JobRequeue": 1, "SlurmdTimeout": 30, "SlurmctldTimeout": 30, "InactiveLimit": 0, "MinJobAge": 3600,
            "KillWait": 30, "Waittime": 0, "RebootProgram": "/bin/false",
            "SchedulerParameters": "batch_sched_delay=1,sched_interval=5,bf_interval=5",
        }  # fmt: skip
        lines = [f"{name}={value}" for name, value in settings.items()]
        if self._gpus:
            lines.append("GresTypes=gpu")
            pieces = [f"NodeName={node} Name=gpu File={folder}/gpu[0-{n - 1}]" for node, n in self._with_gpus() if n]
            (folder / "gres.conf").write_text("\n".join(pieces) + "\n")
            for number in range(max(self._gpus)):
                (folder / f"gpu{number}").touch()  # SLURM wants one file for each; nobody reads them
        for number, (node, gpus) in enumerate(self._with_gpus(), 1):
            gres = f" Gres=gpu:{gpus}" if gpus else ""
            address = f"NodeAddr={_NETWORK}.{number}"
            lines.append(f"NodeName={node} {address} CPUs=4 RealMemory=4000{gres} State=UNKNOWN")
        lines.append("PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        everyone = {_LOGIN: f"{_NETWORK}.254"} | {n: f"{_NETWORK}.{i}" for i, n in enumerate(self.names, 1)}
        for name in everyone:
            own = {name: "127.0.1.1"} if self._loopback and name != _LOGIN else {}
            hosts = "".join(f"{address} {host}\n" for host, address in (everyone | own).items())
            (folder / f"hosts-{name}").write_text(f"127.0.0.1 localhost\n{hosts}")

    def _with_gpus(self) -> list[tuple[str, int]]:
        gpus = list(self._gpus) + [0] * len(self.names)
        return list(zip(self.names, gpus, strict=False))


@contextmanager
def cluster(folder: Path, nodes: int, gpus: Sequence[int] = (), loopback: bool = False) -> Iterator[Cluster]:
    """A cluster that is up while the context lasts."""
    made = Cluster(folder, nodes, gpus, loopback)
    try:
        made.up()
        yield made
    finally:
        made.down()
