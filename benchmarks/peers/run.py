"""Forebay and its peers side by side, in one run.

    forebay bench peers [tabular] [embed] [text] [--rounds 3] [--seconds 4] [--only kserve --only ...]

Each round starts every server in turn, alone, checks its answers, warms it up, measures its doors,
and stops it; every other round goes backwards. A run that is cut off, or that stops by --budget,
goes on where it was when the command is given again (exit status 3: something is left). Results:
benchmarks/results/peers.{json,md} and plots.
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from benchmarks import common
from benchmarks.load import CallsFailed
from benchmarks.peers import bare, models, own, report
from benchmarks.peers.doors import Door
from benchmarks.peers.registry import PEERS
from benchmarks.peers.spec import Candidate, NotInstalled
from benchmarks.peers.state import State, commit
from benchmarks.peers.workloads import GROUPS, KINDS, MAKERS, Group, Workload
from benchmarks.processes import Processes

READY_S = 60.0
STATE = models.KEPT / "peers.jsonl"
#: Seconds beside the load itself that a server and a point take; only to keep a budget.
START_S, POINT_S = 12.0, 1.5
#: How a call fails that is not answered as it should be.
REFUSED = (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, grpc.RpcError)


class OutOfTime(Exception):
    """The next measurement would not end within the budget."""


@contextmanager
def started(candidate: Candidate) -> Iterator[tuple[Processes, dict[str, int], Path]]:
    """A candidate's processes, ports and folder; stopped at the end, its log kept if it failed."""
    with tempfile.TemporaryDirectory(dir=models.KEPT) as home:
        folder = Path(home)
        ports = {"grpc": common.free_port(), "http": common.free_port()}
        processes = candidate.start(ports, folder)
        try:
            yield processes, ports, folder
        finally:
            processes.stop()
            shutil.copy(folder / "log", models.KEPT / f"{candidate.label}.log")


@dataclasses.dataclass
class Runner:
    """One invocation: the state of the run, and when it must end."""

    state: State
    seconds: float
    warmup: float
    ends: float

    def _in_time(self, seconds: float) -> None:
        if time.monotonic() + seconds > self.ends:
            raise OutOfTime

    def round(self, number: int, group: Group, candidates: Sequence[Candidate]) -> None:
        """All candidates of a group, in turn; the bare model before and after Forebay."""
        workloads = MAKERS[group]()
        for at, candidate in enumerate(candidates):
            beside = candidate.role == "forebay"
            self._bare(number, group, f"before {candidate.name}", beside)
            try:
                self._measure(number, group, candidate, workloads)
            finally:
                _log(f"round {number} {group}: {at + 1} of {len(candidates)}")
            self._bare(number, group, f"after {candidate.name}", beside)

    def _bare(self, number: int, group: Group, when: str, wanted: bool) -> None:
        key = {"round": number, "group": group, "bare": when}
        if not wanted or self.state.has(**key):
            return
        self._in_time(6 * self.seconds / 2)
        self.state.add(**key, **bare.measure(group, self.seconds / 2))

    def _measure(
        self, number: int, group: Group, candidate: Candidate, workloads: Sequence[Workload]
    ) -> None:
        key = {"round": number, "group": group, "server": candidate.name}
        key["config"] = candidate.config
        if self.state.has(**key, end=True):
            return
        self._in_time(START_S + self.seconds + POINT_S)
        began = time.monotonic()
        with started(candidate) as (processes, ports, folder):
            doors = {w.name: candidate.doors(folder, w.name) for w in workloads}
            fault = _not_ready(processes, doors[workloads[0].name], ports, workloads[0])
            if fault:
                self.state.add(**key, end=True, fault=fault)
                _log(f"{candidate.label}: {fault}")
                return
            start_s = time.monotonic() - began
            idle = processes.memory_mb()
            for workload in workloads:
                for door in doors[workload.name]:
                    self._points(key, candidate, processes, workload, door, ports)
            loaded = processes.memory_mb()
            self.state.add(**key, end=True, start_s=start_s, idle_mb=idle, loaded_mb=loaded)

    def _points(
        self,
        key: dict[str, Any],
        candidate: Candidate,
        processes: Processes,
        workload: Workload,
        door: Door,
        ports: dict[str, int],
    ) -> None:
        """A door: answers checked, warmed up, then measured with each number of callers."""
        port = ports[door.transport]
        key = {**key, "role": candidate.role, "workload": workload.name, "door": door.name}
        left = [c for c in workload.callers if not self.state.has(**key, callers=c)]
        if not left:
            return
        wrong = _wrong(candidate, workload, door, port)
        if wrong:
            for callers in left:
                self.state.add(**key, callers=callers, fault=wrong)
            _log(f"{candidate.label}, {workload.name}, {door.name}: {wrong}")
            return
        seconds = self.seconds * workload.stretch
        self._in_time(self.warmup + seconds + POINT_S)
        try:
            door.load(port, workload.inputs, max(workload.callers), self.warmup)
            for callers in left:
                processes.settle()
                self._in_time(seconds + POINT_S)
                load = door.load(port, workload.inputs, callers, seconds, processes.cpu_seconds)
                self.state.add(**key, callers=callers, **dataclasses.asdict(load))
                _log(
                    f"{candidate.label}, {workload.name}, {door.name}, {callers} callers: "
                    f"{load.rps:.0f}/s, p50 {load.p50_ms:.2f}, p99 {load.p99_ms:.2f} ms, "
                    f"{load.server_cpu_us:.0f} us"
                )
            processes.settle()
        except CallsFailed as e:
            for callers in left:
                if not self.state.has(**key, callers=callers):
                    self.state.add(**key, callers=callers, fault=str(e)[:300])
            _log(f"{candidate.label}, {workload.name}, {door.name}: {e}")


