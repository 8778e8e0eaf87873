"""Runs many command lines that a generator makes up, each of which must end well: run by test_fuzz.py in a process of its own.

    python tests/support/fuzz.py SEED COUNT CHECKPOINT FOLDER

Ends well: exit code 0, or 2 with one line on the error stream that begins with "error: ". Memory is limited, and so is the time
of each command. Training itself is left out: what is tried is everything before its first step.
"""

import argparse
import contextlib
import importlib
import io
import os
import random
import re
import resource
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

COMMANDS = ("pretrain", "pretrain", "pretrain", "finetune", "export", "probe", "visualize", "report")
LIMIT_S, LIMIT_BYTES = 60, 4 * 2**30

NUMBERS = (
    "0",
    "1",
    "2",
    "-1",
    "3",
    "64",
    "0.5",
    "1e-9",
    "-0.0",
    "nan",
    "inf",
    "-inf",
    "1e308",
    "1e400",
    "9" * 30,
    "-" + "9" * 25,
    "2147483648",
    "9223372036854775807",
    "0x10",
    "1_000",
    "½",
    "٣",
    "",
    " ",
    "1e",
    "--",
    "1,5",
)
WORDS = (
    "",
    " ",
    "auto",
    "none",
    "x" * 5000,
    "a b",
    "ünï-côde",
    "../..",
    "$(id)",
    "%s%n",
    "{}",
    "{0..3}",
    "a:b",
    ":",
    "os:system",
    "builtins:open",
    "timm:",
    "timm:nothing",
    "resnet18",
    "*",
    "-",
    "sys:exit",
    "\udcff",
    "a\nb",
    "random",
    "cpu",
    "cuda:99",
)


def make_paths(folder: Path, checkpoint: Path) -> list[str]:
    """Files and folders of every kind that may be named by mistake."""
    folder.mkdir(parents=True)
    content = checkpoint.read_bytes()
    rng = random.Random(0)
    (folder / "cut.pt").write_bytes(content[: len(content) // 3])
    flipped = bytearray(content)
    for _ in range(50):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    (folder / "flipped.pt").write_bytes(flipped)
    torch.save({"a": torch.ones(3)}, folder / "other.pth")
    torch.save([1, 2], folder / "list.pt")
    (folder / "garbage.pt").write_bytes(rng.randbytes(3000))
    (folder / "garbage.safetensors").write_bytes(b"\xff" * 8 + b"{}")
    (folder / "empty.pt").write_bytes(b"")
    (folder / "huge.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    (folder / "list.txt").write_text("a.png\n/etc/passwd\n../x\n")
    (folder / "table.csv").write_text('path,label\n"a,b\n')
    (folder / "data.parquet").write_bytes(b"PAR1" + rng.randbytes(100) + b"PAR1")
    (folder / "shard.tar").write_bytes(rng.randbytes(2000))
    (folder / "shard.tar.gz").write_bytes(b"\x1f\x8b" + rng.randbytes(200))
    (folder / "images").mkdir()
    for i in range(3):
        (folder / "images" / f"{i}.png").write_bytes(rng.randbytes(100))
    (folder / "nothing").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "loop").symlink_to(folder / "loop")
    run = folder / "run"
    run.mkdir()
    for name in ("config.json", "metrics.jsonl", "notes.jsonl"):
        (run / name).write_bytes(rng.randbytes(500))
    found = [str(path) for path in sorted(folder.iterdir())]
    devices = ["/dev/null", "/dev/zero", "/dev/full", "/proc/self/mem", "/proc/self/environ", "/etc/passwd", "~", "."]
    return [
        str(checkpoint),
        str(checkpoint),
        str(checkpoint.parent.parent),
        *found,
        *devices,
        str(folder / "new"),
        "/proc/none",
    ]


def options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [a for a in parser._actions if a.option_strings and a.dest not in ("help", "watch", "push_to_hub", "wandb")]


def make_line(
    rng: random.Random, command: str, parser: argparse.ArgumentParser, paths: list[str], checkpoint: str
) -> list[str]:
    """A command line of which a few words are odd."""
    words: list[str] = []
    if command == "pretrain":
        words += [
            "--model",
            "resnet18",
            "--input-size",
            "64",
            "--decoder-width",
            "32",
            "--device",
            "cpu",
            "--output",
            paths[-2],
        ]
    elif command == "report":
        words += rng.choices(paths, k=rng.choice((1, 1, 2)))
    else:
        words.append(rng.choice((checkpoint, checkpoint, rng.choice(paths))))
        if command in ("finetune", "probe"):
            words += ["--data", rng.choice((*paths[3:], *paths))]
    for action in rng.sample(options(parser), min(len(options(parser)), rng.choice((1, 1, 2, 3)))):
        words.append(rng.choice(action.option_strings))
        count = 0 if action.nargs == 0 else rng.choice((1, 1, 1, 1, 0, 2, 3))
        for _ in range(count):
            pool: Any = rng.choice(
                (NUMBERS, NUMBERS, WORDS, paths) if action.type in (int, float) else (WORDS, paths, paths, NUMBERS)
            )
            pool = [*action.choices] if action.choices and rng.random() < 0.5 else pool
            words.append(rng.choice(pool))
    if rng.random() < 0.05:
        rng.shuffle(words)
    return [word for word in words if "\0" not in word]


def ends_well(command: str, words: list[str]) -> tuple[int | None, str]:
    """Runs a command. Returns its exit code, and what is wrong with how it ended, or nothing."""
    module = importlib.import_module(f"sparkme.{command}")
    out, err = io.StringIO(), io.StringIO()
    signal.alarm(LIMIT_S)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = module.main(list(words))
            except SystemExit as error:
                code = error.code
    except BaseException:
        return None, traceback.format_exc()
    finally:
        signal.alarm(0)
    lines = err.getvalue().strip().splitlines()
    if code == 2:
        errors = [line for line in lines if line.startswith("error: ")]
        well = len(errors) == 1 and lines[-1] == errors[0]
        return 2, "" if well else f"exit code 2 and these lines: {lines[-5:]}"
    return (0, "") if code in (0, None) else (None, f"exit code {code}: {lines[-5:]}")


def too_long(number: int, frame: object) -> None:
    raise TimeoutError(f"it took longer than {LIMIT_S} s")


def main() -> int:
    from sparkme.training.loop import Loop

    seed, count, checkpoint, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
    paths = make_paths(folder, checkpoint)
    os.chdir(folder / "nothing")
    Loop.run = lambda self: 0  # type: ignore[method-assign]
    signal.signal(signal.SIGALRM, too_long)
    parsers = {}
    for command in dict.fromkeys(COMMANDS):
        module = importlib.import_module(f"sparkme.{command}")
        parsers[command] = module.create_parser()
    used = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
    resource.setrlimit(resource.RLIMIT_DATA, (used + LIMIT_BYTES, used + LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**28, 2**28))
    rng, bad, accepted = random.Random(seed), 0, 0
    for i in range(count):
        command = COMMANDS[i % len(COMMANDS)]
        words = make_line(rng, command, parsers[command], paths, str(checkpoint))
        code, problem = ends_well(command, words)
        accepted += code == 0
        if problem:
            bad += 1
            shown = [word if len(word) < 60 else word[:50] + "..." for word in words]
            print(f"line {i}: {command} {shown}\n{problem}\n", flush=True)
        shutil.rmtree(folder / "new", ignore_errors=True)
    print(f"{count} command lines: {accepted} accepted, {count - accepted - bad} refused, {bad} ended badly")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
