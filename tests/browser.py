"""The browser that tests drive: a Chromium or Chrome of the machine's. As a script, gets one where there is none."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
# Of macOS.
NAMES += ["Chromium", "Google Chrome"]
# Where they are without being on PATH.
PLACES = [
    "/usr/bin",
    "/usr/local/bin",
    "/snap/bin",
    "/opt/google/chrome",
    "/Applications/Chromium.app/Contents/MacOS",
    "/Applications/Google Chrome.app/Contents/MacOS",
]
MISSING = "The browser tests need a Chromium or Chrome that starts: put one on PATH, or run `make test` once."
# A server that never answers must not hold the tests up for longer.
SECONDS_TO_DOWNLOAD = 300


def is_required() -> bool:
    """Whether tests must fail for want of a browser, not skip: continuous integration says so."""
    return bool(os.environ.get("HF_SHAPLEY_BROWSER_REQUIRED"))


def found_browser() -> str:
    """As `find_browser`, for a test: where there is none it skips, or fails where it must not."""
    path = find_browser()
    if path is None:
        (pytest.fail if is_required() else pytest.skip)(MISSING)
    return path


def find_browser() -> str | None:
    """Path of a browser that starts: one on PATH, one in the usual places, or Playwright's own."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *PLACES])
    found = filter(None, (shutil.which(name, path=path) for name in NAMES))
    return next(filter(starts, found), None) or playwrights_own()


def playwrights_own() -> str | None:
    """Path of the Chromium that `playwright install` has put where Playwright looks for it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        path = driver.chromium.executable_path
    return path if starts(path) else None


def starts(path: str) -> bool:
    """Whether it runs: Playwright's may lack libraries, and Ubuntu's /usr/bin/chromium-browser only names a snap."""
    return succeeds([path, "--version"], seconds=60)


def succeeds(command: list[str], seconds: float) -> bool:
    """Run a command without a word; it and what it started are killed when the time is over."""
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    try:
        process = subprocess.Popen(command, start_new_session=True, **quiet)
    except OSError:
        return False
    try:
        return process.wait(timeout=seconds) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def install_playwrights_own() -> bool:
    """Download Playwright's Chromium into the user's cache."""
    command = [sys.executable, "-m", "playwright", "install", "--no-shell", "chromium"]
    return succeeds(command, SECONDS_TO_DOWNLOAD)


def install_debians() -> bool:
    """Install Debian's package, which brings the libraries it needs; only root can."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return False
    apt = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120"]
    succeeds([*apt, "update"], SECONDS_TO_DOWNLOAD)  # where one source fails, another may still have the package
    return succeeds([*apt, "install", "-y", "--no-install-recommends", "chromium"], 2 * SECONDS_TO_DOWNLOAD)


def main() -> None:
    """Find a browser or install one; where that is impossible say so, and fail where tests must not skip."""
    if find_browser():
        return
    print("The browser tests need Chromium, which this machine lacks: installing it.", flush=True)
    if not any(install() and find_browser() for install in (install_playwrights_own, install_debians)):
        fate = "fail" if is_required() else "are skipped"
        print(f"No Chromium could be downloaded, nor Debian's package installed: the browser tests {fate}.")
        if is_required():
            sys.exit(1)


if __name__ == "__main__":
    main()
