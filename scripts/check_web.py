"""Try the page of `peftchat web` in a headless Chromium, as a user does, and take its pictures.

    pip install 'peftchat[web]' selenium      # and Chromium with its driver (Debian: chromium chromium-driver)
    python scripts/check_web.py runs/assistant runs/other BASE --pictures docs/pictures

The first model has to answer a short question within three minutes. What is checked: streaming, stop, retry, undo,
editing an answer, tags in text, keeping, tokens, branches, two hidden models and a vote, phone width, keyboard only,
the password page, axe-core, no request to another host, no error in the browser's console.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

QUESTION = "How do I boil an egg?"
PASSWORD = "an egg takes seven minutes"
LONG = "Write a long story about a fox who learns to sail."
MARKUP = "What does <b>bold</b> or <div hidden>this</div> mean? ![p](http://elsewhere.example/p.png)"


class Browser:
    """A headless Chromium with what it logs."""

    def __init__(self, url: str, ready: str = "#question textarea") -> None:
        options = webdriver.ChromeOptions()
        for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
            options.add_argument(flag)
        options.add_argument("--window-size=1280,1000")
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        self.url = url
        self.driver.get(url)
        self.until(lambda: self.find(ready), "the page")

    def find(self, selector: str) -> Any:
        return next(iter(self.driver.find_elements(By.CSS_SELECTOR, selector)), None)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        found = self.find(selector)
        return found.text if found else ""

    def click(self, selector: str, place: int = 0) -> None:
        self.until(lambda: self.all(selector)[place].is_enabled(), selector)
        found = self.all(selector)[place]
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
        found.click()

    def type(self, selector: str, text: str) -> None:
        self.find(selector).send_keys(text)

    def until(self, holds: Callable[[], Any], what: str, seconds: float = 120) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(WebDriverException, AttributeError, IndexError):
                if found := holds():
                    return found
                if self.all("span.error"):
                    break
            time.sleep(0.05)
        self.driver.save_screenshot("check_web_failed.png")
        raise SystemExit(f"waited in vain for {what}; see check_web_failed.png")

    def picture(self, path: Path) -> None:
        time.sleep(0.5)
        self.driver.save_screenshot(str(path))

    def foreign_requests(self) -> list[str]:
        """Return what was asked of other hosts; what the browser refused by the page's policy never left it."""
        found: dict[str, str] = {}
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            event = message["params"]
            if message["method"] == "Network.requestWillBeSent":
                url = event["request"]["url"]
                if not url.startswith((self.url, "data:", "blob:", "about:", "chrome:")):
                    found[event["requestId"]] = url
            elif message["method"] == "Network.loadingFailed" and event.get("blockedReason") == "csp":
                found.pop(event["requestId"], None)
        return list(found.values())


def idle(page: Browser, prefix: str = "") -> bool:
    return page.find(f"#{prefix}send").is_enabled() and not page.find(f"#{prefix}stop").is_enabled()


def bubbles(page: Browser, role: str, area: str = "#chat") -> list[str]:
    return [found.text for found in page.all(f"{area} .message.{role}")]


def check(name: str, holds: Any) -> None:
    print(f"{'ok' if holds else 'FAILED':7}{name}", flush=True)
    if not holds:
        FAILED.append(name)


FAILED: list[str] = []


def check_accessibility(page: Browser, what: str) -> None:
    """Check a page with axe-core, if the package axe-core-python is there, which brings it."""
    found = importlib.util.find_spec("axe_core_python")
    folders = [] if found is None else list(found.submodule_search_locations or ())
    source = next((file for folder in folders for file in Path(folder).glob("axe*.js")), None)
    if source is None:
        print(f"skipped {what} with axe-core: pip install axe-core-python")
        return
    page.driver.execute_script(source.read_text(encoding="utf-8"))
    result = page.driver.execute_async_script("axe.run().then(arguments[0])")
    serious = [
        f"{one['id']}: {one['help']} {[node['target'] for node in one['nodes'][:3]]}"
        for one in result["violations"]
        if one["impact"] in ("serious", "critical")
    ]
    check(
        f"axe-core {page.driver.execute_script('return axe.version')} finds nothing serious on {what}: {serious}",
        not serious,
    )


def limit_answers(page: Browser) -> None:
    """Keep answers short, so that all of this takes minutes on a CPU; the settings are open, and closed again."""
    page.type(field("most-tokens"), str(ARGUMENTS.tokens))
    page.click("#settings > button")


def open_settings(page: Browser) -> None:
    page.click("#settings > button")
    page.until(lambda: page.find(field("temperature")).is_displayed(), "the settings")


def field(name: str) -> str:
    return f"#{name} textarea, #{name} input"


