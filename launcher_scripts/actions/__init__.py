"""`action=status|logs|cancel|resume`: looking after what was launched."""

from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

from launcher_scripts.manifest import Command
from launcher_scripts.notices import Mistakes
from launcher_scripts.validate import nearest

ACTIONS = ("status", "logs", "cancel", "resume")
# The words of an action, and which of the actions they go with.
KEYS = {
    "action": ACTIONS,
    "results": ACTIONS,
    "watch": ("status", "logs"),
    "stage": ("logs",),
    "point": ("logs",),
}
TRUTH = {"true": True, "yes": True, "on": True, "1": True}
TRUTH |= {"false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True)
class Request:
    """An action, and what it is done to: a folder of results, or what a command composes."""

    action: str
    command: Command
    results: Path | None = None
    watch: bool = False
    stage: str | None = None
    point: str | None = None


def request(command: Command) -> Request | None:
    """Take the words of an action out of a command line; None for `action=launch`.

    Raises:
        Mistakes: words that are wrong, or do not go with the action.
    """
    given: dict[str, str] = {}
    rest = []
    for word in command.words:
        key, _, value = word.lstrip("+").partition("=")
        if key in KEYS:
            given[key] = value.strip("'\"")
        else:
            rest.append(word)
    problems = []
    action = given["action"]
    known = (*ACTIONS, "launch")
    if action not in known:
        near = nearest(action, known) or f"; allowed: {', '.join(known)}"
        raise Mistakes([f"action: {action} is none{near}"])
    for key in given:
        if action not in KEYS[key] and key != "action":
            problems.append(f"{key}: goes with action={' or '.join(KEYS[key])}, not {action}")
    if given.get("watch", "true").lower() not in TRUTH:
        problems.append(f"watch: {given['watch']} is neither True nor False")
    results = Path(given["results"]).expanduser().absolute() if "results" in given else None
    if results is not None and not results.is_dir():
        problems.append(f"results: there is no folder {results}")
    if results is not None and rest and action != "resume":
        problems.append(f"results: the folder says what was launched; leave out {' '.join(rest)}")
    if problems:
        raise Mistakes(problems)
    if action == "launch":
        return None
    command = replace(command, words=tuple(rest))
    watch = TRUTH[given.get("watch", "false").lower()]
    return Request(action, command, results, watch, given.get("stage"), given.get("point"))


def perform(asked: Request) -> int:
    """Do it; returns main.py's exit code."""
    return import_module(f"{__name__}.{asked.action}").run(asked)