def _said(error: Exception) -> str:
    details = error.details() if isinstance(error, grpc.Call) else str(error)
    return f"{type(error).__name__}: {str(details)[:300]}"


def _log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _not_ready(
    processes: Processes, doors: Sequence[Door], ports: dict[str, int], workload: Workload
) -> str:
    """Wait for the first answer of every door; why not, where it does not come."""
    until, last = time.monotonic() + READY_S, ""
    for door in doors:
        while True:
            if not processes.alive():
                return "it ended by itself"
            try:
                door.ask(ports[door.transport], workload.inputs[0], timeout=5)
                break
            except REFUSED as e:
                last = f"{door.name}: {_said(e)}"
            if time.monotonic() > until:
                return last
            time.sleep(0.2)
    return ""


def _wrong(candidate: Candidate, workload: Workload, door: Door, port: int) -> str:
    """The first wrong answer among the first inputs."""
    for i, value in enumerate(workload.inputs[:16]):
        try:
            got = door.ask(port, value)
        except REFUSED as e:
            return _said(e)
        if candidate.role == "limit":  # an echo
            fault = "" if (got.astype("float32") == value).all() else "not an echo"
        else:
            fault = workload.wrong(i, got, candidate.cosine)
        if fault:
            return f"answer {i}: {fault}"
    return ""


def candidates(group: Group, a: argparse.Namespace, state: State) -> list[Candidate]:
    """What is measured for a group. Peers that cannot be had are written down with the reason."""
    out: list[Candidate] = []
    absent: dict[str, str] = {}
    if group == "tabular" and _wanted("echo", a.only):
        try:
            out.append(own.echo())
        except NotInstalled as e:
            absent["Rust echo"] = str(e)
    if _wanted("forebay", a.only):
        out.append(own.forebay(group))
        if group == "embed" and (profile := _profile(a)):
            out.append(own.forebay(group, "forebay, default profile", profile, 0.97))
    if group in KINDS:
        kind = KINDS[group]
        folder = models.forest() if kind == "forest" else models.minilm()
        for peer in PEERS:
            if not _wanted(peer.name, a.only) or not peer.candidates(kind, folder):
                continue
            try:
                peer.install()
                out += peer.candidates(kind, folder, a.all_configs)
            except NotInstalled as e:
                absent[peer.name] = str(e)
        if kind == "minilm" and a.tei:
            from benchmarks.peers import tei

            out.append(tei.candidate(a.tei, folder))
    for name, why in absent.items():
        if not state.has(absent=name):
            state.add(absent=name, why=why)
    return out