def try_chat(page: Browser, pictures: Path) -> None:
    open_settings(page)
    page.type(field("temperature"), "0")
    check_accessibility(page, "the settings")
    limit_answers(page)
    page.type("#question textarea", QUESTION + Keys.ENTER)
    lengths = set()
    page.until(lambda: lengths.add(len(page.text("#chat"))) or (len(lengths) > 2 and idle(page)), "an answer", 180)
    check(f"the answer streams: {len(lengths)} lengths seen", len(lengths) > 3)
    first = bubbles(page, "bot")[-1]
    check("its length and speed are told", "tokens per second" in page.text("#status"))
    page.picture(pictures / "web-chat.png")

    page.click("#show-tokens")
    page.until(lambda: page.all("#token-view tbody tr"), "the tokens")
    check("tokens are shown", len(page.all("#token-view .pc-trained")) > 3)
    page.picture(pictures / "web-tokens.png")

    page.type("#question textarea", LONG + Keys.ENTER)
    page.until(lambda: len(bubbles(page, "bot")) == 2, "the second answer")
    page.click("#stop")
    page.until(lambda: "stopped" in page.text("#status"), "the stop", 30)
    check("an answer stops and stays", len(bubbles(page, "bot")) == 2 and idle(page))

    page.click("#chat button[aria-label='Undo'], #chat button[title='Undo']")
    page.until(lambda: len(bubbles(page, "user")) == 1, "the undo")
    box = page.find("#question textarea")
    check("undo gives the question back", box.get_attribute("value") == LONG)
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(MARKUP + Keys.ENTER)
    page.until(lambda: len(bubbles(page, "user")) == 2, "the question with tags")
    check("tags are shown as text", "<div hidden>this</div>" in bubbles(page, "user")[-1])
    page.click("#stop")
    page.until(lambda: idle(page), "the stop")

    page.click("#clear")
    page.until(lambda: not bubbles(page, "user"), "the new chat")
    page.type("#question textarea", QUESTION + Keys.ENTER)
    page.until(lambda: bubbles(page, "bot") and idle(page), "an answer", 180)
    check("greedy decoding repeats", bubbles(page, "bot")[-1] == first)
    page.click("#chat button[aria-label='Edit'], #chat button[title='Edit']", -1)
    page.until(lambda: page.find("#chat textarea"), "the editor")
    page.find("#chat textarea").send_keys(Keys.CONTROL, "a")
    page.find("#chat textarea").send_keys("Put it into boiling water for seven minutes.")
    page.click("#chat button[aria-label='Submit'], #chat button[title='Submit']")
    page.until(lambda: "seven minutes" in bubbles(page, "bot")[-1], "the edited answer")
    page.until(lambda: page.find("#branch input"), "the branches")
    page.click("#keep")
    page.until(lambda: "examples.jsonl" in page.text("#status"), "the kept example")
    page.picture(pictures / "web-edited.png")
    check_accessibility(page, "the chat")
    try_branches(page, first)


def try_branches(page: Browser, first: str) -> None:
    """Go back to the branch that was edited, and have its answer written again."""
    choose_branch(page, 0)
    page.until(lambda: bubbles(page, "bot")[-1] == first, "the former branch")
    check("a branch that was left can be chosen again", bubbles(page, "user") == [QUESTION])
    before = choose_branch(page, 0)
    page.click("#chat button[aria-label='Retry'], #chat button[title='Retry']", -1)
    page.until(lambda: not idle(page) or choose_branch(page, None) > before, "the retry")
    page.until(lambda: idle(page) and bubbles(page, "bot")[-1] == first, "the same answer", 180)
    check("retry answers on a branch of its own", choose_branch(page, None) == before + 1)


def choose_branch(page: Browser, number: int | None) -> int:
    """Choose a branch, or none, and return how many there are."""
    # The list opens when the field gets the focus, which it may still have.
    page.driver.execute_script("document.activeElement.blur()")
    page.click("#branch input")
    page.until(lambda: page.all("[role='option']"), "the list of branches")
    options = page.all("[role='option']")
    if number is None:
        page.find("#branch input").send_keys(Keys.ESCAPE)
    else:
        options[number].click()
    return len(options)


def try_comparison(page: Browser, pictures: Path) -> None:
    page.click("button[role=tab]:nth-of-type(2)")
    page.until(lambda: page.find("#compare-question textarea").is_displayed(), "the second tab")
    check("nobody can vote yet", not page.find("#vote-0").is_enabled())
    page.type("#compare-question textarea", QUESTION + Keys.ENTER)
    page.until(lambda: page.find("#vote-0").is_enabled(), "both answers", 300)
    labels = page.text("#side-left") + page.text("#side-right")
    check("names are hidden", not any(name in labels for name in ARGUMENTS.models))
    page.picture(pictures / "web-compare.png")
    page.click("#vote-3")
    page.until(lambda: "votes.jsonl" in page.text("#compare-status"), "the vote")
    labels = page.text("#side-left") + page.text("#side-right")
    check("names are shown then", sum(name in labels for name in ARGUMENTS.models) == 2)
    page.click("#keep-pair")
    page.until(lambda: "pairs.jsonl" in page.text("#compare-status"), "the kept pair")
    page.click("#tally > button")
    page.until(lambda: page.find("#tally-table tbody tr").is_displayed(), "the table of votes")
    page.picture(pictures / "web-voted.png")
    check_accessibility(page, "the comparison")


