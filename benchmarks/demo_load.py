"""Many visitors of the Gradio demo at once: errors, wrong answers, waiting times and the server's memory.

Each user uploads a picture of its own, over and over, and checks that scores and sums are those of that picture.

    python benchmarks/demo_load.py --users 50 --seconds 60
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import psutil
import torch
from common import RESULTS, write_result
from PIL import Image
from transformers import pipeline

from hf_shapley import TASK, train_digits_model

APP = Path(__file__).parents[1] / "examples" / "gradio_demo" / "app.py"
EDGE = 64  # pixels


def pictures(folder: Path, count: int) -> list[Path]:
    """Noise, different for each user."""
    paths = []
    for user in range(count):
        generator = torch.Generator().manual_seed(user)
        pixels = torch.randint(0, 256, (EDGE, EDGE), generator=generator, dtype=torch.uint8)
        paths.append(folder / f"{user}.png")
        Image.fromarray(pixels.numpy()).save(paths[-1])
    return paths


def summary(entries: list[dict]) -> tuple[dict[str, float], str]:
    """What the demo has to show for a picture: scores of the five likeliest labels, and the sum of the first map."""
    best = entries[0]
    return {e["label"]: e["score"] for e in entries[:5]}, f"{best['attributions'].sum():+.2f}"


class User(threading.Thread):
    """Asks for the same picture until the time is up."""

    def __init__(self, url: str, path: Path, expected: tuple[dict[str, float], str], deadline: list[float]):
        super().__init__(daemon=True)
        self.url, self.path, self.expected, self.deadline = url, path, expected, deadline
        self.waits: list[float] = []
        self.errors: list[str] = []
        self.wrong = 0

    def run(self) -> None:
        from gradio_client import Client, handle_file

        try:
            client = Client(self.url, verbose=False, download_files=False, analytics_enabled=False)
            while not self.waits or time.monotonic() < self.deadline[0]:
                start = time.monotonic()
                answer = client.predict(handle_file(str(self.path)), api_name="/explain")
                self.waits.append(time.monotonic() - start)
                self.wrong += not self.is_right(answer)
        except Exception as error:  # of any kind: the number of users that met one is the result
            self.errors.append(f"{type(error).__name__}: {error}"[:300])

    def is_right(self, answer: tuple) -> bool:
        scores, total = self.expected
        (found,) = [part for part in answer if isinstance(part, dict) and "confidences" in part]
        shown = {entry["label"]: entry["confidence"] for entry in found["confidences"]}
        titles = [part for part in answer if isinstance(part, str) and "sum " in part]
        near = shown.keys() == scores.keys() and all(abs(shown[label] - scores[label]) < 1e-3 for label in scores)
        return near and re.search(r"sum ([+-][\d.]+)", titles[0]).group(1) == total


def serve(model: Path, log: Path) -> tuple[subprocess.Popen, str]:
    """The demo in a process of its own, and its address."""
    environment = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(log.parent / "uploads")}
    with open(log, "w") as stream:
        command = [sys.executable, "-u", str(APP), "--model", str(model)]
        server = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
    for _ in range(1200):
        if found := re.search(r"http://[\d.]+:\d+", log.read_text()):
            return server, found.group()
        if server.poll() is not None:
            break
        time.sleep(0.1)
    raise RuntimeError(f"The demo does not answer:\n{log.read_text()[-2000:]}")


def run(users: int, seconds: float, epochs: float = 2) -> dict:
    """Let `users` visitors ask at once for so many seconds; what they met, and the server's memory in MiB."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, image_processor = train_digits_model(epochs=epochs)
        classifier = pipeline(TASK, model=model, image_processor=image_processor, device="cpu")
        classifier.save_pretrained(folder / "model")
        paths = pictures(folder, users)
        expected = [summary(classifier(str(path), top_k=10)) for path in paths]
        server, url = serve(folder / "model", folder / "log")
        try:
            deadline = [time.monotonic() + 600.0]
            crowd = [User(url, *mine, deadline) for mine in zip(paths, expected, strict=True)]
            memory = visit(crowd, psutil.Process(server.pid), deadline, seconds)
        finally:
            server.terminate()
            server.wait(timeout=30)
        log = (folder / "log").read_text()
    waits = sorted(wait for user in crowd for wait in user.waits)
    return {
        "users": users,
        "seconds": seconds,
        "answers": len(waits),
        "answers_per_user": [min(len(u.waits) for u in crowd), max(len(u.waits) for u in crowd)],
        "different_answers_expected": len({repr(answer) for answer in expected}),
        "wrong_answers": sum(user.wrong for user in crowd),
        "errors": [error for user in crowd for error in user.errors],
        "errors_in_log": log.count("Traceback"),
        "wait_seconds": {"median": round(statistics.median(waits), 3), "longest": round(waits[-1], 3)}
        if waits
        else None,
        "server_memory_mib": memory,
    }


def visit(crowd: list[User], server: psutil.Process, deadline: list[float], seconds: float) -> list[float]:
    """The time runs once everybody has had an answer; memory is read ten times from then on."""
    for user in crowd:
        user.start()
    while not all(user.waits or user.errors for user in crowd):
        time.sleep(0.2)
    start = time.monotonic()
    deadline[0] = start + seconds
    memory = []
    for step in range(11):
        time.sleep(max(0.0, start + seconds * step / 10 - time.monotonic()))
        memory.append(round(server.memory_info().rss / 2**20, 1))
    for user in crowd:
        user.join(timeout=120)
    return memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--output", default=RESULTS / "demo_load.json")
    args = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gradio's own
        result = run(args.users, args.seconds)
    print({name: result[name] for name in ("answers", "wrong_answers", "errors", "wait_seconds", "server_memory_mib")})
    write_result(args.output, result)
    if result["errors"] or result["errors_in_log"] or result["wrong_answers"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
