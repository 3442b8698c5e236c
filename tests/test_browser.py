"""Which browser the tests drive, and what they do without one."""

import time

import browser
import pytest


@pytest.fixture(autouse=True)
def bare_machine(tmp_path, monkeypatch):
    """No browser but those that a test puts on PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(browser, "PLACES", [])
    monkeypatch.setattr(browser, "playwrights_own", lambda: None)
    monkeypatch.delenv("HF_SHAPLEY_BROWSER_REQUIRED", raising=False)


def program(path, text="exit 0"):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("name", ["chromium", "google-chrome"])
def test_a_browser_on_the_path_is_used(tmp_path, name):
    """Chromium or Chrome, whichever the machine has."""
    path = program(tmp_path / name)
    assert browser.find_browser() == path


def test_a_browser_that_cannot_start_is_passed_over(tmp_path, monkeypatch):
    """What only names a snap, or lacks a library, does not hide another that works; Playwright's own comes last."""
    program(tmp_path / "chromium", "echo install the snap >&2; exit 1")
    monkeypatch.setattr(browser, "playwrights_own", lambda: "playwright's")
    assert browser.find_browser() == "playwright's"
    path = program(tmp_path / "chrome")
    assert browser.find_browser() == path


def test_without_a_browser_only_ci_fails(monkeypatch):
    """A test that finds none skips and says what to do; where a browser is required it fails."""
    with pytest.raises(pytest.skip.Exception, match="put one on PATH"):
        browser.found_browser()
    monkeypatch.setenv("HF_SHAPLEY_BROWSER_REQUIRED", "1")
    with pytest.raises(pytest.fail.Exception, match="put one on PATH"):
        browser.found_browser()


@pytest.mark.parametrize("required", [False, True])
def test_what_cannot_be_installed_is_one_line(required, monkeypatch, capfd):
    """The set-up says in one line that there is no browser, whatever the tools that it tried would print."""
    failing = ["/bin/sh", "-c", "echo much; echo more >&2; exit 1"]
    monkeypatch.setattr(browser, "install_playwrights_own", lambda: browser.succeeds(failing, seconds=10))
    monkeypatch.setattr(browser, "install_debians", lambda: False)
    if required:
        monkeypatch.setenv("HF_SHAPLEY_BROWSER_REQUIRED", "1")
        with pytest.raises(SystemExit, match="1"):
            browser.main()
    else:
        browser.main()
    output = capfd.readouterr()
    assert output.err == ""
    assert output.out.count("No Chromium could be downloaded") == 1 and len(output.out.splitlines()) <= 2


def test_the_first_that_can_be_installed_is_enough(tmp_path, monkeypatch):
    """Debian's package is not asked for where Playwright's own came."""
    monkeypatch.setattr(browser, "install_playwrights_own", lambda: bool(program(tmp_path / "chromium")))
    monkeypatch.setattr(browser, "install_debians", lambda: pytest.fail("Playwright's was there"))
    browser.main()


def test_a_download_that_hangs_is_stopped(tmp_path):
    """So are the programs that it started, and nothing waits for them."""
    child = tmp_path / "child"
    start = time.monotonic()
    assert not browser.succeeds(["/bin/sh", "-c", f"/bin/sleep 60 & echo $! >{child}; wait"], seconds=0.5)
    assert time.monotonic() - start < 10
    pid = int(child.read_text())
    for _ in range(100):
        state = next((line for line in status(pid) if line.startswith("State:")), "State: Z")
        if "Z" in state:  # ended; whether its new parent has asked for it yet is no matter
            return
        time.sleep(0.1)
    raise AssertionError("What the command started still runs.")


def status(pid):
    try:
        with open(f"/proc/{pid}/status") as file:
            return file.read().splitlines()
    except FileNotFoundError:
        return []