def try_phone(page: Browser, pictures: Path) -> None:
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    )
    page.driver.get(page.url)
    page.until(lambda: page.find("#question textarea"), "the page on a phone")
    open_settings(page)
    limit_answers(page)
    page.type("#question textarea", QUESTION)
    page.click("#send")
    page.until(lambda: bubbles(page, "bot") and idle(page), "an answer on a phone", 180)
    width = page.driver.execute_script("return document.documentElement.scrollWidth")
    check(f"a phone needs no sideways scrolling: {width} of 390 pixels", width <= 390)
    page.picture(pictures / "web-phone.png")
    if len(ARGUMENTS.models) > 1:
        page.click("button[role=tab]:nth-of-type(2)")
        page.picture(pictures / "web-phone-compare.png")
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def try_keyboard(page: Browser) -> None:
    page.driver.get(page.url)
    page.until(lambda: page.find("#question textarea"), "the page")
    page.until(lambda: page.driver.switch_to.active_element.tag_name == "textarea", "the focus in the question", 10)
    page.driver.switch_to.active_element.send_keys(QUESTION + Keys.ENTER)
    page.until(lambda: bubbles(page, "bot") and idle(page), "an answer", 180)
    reached = []
    page.driver.switch_to.active_element.send_keys("")
    for _ in range(60):
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
        active = page.driver.switch_to.active_element
        own = active.get_attribute("aria-label") or active.get_attribute("title") or active.text or active.tag_name
        reached.append(own)
    for name in ("Send", "Keep as training example", "Show tokens", "New chat", "Settings"):
        check(f"Tab reaches {name}", any(name in one for one in reached))
    print("       the keyboard reaches", list(dict.fromkeys(reached)))


def try_password(folder: str) -> None:
    """Start the page with a password, and try a wrong and the right one."""
    said = Path(folder, "password.txt")
    command = [sys.executable, "-m", "peftchat", "web", ARGUMENTS.models[-1], "-o", f"{folder}/chats"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PEFTCHAT_WEB_PASSWORD": PASSWORD}
    with said.open("w", encoding="utf-8") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        page = Browser(serving_at(server, said), "input[type=password]")
        check("there is no chat without the password", page.find("#question") is None)
        for password, wanted in (("wrong" + PASSWORD, False), (PASSWORD, True)):
            page.driver.get(page.url)
            page.until(lambda: page.find("input[type=password]"), "the password page")
            page.all("input:not([type=password]), textarea")[0].send_keys("visitor")
            page.type("input[type=password]", password + Keys.ENTER)
            page.click("button.primary, button.lg")
            time.sleep(3)
            if wanted:
                page.until(lambda: page.find("#question textarea"), "the chat behind the password")
            check(f"{'the right' if wanted else 'a wrong'} password", (page.find("#question") is not None) == wanted)
        foreign = page.foreign_requests()
        page.driver.quit()
        check(f"the password page asks no other host {foreign}", not foreign)
    finally:
        server.terminate()
        server.wait(120)


def serving_at(server: subprocess.Popen[bytes], said: Path) -> str:
    """Wait until the server names its address, and return it."""
    while server.poll() is None:
        for line in said.read_text(encoding="utf-8").splitlines():
            if "Serving on " in line:
                return line.split()[2]
        time.sleep(0.2)
    raise SystemExit(f"the server ended:\n{said.read_text(encoding='utf-8')}")


def main() -> None:
    pictures = ARGUMENTS.pictures
    pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "peftchat", "web", *ARGUMENTS.models, "-o", f"{folder}/chats"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        said = Path(folder, "server.txt")
        with said.open("w", encoding="utf-8") as file:
            server = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        try:
            page = Browser(serving_at(server, said))
            steps = [lambda: try_chat(page, pictures)]
            steps += [lambda: try_comparison(page, pictures)] if len(ARGUMENTS.models) > 1 else []
            steps += [lambda: try_phone(page, pictures), lambda: try_keyboard(page)]
            try:
                for step in steps:
                    step()
            finally:
                errors = [entry["message"] for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"]
                # The picture of another host that a question names is refused, and says so.
                errors = [error for error in errors if "Content Security Policy" not in error]
                foreign = page.foreign_requests()
                page.driver.quit()
            check(f"no error in the console {errors}", not errors)
            check(f"no request to another host {foreign}", not foreign)
            kept = sorted(path.name for path in Path(folder, "chats").glob("*.jsonl"))
            check(f"kept: {kept}", "examples.jsonl" in kept)
            prepared = [sys.executable, "-m", "peftchat", "data", "prepare", f"{folder}/chats/examples.jsonl"]
            result = subprocess.run([*prepared, "-o", f"{folder}/clean", "--eval-fraction", "0"], capture_output=True)
            check("data prepare reads the kept example", result.returncode == 0)
        finally:
            server.terminate()
            server.wait(120)
            print(said.read_text(encoding="utf-8"))
        try_password(folder)
    if FAILED:
        raise SystemExit(f"{len(FAILED)} checks failed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="As for `peftchat web`.")
    parser.add_argument("--pictures", type=Path, required=True, help="Folder for the pictures.")
    parser.add_argument("--tokens", type=int, default=80, help="Most tokens of an answer.  [default: 80]")
    ARGUMENTS = parser.parse_args()
    main()
