"""PEFT's own tests on PEQA and LREC, and on PEFT's LoRA over the same GPTQ models as the yardstick.

The tests come from PEFT's source distribution, of the installed version. Fails if a test of ours fails that
`expected.txt` does not list, or if one passes that it lists.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from expected import expected_failures


HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache" / "conformance"
Outcomes = dict[str, tuple[str, str | None]]
"""By test id: passed, failed or skipped, and the reason of an expected failure."""

METHODS = {"lora": "LoRA on GPTQ", "peqa": "PEQA", "lrec": "LREC"}
FILES = (
    "test_custom_models",
    "test_decoder_models",
    "test_config",
    "test_low_level_api",
    "test_tuners_utils",
    "test_initialization",
)
PACKAGES = ("peft", "transformers", "torch", "gptqmodel")


def unpack_peft() -> Path:
    """PEFT's source distribution, downloaded once, with stand-ins for the models its tests download."""
    name = f"peft-{version('peft')}"
    source = CACHE / name
    if not (source / "models").exists():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--no-build-isolation", "-d", CACHE, name.replace("-", "==")], check=True)
        with tarfile.open(CACHE / f"{name}.tar.gz") as archive:
            archive.extractall(CACHE, filter="data")
        (source / "tests" / "__init__.py").touch()
        make_models = "import pathlib, stand_ins; stand_ins.save_models(pathlib.Path('new'))"
        subprocess.run([sys.executable, "-c", make_models], cwd=source, env=environment(), check=True)
        (source / "new" / "models").rename(source / "models")
    return source


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent / "helpers")]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHDYNAMO_DISABLE": "1",  # gptqmodel compiles every layer at its first forward
        "GPTQMODEL_DISABLE_PACK_EXT": "1",
        "GPTQMODEL_DISABLE_GIL_WARNING": "1",
    }


def run_tests(source: Path, method: str, arguments: list[str]) -> Outcomes:
    outcomes = source / f"{method}.json"
    outcomes.unlink(missing_ok=True)
    files = [] if any(argument.startswith("tests/") for argument in arguments) else [f"tests/{f}.py" for f in FILES]
    options = ["-p", "peft_conformance", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings="]
    options += ["-q", "--disable-warnings", f"--method={method}", f"--outcomes={outcomes}"]
    options += ["--tb=no", "-rN"] if method == "lora" else ["--tb=short", "-rfE"]
    print(f"\n{METHODS[method]}", flush=True)
    pytest = [sys.executable, "-m", "pytest", *options, *files, *arguments]
    subprocess.run(pytest, cwd=source, env=environment(), check=False)
    return json.loads(outcomes.read_text(encoding="utf-8"))


def table(results: dict[str, Outcomes]) -> str:
    lines = [f"| passed / failed / skipped | {' | '.join(METHODS[method] for method in results)} |"]
    lines.append("|---" * (len(results) + 1) + "|")
    for file in [*FILES, ""]:
        cells = []
        for outcomes in results.values():
            counts = Counter(what for test, (what, _) in outcomes.items() if test.startswith(f"tests/{file}"))
            cells.append(" / ".join(str(counts[what]) for what in ("passed", "failed", "skipped")))
        lines.append(f"| {file or 'all'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def common_id(test: str) -> str:
    """A test's id without what differs between methods."""
    return re.sub(r"(LREC|PEQA|Lora)Config(-config_kwargs\w+)?|-(lora|lrec|peqa)-", "-", test)


def behind_lora(results: dict[str, Outcomes], method: str) -> Counter[tuple[str, str]]:
    """How many tests LoRA passes and the method fails, by name and reason."""
    passed = {common_id(test) for test, (what, _) in results["lora"].items() if what == "passed"}
    return Counter(
        (test.rpartition("::")[2].partition("[")[0], reason or "not expected")
        for test, (what, reason) in results[method].items()
        if what == "failed" and common_id(test) in passed
    )


def complaints(outcomes: Outcomes, method: str) -> list[str]:
    """What makes the run fail."""
    found = [test for test, (what, reason) in outcomes.items() if what == "failed" and not reason]
    failed = [test for test, (what, _) in outcomes.items() if what == "failed"]
    for pattern, reason in expected_failures(method):
        if not reason.startswith("rounding") and not any(re.search(pattern, test) for test in failed):
            found.append(f"{pattern} is in expected.txt, but nothing it names failed")
    return [f"{METHODS[method]}: {complaint}" for complaint in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog="Further arguments go to pytest.")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options, arguments = parser.parse_known_args()
    source = unpack_peft()
    results = {method: run_tests(source, method, arguments) for method in options.methods}

    print("\n" + ", ".join(f"{package} {version(package)}" for package in PACKAGES) + "\n")
    print(table(results))
    ours = [method for method in results if method != "lora"]
    if "lora" in results:
        for method in ours:
            print(f"\nLoRA passes, {METHODS[method]} fails:")
            for (name, reason), count in sorted(behind_lora(results, method).items()):
                print(f"  {count:3} {name}: {reason}")
    found = [complaint for method in ours for complaint in complaints(results[method], method)]
    print("\n" + "\n".join(found or ["All as expected."]))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
