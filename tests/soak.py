"""Runs of the tiny preset whose processes are killed, stopped, made to fail and slowed down, by a seeded schedule.

    python -m tests.soak --faults 100 --parallel 4 --out soak.json
    python -m tests.soak --table --out soak.json

Every run has faults of its own, from its seed. Some runs have several nodes, in this machine's network or each in a
namespace of its own, a small disk, or vLLM as the teacher. Asserted of each: it completes, every trajectory is trained
exactly once, none is older than the staleness bound, memory and file handles of its processes do not grow, and at
staleness 0 the final weights equal those of a run without faults, bit for bit (on a CPU, the transformers teacher
reading one sequence a call). Results go into the JSON file after every run; the same command goes on from there until
there are as many faults as asked for.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests import soak_plan
from tests.soak_driver import drive
from tests.soak_network import networks_allowed
from tests.soak_plan import GROWTH_HANDLES, GROWTH_MIB, Plan, plan_of
from tests.soak_run import SoakRun


def soak(faults: int, parallel: int, out: Path, first_seed: int, work: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"runs": [], "reference": None}
    lock = threading.Lock()

    privileged = networks_allowed()

    def one(plan: Plan) -> dict[str, Any]:
        folder = work / f"seed-{plan.seed}"
        shutil.rmtree(folder, ignore_errors=True)
        result = SoakRun(plan, folder).run()
        whole = result["completed"] and not (result["lost"] or result["doubled"] or result["unbounded_wait"])
        if whole and result["starts"] < 8:
            shutil.rmtree(folder)
        return result

    def work_off() -> None:
        while True:
            with lock:
                under_way = sum(len(r["faults"]) for r in results["runs"]) + soak_plan.FAULTS * len(begun - finished)
                if under_way >= faults:
                    return
                seed = max([first_seed - 1, *(r["seed"] for r in results["runs"]), *begun]) + 1
                begun.add(seed)
            result = one(plan_of(seed, privileged))
            if not result["completed"] and not result["faults"]:
                log = (work / f"seed-{seed}" / "log").read_text()[-2000:]
                raise RuntimeError(f"the run of seed {seed} did not get anywhere:\n{log}")
            with lock:
                finished.add(seed)
                results["runs"].append(result)
                if reference and reference.done():
                    results["reference"] = reference.result()
                summarize(results)
                write(results, out)
                print(_line(result), flush=True)

    begun: set[int] = set()
    finished: set[int] = set()
    with ThreadPoolExecutor(parallel + 1) as pool:
        reference = None if results["reference"] else pool.submit(one, Plan(-1, "", 0, 1, []))
        list(pool.map(lambda _: work_off(), range(parallel)))
        if reference:
            results["reference"] = reference.result()
    summarize(results)
    write(results, out)
    return results


def write(results: dict[str, Any], out: Path) -> None:
    """As JSON with a line for each run."""
    runs = ",\n  ".join(json.dumps(run) for run in results["runs"])
    facts = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in results.items() if name != "runs"]
    out.write_text("{\n" + ",\n".join([*facts, f' "runs": [\n  {runs}\n ]']) + "\n}\n")


def summarize(results: dict[str, Any]) -> None:
    runs, reference = results["runs"], (results["reference"] or {}).get("weights")
    exact = [r for r in runs if r["staleness"] == 0 and r.get("backend") != "vllm"]
    same = [r for r in exact if not r["set_aside"] and r["completed"]]
    measured = [(role, more) for r in runs for role, more in r.get("growth", {}).items()]
    growth: dict[str, list[float]] = {}
    for role, more in measured:
        growth[role] = [max(pair) for pair in zip(more, growth.get(role, more), strict=True)]
    results |= {
        "faults": sum(len(r["faults"]) for r in runs),
        "completed_runs": sum(r["completed"] for r in runs),
        "all_runs": len(runs),
        "lost_ordinals": sum(r["lost"] for r in runs),
        "doubled_ordinals": sum(r["doubled"] for r in runs),
        "too_old": sum(r["too_old"] for r in runs),
        "unbounded_waits": sum(r["unbounded_wait"] for r in runs),
        "faults_with_vllm": sum(len(r["faults"]) for r in runs if r.get("backend") == "vllm"),
        "growth": growth,
        "growth_allowed": [GROWTH_MIB, GROWTH_HANDLES],
        "grown": sum(more[0] > GROWTH_MIB or more[1] > GROWTH_HANDLES for _, more in measured),
        "set_aside_runs": sum(bool(r["set_aside"]) for r in runs),
        "compared_runs": len(same) if reference else 0,
        "bit_equal_runs": sum(r["weights"] == reference for r in same) if reference else 0,
    }


def _line(result: dict[str, Any]) -> str:
    faults = ", ".join(
        f"{f['kind']} {f['role']} while {f['phase']}" + (f" {f['seconds']:.0f} s" if f["seconds"] else "")
        for f in result["faults"]
    )
    state = "completed" if result["completed"] else "NOT completed"
    return (
        f"seed {result['seed']} {result['special']}: {state} in {result['seconds']:.0f} s, staleness "
        f"{result['staleness']}, lost {result['lost']}, doubled {result['doubled']}, starts {result['starts']}; "
        f"{faults}"
    )


def table(results: dict[str, Any]) -> str:
    """Markdown: fault, role and phase; how often, and the seconds to its repair. A fault without seconds needed none:
    nothing was replaced."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for run in results["runs"]:
        for f in run["faults"]:
            groups.setdefault((f["kind"], f["role"], f["phase"]), []).append(f)
    lines = [
        "| fault | role | phase | tried | replaced | median s | worst s | batches again | rollouts again |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (kind, role, phase), faults in sorted(groups.items()):
        known = [f["seconds"] for f in faults if f["seconds"] is not None]
        median, worst = (f"{statistics.median(known):.0f}", f"{max(known):.0f}") if known else ("", "")
        counted = [f for f in faults if "rollouts_again" in f]
        again = [f"{max(f[name] for f in counted)}" if counted else "" for name in ("batches_again", "rollouts_again")]
        cells = [kind, role, phase, str(len(faults)), str(len(known)), median, worst, *again]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["drive"]:
        drive(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100, help="in all, with those in the file")
    parser.add_argument("--parallel", type=int, default=2, help="runs at the same time; each has about 7 processes")
    parser.add_argument("--out", type=Path, default=Path("soak.json"))
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    parser.add_argument("--work", type=Path, help="folder for the runs; default: a temporary one")
    parser.add_argument("--table", action="store_true", help="print the table of the file, and run nothing")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.out.read_text())))
        return
    work = options.work or Path(tempfile.mkdtemp(prefix="soak-"))
    results = soak(options.faults, options.parallel, options.out, options.seed, work)
    print(table(results))
    print(json.dumps({name: value for name, value in results.items() if name not in ("runs", "reference")}))
    bad = sum(results[name] for name in ("lost_ordinals", "doubled_ordinals", "unbounded_waits", "too_old", "grown"))
    unequal = results["bit_equal_runs"] < results["compared_runs"]
    sys.exit(bool(bad or unequal or results["completed_runs"] < results["all_runs"]))


if __name__ == "__main__":
    main()