def _profile(a: argparse.Namespace) -> str:
    return a.profile.read_text() if a.profile else own.default_profile()


def _wanted(name: str, only: list[str]) -> bool:
    return not only or name in only


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("forebay bench peers", description=__doc__.split("\n\n")[0])
    parser.add_argument("groups", nargs="*", help="tabular, embed, text; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of the shortest run of load")
    parser.add_argument("--warmup", type=float, default=2.0)
    parser.add_argument("--only", action="append", default=[], help="forebay, echo or a peer")
    parser.add_argument("--all-configs", action="store_true", help="those that lost, too")
    parser.add_argument(
        "--profile", type=Path, help="model.yaml of minilm's default profile; default: its own"
    )
    parser.add_argument("--tei", type=Path, help="binary of text-embeddings-inference's router")
    parser.add_argument("--budget", type=float, default=0.0, help="seconds; 0 = until all is done")
    parser.add_argument("--new", action="store_true", help="forget what was measured")
    parser.add_argument("--state", type=Path, default=STATE)
    parser.add_argument("--name", default="peers", help="of the results' files")
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="their folder")
    parser.add_argument(
        "--check", action="store_true", help="only start each server and check its answers"
    )
    parser.add_argument("--report", action="store_true", help="only write the results anew")
    parser.add_argument("--install", action="store_true", help="only make the peers' environments")
    a = parser.parse_args(argv)
    if unknown := set(a.groups) - set(GROUPS):
        parser.error(f"{unknown.pop()!r} is none of {', '.join(GROUPS)}")
    known = {"forebay", "echo", *(p.name for p in PEERS)}
    if unknown := set(a.only) - known:
        parser.error(f"{unknown.pop()!r} is none of {', '.join(sorted(known))}")
    return a


def check(groups: Sequence[Group], a: argparse.Namespace, state: State) -> int:
    """Start each server once and ask every door; no load. Gives how many fail."""
    faults = 0
    for group in groups:
        workloads = MAKERS[group]()
        for candidate in candidates(group, a, state):
            with started(candidate) as (processes, ports, folder):
                doors = {w.name: candidate.doors(folder, w.name) for w in workloads}
                fault = _not_ready(processes, doors[workloads[0].name], ports, workloads[0])
                found = [fault] if fault else []
                for workload in workloads if not fault else ():
                    for door in doors[workload.name]:
                        wrong = _wrong(candidate, workload, door, ports[door.transport])
                        found += [f"{workload.name}, {door.name}: {wrong}"] if wrong else []
            faults += bool(found)
            _log(f"{group}, {candidate.label}: {'; '.join(found) or 'right'}")
    return faults


def install() -> int:
    """Make every peer's environment; say what cannot be had."""
    status = 0
    for peer in PEERS:
        try:
            peer.install()
            print(f"{peer.name}: ready")
        except NotInstalled as e:
            print(f"{peer.name}: {e}")
            status = 1
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is left, write the results."""
    a = arguments(argv)
    # A run that is cut off takes its server with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if a.install:
        return install()
    if a.report:
        report.write(State.read(a.state), a.name, a.results)
        return 0
    ends = time.monotonic() + (a.budget or 1e9)
    facts = {
        "machine": {k: v for k, v in common.machine().items() if k != "date"},
        "commit": commit(),
        "seconds": a.seconds,
        "warmup": a.warmup,
        "default_profile": _profile(a),
    }
    models.KEPT.mkdir(parents=True, exist_ok=True)
    try:
        state = State.open(a.state, facts, a.new)
    except ValueError as e:
        print(e, file=sys.stderr)
        return 2
    if a.check:
        return 1 if check(a.groups or GROUPS, a, state) else 0
    runner = Runner(state, a.seconds, a.warmup, ends)
    status = 0
    try:
        for number in range(a.rounds):
            for group in a.groups or GROUPS:
                found = candidates(group, a, state)
                runner.round(number, group, found[:: -1 if number % 2 else 1])
    except OutOfTime:
        print("The time is up: the same command goes on from here.")
        status = 3
    report.write(state, a.name, a.results)
    return status


if __name__ == "__main__":
    sys.exit(main())
